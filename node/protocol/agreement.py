"""How far the contributions of a round agree, as its record says it.

Each reducer sends, with every shard of the result, a few sums over that shard (compression/agreement.py makes
them). Whoever has all shards has all sums, and makes the same three figures of them:

    cosine       of a contribution to the mean, the mean over contributors
    sign         the share of elements, of all contributors, that have the sign which the mean has there
    norm_kept    the mean's norm, divided by the contributors' median norm, by weight: 1 if all are alike,
                 1/sqrt(n) if n of equal weight each go their own way. A mean of norms would be whatever one
                 member of many says: the median is within those of a majority

They are a part of the body that members vote for. A reducer that tells members different sums is as one that
sends them different means: their votes are not equal. A reducer that tells everybody the same wrong sums gets
wrong figures into the record, within their range: `lengthening` bounds what they can do to a state.

Figures are integers, in parts per million, made by +, *, /, sqrt and fsum alone: IEEE machines agree on them.

Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tapestry.node.protocol.strict import Malformed, finite, integer, sequence

PPM: Final = 1_000_000
SUM_MAX = 2.0**320  # above the squares of any f32 vector, and far from where a sum of sums would overflow
COUNT_MAX = 2**62


@dataclass(frozen=True, slots=True)
class ShardSums:
    """Of one shard; tuples are in the order of the roster's contributors. `sampled` is of a part of it."""

    squares: tuple[float, ...]  # ||x_i||^2
    mean_square: float  # ||mean||^2
    sampled_squares: tuple[float, ...]
    sampled_dots: tuple[float, ...]  # x_i . mean
    sampled_mean_square: float
    same_sign: int  # sampled elements, of all contributors, that have the mean's sign; neither is zero
    other_sign: int

    def of_so_many(self, contributors: int) -> bool:
        """Whether they can be of this number of contributors."""
        counts = (len(self.squares), len(self.sampled_squares), len(self.sampled_dots))
        return counts == (contributors,) * 3


@dataclass(frozen=True, slots=True)
class Agreement:
    """The figures of a round, in parts per million."""

    cosine_ppm: int  # -PPM to PPM
    sign_ppm: int  # 0 to PPM
    norm_kept_ppm: int  # 0 to PPM

    def shares(self) -> dict[str, float]:
        """By their names, as shares: for metrics, status and logs."""
        return {
            "cosine": self.cosine_ppm / PPM,
            "sign": self.sign_ppm / PPM,
            "norm_kept": self.norm_kept_ppm / PPM,
        }


ALIKE = Agreement(PPM, PPM, PPM)  # as one contribution agrees with itself


def agreement(shards: Sequence[ShardSums], weights: Sequence[int]) -> Agreement:
    """The figures of the whole vector: the same for any order of its shards.

    `weights` are those of the contributors, each above 0. Vectors of zeros agree in nothing.
    """
    norms = [math.sqrt(square) for square in _added([s.squares for s in shards])]
    mean_norm = math.sqrt(math.fsum(s.mean_square for s in shards))
    sampled_mean_square, sampled_squares, dots = sampled(shards)
    sampled_mean_norm = math.sqrt(sampled_mean_square)
    cosines = [
        _ratio(dot, math.sqrt(square) * sampled_mean_norm)
        for dot, square in zip(dots, sampled_squares, strict=True)
    ]
    same, other = sum(s.same_sign for s in shards), sum(s.other_sign for s in shards)
    return Agreement(
        _ppm(math.fsum(cosines) / len(cosines), -PPM),
        _ppm(_ratio(same, same + other)),
        _ppm(_ratio(mean_norm, _median(norms, weights))),
    )


def lengthening(found: Agreement, contributors: int) -> float:
    """What the mean is to be divided by, to be as long as its contributors are in the middle; 1 at most.

    Not less than 1/sqrt(n), what n unrelated vectors keep: below it contributors pull against each other, and
    the length of their mean is mostly chance. So no figure, a liar's neither, makes a step more than sqrt(n)
    times as long.
    """
    return max(found.norm_kept_ppm / PPM, 1.0 / math.sqrt(contributors))


def sampled(shards: Sequence[ShardSums]) -> tuple[float, list[float], list[float]]:
    """Of the sampled part of these shards together: |mean|^2; and of each contribution x_i, |x_i|^2 and
    x_i . mean."""
    mean_square = math.fsum(s.sampled_mean_square for s in shards)
    squares, dots = _added([s.sampled_squares for s in shards]), _added([s.sampled_dots for s in shards])
    return mean_square, squares, dots


def _median(values: Sequence[float], weights: Sequence[int]) -> float:
    """The value in the middle by weight; between two, their mean."""
    pairs = sorted(zip(values, weights, strict=True))
    total, below = sum(weights), 0
    for place, (value, weight) in enumerate(pairs):
        below += weight
        if 2 * below == total:
            return (value + pairs[place + 1][0]) / 2
        if 2 * below > total:
            return value
    return 0.0


def _added(shards: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(column) for column in zip(*shards, strict=True)]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _ppm(value: float, lowest: int = 0) -> int:
    return max(lowest, min(PPM, round(value * PPM)))


# --- what comes from outside ------------------------------------------------------------------------


def agreement_to_list(found: Agreement) -> list[int]:
    return [found.cosine_ppm, found.sign_ppm, found.norm_kept_ppm]


def agreement_from(raw: Any, what: str) -> Agreement:
    """Raises Malformed."""
    cosine, sign, norm_kept = sequence(raw, 3, what, 3)
    return Agreement(
        integer(cosine, -PPM, PPM, what), integer(sign, 0, PPM, what), integer(norm_kept, 0, PPM, what)
    )


def sums_to_list(sums: ShardSums) -> list[Any]:
    return [
        list(sums.squares),
        sums.mean_square,
        list(sums.sampled_squares),
        list(sums.sampled_dots),
        sums.sampled_mean_square,
        sums.same_sign,
        sums.other_sign,
    ]


def sums_from(raw: Any, members_max: int, what: str) -> ShardSums:
    """Raises Malformed."""
    squares, mean_square, sampled_squares, dots, sampled_mean_square, same, other = sequence(raw, 7, what, 7)
    return ShardSums(
        _sums(squares, members_max, 0.0, what),
        _sum(mean_square, 0.0, what),
        _sums(sampled_squares, members_max, 0.0, what),
        _sums(dots, members_max, -SUM_MAX, what),
        _sum(sampled_mean_square, 0.0, what),
        integer(same, 0, COUNT_MAX, what),
        integer(other, 0, COUNT_MAX, what),
    )


def _sums(raw: Any, members_max: int, low: float, what: str) -> tuple[float, ...]:
    return tuple([_sum(value, low, what) for value in sequence(raw, members_max, what, 1)])


def _sum(value: Any, low: float, what: str) -> float:
    if finite(value, what, low) > SUM_MAX:
        raise Malformed(f"{what} must be at most {SUM_MAX:g}")
    return float(value)
