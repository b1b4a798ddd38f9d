"""The door: the streams that peers open, who may have one more, and who is turned away.

p2pd hands each stream over as a connection of its own. First is read who opened it; then the conduct of that
peer, its pace, and its place among others (places.py) say whether the protocol's handler gets the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from tapestry.dht.addresses import short
from tapestry.dht.conduct import Ban, Conduct
from tapestry.dht.control import opener_of
from tapestry.dht.p2pd import STOP_TIMEOUT_S, SwarmConfig, SwarmError
from tapestry.dht.places import NoPlace, StreamPlaces
from tapestry.dht.streams import drop_stream, until_ended

_log = logging.getLogger("tapestry.swarm")

StreamHandler = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

# New streams of one peer. Guess: one that comes and goes with the smallest back-off opens ten a second.
STREAMS_PER_S, STREAMS_BURST = 20.0, 256.0
_PACES_KEPT = 1024
STUCK_MAX = 8  # of one peer. A link of a node that was frozen leaves five
# Beyond streams_max: those that have no place yet, for it is not known whose they are. p2pd says it in
# milliseconds, so that these are few at a time. Guess
UNREAD_MAX = 32


class Door:
    """Of one swarm, on its loop. `on_stream` serves the socket to which p2pd hands streams over."""

    def __init__(
        self,
        config: SwarmConfig,
        conduct: Conduct,
        end_connections: Callable[[str], Awaitable[None]],  # p2pd's with a peer. Raises SwarmError
        is_member: Callable[[str], bool],
        on_refused: Callable[[str], None],
    ) -> None:
        self.handlers: dict[str, StreamHandler] = {}  # protocol -> who is called with its streams
        self._conduct = conduct
        self._end_connections = end_connections
        self._is_member = is_member
        self._on_refused = on_refused
        self._streams_max = config.streams_max
        self._inbound: dict[asyncio.Task[Any], None] = {}
        self._places: StreamPlaces[asyncio.Task[Any]] = StreamPlaces(
            config.streams_max, config.peer_streams_max
        )
        self._pace: dict[str, _Bucket] = {}  # of new streams, by peer
        self._stuck: dict[str, int] = {}  # peer -> streams of which it did not take all, the last at the end
        self._disconnecting: dict[str, asyncio.Task[None]] = {}

    async def on_stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection from p2pd: a stream that a peer has opened."""
        task = asyncio.current_task()
        assert task is not None
        self._inbound[task] = None
        try:
            if len(self._inbound) > self._streams_max + UNREAD_MAX:
                _log.debug("stream refused reason=too_many limit=%d", self._streams_max)
                self._on_refused("streams")
                return
            await self._handle_inbound(reader, writer)
        except asyncio.CancelledError:
            return  # by close(), or for another: asyncio's server would report it as a crash
        finally:
            del self._inbound[task]
            writer.close()

    async def _handle_inbound(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            peer_id, protocol = await opener_of(reader)
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            return
        if not self._lets_in(peer_id):
            return
        task = asyncio.current_task()
        assert task is not None
        if not self._take_place(peer_id, task):
            return
        try:
            await self.handlers[protocol](peer_id, reader, writer)
            await until_ended(writer)  # in its place: who takes nothing holds a descriptor
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            _log.debug("stream broke proto=%s peer=%s error=%r", protocol, short(peer_id), error)
        except Exception:  # the edge: nobody awaits this task, and one stream must not end a node
            _log.exception("stream handler failed proto=%s peer=%s", protocol, short(peer_id))
        finally:
            drop_stream(writer, functools.partial(self.count_stuck, peer_id))
            self._places.leave(peer_id, task)

    def _lets_in(self, peer_id: str) -> bool:
        """Whether a peer may have one more stream here, now."""
        if self.is_banned(peer_id):
            self._disconnect(peer_id)
            return False
        if peer_id not in self._pace:
            if len(self._pace) >= _PACES_KEPT:
                self._pace.pop(next(iter(self._pace)))
            self._pace[peer_id] = _Bucket(STREAMS_PER_S, STREAMS_BURST, self._now())
        if self._pace[peer_id].take(self._now()):
            return True
        self._on_refused("streams")
        self.blame(peer_id, "streams")
        return False

    def _take_place(self, peer_id: str, task: asyncio.Task[Any]) -> bool:
        try:
            gone = self._places.enter(peer_id, task, self._is_member(peer_id))
        except NoPlace as full:
            self._on_refused("streams")
            if full.own:
                self.blame(peer_id, "streams")
            return False
        if gone is not None:
            self._on_refused("streams")
            gone.cancel()
        return True

    async def close(self) -> None:
        """End all streams that peers opened."""
        for some in (self._inbound, self._disconnecting.values()):  # the first may start some of the others
            tasks = [*some]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=STOP_TIMEOUT_S)

    def blame(self, peer_id: str, reason: str) -> None:
        """A peer did what no honest one does at the door. Who does so again and again is turned away."""
        ban_s = self._conduct.fault(peer_id, reason, self._now())
        if ban_s:
            _log.warning(
                "banned peer=%s reason=%s for_s=%g; if it is a member, ask its operator for its version "
                "and log",
                *(short(peer_id), reason, ban_s),
            )
            self._disconnect(peer_id)

    def is_banned(self, peer_id: str) -> bool:
        return self._conduct.is_banned(peer_id, self._now())

    def bans(self) -> tuple[Ban, ...]:
        """Those who are turned away at this moment."""
        return self._conduct.bans(self._now())

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _disconnect(self, peer_id: str) -> None:
        """End p2pd's connection with a peer: what it sends then stops there, and not at our socket."""
        if peer_id not in self._disconnecting:
            task = asyncio.create_task(self._end_connection(peer_id))
            self._disconnecting[peer_id] = task
            task.add_done_callback(lambda _: self._disconnecting.pop(peer_id, None))

    async def _end_connection(self, peer_id: str) -> None:
        with contextlib.suppress(SwarmError):  # p2pd is ending, or the peer was quicker
            await self._end_connections(peer_id)

    def count_stuck(self, peer_id: str) -> None:
        """A stream ended with what the peer had not taken. p2pd keeps its end of it, a descriptor and some
        hundred kB, as long as the peer is connected: so not for longer, if they become many."""
        count = self._stuck.pop(peer_id, 0) + 1
        if count > STUCK_MAX:
            _log.info("disconnected peer=%s reason=%r", short(peer_id), "it took nothing on many streams")
            self._on_refused("streams")
            self._disconnect(peer_id)
            return
        if len(self._stuck) >= _PACES_KEPT:
            del self._stuck[next(iter(self._stuck))]
        self._stuck[peer_id] = count


class _Bucket:
    """How many may come now: a burst, and a rate."""

    def __init__(self, per_s: float, burst: float, now: float) -> None:
        self._per_s, self._burst = per_s, burst
        self._left, self._at = burst, now

    def take(self, now: float) -> bool:
        self._left = min(self._burst, self._left + self._per_s * (now - self._at))
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
