"""Named tensors <-> one flat f32 vector <-> shards; and the schema hash that members must agree on.

A layout is a list of names and shapes. Its order is the order of the flat vector, without gaps. The hash
is blake3 over one canonical text, so two members whose models differ in a name, a shape or the order never
average with one another.

Must not import: anything of ours but refusals and the block size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

from tapestry.compression.blocks import BLOCK, check_vector
from tapestry.compression.refusals import RefusedLayout


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each named tensor lies in the flat vector. Make one with `from_named`."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]  # of each tensor's first element
    n: int  # elements in all
    schema_hash: str  # 64 hex digits

    @classmethod
    def from_named(cls, named: Iterable[tuple[str, Iterable[int]]]) -> Layout:
        """A layout in the order given. Raises RefusedLayout: name (twice), shape (negative)."""
        pairs = [(name, tuple(int(size) for size in shape)) for name, shape in named]
        names = tuple(name for name, _ in pairs)
        shapes = tuple(shape for _, shape in pairs)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise RefusedLayout("name", f"{twice!r} is there twice")
        for name, shape in pairs:
            if any(size < 0 for size in shape):
                raise RefusedLayout("shape", f"{name!r} has the shape {shape}")
        offsets, n = [], 0
        for shape in shapes:
            offsets.append(n)
            n += math.prod(shape)
        return cls(names, shapes, tuple(offsets), n, _schema_hash(pairs))

    def flatten(
        self,
        named: Mapping[str, Tensor],
        out: Tensor | None = None,  # f32 (n,)
    ) -> Tensor:  # f32 (n,)
        """Copy the tensors, from whatever device, into one vector; `out` is untouched by a refusal.

        Raises RefusedLayout: name (missing or unexpected), shape, dtype (other than f32).
        """
        self._check_named(named)
        flat = torch.empty(self.n) if out is None else out
        for name, view in self.views(flat).items():
            view.copy_(named[name].detach())
        return flat

    def views(
        self,
        flat: Tensor,  # f32 (n,)
    ) -> dict[str, Tensor]:
        """The named tensors as views of the flat vector: nothing is copied.

        Raises RefusedLayout("length"), or RefusedVector for a wrong dtype, shape, device or stride.
        """
        check_vector(flat)
        if flat.numel() != self.n:
            raise RefusedLayout("length", f"the layout has {self.n} elements, the vector {flat.numel()}")
        return {
            name: flat[offset : offset + math.prod(shape)].view(shape)
            for name, shape, offset in zip(self.names, self.shapes, self.offsets, strict=True)
        }

    def _check_named(self, named: Mapping[str, Tensor]) -> None:
        for name in self.names:
            if name not in named:
                raise RefusedLayout("name", f"{name!r} is missing")
        if len(named) > len(self.names):
            unexpected = next(name for name in named if name not in self.names)
            raise RefusedLayout("name", f"{unexpected!r} is not of this layout")
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tuple(named[name].shape) != shape:
                raise RefusedLayout("shape", f"{name!r} is {tuple(named[name].shape)}, not {shape}")
            if named[name].dtype != torch.float32:
                raise RefusedLayout("dtype", f"{name!r} is {named[name].dtype}, not f32")


@dataclass(frozen=True, slots=True)
class Shard:
    """Elements start <= i < stop of the flat vector."""

    index: int
    start: int
    stop: int

    @property
    def n(self) -> int:
        """Elements in this shard."""
        return self.stop - self.start


def shard_bounds(n: int, shard_elements: int) -> tuple[Shard, ...]:
    """Cut n elements into shards of shard_elements, the last one shorter; none if n is 0.

    Shards begin at block boundaries, so that a shard's encoding is the same as in the whole vector.
    Raises RefusedLayout("shard") unless shard_elements is a positive multiple of 256 and n >= 0.
    """
    if shard_elements <= 0 or shard_elements % BLOCK:
        raise RefusedLayout("shard", f"shard_elements is a multiple of {BLOCK}, not {shard_elements}")
    if n < 0:
        raise RefusedLayout("shard", f"{n} elements cannot be cut")
    starts = range(0, n, shard_elements)
    return tuple(Shard(index, start, min(start + shard_elements, n)) for index, start in enumerate(starts))


def _schema_hash(pairs: list[tuple[str, tuple[int, ...]]]) -> str:
    text = json.dumps(["tapestry layout 1", "f32", pairs], ensure_ascii=True, separators=(",", ":"))
    return blake3(text.encode("ascii")).hexdigest()
