"""Whose contribution is unlike all others: of each contributor, its cosine to the mean of all others.

A record has no figure of one member. Whoever has a round's result whole has every reducer's sums
(agreement.py), and can say it for itself, for people: nothing is decided by it. As at the gate (gate.py), a
reducer has one voice about each contributor, however many shards it averaged, and none about itself. The
higher median of the voices counts: what fewer than half of the others say makes nobody unlike them. Of whom
only one reducer could speak nothing is said.

Standard library only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from tapestry.node.protocol.agreement import ShardSums, sampled
from tapestry.node.protocol.exchange import Exchange

VOICES_MIN = 2
LONG = 1.5  # times the median norm: more of nobody is in the mean, by the default rule (compression/means)


def likeness_in(exchange: Exchange, result: str) -> tuple[tuple[str, float], ...]:
    """Contributors, and the cosine of what each gave to the mean of all others; () if we lack this result."""
    if not exchange.complete or exchange.result_digest() != result:
        return ()
    members = exchange.contributors()
    weights = [m.weight for m in members]
    said = {peer: cosines(sums, weights) for peer, sums in exchange.sums_by_reducer().items()}
    found = []
    for index, member in enumerate(members):
        voices = [each[index] for reducer, each in said.items() if reducer != member.peer]
        if len(voices) >= VOICES_MIN:
            found.append((member.peer, statistics.median_high(voices)))
    return tuple(found)


def cosines(shards: Sequence[ShardSums], weights: Sequence[int]) -> list[float]:
    """Of each contribution to the mean of all others, over these shards; 0 for zeros.

    With m the mean, x_i a contribution, and p_i the part that it has in m: m - p_i x_i is the others'. The
    part is its share of the weight, or less if it is LONG. Under a rule other than `clipped` with its default
    bound that is not exact, and who is far from the others is far all the same.
    """
    total = sum(weights)
    mean_square, squares, dots = sampled(shards)
    norms = [math.sqrt(square) for square in squares]
    limit = LONG * statistics.median_low(norms)
    found = []
    for weight, square, dot, norm in zip(weights, squares, dots, norms, strict=True):
        part = weight / total * (min(1.0, limit / norm) if norm else 1.0)
        others_square = mean_square - 2.0 * part * dot + part * part * square
        length = norm * math.sqrt(max(others_square, 0.0))
        found.append(max(-1.0, min(1.0, (dot - part * square) / length)) if length else 0.0)
    return found
