"""Who may average where not everybody hears everybody: a firewall between two members, a link cut one way.

Members exchange shards with reducers only. So two that do not hear each other can both contribute, as long as
neither is a reducer; and where nobody but one is heard by all, as in a star, that one averages everything. It
has to take in every contribution then, so there is an end to that: where each reducer would have more than
LOAD_MAX times its even share to do, whoever is at odds with the most stays out of this round. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set

LOAD_MAX = 8  # Guess: rounds so many times longer than they need be are better than data that never counts

AtOdds = dict[str, set[str]]  # each peer with those that it does not hear, or that do not hear it


def at_odds(unheard: Mapping[str, Iterable[str]]) -> AtOdds:
    """`unheard`: each peer with those that it says it does not hear. Who is no key of it does not count."""
    odds: AtOdds = {peer: set() for peer in unheard}
    for peer, named in unheard.items():
        for other in named:
            if other != peer and other in odds:
                odds[peer].add(other)
                odds[other].add(peer)
    return odds


def overloaded(reducer_count: int, peer_count: int, shard_count: int) -> bool:
    """Whether so few average far more each than if all of the `peer_count` did."""
    return min(shard_count, peer_count) > LOAD_MAX * min(shard_count, reducer_count)


def seat(
    peers: Collection[str], odds: AtOdds, lots: Mapping[str, str], shard_count: int
) -> tuple[list[str], list[str]]:
    """Who of `peers` may contribute, and who of these is at odds with none of them: in the order of `peers`.

    Of two at odds with as many, the one with the greater lot stays out.
    """
    left = dict.fromkeys(peers)
    count = {peer: len(odds[peer] & left.keys()) for peer in left}
    free = sum(not n for n in count.values())
    while left and (not free or overloaded(free, len(left), shard_count)):
        out = max(left, key=lambda p: (count[p], lots[p]))
        del left[out]
        for other in odds[out] & left.keys():
            count[other] -= 1
            free += not count[other]
    return list(left), [peer for peer in left if not count[peer]]


def choose_reducers(
    able: Sequence[str],
    contributor_count: int,
    electors: Set[str],
    quorum: int,
    odds: AtOdds,
    shard_count: int,
) -> list[str]:
    """Those of `able` that are to average. `electors`: who is to vote on the result, contributing or not.

    Everybody names the electors that it does not hear; but who never had a link with a newcomer does not name
    it. So electors average if they are enough. And a quorum of them has to get the result: if it is not one
    without those whom a reducer is cut off from, they average who are cut off from no elector.
    """
    elected = [peer for peer in able if peer in electors]
    if elected and not overloaded(len(elected), contributor_count, shard_count):
        able = elected
    deaf = {peer for peer in electors if odds[peer] & set(able)}
    if len(electors) - len(deaf) < quorum:
        able = [peer for peer in able if not odds[peer] & deaf] or able
    return list(able)
