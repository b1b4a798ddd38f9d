"""The shared base -> a Hugging Face directory that transformers loads offline; and a sample from one.

`export_model` writes config.json with all its numbers, generation_config.json, the tokenizer (the base's
files as they are, or the byte tokenizer in the `tokenizers` library's format), weights in safetensors files
of at most 5 GB, a model card, and tapestry.json with the lineage. Weights are written tensor by tensor: one
of them is in memory at a time, unless the architecture's files are cut otherwise than its modules (a mixture
of experts); then all are.

A LoRA run is written with its adapters merged into the base, or as a PEFT directory of the adapters alone.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tapestry.compression.shards import Layout
from tapestry.node.lineage.asked import ExportError, require_free
from tapestry.node.spec.training import LlamaSpec, ModelSpec, TransformersSpec
from tapestry.node.trainer.imports import meta_device
from tapestry.node.trainer.models import lora, registry
from tapestry.node.trainer.models.folder import CONFIG, INDEX, SINGLE
from tapestry.node.trainer.models.llama import config_fields
from tapestry.node.trainer.models.pretrained import (
    SHARED_FILES,
    as_stored,
    construct_seeded,
    described_config,
    kept_tensors,
    load_config,
    quiet,
    same_names,
    untrained,
)
from tapestry.node.trainer.models.stored import Source, StoredWeights, write_weights
from tapestry.node.trainer.models.weights import load_base
from tapestry.node.trainer.tokenizers.byte import BOS_ID, EOS_ID, PAD_ID, encode

# Text that contains these names would be read as the special tokens, so they are unlikely ones.
SPECIAL_TOKENS = {"<|tapestry_bos|>": BOS_ID, "<|tapestry_eos|>": EOS_ID, "<|tapestry_pad|>": PAD_ID}
ADAPTER_CONFIG, ADAPTERS = "adapter_config.json", "adapter_model.safetensors"  # as PEFT calls them
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
SAMPLE_TEMPERATURE = 0.7  # guess: livelier than the likeliest byte, still words
FILE_BYTES_MAX = 5 * 10**9  # what save_pretrained took for years; a hub stores no file over 50 GB
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}

Progress = Callable[[str, int, int], None]  # what, done, in all


@dataclass(frozen=True, slots=True)
class Form:
    """How a model is written."""

    dtype: torch.dtype = torch.float32
    adapters_apart: bool = False  # of a LoRA run
    file_bytes_max: int = FILE_BYTES_MAX


def silent(_what: str, _done: int, _total: int) -> None:
    """For who does not want to know."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What is written, and from where."""

    spec: ModelSpec
    sequence_length: int
    layout: Layout
    flat: Tensor  # f32 (n,), may be a mapped file
    base: Path | None = None  # HOME/base, for a transformers model
    form: Form = Form()


def export_model(
    out_dir: Path,
    spec: ModelSpec,
    sequence_length: int,
    layout: Layout,
    flat: Tensor,  # f32 (n,)
    *,
    meta: Mapping[str, Any],
    base: Path | None = None,
    form: Form = Form(),  # frozen
    card: str = "",
    progress: Progress = silent,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write the whole directory or nothing. `meta` (run id, epoch, head, ...) becomes tapestry.json; `finish`
    adds to the directory before it gets its name.

    Raises ExportError if `out_dir` is there already and not an empty folder, or cannot be written, or
    ModelError if the base does not hold.
    """
    what = Exported(spec, sequence_length, layout, flat, base, form)
    out_dir = out_dir.absolute()
    require_free(out_dir)
    temporary = out_dir.with_name(f".{out_dir.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        quiet()
        _write_json(temporary / "tapestry.json", meta)
        if card:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        if form.adapters_apart:
            _write_adapters(temporary, what)
        else:
            _write_model(temporary, what, progress)
        if finish is not None:
            finish(temporary)
        os.replace(temporary, out_dir)
    except OSError as error:
        raise ExportError(f"cannot write {out_dir}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def json_text(content: Mapping[str, Any]) -> bytes:
    """The only form in which an export writes JSON."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_bytes(json_text(content))


# --- a whole model ----------------------------------------------------------------------------------


def _write_model(folder: Path, what: Exported, progress: Progress) -> None:
    for name, content in json_files(what.spec, what.sequence_length, what.base, what.form).items():
        _write_json(folder / name, content)
    _copy_base_files(folder, what.base)
    write_shards(folder, sources_of(what), what.form.file_bytes_max, progress)


def sources_of(what: Exported) -> list[Source]:
    """The tensors of its weights, as they are stored. Raises ModelError, OSError."""
    if what.form.adapters_apart:
        names = lora.saved_names(what.layout)
        views = {names[name]: view for name, view in what.layout.views(what.flat).items()}
        return _sources(views, what.form.dtype)
    with meta_device():
        frame = registry.build(what.spec, what.base, what.sequence_length)
    return _adapted_sources(what, frame) if _is_lora(what.spec) else _whole_sources(what, frame)


def _is_lora(spec: ModelSpec) -> bool:
    return isinstance(spec, TransformersSpec) and spec.lora_rank > 0


def _copy_base_files(folder: Path, base: Path | None) -> None:
    """The tokenizer, the generation config and the chat template, as they are."""
    for name in SHARED_FILES:
        if base is not None and name != CONFIG and (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def _whole_sources(what: Exported, frame: nn.Module) -> list[Source]:
    """Every tensor is a view of the flat vector, but for what the config makes and nobody trains."""
    tensors: dict[str, Tensor] = dict(what.layout.views(what.flat))
    if untrained(frame):
        assert isinstance(what.spec, TransformersSpec) and what.base is not None
        built = construct_seeded(load_config(what.base), what.base, what.spec.seed)
        tensors |= {name: tensor for name, tensor in kept_tensors(built) if not tensor.requires_grad}
    return _sources(as_stored(frame, tensors), what.form.dtype)


def _adapted_sources(what: Exported, frame: nn.Module) -> list[Source]:
    """The base's tensors, each with what the adapters add to it."""
    assert isinstance(what.spec, TransformersSpec) and what.base is not None
    deltas = lora.deltas(frame, what.layout.views(what.flat))
    with meta_device():
        bare = registry.build(dataclasses.replace(what.spec, lora_rank=0), what.base, what.sequence_length)
    stored = StoredWeights.find(what.base)
    if same_names(bare, stored):
        dtype, load = what.form.dtype, functools.partial(_merged, stored, deltas)
        return [
            Source(name, tuple(tensor.shape), dtype, functools.partial(load, name))
            for name, tensor in kept_tensors(bare)
        ]
    whole = load_base(what.base, torch.float32)
    tensors = {name: tensor.detach() for name, tensor in kept_tensors(whole)}
    for name, delta in deltas.items():
        tensors[name].add_(delta())
    return _sources(as_stored(bare, tensors), what.form.dtype)


def _merged(stored: StoredWeights, deltas: Mapping[str, Callable[[], Tensor]], name: str) -> Tensor:
    weight = stored.read(name)
    return weight.float() + deltas[name]() if name in deltas else weight


def _sources(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> list[Source]:
    return [
        Source(name, tuple(tensor.shape), dtype, functools.partial(_itself, tensor))
        for name, tensor in tensors.items()
    ]


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def write_shards(folder: Path, sources: list[Source], bytes_max: int, progress: Progress) -> None:
    """One file of weights, or several with an index, in `folder`. Raises OSError."""
    groups = list(_groups(sources, bytes_max))
    total, done = sum(source.size_bytes for source in sources), 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        progress("writing bytes", done, total)

    names = [SINGLE]
    if len(groups) > 1:
        count = len(groups)
        names = [f"model-{index:05}-of-{count:05}.safetensors" for index in range(1, count + 1)]
        places = {s.name: name for name, group in zip(names, groups, strict=True) for s in group}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    for name, group in zip(names, groups, strict=True):
        write_weights(folder / name, group, wrote)


def _groups(sources: list[Source], bytes_max: int) -> Iterator[list[Source]]:
    """In order; each at most bytes_max, unless one tensor alone is more."""
    group: list[Source] = []
    size = 0
    for source in sources:
        if group and size + source.size_bytes > bytes_max:
            yield group
            group, size = [], 0
        group.append(source)
        size += source.size_bytes
    yield group


# --- adapters apart ---------------------------------------------------------------------------------


def _write_adapters(folder: Path, what: Exported) -> None:
    """A PEFT directory: adapter_config.json, which names the base, and adapter_model.safetensors."""
    if not _is_lora(what.spec):
        raise ExportError("this run trains all parameters: it has no adapters to write apart")
    for name, content in json_files(what.spec, what.sequence_length, what.base, what.form).items():
        _write_json(folder / name, content)
    write_weights(folder / ADAPTERS, sources_of(what))
    _copy_base_files(folder, what.base)


def _plain(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    return value.value if isinstance(value, enum.Enum) else value


def sample(out_dir: Path, prompt: str, n_bytes: int, seed: int) -> str:
    """What the exported model writes after the prompt: n_bytes bytes, read as UTF-8 as far as they are."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(out_dir, local_files_only=True).eval()
    window = model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)
    ids = [EOS_ID, *encode(prompt)]  # training never saw bos: documents follow one another's eos
    start = len(ids)
    with torch.no_grad():
        for _ in range(n_bytes):
            logits = model(input_ids=torch.tensor([ids[-window:]])).logits[0, -1, :BOS_ID]
            chances = torch.softmax(logits / SAMPLE_TEMPERATURE, dim=0)
            ids.append(int(torch.multinomial(chances, 1, generator=generator)))
    return bytes(ids[start:]).decode("utf-8", errors="replace")


# --- the files of JSON ------------------------------------------------------------------------------


def json_files(
    spec: ModelSpec,
    sequence_length: int,
    base: Path | None,  # of a transformers model: a folder with the base's own config.json
    form: Form,
) -> dict[str, dict[str, Any]]:
    """By name, what follows from the run alone: whoever has its spec and the base's config makes the same
    again, and `verify` does. Raises ModelError."""
    if isinstance(spec, LlamaSpec):
        return _preset_files(spec, sequence_length, _name_of(form.dtype))
    assert base is not None
    with meta_device():
        frame: Any = registry.build(spec, base, sequence_length)
    if form.adapters_apart:
        settings = frame.peft_config["default"].to_dict()
        settings |= {"base_model_name_or_path": _name_of_base(spec, base), "inference_mode": True}
        return {ADAPTER_CONFIG: {key: _plain(value) for key, value in settings.items()}}
    bare = frame.get_base_model() if _is_lora(spec) else frame
    said = {"architectures": [type(bare).__name__], "dtype": _name_of(form.dtype)}
    return {CONFIG: _with_theta({**described_config(base), **said})}


def names_of_base(spec: ModelSpec, base: Path) -> tuple[str, ...]:
    """By which adapters may name their base: the digest of its weights, and where its config says that it
    is published."""
    assert isinstance(spec, TransformersSpec)
    named = json.loads((base / CONFIG).read_bytes()).get("_name_or_path")
    published = (named,) if isinstance(named, str) and HUB_ID.fullmatch(named) else ()
    return (f"blake3:{spec.weights}", *published)


def _name_of_base(spec: ModelSpec, base: Path) -> str:
    """Where the base is published, if its config says so; else the digest of its weights, by which it is
    found. Never a place on this disk."""
    digest, *published = names_of_base(spec, base)
    return published[0] if published and not os.path.exists(published[0]) else digest


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _with_theta(config: dict[str, Any]) -> dict[str, Any]:
    """The base of the rotary angles also where readers older than transformers 5 look for it."""
    rope = config.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    return config if theta is None else {"rope_theta": theta, **config}


def _preset_files(spec: LlamaSpec, sequence_length: int, dtype: str) -> dict[str, dict[str, Any]]:
    from transformers import LlamaConfig

    specials = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    bos, eos, pad = SPECIAL_TOKENS
    fields = {**config_fields(spec, sequence_length), "use_cache": True}
    config = json.loads(LlamaConfig(**fields, architectures=["LlamaForCausalLM"]).to_json_string())
    del config["transformers_version"]  # who wrote it is no part of the model
    return {
        "config.json": _with_theta({**config, "dtype": dtype}),
        "generation_config.json": specials,
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "clean_up_tokenization_spaces": False,
            "model_max_length": sequence_length,
        },
    }


def _tokenizer() -> dict[str, Any]:
    """Byte-level BPE without a single merge: one token per byte, with the byte as its id."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id_, "content": name, **flags} for name, id_ in SPECIAL_TOKENS.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_byte_characters())},
            "merges": [],
        },
    }


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {byte: chr(byte) for byte in printable}
    stand_ins.update({byte: chr(0x100 + index) for index, byte in enumerate(others)})
    return [stand_ins[byte] for byte in range(256)]
