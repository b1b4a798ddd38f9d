"""`aligned`: `clipped`, without the members that pull against what all others together want.

    x_i     = weight_i / total * scale_i * decode(payload_i)      clipped, as in `clipped`
    counts  = x_i . (sum of the others' x) >= 0
    result  = sum over those that count of weight_i / (their weight) * scale_i * decode(payload_i)

A member that flips its signs is as long as the others, so no norm gives it away; its dot product does, as
long as members agree on anything: in a shard of 262,144 elements chance alone makes cosines of 0.002. If
nobody counted, all would.

What it costs: a member whose text asks for the opposite of the rest's is not heard in that shard and round.
Liars that know the others' contributions can stay just on the right side, and then move the result by no more
than their share of the clipped norm.

With one or two contributions it is `mean`. One piece of every member is held, decoded.

Must not import: anything outside this package of ours; asyncio; anything that does I/O.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tapestry.compression.blocks import ordered_sum, unit_of
from tapestry.compression.means.api import Contribution, GivePiece
from tapestry.compression.means.clipped import norm
from tapestry.compression.means.shares import clip_scales, is_plain
from tapestry.compression.means.weighted import add_up

UNIT_MIN = 2.0**-100  # of contributions that are all smaller the dot products vanish, and all count


@dataclass(frozen=True, slots=True)
class Aligned:
    """See the module."""

    norm_max: float

    def over(self, contributions: Sequence[Contribution], spans: Sequence[tuple[int, int]]) -> GivePiece:
        """See Mean."""
        weights = [one.weight for one in contributions]
        if is_plain(weights):
            return add_up(contributions, [1.0] * len(contributions))
        norms = [norm(one, len(spans)) for one in contributions]
        scales = clip_scales(norms, weights, self.norm_max)
        lengths = [one.share * s * n for one, s, n in zip(contributions, scales, norms, strict=True)]
        unit = max(unit_of(max(lengths))[0], UNIT_MIN)
        factors = [one.share * s / unit for one, s in zip(contributions, scales, strict=True)]
        with_others = dots_with_others(contributions, factors, spans)
        kept = [i for i, dot in enumerate(with_others) if dot >= 0 and weights[i]]
        kept = kept or list(range(len(weights)))
        total = sum(weights[i] for i in kept)
        heard = [replace(contributions[i], share=weights[i] / total) for i in kept]
        return add_up(heard, [scales[i] for i in kept])


def dots_with_others(
    contributions: Sequence[Contribution],
    factors: Sequence[float],
    spans: Sequence[tuple[int, int]],
) -> list[float]:
    """Of each scaled contribution with the sum of all other scaled ones; to 2**-16 of their lengths."""
    longest = max((stop - start for start, stop in spans), default=0)
    room, sums = torch.empty(len(contributions), longest), torch.empty(2, longest)
    parts: list[list[float]] = [[] for _ in contributions]
    for index, (start, stop) in enumerate(spans):
        rows, (total, product) = room[:, : stop - start], sums[:, : stop - start]
        total.zero_()
        for row, one, factor in zip(rows, contributions, factors, strict=True):
            row.zero_()
            one.payload.accumulate_piece(index, factor, row)
            total.add_(row)
        for part, row in zip(parts, rows, strict=True):
            part.append(_dot_with_rest(row, total, product))
    return [math.fsum(part) for part in parts]


def _dot_with_rest(
    row: Tensor,  # f32 (count,)
    total: Tensor,  # f32 (count,)
    scratch: Tensor,  # f32 (count,), written
) -> float:
    torch.sub(total, row, out=scratch)
    scratch.mul_(row)
    return ordered_sum(scratch.numpy())
