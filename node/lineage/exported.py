"""What an export says of its tensors so that others can check them: their digest as the state has it.

A state's digest is made of one digest for each of its vectors (state/model.py). tapestry.json names those,
and the layout, whose hash the genesis signs. So whoever has the export alone puts its tensors in the layout's
order, hashes them, and joins that with the buffers' digests into the digest that a record signed.

Only numbers that were written as they are can be checked so: f32, the whole model or adapters apart
(provable.py; against.py compares others with a state that was signed).

What is compared must be what a loader takes. So an export has no other file than those that `export`
writes, its config makes a model of the signed layout, and its weights hold that model's tensors and nothing
else: transformers would load another set of weights, an adapter or an untied output layer that lies beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from tapestry.compression.shards import Layout
from tapestry.node.lineage.huggingface import ADAPTER_CONFIG, ADAPTERS
from tapestry.node.lineage.manifest import LINEAGE
from tapestry.node.lineage.manifest import NAME as MANIFEST
from tapestry.node.lineage.provable import FLOAT32
from tapestry.node.protocol.record import Genesis
from tapestry.node.spec.training import ModelSpec, TransformersSpec
from tapestry.node.trainer.models.folder import CONFIG, INDEX, SINGLE, weight_files
from tapestry.node.trainer.models.lora import saved_names
from tapestry.node.trainer.models.pretrained import (
    SHARED_FILES,
    as_stored,
    construct_seeded,
    frame_of,
    kept_tensors,
    load_config,
    untrained,
)
from tapestry.node.trainer.models.refusal import ModelError
from tapestry.node.trainer.models.registry import layout_of
from tapestry.node.trainer.models.stored import StoredWeights, weights_of
from tapestry.node.trainer.models.weights import load_base

PIECE = 1 << 22  # elements: 16 MiB
FORMS = ("whole", "adapters", "merged")  # the last two are of a LoRA run


def described(layout: Layout, form: str, dtype: torch.dtype) -> dict[str, Any]:
    """For tapestry.json."""
    pairs = [[name, list(shape)] for name, shape in zip(layout.names, layout.shapes, strict=True)]
    return {"form": form, "dtype": str(dtype).removeprefix("torch."), "layout": pairs}


def weights_at(folder: Path) -> str:
    """The file to be named where the weights do not read: the index, if they are cut."""
    return INDEX if (folder / INDEX).exists() else SINGLE


def foreign_files(folder: Path, form: str) -> list[str]:
    """Files that no export of this form ("derivative" is one too) has: a loader might take them for what is
    checked here. Of weights there is one set: `model.safetensors`, or what the index names.

    Raises ModelError.
    """
    if form == "adapters":
        known = {*SHARED_FILES, ADAPTER_CONFIG, ADAPTERS} - {CONFIG}
    else:
        known = {*SHARED_FILES, *weight_files(folder)}
    known |= {"README.md", "tapestry.json", MANIFEST}
    if form == "derivative":  # its tokenizer's files are those of any base
        known |= {path.name for path in folder.iterdir() if path.suffix in (".json", ".jinja")}
        known -= {INDEX, ADAPTER_CONFIG} - set(weight_files(folder))
    else:
        known |= {f"{LINEAGE}/{name}" for name in ("genesis.json", "chain.jsonl", CONFIG)}
    there = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    return [name for path in there if (name := path.relative_to(folder).as_posix()) not in known]


def foreign_tensors(folder: Path) -> list[str]:
    """Stored tensors that the model of this config does not have: some loader might take them all the same.
    Raises ModelError."""
    known = as_stored(frame := frame_of(folder).module, dict(kept_tensors(frame)))
    return sorted(set(StoredWeights.find(folder).tensors) - set(known))


def params_digest(folder: Path, table: Mapping[str, Any], genesis: Genesis, model: ModelSpec) -> str | None:
    """Of the exported tensors in the layout's order, after there is found to be nothing else that a loader
    would take; None where they are not the state's own numbers. Raises ModelError, ValueError."""
    layout = Layout.from_named((str(name), shape) for name, shape in table["layout"])
    if layout.schema_hash != genesis.schema:
        raise ValueError("its layout is not the run's")
    lora = isinstance(model, TransformersSpec) and model.lora_rank > 0
    if table["form"] not in (FORMS[1:] if lora else FORMS[:1]):
        raise ValueError(f"the run's models are not written as {str(table['form'])[:20]!r}")
    if table["form"] == "adapters":
        tensors = _adapters(folder, layout)
    else:
        _require_nothing_else(folder, layout if table["form"] == "whole" else None)
        tensors = _in_order(folder, layout, model)
    if table["dtype"] != FLOAT32 or table["form"] == "merged":
        return None
    hasher = blake3()
    for tensor in tensors:
        flat = tensor.reshape(-1)
        for start in range(0, flat.numel(), PIECE):
            piece = flat[start : start + PIECE].contiguous()
            hasher.update(memoryview(piece.numpy()).cast("B"))  # type: ignore[arg-type]
    return hasher.hexdigest()


def _require_nothing_else(folder: Path, layout: Layout | None) -> None:
    """Raises ModelError unless its config makes the run's model, and its files hold that alone."""
    if layout is not None and layout_of(frame_of(folder).module).schema_hash != layout.schema_hash:
        raise ModelError(f"its {CONFIG} makes a model of other tensors than the run's")
    if extra := foreign_tensors(folder):
        raise ModelError(
            f"it holds {extra[0][:120]}, which the run's model has not ({len(extra)} such tensors)"
        )


def _adapters(folder: Path, layout: Layout) -> Iterator[Tensor]:
    stored, names = StoredWeights(weights_of(folder / ADAPTERS)), saved_names(layout)
    if extra := sorted(set(stored.tensors) - set(names.values())):
        raise ModelError(f"{ADAPTERS} holds {extra[0][:120]}, which is no adapter of the run")
    return (_f32(stored.read(names[name]), name, shape) for name, shape in _named(layout))


def _in_order(folder: Path, layout: Layout, model: ModelSpec) -> Iterator[Tensor]:
    """One at a time; but where transformers stores an architecture in other pieces, all at once."""
    stored, frame = StoredWeights.find(folder), frame_of(folder).module
    kept = untrained(frame)
    read = stored.read if {*layout.names, *kept} <= set(stored.tensors) else _converted(folder)
    if kept and isinstance(model, TransformersSpec):
        built = dict(kept_tensors(construct_seeded(load_config(folder), folder, model.seed)))
        for name in kept:
            if not torch.equal(read(name), built[name].float()):
                raise ModelError(f"{name} is not what its {CONFIG} makes, and nobody trains it")
    for name, shape in _named(layout):
        yield _f32(read(name), name, shape)


def _named(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    return zip(layout.names, layout.shapes, strict=True)


def _f32(tensor: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
        raise ModelError(f"{name} is not {shape} of f32")
    return tensor


def _converted(folder: Path) -> Callable[[str], Tensor]:
    tensors = {name: tensor.detach() for name, tensor in kept_tensors(load_base(folder, torch.float32))}
    return tensors.__getitem__
