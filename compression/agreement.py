"""How far the members' contributions of a round agree: sums that each reducer makes of the shards it holds.

A reducer has every member's payload of a shard and the payload of their mean. Of these, `agreement_sums`
makes a few numbers for each member, which add up over shards: squared norms, dot products with the mean,
and the number of elements that have the mean's sign. `agreement` makes the whole vector's figures of them:

    cosine          of a member's contribution to the mean, the mean over members
    norm_kept       the mean's norm, divided by the members' mean norm: 1 if all are alike, 1/sqrt(n) if each
                    goes its own way
    sign_agreement  the share of the elements, of all members, that have the sign which the mean has there;
                    elements for which mean or member is zero are not counted

The numbers depend on the payloads alone, not on the machine: sums are made in a fixed order, every operation
rounded by itself to f32, of pieces scaled by a power of two; the error is below 2**-16 of the sum of the
terms' magnitudes. Over pieces and shards `math.fsum` adds, which is exact before one rounding, so the shards'
order does not matter.

Must not import: anything outside this package of ours; asyncio; anything that does I/O.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tapestry.compression.blocks import thread_scratch
from tapestry.compression.codecs import Codec, OpenPayload

ROW = 1024  # elements that are added at once: the fastest of 256 to 4096 on 2 MiB of level 2 cache


@dataclass(frozen=True, slots=True)
class AgreementSums:
    """Of one shard, or of several together; lists are in the roster's order."""

    squares: tuple[float, ...]  # ||x_i||^2 of each member
    dots: tuple[float, ...]  # x_i . mean
    mean_square: float  # ||mean||^2
    same_sign: tuple[int, ...]  # elements where neither is zero and both have one sign
    other_sign: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of the whole vector."""

    cosines: tuple[float, ...]  # of each member to the mean; 0 for a vector of zeros
    cosine: float  # their mean
    norm_kept: float  # 0 if all members are zeros
    sign_agreement: float  # 0 if nothing was counted


def agreement_sums(
    payloads: Sequence[Tensor],  # uint8 (codec.payload_size(n),) each, in roster order
    mean: Tensor,  # uint8 (codec.payload_size(n),), as reduce_shard made it
    codec: Codec,
    n: int,
    every: int = 1,  # look at one piece of so many: a sample, where time is short
) -> AgreementSums:
    """The sums of one shard, of its first piece at least. Raises RefusedPayload, as codec.open."""
    members, middle = [_Member(codec.open(payload, n)) for payload in payloads], codec.open(mean, n)
    mean_squares: list[float] = []
    for index, (start, stop) in list(enumerate(codec.pieces(n)))[::every]:
        m, unit = _unit_piece(middle, index, "agreement_mean", stop - start)
        product = thread_scratch("agreement_product", stop - start).numpy()
        mean_squares.append(_sum(np.multiply(m, m, out=product)) * unit * unit)
        for member in members:
            member.add_piece(index, m, unit, product)
    return AgreementSums(
        tuple(math.fsum(member.squares) for member in members),
        tuple(math.fsum(member.dots) for member in members),
        math.fsum(mean_squares),
        tuple(member.same for member in members),
        tuple(member.other for member in members),
    )


def agreement(shards: Sequence[AgreementSums]) -> Agreement:
    """The figures of the whole vector: the same for any order of its shards."""
    squares = [math.fsum(column) for column in zip(*(s.squares for s in shards), strict=True)]
    dots = [math.fsum(column) for column in zip(*(s.dots for s in shards), strict=True)]
    mean_norm = math.sqrt(math.fsum(s.mean_square for s in shards))
    norms = [math.sqrt(square) for square in squares]
    cosines = tuple(
        dot / (norm * mean_norm) if norm and mean_norm else 0.0 for dot, norm in zip(dots, norms, strict=True)
    )
    same = sum(sum(s.same_sign) for s in shards)
    other = sum(sum(s.other_sign) for s in shards)
    total = math.fsum(norms)
    return Agreement(
        cosines,
        math.fsum(cosines) / len(cosines),
        len(norms) * mean_norm / total if total else 0.0,
        same / (same + other) if same + other else 0.0,
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
    ) -> None:
        x, unit = _unit_piece(self._opened, index, "agreement_member", len(m))
        self.squares.append(_sum(np.multiply(x, x, out=product)) * unit * unit)
        np.multiply(x, m, out=product)
        self.same += int(np.count_nonzero(product > 0))
        self.other += int(np.count_nonzero(product < 0))
        self.dots.append(_sum(product) * unit * mean_unit)


def _unit_piece(
    opened: OpenPayload, index: int, use: str, count: int
) -> tuple[
    np.ndarray, float
]:  # f32 (count,), all |x| < 1; the power of two that they are to be multiplied by
    """Scaled, so that no product of two overflows, and none vanishes that could matter."""
    out = thread_scratch(use, count)
    opened.decode_piece(index, out)
    lowest, highest = torch.aminmax(out)
    _, exponent = math.frexp(max(-float(lowest), float(highest)))
    # In two factors: one alone could be too large for f32.
    out.mul_(2.0 ** -(exponent // 2)).mul_(2.0 ** -(exponent - exponent // 2))
    return out.numpy(), 2.0**exponent


def _sum(
    values: np.ndarray,  # f32 (count,), written over
) -> float:
    """In an order that is the same on every machine: rows onto one another, then halves."""
    count = len(values)
    if count > ROW:
        whole = count - count % ROW
        rest = math.fsum(values[whole:].tolist())
        values, count = np.add.reduce(values[:whole].reshape(-1, ROW), axis=0), ROW
        return _sum(values) + rest
    while count > 1:
        half = count // 2
        values[:half] += values[count - half : count]
        count -= half
    return float(values[0]) if count else 0.0
