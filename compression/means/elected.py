"""`sign-elected`: at every element the members elect a sign, and the mean is of those that have it.

Contributions are clipped as in `clipped` first: without it one of them with large enough values elects every
sign and is the mean of its own. Then, as TIES-merging (Yadav et al., 2306.01708, section 4) without its
trimming, with c_i = f32(weight_i / total * scale_i):

    up      = sum of c_i * x_i over the members with c_i * x_i > 0          down: the same of those < 0
    result  = up / (sum of the shares of those above 0)       if up > -down
              down / (sum of the shares of those below 0)     if up < -down;  else 0

Members that differ do not cancel out, so the result is longer than a mean. With one or two contributions it
is `mean`.

Must not import: anything outside this package of ours; asyncio; anything that does I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tapestry.compression.blocks import thread_scratch
from tapestry.compression.means.api import Contribution, GivePiece
from tapestry.compression.means.clipped import scales_of
from tapestry.compression.means.shares import is_plain
from tapestry.compression.means.weighted import WeightedMean

SCRATCH = ("x", "part", "down", "above", "below")


@dataclass(frozen=True, slots=True)
class SignElected:
    """See the module."""

    norm_max: float

    def over(self, contributions: Sequence[Contribution], spans: Sequence[tuple[int, int]]) -> GivePiece:
        """See Mean."""
        if is_plain([one.weight for one in contributions]):
            return WeightedMean().over(contributions, spans)
        scales = scales_of(contributions, len(spans), self.norm_max)
        factors = [_f32(one.share * scale) for one, scale in zip(contributions, scales, strict=True)]
        shares = [_f32(one.share) for one in contributions]

        def give(index: int, out: Tensor) -> None:
            x, part, down, above, below = (
                thread_scratch(f"elected_{name}", len(out))
                for name in ("x", "part", "down", "above", "below")
            )
            for tensor in (out, down, above, below):
                tensor.zero_()
            for one, factor, share in zip(contributions, factors, shares, strict=True):
                one.payload.decode_piece(index, x)
                x.mul_(factor)
                out.add_(torch.clamp(x, min=0.0, out=part))
                above.add_(part.sign_().mul_(share))
                down.sub_(x.neg_().clamp_(min=0.0))
                below.add_(x.sign_().mul_(share))
            _elect(out, down, above, below)

        return give


def _elect(up: Tensor, down: Tensor, above: Tensor, below: Tensor) -> None:
    """f32 (n,) each; the result is in `up`."""
    falls, rises = up < -down, up > -down
    up.div_(above.masked_fill_(above == 0, 1.0))
    down.div_(below.masked_fill_(below == 0, 1.0))
    up.copy_(torch.where(falls, down, up)).masked_fill_(~(falls | rises), 0.0)


def _f32(value: float) -> float:
    return float(np.float32(value))
