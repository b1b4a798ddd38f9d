"""The relay: this node keeps places for linked peers that cannot be dialled, and carries connections to them.

libp2p's circuit relay 2 (dht/reachability.py has the messages). A guest asks for a place; a caller asks for a
guest; we open a stream to the guest, tell it who calls, and from then on pass bytes both ways. The two then
prove to each other who they are and encrypt, inside: we see sizes and times.

Only a linked peer, so one of this run, gets a place, and only to those with a place is anything carried; who
calls may be anybody, for a joiner is nobody yet, but strangers have few circuits (circuits.py). What is
carried waits for the upload cap like bulk, and counts for both caps. Everything has a bound: places,
circuits, and how long a side may take nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection
from typing import Any

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
from tapestry.node.net.circuits import Circuits, Kind
from tapestry.node.net.places import NoPlace
from tapestry.node.net.throttle import Throttles

PLACES_MAX = 128  # libp2p's
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
        end_stream: Callable[[str, asyncio.StreamWriter], None],
        linked: Callable[[], Collection[str]],
        kind_of: Callable[[str], Kind],  # what a caller is here
        throttles: Throttles,
        enabled: bool,
    ) -> None:
        self._open_stream = open_stream
        self._end_stream = end_stream
        self._linked = linked
        self._kind_of = kind_of
        self._throttles = throttles
        self._enabled = enabled
        self._places: dict[str, float] = {}  # guest -> until when
        self._circuits: Circuits[asyncio.Task[Any]] = Circuits()  # by what carries each

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
        task = asyncio.current_task()
        assert task is not None
        try:
            gone = self._circuits.enter(task, caller, guest, self._kind_of(caller), _now())
        except NoPlace:
            await write_message(writer, hop_answer(TOO_MANY))
            return
        if gone is not None:
            gone.cancel()
        try:
            await self._carry(caller, guest, reader, writer, lambda: self._circuits.heard(task, _now()))
        finally:
            self._circuits.leave(task)

    async def _carry(
        self,
        caller: str,
        guest: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_heard: Callable[[], None],  # the guest says something
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(ASK_S):
                    inner_reader, inner_writer = await self._open_stream(guest, STOP, ASK_S)
                    stack.callback(self._end_stream, guest, inner_writer)
                    status = stop_status(await exchange(inner_reader, inner_writer, stop_request(caller)))
            except (SwarmError, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                _log.debug("relay=not_carried to=%s reason=%r", guest[-6:], error)
                status = NOT_REACHED
            await write_message(writer, hop_answer(status))
            if status != OK:
                return
            _log.debug("relay=carries from=%s to=%s", caller[-6:], guest[-6:])
            ways = [
                asyncio.create_task(self._pass(reader, inner_writer, lambda: None)),
                asyncio.create_task(self._pass(inner_reader, writer, on_heard)),
            ]
            try:  # the end of one way is the end of both: p2pd's streams have no half
                ended, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ended:
                    way.result()  # our bug goes to the stream's edge (dht/swarm.py), which tells of it
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.wait(ways)

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, on_piece: Callable[[], None]
    ) -> None:
        """Until one side ends or takes nothing."""
        with contextlib.suppress(OSError, TimeoutError):
            while piece := await reader.read(PIECE_BYTES):
                self._throttles.download.spend(len(piece))
                on_piece()
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
