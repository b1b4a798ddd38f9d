"""Who is served when all places of a donor are taken: members before newcomers, and who has few streams.

A stream is served for as long as its peer asks on it. So two peers could hold all places for good, and who
missed a round found every donor busy. Who gets a place in this way takes it from the peer that has most: its
oldest. The difference must be two, or two that want the same would take it from each other in turn. Who lost
a stream opens another: an update begins again, a state goes on where it was.

Pure: knows neither sockets nor time.
"""

from __future__ import annotations

from typing import Generic, TypeVar

S = TypeVar("S")


class NoPlace(Exception):
    """All are taken, and nobody has so many more that one must go."""


class ServedPlaces(Generic[S]):
    """Of one donor; a stream is whatever stands for it there."""

    def __init__(self, streams_max: int) -> None:
        self._max = streams_max
        self._streams: dict[S, tuple[str, bool]] = {}  # whose, and whether it is a member; the oldest first

    def enter(self, peer: str, stream: S, is_member: bool) -> S | None:
        """Take a place; the stream that must end for it, if one must: it has left. Raises NoPlace."""
        gone = self._room_for(peer, is_member) if len(self._streams) >= self._max else None
        if gone is not None:
            self.leave(gone)
        self._streams[stream] = (peer, is_member)
        return gone

    def leave(self, stream: S) -> None:
        """It has ended, perhaps because it had to."""
        self._streams.pop(stream, None)

    def _room_for(self, peer: str, is_member: bool) -> S:
        newcomers = self._counts(of_members=False)
        if is_member and newcomers:
            return self._oldest_of(max(newcomers, key=newcomers.__getitem__))
        equals = self._counts(is_member)
        most = max(equals.values(), default=0)
        if most < equals.get(peer, 0) + 2:
            raise NoPlace
        return self._oldest_of(next(other for other, count in equals.items() if count == most))

    def _counts(self, of_members: bool) -> dict[str, int]:
        counts: dict[str, int] = {}
        for peer, is_member in self._streams.values():
            if is_member == of_members:
                counts[peer] = counts.get(peer, 0) + 1
        return counts

    def _oldest_of(self, peer: str) -> S:
        return next(stream for stream, (whose, _) in self._streams.items() if whose == peer)
