"""Any causal language model of transformers, as a layout and a flat vector; and what is refused, with the
reason."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import FAMILIES, MIXTURES, STATE_SPACE, edit_json, make_base
from torch import Tensor, nn

from tapestry.node.spec.training import PRESETS, TransformersSpec
from tapestry.node.trainer.gradients import Gradients, Windows
from tapestry.node.trainer.memory import Footing
from tapestry.node.trainer.models import hub, lora, registry
from tapestry.node.trainer.models.folder import INDEX, SINGLE
from tapestry.node.trainer.models.pretrained import check_base
from tapestry.node.trainer.models.refusal import ModelError
from tapestry.node.trainer.models.stored import join_files
from tapestry.node.trainer.models.weights import weights_digest

LENGTH = 32
IDS = torch.arange(40).reshape(2, 20) * 7


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A base of each family in bf16 and three files, made once."""
    folder = tmp_path_factory.mktemp("bases")

    def base(family: str) -> Path:
        path = folder / family
        return path if path.exists() else make_base(path, family, dtype=torch.bfloat16, shards=3)

    return base


# ---- every family ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_goes_into_a_flat_vector_and_comes_out_with_equal_logits(
    bases: Callable[[str], Path], family: str
) -> None:
    folder = bases(family)
    spec = _spec(folder)
    state = registry.initial_state(spec, folder, LENGTH)
    ours = _filled(registry.build(spec, folder, LENGTH), state)
    assert torch.equal(_logits(ours), _logits(_reference(folder)))
    assert registry.layout(spec, folder, LENGTH) == registry.layout_of(ours)
    assert state.numel() == spec.parameters
    assert weights_digest(ours) == spec.weights


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_trains_and_every_gradient_lands_in_place(bases: Callable[[str], Path], family: str) -> None:
    folder = bases(family)
    spec = _spec(folder)
    model = _filled(registry.build(spec, folder, LENGTH), registry.initial_state(spec, folder, LENGTH))
    flat = torch.zeros(spec.parameters)
    views = registry.layout_of(model).views(flat)
    for name, parameter in model.named_parameters():
        parameter.grad = views[name]
    losses = []
    for _ in range(2):  # with the same numbers: dropout and a router's noise are off
        flat.zero_()
        logits = model.train()(input_ids=IDS[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append((loss.item(), flat.double().norm().item()))
    assert losses[0] == losses[1]
    assert losses[0][1] > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "mamba"])  # each stores its layers otherwise
def test_adapters_begin_as_the_base_and_merge_as_peft_merges_them(
    bases: Callable[[str], Path], family: str
) -> None:
    folder = bases(family)
    spec = _spec(folder, lora_rank=4)
    layout = registry.layout(spec, folder, LENGTH)
    state = registry.initial_state(spec, folder, LENGTH)
    model = registry.build(spec, folder, LENGTH)
    assert registry.layout_of(model) == layout and layout.n < spec.parameters / 2
    assert torch.equal(_logits(_filled(model, state)), _logits(_reference(folder, torch.bfloat16)))
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        state = torch.randn(layout.n) * 0.05
    with torch.device("meta"):
        frame = registry.build(spec, folder, LENGTH)
    merged = _reference(folder)
    for name, delta in lora.deltas(frame, layout.views(state)).items():
        merged.get_parameter(name).data += delta()
    in_f32 = _filled(lora.adapt(_reference(folder), spec), state)
    assert torch.allclose(_logits(merged), _logits(in_f32), atol=1e-3)
    assert not torch.allclose(_logits(merged), _logits(_reference(folder)), atol=1e-2)


def test_a_preset_is_the_llama_that_it_was() -> None:
    spec = PRESETS["nano"].model
    state = registry.initial_state(spec, None, LENGTH)
    assert state.numel() == registry.layout(spec, None, LENGTH).n == 48_448
    out = torch.empty(state.numel())
    assert registry.initial_state(spec, None, LENGTH, out) is out and torch.equal(out, state)


def test_a_config_alone_begins_with_random_weights_that_follow_from_the_seed(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base", "qwen3")
    (folder / SINGLE).unlink()
    facts = check_base(folder, need_weights=False)
    states = [
        registry.initial_state(
            TransformersSpec("transformers", (), "", facts.parameters, seed), folder, LENGTH
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


# ---- the digest --------------------------------------------------------------------------------------


def test_the_digest_does_not_depend_on_how_weights_are_cut_or_stored(tmp_path: Path) -> None:
    half = make_base(tmp_path / "half", "llama", dtype=torch.bfloat16)
    model = _reference(half)
    digests = {weights_digest(half), weights_digest(model)}
    model.save_pretrained(tmp_path / "whole", max_shard_size=20_000)
    assert len([*(tmp_path / "whole").glob("*.safetensors")]) > 3
    digests.add(weights_digest(tmp_path / "whole"))
    assert len(digests) == 1
    model.lm_head.weight.data[3, 3] += 1e-3
    assert weights_digest(model) not in digests


def test_f16_weights_load_as_the_same_numbers(tmp_path: Path) -> None:
    folder = make_base(tmp_path, "olmo2", dtype=torch.float16)
    spec = _spec(folder)
    assert check_base(folder).dtype == torch.float16
    model = _filled(registry.build(spec, folder, LENGTH), registry.initial_state(spec, folder, LENGTH))
    assert torch.equal(_logits(model), _logits(_reference(folder)))


def test_other_weights_than_the_run_began_with_are_refused(tmp_path: Path) -> None:
    ours, theirs = make_base(tmp_path / "a", "llama"), make_base(tmp_path / "b", "llama", seed=2)
    assert registry.holds_weights(_spec(ours), ours) and not registry.holds_weights(_spec(ours), theirs)
    for rank in (0, 4):
        with pytest.raises(ModelError, match="holds other weights"):
            registry.initial_state(_spec(ours, lora_rank=rank), theirs, LENGTH)


def test_a_base_in_several_files_becomes_one_file_of_the_same_bytes_everywhere(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, whole = bases("mixtral"), make_base(tmp_path / "whole", "mixtral", dtype=torch.bfloat16)
    heard: list[int] = []
    digest = weights_digest(folder, heard.append)
    assert sum(heard) >= 4 * check_base(folder).parameters, "what is read is told"
    for source, name in ((folder, "a"), (whole, "b")):
        join_files(source, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    (tmp_path / "a").replace(whole / SINGLE)
    assert weights_digest(whole) == digest
    assert torch.equal(_logits(_reference(whole)), _logits(_reference(folder)))


# ---- facts -------------------------------------------------------------------------------------------


def test_the_facts_say_what_a_summary_needs(bases: Callable[[str], Path]) -> None:
    folder = bases("llama")
    facts = check_base(str(folder))
    assert (facts.folder, facts.model_type, facts.architecture) == (folder, "llama", "LlamaForCausalLM")
    assert (facts.parameters, facts.dtype, facts.vocab_size) == (36_000, torch.bfloat16, 320)
    assert (facts.tokenizer_ids, facts.sequence_length_max, facts.licence) == (320, 128, "apache-2.0")
    assert facts.bytes_to_train >= 16 * 36_000 > facts.bytes_to_build >= 4 * 36_000
    assert facts.weights_bytes == 2 * 36_000


def test_a_state_space_model_has_no_longest_sequence(bases: Callable[[str], Path]) -> None:
    for family in STATE_SPACE:
        assert check_base(bases(family)).sequence_length_max is None


def test_more_rows_than_ids_are_fine(tmp_path: Path) -> None:
    facts = check_base(make_base(tmp_path, "qwen2", vocab=384))
    assert (facts.vocab_size, facts.tokenizer_ids) == (384, 320)


def test_files_of_a_peer_must_mean_what_its_run_claims(bases: Callable[[str], Path]) -> None:
    folder = bases("llama")
    spec = TransformersSpec("transformers", (), "", 36_000)
    assert sum(p.numel() for p in registry.build(spec, folder, LENGTH).parameters()) == 36_000
    with pytest.raises(ModelError, match=r"claims 1,000 parameters, its config\.json means 36,000"):
        registry.build(dataclasses.replace(spec, parameters=1_000), folder, LENGTH)
    with pytest.raises(ModelError, match="sequence_length 129 is longer than the base's 128 positions"):
        registry.build(spec, folder, 129)


def test_a_hub_id_that_is_nowhere_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="no-such/base is neither a folder here nor in the cache"):
        check_base("no-such/base")


def test_a_hub_id_in_the_cache_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bases: Callable[[str], Path]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda hub_id, **extra: asked.append(extra) or str(bases("llama")),  # type: ignore[func-returns-value]
    )
    assert check_base("some/base").parameters == 36_000
    assert "*.safetensors" in asked[0]["allow_patterns"] and not any(".py" in p for p in hub.PATTERNS)


# ---- refusals ----------------------------------------------------------------------------------------


def _edit(name: str, **fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / name, lambda table: table.update(fields))


def _config(**fields: Any) -> Callable[[Path], None]:
    return _edit("config.json", **fields)


def _pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def _cut(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-100])


def _wild_index(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))


def _lost_shard(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "model-1.safetensors")
    names = {"x": "model-2.safetensors", "y": "model-1.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def _quantized(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def _huge_header(folder: Path) -> None:
    (folder / SINGLE).write_bytes(struct.pack("<Q", 1 << 60))


def _lfs(folder: Path) -> None:
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\n")


def _no_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _deep(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 200_000)


def _large(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"a": "x" * 300_000}))


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_config(auto_map={"AutoModelForCausalLM": "x.Y"}), "asks for remote code"),
        (_config(extra={"auto_map": {"AutoConfig": "x.Y"}}), "asks for remote code"),
        (_edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["x", "y"]}), "asks for remote code"),
        (_config(attn_implementation="someone/kernels"), "chooses an implementation"),
        (_config(quantization_config={"quant_method": "gptq"}), "quantized weights"),
        (_config(model_type="nobody-knows"), "has no architecture 'nobody-knows'"),
        (_config(model_type=None), "names no model_type"),
        (_config(model_type="bert", architectures=["BertForMaskedLM"]), "is a BertForMaskedLM, not a BertLM"),
        (_config(model_type="t5"), "an encoder-decoder"),
        (_config(model_type="gemma3"), "wraps several models .text_config, vision_config."),
        (_config(model_type="vit"), "builds no causal language model of vit"),
        (_config(architectures=["LlamaForSequenceClassification"]), "not a LlamaForCausalLM"),
        (_config(num_hidden_layers=100_000), "num_hidden_layers is 100000, at most 512"),
        (_config(vocab_size=10**12), "vocab_size is 1000000000000, at most 2097152"),
        (_config(hidden_size=-1), "hidden_size is -1"),
        (_config(anything=10**40), "anything is 1"),
        (_config(num_hidden_layers=500, num_local_experts=2000), "500 layers of 2000 experts"),
        (_config(hidden_size=65_536, head_dim=64), "is stored|stores .* as|no weights for"),
        (_config(hidden_act="nonsense"), "does not make a model|does not read"),
        (_config(hidden_size="wide"), "does not read|does not make a model"),
        (_config(tie_word_embeddings=False, num_hidden_layers=3), "holds no weights for model.layers.2"),
        (_no_config, "is not JSON"),
        (_deep, "is not JSON"),
        (_large, "is larger than"),
        (_adapter, "holds an adapter, not a model"),
        (_pickled, "holds pickled weights .pytorch_model.bin."),
        (_cut, "its header says"),
        (_wild_index, "no safetensors file beside it"),
        (_lost_shard, "lacks model-2.safetensors"),
        (_quantized, "stores x as F8_E4M3"),
        (_huge_header, "is no safetensors file"),
        (_lfs, "is no safetensors file"),
        (_no_tokenizer, "holds no tokenizer.json"),
        (_edit("tokenizer_config.json", added_tokens_decoder={"400": {}}), "gives ids up to 400"),
        (lambda folder: shutil.rmtree(folder), "there is no folder"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    base_copy: Path, change: Callable[[Path], None], line: str
) -> None:
    change(base_copy)
    with pytest.raises(ModelError, match=line) as refused:
        check_base(base_copy)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gives ids up to 319, the embedding has 300 rows"):
        check_base(make_base(tmp_path, "llama", vocab=300))


def test_a_model_that_does_not_fit_is_refused_before_it_is_built(base_copy: Path) -> None:
    (base_copy / SINGLE).unlink()
    _config(hidden_size=16_384, num_hidden_layers=126, num_attention_heads=128, intermediate_size=53_248)(
        base_copy
    )
    with pytest.raises(ModelError, match=r"parameters: \d+\.\d GiB to train, 2\.0 GiB are free") as refused:
        check_base(base_copy, need_weights=False, memory_bytes=2 << 30)
    assert "--lora" in refused.value.hint


def test_statistics_of_a_members_own_data_are_refused(
    base_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    build = LlamaForCausalLM.__init__

    def with_batch_norm(self: Any, config: Any) -> None:
        build(self, config)
        self.norm = nn.BatchNorm1d(4)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_batch_norm)
    with pytest.raises(ModelError, match="norm keeps running statistics"):
        check_base(base_copy)


def test_numbers_that_no_joiner_could_rebuild_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    build, value = LlamaForCausalLM.__init__, 1.0

    def with_buffer(self: Any, config: Any) -> None:
        build(self, config)
        self.register_buffer("bias", torch.full((4,), value))

    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_buffer)
    folder = make_base(tmp_path / "base", "llama")
    spec = _spec(folder)  # what the config makes is what is stored: it is rebuilt
    built = registry.build(spec, folder, LENGTH)
    assert torch.equal(built.get_buffer("bias"), torch.ones(4)) and registry.layout_of(built).n == 36_000
    value = 2.0
    with pytest.raises(ModelError, match="keeps numbers in bias"):
        check_base(folder)


@pytest.fixture
def base_copy(tmp_path: Path, _llama: Path) -> Path:
    return Path(shutil.copytree(_llama, tmp_path / "copy"))


@pytest.fixture(scope="module")
def _llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("llama"), "llama")


# ---- helpers -----------------------------------------------------------------------------------------


def _spec(folder: Path, **fields: Any) -> TransformersSpec:
    return TransformersSpec(
        "transformers", (), weights_digest(folder), check_base(folder).parameters, **fields
    )


def _reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def _filled(model: nn.Module, state: Tensor) -> nn.Module:
    for name, view in registry.layout_of(model).views(state).items():
        model.get_parameter(name).data.copy_(view)
    return model


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_trains_with_its_load_balancing_loss_as_transformers_adds_it(
    tmp_path: Path, family: str
) -> None:
    folder = make_base(tmp_path, family, router_aux_loss_coef=1.0)
    spec = _spec(folder)
    state = registry.initial_state(spec, folder, LENGTH)
    grads = []
    for ours in (True, False):
        model = _filled(registry.build(spec, folder, LENGTH), state).train()
        if ours:
            batch = Windows(IDS.numpy())
            told, _ = Gradients(model, torch.device("cpu"), Footing(len(IDS), False)).add(batch)
        else:
            targets = IDS[:, 1:].contiguous()
            out = model(
                input_ids=IDS[:, :-1], labels=targets, shift_labels=targets, output_router_logits=True
            )
            out.loss.backward()
            assert out.aux_loss > 0
            # What people and validation see is the cross entropy alone.
            assert told == pytest.approx(
                (out.loss - model.config.router_aux_loss_coef * out.aux_loss).item(), rel=1e-5
            )
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-7)
