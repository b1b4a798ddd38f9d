"""What an export says of its tensors so that others can check them: their digest as the state has it.

A state's digest is made of one digest for each of its vectors (state/model.py). tapestry.json names those,
and the layout, whose hash the genesis signs. So whoever has the export alone puts its tensors in the layout's
order, hashes them, and joins that with the buffers' digests into the digest that a record signed.

Only numbers that were written as they are can be checked: f32, the whole model or adapters apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from tapestry.compression.shards import Layout
from tapestry.node.protocol.chain import Genesis
from tapestry.node.trainer.models.lora import saved_names
from tapestry.node.trainer.models.refusal import ModelError
from tapestry.node.trainer.models.stored import StoredWeights, weights_of

PIECE = 1 << 22  # elements: 16 MiB
FORMS = ("whole", "adapters", "merged")


class Unprovable(Exception):
    """Nothing is known to be wrong, but nothing can be compared; one line that says why and what can be."""


def described(layout: Layout, form: str, dtype: torch.dtype) -> dict[str, Any]:
    """For tapestry.json."""
    pairs = [[name, list(shape)] for name, shape in zip(layout.names, layout.shapes, strict=True)]
    return {"form": form, "dtype": str(dtype).removeprefix("torch."), "layout": pairs}


def params_digest(folder: Path, table: Mapping[str, Any], genesis: Genesis) -> str:
    """Of the exported tensors in the layout's order. Raises Unprovable; else ModelError, ValueError."""
    if table["dtype"] != "float32":
        raise Unprovable(
            "its weights were rounded: an export with --dtype f32 can be compared with the records"
        )
    if table["form"] == "merged":
        raise Unprovable(
            "its adapters were added to the base: export --adapters can be compared with the records"
        )
    layout = Layout.from_named((str(name), shape) for name, shape in table["layout"])
    if layout.schema_hash != genesis.schema:
        raise ValueError("its layout is not the run's")
    hasher = blake3()
    for tensor in _in_order(folder, layout, table["form"] == "adapters"):
        flat = tensor.reshape(-1)
        for start in range(0, flat.numel(), PIECE):
            piece = flat[start : start + PIECE].contiguous()
            hasher.update(memoryview(piece.numpy()).cast("B"))  # type: ignore[arg-type]
    return hasher.hexdigest()


def _in_order(folder: Path, layout: Layout, adapters: bool) -> Iterator[Tensor]:
    """One at a time; but where transformers stores an architecture in other pieces, all at once."""
    names: Mapping[str, str] = saved_names(layout) if adapters else {name: name for name in layout.names}
    stored = StoredWeights(weights_of(folder / "adapter_model.safetensors")) if adapters else None
    stored = stored or StoredWeights.find(folder)
    read = stored.read if set(names.values()) <= set(stored.tensors) else _converted(folder)
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        tensor = read(names[name])
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ModelError(f"{name} is not {shape} of f32")
        yield tensor


def _converted(folder: Path) -> Callable[[str], Tensor]:
    from tapestry.node.trainer.models.pretrained import kept_tensors
    from tapestry.node.trainer.models.weights import load_base

    tensors = {name: tensor.detach() for name, tensor in kept_tensors(load_base(folder, torch.float32))}
    return tensors.__getitem__


def vectors_of(names: Sequence[str], digests: Sequence[str]) -> dict[str, str]:
    """For tapestry.json."""
    return dict(zip(names, digests, strict=True))
