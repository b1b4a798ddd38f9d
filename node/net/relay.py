"""The relay: this node keeps places for linked peers that cannot be dialled, and carries connections to them.

libp2p's circuit relay 2 (dht/reachability.py has the messages). A guest asks for a place; a caller asks for a
guest; we open a stream to the guest, tell it who calls, and from then on pass bytes both ways. The two then
prove to each other who they are and encrypt, inside: we see sizes and times.

Only a linked peer, so a member of this run, gets a place, and only to those with a place is anything carried;
who calls may be anybody, for a joiner is nobody yet, but strangers have few circuits. What is carried waits
for the upload cap like bulk, and counts for both caps. Everything has a bound: places, circuits in all and of
each peer, and how long a side may take nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection

from tapestry.dht.p2pd import SwarmError
from tapestry.dht.reachability import (
    CONNECTING,
    DENIED,
    MALFORMED,
    NO_PLACE,
    NOT_REACHED,
    OK,
    PLACE_REFUSED,
    RESERVING,
    STOP,
    TOO_MANY,
    OpenStream,
    exchange,
    hop_answer,
    hop_request,
    read_message,
    stop_request,
    stop_status,
    write_message,
)
from tapestry.node.net.throttle import Throttles

PLACES_MAX = 128  # libp2p's
CIRCUITS_MAX = 256  # Guess: 16 guests that are all linked with each other take 240, one for each end's dial
PEER_CIRCUITS_MAX = 32  # to or from one peer. Guess
# Of all who are no members, one each, and the oldest makes room: enough to ask for admission. Guess
STRANGERS_CIRCUITS_MAX = 16
PLACE_S = 3600.0  # libp2p's; our guests ask again each minute
ASK_S = 10.0  # for a question to come, and for a guest to answer
WRITE_S = 60.0  # Guess: a side that takes nothing for so long has no use for it
PIECE_BYTES = 1 << 17

_log = logging.getLogger("tapestry.network")


class Relay:
    """`serve` is the handler of reachability.HOP on one swarm."""

    def __init__(
        self,
        open_stream: OpenStream,
        linked: Callable[[], Collection[str]],
        admits: Callable[[str], bool],  # whether a peer belongs to the run
        throttles: Throttles,
        enabled: bool,
    ) -> None:
        self._open_stream = open_stream
        self._linked = linked
        self._admits = admits
        self._throttles = throttles
        self._enabled = enabled
        self._places: dict[str, float] = {}  # guest -> until when
        self._circuits: Counter[str] = Counter()  # by peer, of either end
        # Callers that are no members, with a circuit each: what carries it, the oldest first.
        self._strangers: dict[str, asyncio.Task[None] | None] = {}

    @property
    def guests(self) -> tuple[str, ...]:
        return tuple(self._places)

    async def serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one question of `peer`, and carry what it leads to. Raises TimeoutError, OSError."""
        try:
            async with asyncio.timeout(ASK_S):
                kind, named = hop_request(await read_message(reader))
        except SwarmError:
            await write_message(writer, hop_answer(MALFORMED))
            return
        if kind == RESERVING:
            await write_message(writer, self._reserve(peer))
        elif kind == CONNECTING:
            await self._connect(peer, named, reader, writer)
        else:
            await write_message(writer, hop_answer(MALFORMED))

    def _reserve(self, peer: str) -> bytes:
        """The answer to who asks for a place."""
        self._forget()
        if not self._enabled:
            return hop_answer(PLACE_REFUSED)
        if peer not in self._linked():
            return hop_answer(DENIED)
        if peer not in self._places and len(self._places) >= PLACES_MAX:
            return hop_answer(TOO_MANY)
        if peer not in self._places:
            _log.debug("relay=place peer=%s places=%d", peer[-6:], len(self._places) + 1)
        self._places[peer] = _now() + PLACE_S
        return hop_answer(OK, time.time() + PLACE_S)

    def _forget(self) -> None:
        """A place is lost with the link, and with time."""
        linked, now = self._linked(), _now()
        self._places = {p: until for p, until in self._places.items() if p in linked and now < until}

    async def _connect(
        self, caller: str, guest: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._forget()
        if guest not in self._places:
            await write_message(writer, hop_answer(NO_PLACE))
            return
        of_peers = max(self._circuits[caller], self._circuits[guest])
        if self._circuits.total() >= 2 * CIRCUITS_MAX or of_peers >= PEER_CIRCUITS_MAX:
            await write_message(writer, hop_answer(TOO_MANY))
            return
        is_member = self._admits(caller)
        if not is_member and caller in self._strangers:
            await write_message(writer, hop_answer(TOO_MANY))
            return
        ends = (caller, guest)
        self._circuits.update(ends)
        task = asyncio.current_task()
        if not is_member:
            self._make_room_for_stranger()
            self._strangers[caller] = task
        try:
            await self._carry(caller, guest, reader, writer)
        finally:
            if self._strangers.get(caller) is task:
                del self._strangers[caller]
            self._circuits.subtract(ends)
            self._circuits = +self._circuits  # without those that have none

    def _make_room_for_stranger(self) -> None:
        """Who holds a silent circuit open keeps no applicant away."""
        if len(self._strangers) >= STRANGERS_CIRCUITS_MAX:
            oldest = self._strangers.pop(next(iter(self._strangers)))
            if oldest is not None:
                oldest.cancel()

    async def _carry(
        self, caller: str, guest: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(ASK_S):
                    inner_reader, inner_writer = await self._open_stream(guest, STOP, ASK_S)
                    stack.callback(inner_writer.close)
                    status = stop_status(await exchange(inner_reader, inner_writer, stop_request(caller)))
            except (SwarmError, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                _log.debug("relay=not_carried to=%s reason=%r", guest[-6:], error)
                status = NOT_REACHED
            await write_message(writer, hop_answer(status))
            if status != OK:
                return
            _log.debug("relay=carries from=%s to=%s", caller[-6:], guest[-6:])
            ways = [
                asyncio.create_task(self._pass(reader, inner_writer)),
                asyncio.create_task(self._pass(inner_reader, writer)),
            ]
            try:  # the end of one way is the end of both: p2pd's streams have no half
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.wait(ways)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until one side ends or takes nothing."""
        with contextlib.suppress(OSError, TimeoutError):
            while piece := await reader.read(PIECE_BYTES):
                self._throttles.download.spend(len(piece))
                view = memoryview(piece)
                while view:
                    count = await self._throttles.upload.take(len(view))
                    if writer.is_closing():  # uvloop raises RuntimeError when such a one is written to
                        return
                    writer.write(view[:count])
                    view = view[count:]
                    async with asyncio.timeout(WRITE_S):
                        await writer.drain()


def _now() -> float:
    return asyncio.get_running_loop().time()
