"""Places for streams that wait until they have one: members before newcomers, in the order of their coming.

Where a donor says that it is busy (places.py), here the stream waits in a line. Who has had its place for
`held_s` leaves it when another waits: whoever drips its bytes keeps the others out no longer than that. A
stream that leaves its place goes on beside the places while there is room for it, `beside_max` in all, and is
closed otherwise. So what takes longer than `held_s` on a slow line gets done, and nobody waits longer for it;
how slow it may be is for its reader to say (net/wire.py, FrameLimits.behind_s). A newcomer makes no member
leave, and leaves the room beside the places to a member that needs it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from tapestry.node.net.places import NoPlace, ServedPlaces


@dataclass(slots=True, eq=False)
class Held:
    """A place."""

    at: float  # of the loop's clock: since when
    is_member: bool
    goes_on: bool  # beside the places, after its time
    is_beside: bool = False


class WaitingPlaces:
    """So many streams at a time, and `beside_max` that have had their time."""

    def __init__(
        self, streams_max: int, held_s: float, is_member: Callable[[str], bool], beside_max: int = 0
    ) -> None:
        self._held_s = held_s
        self._beside_max = beside_max
        self._is_member = is_member
        self._places: ServedPlaces[asyncio.StreamWriter] = ServedPlaces(streams_max)
        self._held: dict[asyncio.StreamWriter, Held] = {}  # the oldest first
        self._beside: dict[asyncio.StreamWriter, Held] = {}  # the oldest first
        self._lines = {True: asyncio.Lock(), False: asyncio.Lock()}  # of members, of newcomers
        self._left = asyncio.Event()  # a place may be free

    @contextlib.asynccontextmanager
    async def place(
        self, peer: str, writer: asyncio.StreamWriter, goes_on: bool = True
    ) -> AsyncIterator[Held]:
        """Wait for a place, and hold it. `goes_on`: beside the places after its time, if there is room."""
        is_member = self._is_member(peer)
        async with self._lines[is_member]:
            while not self._has_room(peer, writer, is_member):
                await self._room(is_member)
            held = self._held[writer] = Held(asyncio.get_running_loop().time(), is_member, goes_on)
        self._left.set()  # there may be another, for a newcomer that let a member go first
        try:
            yield held
        finally:
            self._leave(writer)

    def _has_room(self, peer: str, writer: asyncio.StreamWriter, is_member: bool) -> bool:
        if not is_member and self._lines[True].locked():
            return False
        try:
            gone = self._places.enter(peer, writer, is_member)
        except NoPlace:
            return False
        if gone is not None:
            self._cut(gone)
        return True

    async def _room(self, is_member: bool) -> None:
        """Until somebody has left, or had to."""
        oldest = next((one for one, held in self._held.items() if is_member or not held.is_member), None)
        self._left.clear()
        try:
            until = self._held[oldest].at + self._held_s if oldest is not None else None
            async with asyncio.timeout_at(until):
                await self._left.wait()
        except TimeoutError:
            if oldest is not None and oldest in self._held:  # it has not left at the same moment
                self._had_its_time(oldest)

    def _had_its_time(self, writer: asyncio.StreamWriter) -> None:
        """Another waits for its place: it goes on beside the places, or is closed."""
        held, newcomer = self._held[writer], None
        if held.goes_on and held.is_member and len(self._beside) >= self._beside_max:
            newcomer = next((one for one, beside in self._beside.items() if not beside.is_member), None)
        if newcomer is not None:
            self._cut(newcomer)
        if held.goes_on and len(self._beside) < self._beside_max:
            self._leave(writer)
            self._beside[writer], held.is_beside = held, True
        else:
            self._cut(writer)

    def _cut(self, writer: asyncio.StreamWriter) -> None:
        self._leave(writer)
        writer.close()

    def _leave(self, writer: asyncio.StreamWriter) -> None:
        self._places.leave(writer)
        self._held.pop(writer, None)
        self._beside.pop(writer, None)
        self._left.set()
