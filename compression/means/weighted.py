"""`mean`: the weighted mean.

    acc = +0
    for each member, in roster order:
        acc = f32(acc + f32(f32(weight / total) * decode(payload)))

One member can take it anywhere: nothing bounds what a contribution does.

Must not import: anything outside this package of ours; asyncio; anything that does I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tapestry.compression.means.api import Contribution, GivePiece


@dataclass(frozen=True, slots=True)
class WeightedMean:
    """See the module."""

    def over(self, contributions: Sequence[Contribution], spans: Sequence[tuple[int, int]]) -> GivePiece:
        """See Mean."""
        return add_up(contributions, [1.0] * len(contributions))


def add_up(
    contributions: Sequence[Contribution],
    scales: Sequence[float],  # of each: share * scale is what it is multiplied by
) -> GivePiece:
    """The sum of the scaled contributions, in roster order."""
    factors = [one.share * scale for one, scale in zip(contributions, scales, strict=True)]

    def give(index: int, out: Tensor) -> None:
        out.zero_()
        for one, factor in zip(contributions, factors, strict=True):
            one.payload.accumulate_piece(index, factor, out)

    return give
