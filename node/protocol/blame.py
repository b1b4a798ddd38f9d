"""Who is to be left out when a round gets no further although everybody lives.

Each member names whom it waits for. Most are waiting for a reducer which itself waits for a contributor, so
blame is passed on along what the accused say, until it stays with somebody who waits for nobody, or goes
round in a circle. A one-way cut between contributor A and reducer R makes the circle A -> R -> A: R cannot
reduce without A, A gets no result from R. There the one with the fewer accusers is left out: the contributor,
since everybody waits for a reducer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def culprit(waiting_on: Mapping[str, Sequence[str]]) -> str | None:
    """The member to leave out, given who waits for whom; None if nobody waits.

    Deterministic: ties go to the smaller peer id.
    """
    accusers: dict[str, int] = {}
    for accused in waiting_on.values():
        for peer in accused:
            accusers[peer] = accusers.get(peer, 0) + 1
    if not accusers:
        return None
    peer = min(accusers, key=lambda p: (-accusers[p], p))
    path = [peer]
    while waiting_on.get(peer):
        peer = min(waiting_on[peer], key=lambda p: (-accusers[p], p))
        if peer in path:
            circle = path[path.index(peer) :]
            return min(circle, key=lambda p: (accusers[p], p))
        path.append(peer)
    return peer
