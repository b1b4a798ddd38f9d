"""Who may hold a connection to the endpoint, and for how long: between the socket and aiohttp.

aiohttp waits without end for a first request, and takes as many connections as come: 1,100 idle ones used up
the node's file descriptors, and it ended while writing a vote. Here each connection is either being answered
or has a deadline, and so many bytes to say what it wants; and the house has a last place: whoever comes when
it is full takes the place of the connection that has been silent longest. So one that only holds places
cannot keep a scraper out.

    listening socket (listener.py) -> Door() -> Guest -> aiohttp's protocol -> guard (http.py) -> handler

Of the project it imports turns.py only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import cast

from tapestry.node.surface.turns import Turns


@dataclass(frozen=True, slots=True)
class DoorLimits:
    connections_max: int = 64  # Guess: a browser takes six, a scraper one
    idle_s: float = 20.0  # to send a request, to take an answer. Guess: above a scrape interval of 15 s
    answer_s: float = 10.0  # to make an answer; nothing here takes long
    connections_per_s: float = 50.0  # that are taken; the others wait in the kernel. Guess
    connections_burst: int = 128
    requests_per_s: float = 25.0  # of all together; who asks faster waits. Guess
    requests_burst: int = 50
    request_bytes: int = 1 << 16  # of one request, to its end: a browser sends 2 KiB. Guess


class Door:
    """The protocol factory of a listening socket; call it for each connection."""

    def __init__(
        self,
        make_inner: Callable[[], asyncio.Protocol],
        limits: DoorLimits,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._make_inner = make_inner
        self._limits = limits
        self._sleep = sleep
        self._guests: dict[
            asyncio.BaseProtocol, Guest
        ] = {}  # by aiohttp's protocol; the longest silent first
        self._turns = Turns(limits.requests_per_s, limits.requests_burst)

    def __call__(self) -> Guest:
        inner = self._make_inner()
        return Guest(self, inner, self._limits)

    @property
    def open(self) -> int:
        """Connections that are held."""
        return len(self._guests)

    def enter(self, guest: Guest) -> None:
        """A connection is there; another may have to go for it."""
        self._guests[guest.inner] = guest
        if len(self._guests) > self._limits.connections_max:
            idle = next((g for g in self._guests.values() if not g.answered), guest)
            self._guests.pop(idle.inner)
            idle.abort()

    def leave(self, guest: Guest) -> None:
        self._guests.pop(guest.inner, None)

    async def turn(self) -> bool:
        """Wait until the next request is due.

        False at once, and nothing is charged, where more wait than have places here: those are requests of
        who has left again, and each would keep the next one waiting for its turn all the same.
        """
        now = asyncio.get_running_loop().time()
        wait_s = self._turns.wait_s(now)
        if wait_s > self._turns.every_s * self._limits.connections_max:
            return False
        self._turns.take(now)
        if wait_s > 0:
            await self._sleep(wait_s)
        return True

    @contextlib.contextmanager
    def answering(self, inner: asyncio.BaseProtocol | None) -> Iterator[None]:
        """A request has been read whole and is answered inside; then its connection is idle again."""
        guest = self._guests.get(cast(asyncio.BaseProtocol, inner))
        if guest is None:
            yield
            return
        guest.answered = True
        guest.give(self._limits.answer_s)
        try:
            yield
        finally:
            guest.answered, guest.came = False, 0
            guest.give(self._limits.idle_s)
            if self._guests.pop(guest.inner, None) is not None:
                self._guests[guest.inner] = guest  # the one that was silent for the shortest time

    def goes_on(self, inner: asyncio.BaseProtocol | None) -> None:
        """An answer without an end (/events) is being taken: its time begins anew."""
        guest = self._guests.get(cast(asyncio.BaseProtocol, inner))
        if guest is not None:
            guest.give(self._limits.answer_s)


class Guest(asyncio.Protocol):
    """One connection: all goes to aiohttp's protocol, until its time is over."""

    def __init__(self, door: Door, inner: asyncio.Protocol, limits: DoorLimits) -> None:
        self.inner = inner
        self.answered = False  # at this moment
        self.came = 0  # bytes, since the last request was whole
        self._door = door
        self._limits = limits
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def give(self, seconds: float) -> None:
        """So long from now, and the connection ends."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None
        if self._transport is not None and not self._transport.is_closing():
            self._deadline = asyncio.get_running_loop().call_later(seconds, self.abort)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.inner.connection_made(transport)
        self.give(self._limits.idle_s)
        self._door.enter(self)

    def data_received(self, data: bytes) -> None:
        room = self._limits.request_bytes - self.came
        self.came += len(data)
        if room > 0:  # to parse the rest costs a core and hundreds of megabytes, if many send such
            self.inner.data_received(data[:room])
        transport = self._transport
        if self.came > self._limits.request_bytes and transport is not None and not transport.is_closing():
            transport.pause_reading()

    def eof_received(self) -> bool | None:
        return self.inner.eof_received()

    def pause_writing(self) -> None:
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        self.inner.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._transport = None
        self._door.leave(self)
        self.inner.connection_lost(error)
