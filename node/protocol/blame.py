"""Who is to be left out when a round gets no further although everybody lives.

Each member names whom it waits for. Most are waiting for a reducer which itself waits for a contributor, so
blame is passed on along what the accused say, until it stays with somebody who waits for nobody, or goes
round in a circle. A one-way cut between contributor A and reducer R makes the circle A -> R -> A: R cannot
reduce without A, A gets no result from R. There the one with the fewer accusers is left out: the contributor,
since everybody waits for a reducer. Unless one of the two is at odds with more members than the other is:
then it is the one. And a reducer is spared only once: one that withholds results from everybody could name
one innocent contributor after another, so who was spared in one circle is the first to go in the next.

Before that: contributors of whom most reducers wait for shards are left out together (`silent`). Else a few
of them would be at odds with every reducer, and each reducer with all of them: the reducers would go first.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence


def debts(
    waiting_on: Mapping[str, Sequence[str]], reducers: Collection[str], owing_me: Container[str]
) -> dict[str, list[str]]:
    """Contributor -> the reducers that wait for its shards, by their own word.

    A reducer that another names may owe it a mean instead, and wait for somebody itself. So a reducer counts
    only if it owes us, who average too, its own shards (`owing_me`).
    """
    waiting: dict[str, list[str]] = {}
    for reducer in sorted(reducers):
        for peer in waiting_on.get(reducer, ()):
            if peer not in reducers or peer in owing_me:
                waiting.setdefault(peer, []).append(reducer)
    return waiting


def silent(waiting: Mapping[str, Collection[str]], reducers: Collection[str], me: str) -> list[str]:
    """Contributors that most of the reducers wait for, sorted. `waiting`: as `debts` has it.

    One reducer alone is not believed, unless it is `me`: it could leave everybody out but itself. A majority
    of reducers could, and so could a majority of the electors, who average.
    """
    return [
        peer
        for peer, by in sorted(waiting.items(), key=lambda entry: entry[0])
        if 2 * len(by) > sum(r != peer for r in reducers) and (len(by) > 1 or me in by)
    ]


def culprit(waiting_on: Mapping[str, Sequence[str]], spared: Container[str] = ()) -> str | None:
    """The member to leave out, given who waits for whom; None if nobody waits.

    `spared`: who was accused in an earlier ballot of this round and not left out.
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
            return min(circle, key=lambda p: (-_at_odds(p, waiting_on), p not in spared, accusers[p], p))
        path.append(peer)
    return peer


def _at_odds(peer: str, waiting_on: Mapping[str, Sequence[str]]) -> int:
    """How many wait for `peer` while it waits for them."""
    return sum(peer in waiting_on.get(other, ()) for other in waiting_on.get(peer, ()))
