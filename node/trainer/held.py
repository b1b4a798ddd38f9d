"""What a process holds of the trained parameters: all of them, or, as one of several, its share of each.

A holding is made of pieces, each a run of elements of the run's flat vector: f32 values, and their gradient
in place. Alone it is one piece, the vector itself. In a group (`group`) FSDP2 (`fully_shard`) has cut each
parameter by its first dimension, and what a rank keeps of one lies together in the flat vector too: one piece
for each parameter. Everything that the inner loop does to parameters, it does to pieces.

To encode the contribution is the one thing that cuts the vector otherwise, by the codec's shards. For that a
span of it is put together from all ranks' pieces: a sum in which every element has one term that is not zero,
so it has the same bits wherever it comes from.

Knows of no epoch and no optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tapestry.compression.shards import Layout
from tapestry.node.trainer.encoder import Write
from tapestry.node.trainer.group import Group
from tapestry.node.trainer.optimizers.parts import Part, flat_parts, kinds_of, make_part


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements from `start` on of the flat vector."""

    start: int
    values: Tensor  # f32 (m,)
    gradient: Tensor  # f32 (m,)

    @property
    def stop(self) -> int:
        """The first element after it."""
        return self.start + self.values.numel()


class Held:
    """A process's pieces, and what is done to all of them. Make one with `all_of` or `share_of`."""

    def __init__(self, pieces: Sequence[Piece], parts: Sequence[Part], group: Group | None) -> None:
        self.pieces = pieces
        self._group = group
        self.parts = parts

    @property
    def _values(self) -> list[Tensor]:
        return [piece.values for piece in self.pieces]

    def take(
        self,
        base: Tensor,  # f32 (n,), CPU
    ) -> None:
        """Be the base."""
        for piece in self.pieces:
            piece.values.copy_(base[piece.start : piece.stop])

    def copy(self, into: list[Tensor] | None = None) -> list[Tensor]:
        """The values as they are."""
        if into is None:
            return [values.clone() for values in self._values]
        for kept, values in zip(into, self._values, strict=True):
            kept.copy_(values)
        return into

    def put_back(self, kept: list[Tensor]) -> None:
        """Be what `copy` gave."""
        for values, one in zip(self._values, kept, strict=True):
            values.copy_(one)

    def move(
        self,
        left: list[Tensor],  # of `copy`
        base: Tensor,  # f32 (n,), CPU
    ) -> None:
        """By as much as it is from there to the base."""
        for piece, one in zip(self.pieces, left, strict=True):
            piece.values.sub_(one).add_(base[piece.start : piece.stop].to(one.device))

    def forget_gradient(self) -> None:
        """Zeros."""
        for piece in self.pieces:
            piece.gradient.zero_()

    def clip_gradient(self, norm_max: float) -> None:
        """To an L2 norm of at most that, over all ranks: as torch's clip_grad_norm_ does."""
        if self._group is None:
            piece = self.pieces[0]
            parameter = nn.Parameter(piece.values)
            parameter.grad = piece.gradient
            nn.utils.clip_grad_norm_([parameter], norm_max)
            return
        squares = sum(float(torch.linalg.vector_norm(piece.gradient)) ** 2 for piece in self.pieces)
        factor = norm_max / (math.sqrt(self._group.sum(squares)) + 1e-6)
        if factor < 1.0:
            for piece in self.pieces:
                piece.gradient.mul_(factor)

    def pseudo_gradient(
        self,
        base: Tensor,  # f32 (n,), CPU
    ) -> Write:
        """Base minus values."""

        def write(piece: Piece, start: int, stop: int, out: Tensor) -> None:
            local = piece.values[start - piece.start : stop - piece.start]
            torch.sub(base[start:stop].to(out.device), local.to(out.device), out=out)

        return self._writer(write)

    def mean_gradient(self, batches: int) -> Write:
        """Gradient over batches."""
        # By a tensor: torch on CUDA multiplies by the reciprocal of a number.
        count = torch.full((1,), float(batches))

        def write(piece: Piece, start: int, stop: int, out: Tensor) -> None:
            gradient = piece.gradient[start - piece.start : stop - piece.start]
            torch.div(gradient.to(out.device), count.to(out.device), out=out)

        return self._writer(write)

    def _writer(self, write: Any) -> Write:
        if self._group is None:
            return lambda start, stop, out: write(self.pieces[0], start, stop, out)
        group = self._group

        def put_together(start: int, stop: int, out: Tensor) -> None:
            out.zero_()
            for piece in self.pieces:
                low, high = max(start, piece.start), min(stop, piece.stop)
                if low < high:
                    write(piece, low, high, out[low - start : high - start])
            group.add_up(out)

        return put_together


def all_of(model: nn.Module, layout: Layout, device: torch.device) -> Held:
    """Point every trained parameter and its gradient into two flat vectors; backward then adds in place."""
    flat, gradient = torch.zeros(layout.n, device=device), torch.zeros(layout.n, device=device)
    parameters = dict(model.named_parameters())
    for name, shape, offset in zip(layout.names, layout.shapes, layout.offsets, strict=True):
        place = slice(offset, offset + math.prod(shape))
        parameters[name].data = flat[place].view(shape)
        parameters[name].grad = gradient[place].view(shape)
    model.to(device)
    parts = flat_parts(kinds_of(model), layout, flat, gradient)
    return Held([Piece(0, flat, gradient)], parts, None)


def share_of(model: nn.Module, layout: Layout, device: torch.device, group: Group) -> Held:
    """This rank's share, after FSDP2 has cut the model: layer by layer, and what is left as one."""
    from torch.distributed.tensor import DTensor

    kinds = kinds_of(model)
    model.to(device)
    _shard(model, group)
    parameters: dict[str, Any] = dict(model.named_parameters())
    pieces, parts = [], []
    for name, shape, offset in zip(layout.names, layout.shapes, layout.offsets, strict=True):
        parameter = parameters[name]
        local = parameter.to_local().detach()
        slope = torch.zeros_like(local)
        parameter.grad = DTensor.from_local(
            slope,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        # As torch.chunk cuts: each rank but the last ones has the rows' number over the size, rounded up.
        rows = min(-(-shape[0] // group.size) * group.rank, shape[0])
        start = offset + rows * math.prod(shape[1:])
        pieces.append(Piece(start, local.view(-1), slope.view(-1)))
        if local.numel():
            parts.append(make_part(name, kinds[name], local, slope))
    return Held(pieces, parts, group)


def _shard(model: nn.Module, group: Group) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = group.mesh()
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                if any(True for _ in layer.parameters()) and _has_forward(layer):
                    fully_shard(layer, mesh=mesh)
            break  # the decoder's layers; lists further in are theirs
    fully_shard(model, mesh=mesh)


def _has_forward(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList)
