"""Numbers that means are made of: the median of norms, and how much each contribution is scaled down.

Everything here is +, -, *, / and comparison of f64 and of integers, so every machine gets the same bits.

Must not import torch, nor anything of ours: the simulator of the protocol uses it as well.
"""

from __future__ import annotations

from collections.abc import Sequence

PLAIN_MAX = 2  # contributions. Of two that differ nobody can tell which is the odd one


def is_plain(weights: Sequence[int]) -> bool:
    """Whether so few weigh anything that every mean is the weighted mean."""
    return sum(weight > 0 for weight in weights) <= PLAIN_MAX


def lower_median(
    values: Sequence[float],
    weights: Sequence[int],  # >= 0, not all of them 0
) -> float:
    """The smallest of the values such that it and those below it have at least half of the weight.

    If liars have less than half of it, an honest value lies at or below the median, and one at or above.
    """
    half, before = sum(weights), 0
    for value, weight in sorted(zip(values, weights, strict=True)):
        before += 2 * weight
        if weight and before >= half:
            return value
    raise AssertionError("nobody weighs anything")


def clip_scales(
    norms: Sequence[float],  # finite, >= 0
    weights: Sequence[int],
    norm_max: float,  # times the median norm
) -> list[float]:  # in [0, 1]
    """What each contribution is multiplied by, so that none is longer than norm_max times the median."""
    if is_plain(weights):
        return [1.0] * len(norms)
    limit = norm_max * lower_median(norms, weights)
    return [1.0 if norm <= limit else limit / norm for norm in norms]
