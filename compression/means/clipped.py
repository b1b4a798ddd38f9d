"""`clipped`: the weighted mean of contributions of which none is longer than norm_max times the median norm.

    norm_i  = the L2 norm of member i's payload of this shard, as the reducer computes it
    scale_i = min(1, norm_max * median / norm_i)
    result  = sum of weight_i / total * scale_i * decode(payload_i)

A member of share w moves the result by at most w * norm_max * median, whatever it sends: scaling a
contribution up, or values of 1e30, gain nothing beyond norm_max. Directions are not judged: see `trimmed`.
The median is weighted as the mean is. With one or two contributions, and where nobody is clipped, the bits
are those of `mean`. After "clip to the median norm" of SparseLoCo (2508.15706).

A shard in which more than half of the weight is zero has the median 0, and so does not move.

Must not import: anything outside this package of ours; asyncio; anything that does I/O.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tapestry.compression.means.api import Contribution, GivePiece
from tapestry.compression.means.shares import clip_scales, is_plain
from tapestry.compression.means.weighted import add_up


@dataclass(frozen=True, slots=True)
class Clipped:
    """See the module."""

    norm_max: float

    def over(self, contributions: Sequence[Contribution], spans: Sequence[tuple[int, int]]) -> GivePiece:
        """See Mean."""
        return add_up(contributions, scales_of(contributions, len(spans), self.norm_max))


def scales_of(contributions: Sequence[Contribution], pieces: int, norm_max: float) -> list[float]:
    """`clip_scales` by the norms of what is there."""
    weights = [one.weight for one in contributions]
    if is_plain(weights):
        return [1.0] * len(contributions)
    return clip_scales([norm(one, pieces) for one in contributions], weights, norm_max)


def norm(contribution: Contribution, pieces: int) -> float:
    """Of the shard, L2."""
    square = contribution.payload.square_of_piece
    return math.sqrt(math.fsum(square(index) for index in range(pieces)))
