"""Who may have one more stream here: of each peer so many, and of all strangers together half of the places.

A stranger is whoever is no member of the run, and anybody can be as many of them as they like. So they take
nothing of the half that is left to members. When theirs is full, who comes with less than another has takes
the place of that one's oldest stream, and who has less than a link needs, of the oldest of all: who holds
silent streams open, many or under many names, keeps nobody out who wants a link.

Members may have what strangers leave. When all places are taken they have half of them or more: then the
member that has most gives its newest stream (its oldest are its link's) to who has two less, or two that want
the same would take it from each other in turn; and none has to give of MEMBER_STREAMS_MIN. A stranger, while
strangers have less than half, is given one in the same way.

Pure: knows neither sockets nor time.
"""

from __future__ import annotations

from typing import Generic, TypeVar

LINK_STREAMS = 2  # of control and of bulk
MEMBER_STREAMS_MIN = 8  # a link of five streams, and some to catch up. 64 such members have half of 1,024
S = TypeVar("S")


class NoPlace(Exception):
    """Not one more of this peer's. `own`: it has all that one peer may have, which no honest one needs."""

    def __init__(self, own: bool) -> None:
        super().__init__("more streams than one peer may have" if own else "all streams are taken")
        self.own = own


class StreamPlaces(Generic[S]):
    """Of one swarm; a stream is whatever stands for it there."""

    def __init__(self, streams_max: int, peer_streams_max: int) -> None:
        self._max = streams_max
        self._strangers_max = max(1, streams_max // 2)
        self._peer_max = peer_streams_max
        self._members: dict[str, dict[S, None]] = {}  # by peer, the oldest first
        self._strangers: dict[str, dict[S, None]] = {}

    def enter(self, peer: str, stream: S, is_member: bool) -> S | None:
        """Take a place; the stream that must end for it, if one must: it has left. Raises NoPlace."""
        places = self._members if is_member else self._strangers
        if self._count(peer) >= self._peer_max:
            raise NoPlace(own=True)
        gone = None
        if not is_member and _total(self._strangers) >= self._strangers_max:
            gone = self._of_strangers(peer)
        elif _total(self._members) + _total(self._strangers) >= self._max:
            gone = self._of_members(peer)
        places.setdefault(peer, {})[stream] = None
        return gone

    def leave(self, peer: str, stream: S) -> None:
        """It has ended, perhaps because it had to."""
        for places in (self._members, self._strangers):
            places.get(peer, {}).pop(stream, None)
            if not places.get(peer, True):
                del places[peer]

    def _count(self, peer: str) -> int:
        return len(self._members.get(peer, ())) + len(self._strangers.get(peer, ()))

    def _of_strangers(self, stranger: str) -> S:
        strangers = self._strangers
        greediest, most = _greediest(strangers)
        if len(strangers.get(stranger, ())) >= max(most, LINK_STREAMS):
            raise NoPlace(own=False)
        if most <= LINK_STREAMS:
            greediest = next((peer for peer in strangers if peer != stranger), stranger)
        oldest = next(iter(strangers[greediest]))
        self.leave(greediest, oldest)
        return oldest

    def _of_members(self, peer: str) -> S:
        greediest, most = _greediest(self._members)
        if most < self._count(peer) + 2 or most <= MEMBER_STREAMS_MIN:
            raise NoPlace(own=False)
        newest = next(reversed(self._members[greediest]))
        self.leave(greediest, newest)
        return newest


def _total(places: dict[str, dict[S, None]]) -> int:
    return sum(map(len, places.values()))


def _greediest(places: dict[str, dict[S, None]]) -> tuple[str, int]:
    """Who has most, the first of equals, and how many; nobody has none."""
    peer = max(places, key=lambda peer: len(places[peer]), default="")
    return peer, len(places.get(peer, ()))
