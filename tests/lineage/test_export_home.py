"""`tapestry export` over whole homes: presets, bases and adapters, read by transformers; and only ever
read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from bases import edit_json, make_base
from numpy_llama import logits
from torch import Tensor, nn

from tapestry.dht.identity import Identity
from tapestry.node.disk.checkpoints import Checkpoints
from tapestry.node.disk.store import Store, result_digest
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage import huggingface
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.lineage.export import export_home
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.record import Body, Member, Record, found, head_of
from tapestry.node.spec.run import new_spec
from tapestry.node.spec.training import PRESETS, DataSpec, ModelSpec, TrainingSpec, TransformersSpec
from tapestry.node.state.model import Arithmetic, ModelState
from tapestry.node.trainer.models import lora, registry
from tapestry.node.trainer.models.folder import INDEX, SINGLE
from tapestry.node.trainer.models.pretrained import check_base
from tapestry.node.trainer.models.weights import load_base, weights_digest

LENGTH = 32
IDS = torch.arange(40).reshape(2, 20) * 6
SHARED = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Made:
    """A home with one epoch behind it, and the state that it is at."""

    home: Home
    spec: ModelSpec
    params: Tensor  # f32 (n,)
    peer: str

    @property
    def base(self) -> Path | None:
        return self.home.path / "base" if isinstance(self.spec, TransformersSpec) else None

    def model(self) -> nn.Module:
        """What should be exported; adapters on an f32 base."""
        if isinstance(self.spec, TransformersSpec) and self.spec.lora_rank:
            assert self.base is not None
            model = lora.adapt(load_base(self.base, torch.float32), self.spec)
        else:
            model = registry.build(self.spec, self.base, LENGTH)
        for name, view in registry.layout_of(model).views(self.params).items():
            model.get_parameter(name).data.copy_(view)
        return model


def test_a_preset_is_exported_with_all_its_numbers(preset: Made, tmp_path: Path) -> None:
    export_home(preset.home, tmp_path / "out", None)
    assert torch.equal(_logits(_loaded(tmp_path / "out")), _logits(preset.model()))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    numbers = ("rms_norm_eps", "rope_parameters", "rope_theta", "hidden_act", "head_dim", "attention_bias")
    assert [name for name in numbers if name not in config] == []
    assert config["dtype"] == "float32" and config["rope_theta"] == 10_000.0


def test_a_preset_is_read_by_what_is_not_transformers(preset: Made, tmp_path: Path) -> None:
    export_home(preset.home, tmp_path / "out", None)
    _same_logits(tmp_path / "out", preset.model())


@pytest.mark.parametrize(("family", "rank"), [("llama", 0), ("llama", 4), ("qwen2", 0), ("qwen3", 0)])
def test_a_base_is_read_by_what_is_not_transformers(tmp_path: Path, family: str, rank: int) -> None:
    made = _home(tmp_path / "home", _base_spec(tmp_path / "home", family, lora_rank=rank))
    export_home(made.home, tmp_path / "out", None)
    _same_logits(tmp_path / "out", made.model())


def test_the_reader_that_is_not_transformers_sees_a_wrong_number(preset: Made, tmp_path: Path) -> None:
    export_home(preset.home, tmp_path / "out", None)
    for changed in ({"rope_theta": 500_000.0}, {"rms_norm_eps": 0.1}):
        edit_json(tmp_path / "out" / "config.json", lambda table, changed=changed: table.update(changed))
        with pytest.raises(AssertionError):
            _same_logits(tmp_path / "out", preset.model())


def _same_logits(folder: Path, model: nn.Module) -> None:
    """Of numpy in f64, from the files alone, and of the model in f32."""
    wanted, found = _logits(model).double().numpy(), logits(folder, IDS.numpy())
    assert abs(found - wanted).max() < 1e-5 * abs(wanted).max()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt-neox", "mixtral", "mamba"])
def test_a_base_is_exported_with_its_tokenizer_and_reloads_with_equal_logits(
    tmp_path: Path, family: str
) -> None:
    made = _home(tmp_path / "home", _base_spec(tmp_path / "home", family))
    export_home(made.home, tmp_path / "out", None)
    assert torch.equal(_logits(_loaded(tmp_path / "out")), _logits(made.model()))
    for name in SHARED[1:]:
        assert made.base is not None
        assert (tmp_path / "out" / name).read_bytes() == (made.base / name).read_bytes()
    assert weights_digest(tmp_path / "out") == weights_digest(made.model())


def test_a_base_keeps_what_its_config_said_and_gets_what_it_left_out(tmp_path: Path) -> None:
    spec = _base_spec(tmp_path / "home", "gpt2")
    path = tmp_path / "home" / "base" / "config.json"
    edit_json(path, lambda table: (table.update(their_note="kept", attn_pdrop=0.3), table.pop("resid_pdrop")))
    export_home(_home(tmp_path / "home", spec).home, tmp_path / "out", None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["their_note"], config["attn_pdrop"], config["resid_pdrop"]) == ("kept", 0.3, 0.1)
    assert config["use_cache"] is True


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_adapters_are_merged_into_the_base(tmp_path: Path, family: str) -> None:
    made = _home(tmp_path / "home", _base_spec(tmp_path / "home", family, lora_rank=4))
    export_home(made.home, tmp_path / "out", None)
    merged = _logits(_loaded(tmp_path / "out"))
    assert torch.allclose(merged, _logits(made.model()), atol=1e-4)
    assert made.base is not None and not torch.allclose(merged, _logits(_loaded(made.base)), atol=1e-3)


def test_adapters_apart_are_a_peft_directory_that_names_its_base(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    made = _home(tmp_path / "home", _base_spec(tmp_path / "home", "llama", lora_rank=4))
    export_home(made.home, tmp_path / "out", None, adapters=True)
    path = tmp_path / "out" / "adapter_config.json"
    table = json.loads(path.read_bytes())
    assert isinstance(made.spec, TransformersSpec)
    assert table["base_model_name_or_path"] == f"blake3:{made.spec.weights}"
    assert str(tmp_path) not in path.read_text()
    path.write_text(json.dumps(table | {"base_model_name_or_path": str(made.home.base)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers for a name that it deprecates
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(_logits(loaded), _logits(made.model()))
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_without_adapters_has_none_to_export(preset: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has no adapters to write apart"):
        export_home(preset.home, tmp_path / "out", None, adapters=True)
    assert [*tmp_path.iterdir()] == []


def test_bf16_weights_are_the_nearest_ones_and_half_as_large(preset: Made, tmp_path: Path) -> None:
    export_home(preset.home, tmp_path / "f32", None)
    export_home(preset.home, tmp_path / "bf16", None, dtype="bf16")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("f32", "bf16")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = _loaded(tmp_path / "bf16")
    for name, value in preset.model().named_parameters():
        assert torch.equal(loaded.get_parameter(name), value.bfloat16().float())
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_large_models_become_several_files_with_an_index(preset: Made, tmp_path: Path) -> None:
    form = huggingface.Form(file_bytes_max=60_000)
    layout = registry.layout(preset.spec, None, LENGTH)
    huggingface.export_model(tmp_path / "out", preset.spec, LENGTH, layout, preset.params, meta={}, form=form)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
    assert all((tmp_path / "out" / name).stat().st_size < 70_000 for name in files)
    places = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert sorted(set(places.values())) == files
    assert torch.equal(_logits(_loaded(tmp_path / "out")), _logits(preset.model()))


def test_the_card_says_run_members_shares_and_licence(tmp_path: Path) -> None:
    spec = _base_spec(tmp_path / "home", "llama")
    (tmp_path / "home" / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    made = _home(tmp_path / "home", spec)
    export_home(made.home, tmp_path / "out", None)
    card = (tmp_path / "out" / "README.md").read_text()
    lineage = json.loads((tmp_path / "out" / "tapestry.json").read_text())
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: transformers\n")
    assert f"| `{made.peer}` | 75.0 % | 300 |" in card and "| 25.0 % | 100 |" in card
    for word in ("# a run, epoch 1", lineage["head"], lineage["run_id"], lineage["state_digest"]):
        assert word in card
    assert isinstance(spec, TransformersSpec) and spec.weights in card
    assert "## Data" not in card
    assert lineage["members"][0] == {"peer": made.peer, "share": 0.75, "tokens": 300}


# ---- it only reads -----------------------------------------------------------------------------------


def test_a_read_only_home_on_a_full_disk_without_its_key_is_exported(
    preset: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset.home.identity_key.unlink()
    before = _listing(preset.home.path)
    _close(preset.home.path)
    _fill(monkeypatch, preset.home.path)
    export_home(preset.home, tmp_path / "out", None)
    assert _listing(preset.home.path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_home_on_another_disk_is_exported_without_a_copy(
    preset: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_disk(*_: object) -> NoReturn:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", other_disk)
    before = _listing(preset.home.path)
    export_home(preset.home, tmp_path / "out", None)
    assert torch.equal(_logits(_loaded(tmp_path / "out")), _logits(preset.model()))
    assert _listing(preset.home.path) == before


def test_no_room_beside_out_is_one_line_and_leaves_nothing(
    preset: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(UserError, match=r"no room for the state in .*: a file needs"):
        export_home(preset.home, tmp_path / "out", None)
    assert [*tmp_path.iterdir()] == []


def test_a_file_that_a_live_node_prunes_meanwhile_is_met_by_another_look(
    preset: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, calls = Checkpoints.load, []

    def pruned_once(self: Checkpoints) -> None:
        load(self)
        calls.append(1)
        if len(calls) == 1:
            self._files.clear()

    monkeypatch.setattr(Checkpoints, "load", pruned_once)
    export_home(preset.home, tmp_path / "out", None)
    assert len(calls) == 2 and (tmp_path / "out" / "model.safetensors").exists()


def test_an_epoch_that_is_not_there_is_refused(preset: Made, tmp_path: Path) -> None:
    export_home(preset.home, tmp_path / "zero", 0)
    assert json.loads((tmp_path / "zero" / "tapestry.json").read_text())["epoch"] == 0
    with pytest.raises(UserError, match="there is no epoch 5 yet: the run is at 1"):
        export_home(preset.home, tmp_path / "five", 5)


def test_progress_tells_of_every_byte(preset: Made, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    export_home(preset.home, tmp_path / "out", None, progress=lambda *step: told.append(step))
    assert told[0][0] == "restoring" and told[-1] == ("writing bytes", 4 * 48_448, 4 * 48_448)


# ---- homes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _preset(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return _home(tmp_path_factory.mktemp("preset"), PRESETS["nano"].model)


@pytest.fixture
def preset(_preset: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("copy") / "home"
    shutil.copytree(_preset.home.path, folder)
    return replace(_preset, home=Home(folder))


def _base_spec(home: Path, family: str, **fields: Any) -> TransformersSpec:
    folder = make_base(home / "base", family, dtype=torch.bfloat16)
    files = tuple(f"{name} {(folder / name).stat().st_size} {'0' * 64}" for name in (*SHARED, SINGLE))
    parameters = check_base(folder).parameters
    return TransformersSpec("transformers", files, weights_digest(folder), parameters, **fields)


def _home(folder: Path, model: ModelSpec) -> Made:
    """A run of one epoch that two members contributed to, written as a node writes it."""
    identity = Identity.load_or_create(folder / "identity.key")
    home, crypto = Home(folder), NodeCrypto(identity)
    text = new_spec("a run", TrainingSpec(model, DataSpec(sequence_length=LENGTH), PRESETS["nano"].train))
    base = folder / "base" if isinstance(model, TransformersSpec) else None
    layout = registry.layout(model, base, LENGTH)
    params = registry.initial_state(model, base, LENGTH)
    state = ModelState(params, layout.schema_hash, Arithmetic.of(text, layout.n), 0, "")
    digest = state.digest()
    spec_text = text.canonical().decode()
    genesis = found(spec_text, identity.peer_id, digest, layout.schema_hash, layout.n, "0" * 32, crypto)
    state.head = genesis.run_id
    store, chain = Store(home, crypto), Chain(genesis)
    store.load()
    store.write_genesis(genesis)
    checkpoints = Checkpoints(home.checkpoints, genesis.run_id, 3)
    checkpoints.load()
    checkpoints.save(state, digest)
    rng = torch.Generator().manual_seed(3)
    codec, shards = state.arithmetic.codec, state.arithmetic.shards
    payloads = [codec.encode(torch.randn(shard.n, generator=rng) * 0.05) for shard in shards]
    members = tuple(
        sorted(
            [Member(identity.peer_id, 300, "c0" * 32, "", 300), Member("zzz", 100, "c1" * 32, "", 100)],
            key=_peer,
        )
    )
    body = Body(genesis.run_id, 1, chain.head, digest, members, result_digest(payloads))
    record = Record(body, head_of(body, crypto), 0, ())
    store.write_update(1, record.head, payloads)
    store.append_record(record)
    state.apply(payloads, record)
    return Made(home, model, state.params, identity.peer_id)


def _peer(member: Member) -> str:
    return member.peer


def _loaded(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    return model


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits


def _listing(folder: Path) -> list[tuple[str, int, bytes]]:
    return [
        (str(path), path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    ]


def _close(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(stat.S_IRUSR | (stat.S_IXUSR if path.is_dir() else 0))


def _fill(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Whatever opens a file below `folder` for writing meets a full disk; the superuser meets modes
    otherwise."""
    open_file: Callable[..., int] = os.open

    def opened(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        below = isinstance(path, str | os.PathLike) and str(path).startswith(str(folder))
        if below and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open_file(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", opened)
