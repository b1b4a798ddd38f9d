"""Places for streams that wait until they have one: members before newcomers, in the order of their coming.

Where a donor says that it is busy (places.py), here the stream waits in a line. Who has had its place for
`held_s` leaves it when another waits: whoever drips its bytes keeps the others out no longer than that. A
stream that must leave is closed. A newcomer makes no member leave.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from tapestry.node.net.places import NoPlace, ServedPlaces


class WaitingPlaces:
    """So many streams at a time."""

    def __init__(self, streams_max: int, held_s: float, is_member: Callable[[str], bool]) -> None:
        self._held_s = held_s
        self._is_member = is_member
        self._places: ServedPlaces[asyncio.StreamWriter] = ServedPlaces(streams_max)
        # Who has a place: since when, and whether it is a member; the oldest first.
        self._since: dict[asyncio.StreamWriter, tuple[float, bool]] = {}
        self._lines = {True: asyncio.Lock(), False: asyncio.Lock()}  # of members, of newcomers
        self._left = asyncio.Event()  # a place may be free

    @contextlib.asynccontextmanager
    async def place(self, peer: str, writer: asyncio.StreamWriter) -> AsyncIterator[None]:
        """Wait for a place, and hold it."""
        is_member = self._is_member(peer)
        async with self._lines[is_member]:
            while not self._enters(peer, writer, is_member):
                await self._room(is_member)
        self._left.set()  # there may be another, for a newcomer that let a member go first
        try:
            yield
        finally:
            self._leave(writer)

    def _enters(self, peer: str, writer: asyncio.StreamWriter, is_member: bool) -> bool:
        if not is_member and self._lines[True].locked():
            return False
        try:
            gone = self._places.enter(peer, writer, is_member)
        except NoPlace:
            return False
        if gone is not None:
            self._end(gone)
        self._since[writer] = asyncio.get_running_loop().time(), is_member
        return True

    async def _room(self, is_member: bool) -> None:
        """Until somebody has left, or had to."""
        held = [(at, writer) for writer, (at, of_member) in self._since.items() if is_member or not of_member]
        self._left.clear()
        try:
            async with asyncio.timeout_at(held[0][0] + self._held_s if held else None):
                await self._left.wait()
        except TimeoutError:
            self._end(held[0][1])

    def _end(self, writer: asyncio.StreamWriter) -> None:
        self._leave(writer)
        writer.close()

    def _leave(self, writer: asyncio.StreamWriter) -> None:
        self._places.leave(writer)
        self._since.pop(writer, None)
        self._left.set()
