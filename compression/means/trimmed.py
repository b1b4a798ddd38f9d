"""`trimmed`: at every element, the weighted mean of the members in the middle.

    An element's values are sorted, equal ones by their members' places. One of them counts if at least `trim`
    of the total weight lies below it in that order, and as much above. If none does (few members, or one with
    much of the weight), the lower weighted median counts alone.
    result = sum over those that count, in sorted order, of f32(weight / their weight) * value

With equal weights and n members the ceil(trim * n) lowest and as many of the highest do not count: 1 of 3, 1
of 4, 2 of 7 and 3 of 10 with trim = 0.25. As long as liars have no more of the weight than what is cut, every
element of the result lies between values that honest members sent (Yin et al., 1803.01498). What members
learn from text that nobody else has is at the ends too, and is lost with the rest.

With one or two contributions it is `mean`. One piece of every member is held, decoded: at most twice the
bytes that their payloads of the run's default shard have anyway.

Sorting is by Batcher's network, whose every step is one elementwise minimum and maximum of two members:
five times as fast as torch.sort and numpy's sort over so few.

Must not import: anything outside this package of ours; asyncio; anything that does I/O.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tapestry.compression.means.api import Contribution, GivePiece
from tapestry.compression.means.shares import is_plain
from tapestry.compression.means.weighted import WeightedMean

COLUMNS = 8192  # elements sorted at once. Guess: ten members of them are 320 KiB
EXACT = 2**53  # integers up to here are exact in f64


@dataclass(frozen=True, slots=True)
class Trimmed:
    """See the module."""

    trim: float  # from 0 to 0.5

    def over(self, contributions: Sequence[Contribution], spans: Sequence[tuple[int, int]]) -> GivePiece:
        """See Mean."""
        voices = [one for one in contributions if one.weight]
        weights = _exact([one.weight for one in voices])
        if is_plain(weights):
            return WeightedMean().over(contributions, spans)
        longest = max((stop - start for start, stop in spans), default=0)
        room = torch.empty(len(voices), longest)

        def give(index: int, out: Tensor) -> None:
            for row, one in zip(room, voices, strict=True):
                one.payload.decode_piece(index, row[: len(out)])
            for at in range(0, len(out), COLUMNS):
                part = slice(at, min(at + COLUMNS, len(out)))
                _middle([row[part] for row in room], weights, self.trim, out[part])

        return give


def _exact(weights: list[int]) -> list[int]:
    """As they are; where f64 could not count them, in units of 2**-40 of their total."""
    total = sum(weights)
    return weights if total < EXACT else [max(1, (weight << 40) // total) for weight in weights]


def _middle(
    rows: list[Tensor],  # f32 (count,) of each member, written over
    weights: Sequence[int],  # > 0
    trim: float,
    out: Tensor,  # f32 (count,), written
) -> None:
    out.zero_()
    if len(set(weights)) == 1:
        middle = _sorted(rows)[_ranks(len(rows), trim)]
        for row in middle:
            out.add_(row.mul_(1.0 / len(middle)))
        return
    values, by_rank = _sorted_with_weights(rows, weights)
    counted = _that_count(by_rank, trim * sum(weights), sum(weights))
    total = torch.zeros_like(counted[0])
    for weight in counted:
        total.add_(weight)
    for row, weight in zip(values, counted, strict=True):
        out.add_(row.mul_((weight / total).float()))


def _ranks(count: int, trim: float) -> slice:
    """Which of so many equal members count, once sorted."""
    below = math.ceil(trim * count)
    return slice(below, count - below) if 2 * below < count else slice((count - 1) // 2, (count + 1) // 2)


def _that_count(
    by_rank: Sequence[Tensor],  # f64 (count,): weights, from the lowest value's to the highest's
    cut: float,
    total: int,
) -> list[Tensor]:  # f64 (count,): the same, and 0 where it does not count
    before = torch.zeros_like(by_rank[0])
    counted, median = [], []
    for weight in by_rank:
        upto = before + weight
        counted.append(torch.where((before >= cut) & (total - upto >= cut), weight, 0.0))
        median.append(torch.where((2 * before < total) & (2 * upto >= total), weight, 0.0))
        before = upto
    nobody = torch.stack(counted).amax(dim=0) == 0
    return [torch.where(nobody, m, c) for m, c in zip(median, counted, strict=True)]


def _sorted_with_weights(
    rows: Sequence[Tensor],  # f32 (count,)
    weights: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:  # f32 (count,), f64 (count,) of each rank
    """Sorted as integers: the value's bits, in the order of the values, and then the member's number."""
    bits = (len(rows) - 1).bit_length()
    keys = []
    for member, row in enumerate(rows):
        key = _flipped(row.view(torch.int32)).long()
        keys.append(key.bitwise_left_shift_(bits).bitwise_or_(member))
    table = torch.tensor(weights, dtype=torch.float64)
    values, by_rank = [], []
    for key in _sorted(keys):
        by_rank.append(table[key & ((1 << bits) - 1)])
        values.append(_flipped(key.bitwise_right_shift_(bits).int()).view(torch.float32))
    return values, by_rank


def _flipped(
    bits: Tensor,  # int32 (count,)
) -> Tensor:  # int32 (count,)
    """Of a float's bits, an integer that is in the order of the floats; and back."""
    return bits ^ ((bits >> 31) & 0x7FFF_FFFF)


def _sorted(rows: Sequence[Tensor]) -> list[Tensor]:
    """The rows' values in order at every element; the rows are written over."""
    ordered, spare = list(rows), torch.empty_like(rows[0])
    for low, high in network(len(ordered)):
        torch.minimum(ordered[low], ordered[high], out=spare)
        torch.maximum(ordered[low], ordered[high], out=ordered[high])
        ordered[low], spare = spare, ordered[low]
    return ordered


@functools.lru_cache(maxsize=64)
def network(count: int) -> tuple[tuple[int, int], ...]:
    """Pairs to be put in order, one after another, so that all are: Batcher's merge exchange.

    Knuth, The Art of Computer Programming 3, section 5.2.2, algorithm M.
    """
    pairs = []
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top if count > 1 else 0
    while p:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            q, r, d = q >> 1, p, q - p
        p >>= 1
    return tuple(pairs)
