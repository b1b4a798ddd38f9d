"""How far the members' contributions of a round agree: sums that each reducer makes of the shards it holds.

A reducer has every member's payload of a shard and the payload of their mean. Of these, `agreement_sums`
makes a few numbers for each member, which add up over shards: squared norms, dot products with the mean,
and the number of elements that have the mean's sign. node/protocol/agreement.py makes the whole vector's
figures of them: what everybody in the round computes alike, and the record holds.

Norms are of all elements, because the outer step may divide by what is made of them; dot products and signs
are for people, and looked at in one piece of EVERY (a shard's first piece at least).

The numbers depend on the payloads alone, not on the machine: sums are made in a fixed order, every operation
rounded by itself to f32, of pieces that are scaled by a power of two where their squares could overflow or
vanish; the error is below 2**-16 of the sum of the terms' magnitudes. Over pieces `math.fsum` adds, which is
exact before one rounding.

Must not import: anything outside this package of ours; asyncio; anything that does I/O.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tapestry.compression.blocks import ordered_sum, thread_scratch, unit_of
from tapestry.compression.codecs import Codec, OpenPayload

EVERY = 4  # pieces, of which one is looked at for dots and signs: all of them take half as long again
PLAIN_EXPONENTS = range(-30, 51)  # of a piece's largest magnitude: f32 has room for its squares, unscaled


@dataclass(frozen=True, slots=True)
class AgreementSums:
    """Of one shard; tuples are in the roster's order. `sampled` is of one piece in EVERY."""

    squares: tuple[float, ...]  # ||x_i||^2 of each member
    mean_square: float  # ||mean||^2
    sampled_squares: tuple[float, ...]
    sampled_dots: tuple[float, ...]  # x_i . mean
    sampled_mean_square: float
    same_sign: int  # sampled elements, of all members, that have the mean's sign; neither is zero
    other_sign: int


def agreement_sums(
    payloads: Sequence[Tensor],  # uint8 (codec.payload_size(n),) each, in roster order
    mean: Tensor,  # uint8 (codec.payload_size(n),), as reduce_shard made it
    codec: Codec,
    n: int,
    every: int = EVERY,
) -> AgreementSums:
    """The sums of one shard. Raises RefusedPayload, as codec.open."""
    members, middle = [_Member(codec.open(payload, n)) for payload in payloads], codec.open(mean, n)
    mean_squares: list[float] = []
    for index, (start, stop) in enumerate(codec.pieces(n)):
        m, unit = _unit_piece(middle, index, "agreement_mean", stop - start)
        product = thread_scratch("agreement_product", stop - start).numpy()
        mean_squares.append(ordered_sum(np.multiply(m, m, out=product)) * unit * unit)
        for member in members:
            member.add_piece(index, m, unit, product, sampled=index % every == 0)
    return AgreementSums(
        squares=tuple(math.fsum(member.squares) for member in members),
        mean_square=math.fsum(mean_squares),
        sampled_squares=tuple(math.fsum(member.squares[::every]) for member in members),
        sampled_dots=tuple(math.fsum(member.dots) for member in members),
        sampled_mean_square=math.fsum(mean_squares[::every]),
        same_sign=sum(member.same for member in members),
        other_sign=sum(member.other for member in members),
    )


class _Member:
    """One member's payload of the shard, and what its pieces have come to so far."""

    def __init__(self, opened: OpenPayload) -> None:
        self._opened = opened
        self.squares: list[float] = []
        self.dots: list[float] = []
        self.same = 0
        self.other = 0

    def add_piece(
        self,
        index: int,
        m: np.ndarray,  # f32 (count,), the mean in units of `mean_unit`
        mean_unit: float,
        product: np.ndarray,  # f32 (count,), free to use
        sampled: bool,
    ) -> None:
        x, unit = _unit_piece(self._opened, index, "agreement_member", len(m))
        self.squares.append(ordered_sum(np.multiply(x, x, out=product)) * unit * unit)
        if not sampled:
            return
        np.multiply(x, m, out=product)
        self.same += int(np.count_nonzero(product > 0))
        self.other += int(np.count_nonzero(product < 0))
        self.dots.append(ordered_sum(product) * unit * mean_unit)


def _unit_piece(
    opened: OpenPayload, index: int, use: str, count: int
) -> tuple[np.ndarray, float]:  # f32 (count,); the power of two that they are to be multiplied by
    """Scaled where need be, so that no product of two overflows and none vanishes that could matter."""
    out = thread_scratch(use, count)
    opened.decode_piece(index, out)
    lowest, highest = torch.aminmax(out)
    largest = max(-float(lowest), float(highest))
    if math.frexp(largest)[1] in PLAIN_EXPONENTS:
        return out.numpy(), 1.0
    unit, units = unit_of(largest)
    out.mul_(units[0]).mul_(units[1])
    return out.numpy(), unit
