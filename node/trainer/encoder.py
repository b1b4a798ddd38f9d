"""A contribution, encoded as it is made: from the parameters to the payloads of all shards in shared memory.

On the CPU it is one pass over pieces that fit the cache: make a piece of the vector, add up its norm, encode
it. The vector is nowhere whole, and finite is what the codec takes. On a CUDA device, if the codec works
there, some shards are made and encoded at a time, and their payloads alone cross the bus. For another codec
the pieces are brought to the CPU.

The bytes are those of `codec.encode` of each shard of the vector, wherever they are made. Of several
processes that hold a share of every parameter each (`group`), all make a span of shards together, and the one
whose turn it is encodes it.

With `residual` (error feedback, 1-bit SGD 2014; off by default: at 8 bits no paper found it to matter), what
encoding rounded away is added to the next contribution, and only if this one was committed: else the whole
of it is lost and must not be counted half. It lies in this process alone: with a worker that dies it is lost,
and the next one begins without.

Nothing here knows of processes, pipes or clocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from tapestry.compression.blocks import DEVICE_PIECE, PIECE, thread_scratch
from tapestry.compression.payloads import PayloadLayout
from tapestry.compression.shards import Shard
from tapestry.node.trainer.group import Group

# (start, stop, out): write elements start <= i < stop of the vector to `out`, f32 (stop - start,), which lies
# on the CPU or where the vector is made.
Write = Callable[[int, int, Tensor], None]


class Encoder:
    """A run's codec and shards for one trainer on `device`; keeps the residual."""

    def __init__(
        self, layout: PayloadLayout, device: torch.device, residual: bool, group: Group | None = None
    ) -> None:
        self._layout = layout
        self._device = device if device.type in layout.codec.devices else torch.device("cpu")
        self._group = group
        self._in_pieces = self._device.type == "cpu" and group is None
        self._keeps = residual
        self._residual: Tensor | None = None  # f32 (n,), CPU, of what counted; None: zeros
        self._pending: tuple[int, Tensor] | None = None  # generation, f32 (n,), CPU; of the newest encoded
        self._wide = torch.empty(PIECE, dtype=torch.float64, device="cpu")

    def encode(
        self,
        write: Write,
        out: Tensor,  # uint8 (layout.size,), CPU, written
        generation: int,  # its name, for `settle`
    ) -> float:
        """L2 norm of the vector, without the residual: a sum in f64 over pieces, rounded as they come.

        Raises RefusedVector("not_finite"); what is in `out` is then unspecified.
        """
        rest = torch.empty(self._layout.n, dtype=torch.float32, device="cpu") if self._keeps else None
        squares: list[float] = []
        payloads = self._layout.views(out)
        if self._in_pieces:
            for shard, payload in zip(self._layout.shards, payloads, strict=True):
                self._encode_pieces(write, shard, payload, rest, squares)
                self._take_sent(shard, payload, rest)
        else:
            for turn, (first, last) in enumerate(alike(self._layout)):
                mine = self._is_mine(turn)
                self._encode_together(write, first, last, out, rest, squares, mine)
                for index in range(first, last) if mine else ():
                    self._take_sent(self._layout.shards[index], payloads[index], rest)
        self._pending = None if rest is None else (generation, rest)
        total = math.fsum(squares)
        return math.sqrt(total if self._group is None else self._group.sum(total))

    def _take_sent(
        self,
        shard: Shard,
        payload: Tensor,  # uint8 (payload_size(shard.n),), of what lies in `rest`
        rest: Tensor | None,  # f32 (n,): the shard's part is changed
    ) -> None:
        """Leave what rounding took. Other processes' shards are not looked at: they may be half written, and
        the pages of theirs in `rest` take no memory as long as nobody touches them."""
        if rest is not None:
            self._layout.codec.accumulate(payload, shard.n, -1.0, rest[shard.start : shard.stop])

    def _is_mine(self, turn: int) -> bool:
        """Whether this process encodes these shards; all help to put them together."""
        return self._group is None or turn % self._group.size == self._group.rank

    def settle(self, counted: int) -> None:
        """A round is over, in which the contribution of this generation counted; 0: none did.

        The residual of what counted is kept. If another has been encoded since, it is gone; what it had been
        added to has counted, so it must not stay either.
        """
        pending, self._pending = self._pending, None
        if counted:
            self._residual = pending[1] if pending is not None and pending[0] == counted else None

    def _encode_pieces(
        self,
        write: Write,
        shard: Shard,
        payload: Tensor,  # uint8 (payload_size(shard.n),), written
        rest: Tensor | None,  # f32 (n,): the shard's part is written
        squares: list[float],  # grows
    ) -> None:
        def make(_: int, start: int, stop: int) -> Tensor:
            start, stop = shard.start + start, shard.start + stop
            x = thread_scratch("vector", stop - start) if rest is None else rest[start:stop]
            write(start, stop, x)
            wide = self._wide[: stop - start].copy_(x)
            squares.append(float(torch.dot(wide, wide)))
            if rest is not None and self._residual is not None:
                x.add_(self._residual[start:stop])
            return x

        self._layout.codec.encode_pieces(make, shard.n, payload)

    def _encode_together(
        self,
        write: Write,
        first: int,  # shards first <= i < last, as of `alike`
        last: int,
        out: Tensor,  # uint8 (layout.size,), CPU: their part is written
        rest: Tensor | None,  # f32 (n,): their part is written
        squares: list[float],  # grows
        mine: bool,
    ) -> None:
        """All of it where the vector is made."""
        layout = self._layout
        place = slice(layout.shards[first].start, layout.shards[last - 1].stop)
        x = torch.empty(place.stop - place.start, dtype=torch.float32, device=self._device)
        write(place.start, place.stop, x)
        if not mine:
            return
        squares.append(float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2)
        if rest is not None:
            if self._residual is not None:
                x.add_(self._residual[place].to(self._device))
            rest[place].copy_(x)
        layout.codec.encode_rows(x, last - first, out[layout.offsets[first] : layout.offsets[last]])


def alike(layout: PayloadLayout) -> list[tuple[int, int]]:
    """First and last + 1 of shards that a GPU encodes at a time: of one size, and so of whole blocks if there
    are several; together a piece of its memory at most.
    """
    spans, first = [], 0
    for n, shards in groupby(layout.shards, key=lambda shard: shard.n):
        end = first + sum(1 for _ in shards)
        count = max(1, DEVICE_PIECE // n)
        spans += [(start, min(start + count, end)) for start in range(first, end, count)]
        first = end
    return spans
