"""Who may average where not everybody hears everybody: a firewall between two members, a link cut one way.

Members exchange shards with reducers only. So two that do not hear each other can both contribute, as long as
neither is a reducer; and where nobody but one is heard by all, as in a star, that one averages everything. It
has to take in every contribution then, so there is an end to that: where reducers would be fewer than one in
REDUCED_PER_REDUCER_MAX, whoever is at odds with the most stays out of this round. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Guess: rounds so many times longer than they need be are better than contributions that never count.
REDUCED_PER_REDUCER_MAX = 8


def seat(ready: Mapping[str, Sequence[str]], lots: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Of those ready, who may be in, and who of these may reduce: both in the order of `ready`.

    `ready`: each peer with those that it does not hear; `lots`: of two at odds with as many, the one with the
    greater lot stays out.
    """
    seated = list(ready)
    while True:
        at_odds = dict.fromkeys(seated, 0)
        for peer in seated:
            for other in ready[peer]:
                if other in at_odds and other != peer:
                    at_odds[peer] += 1
                    at_odds[other] += 1
        reducers = [peer for peer, count in at_odds.items() if not count]
        if len(reducers) * REDUCED_PER_REDUCER_MAX >= len(seated):
            return seated, reducers
        seated.remove(max(seated, key=lambda p: (at_odds[p], lots[p])))
