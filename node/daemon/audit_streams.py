"""The streams of audits and accusations: one protocol, which two desks of a node share.

A stream carries one request: a frame without payload, whose header is a word and what belongs to it.
`requests` says which desk answers which word: `input` and `second` are audit_desk.py's, `accuse` is
accusation_desk.py's. Here is what both keep to, in either direction: how many streams a peer has open and how
many are opened to it, that of a kind each has one at a time, and that every byte is counted and throttled.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

import msgpack
from typing_extensions import Buffer

from tapestry.dht.p2pd import SwarmError
from tapestry.node.daemon.desk import Loop
from tapestry.node.daemon.views import Reporter
from tapestry.node.net.network import Network, Streams
from tapestry.node.net.throttle import Throttles
from tapestry.node.net.wire import (
    FrameLimits,
    RemoteProtocolError,
    WriteLimits,
    frame_parts,
    read_header,
    write_frame,
)
from tapestry.node.net.wire import unpack as unpack_header
from tapestry.node.protocol import strict
from tapestry.node.protocol.canon import Crypto

STREAMS_MAX = 4  # of all peers that are given inputs at a time, and that accuse; the others wait
STREAMS_OF_ONE_MAX = 8  # open ones of a peer; it is given one input at a time, and accuses by one
BYTES_PER_SECOND_MIN = 16 * 1024  # of who asks or accuses, or gives; Guess: as of a donor (net/transfer.py)
OPENED_PER_S = 8.0  # streams to one peer. Guess: it takes 20 a second of one (dht/door.py), of all kinds
OPEN_S = 10.0
SILENCE_S = 10.0
HEADER_BYTES_MAX = 8192  # a path of PATH_MAX digests fits
PAYLOAD_BYTES_MAX = 64 << 20  # Guess: an accusation of 128 members' shards of 512 KiB

_log = logging.getLogger("tapestry.audit")


def audit_protocol(run_id: str) -> str:
    return f"/tapestry/{run_id}/audit/2"


@dataclass(frozen=True, slots=True)
class Auditor:
    """Who audits."""

    crypto: Crypto
    own: str  # peer id
    run_id: str
    folder: Path  # HOME/accusations
    throttles: Throttles
    on_lie: Literal["remove", "rollback", "mark"] = "mark"  # the spec's: what this node asks for


@dataclass(frozen=True, slots=True)
class Request:
    """Of a peer that we are linked with."""

    peer: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    said: list[Any]  # the values after the word, unchecked


Answer = Callable[[Request], Awaitable[None]]  # raises as `serve`


class AuditStreams:
    """One node's, for as long as it runs."""

    def __init__(self, loop: Loop, network: Network, reporter: Reporter, auditor: Auditor) -> None:
        self._loop = loop
        self._network = network
        self._reporter = reporter
        self._throttles = auditor.throttles
        self.protocol = audit_protocol(auditor.run_id)
        self.limits = FrameLimits(
            HEADER_BYTES_MAX, PAYLOAD_BYTES_MAX, BYTES_PER_SECOND_MIN, auditor.throttles.download
        )
        self._of_requests = replace(self.limits, payload_bytes_max=0)
        self.requests: dict[str, Answer] = {}  # by word
        self.streams: Counter[str] = Counter()  # open ones, by peer
        # By peer and what it asks for: it takes no more than one's place.
        self.turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        # By who is told, and what.
        self._lines: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        # Of who was asked or told something lately: when it may be again.
        self._open_at: dict[str, float] = {}

    # --- our own -------------------------------------------------------------------------------

    async def open(self, peer: str, open_s: float = OPEN_S) -> Streams:
        """A stream, not sooner than the peer is to let one in: it bans who opens many. Raises SwarmError."""
        now = self._loop.now()
        self._open_at = {other: at for other, at in self._open_at.items() if at > now}
        at = self._open_at.get(peer, now)
        self._open_at[peer] = at + 1 / OPENED_PER_S
        await asyncio.sleep(at - now)
        return await self._network.open_stream(peer, self.protocol, open_s)

    def line(self, peer: str, what: str) -> asyncio.Lock:
        """To each peer one thing of a kind at a time: it refuses many streams of one, and counts them against
        it. What waits for its place for accusations keeps nothing else from it."""
        return self._lines.setdefault((peer, what), asyncio.Lock())

    async def say(self, peer: str, said: list[Any]) -> None:
        """Whether it arrived is all the same to us."""
        async with self.line(peer, "say"):
            try:
                reader, writer = await self.open(peer)
            except SwarmError:
                return
            try:
                await self.write(peer, writer, msgpack.packb(said))
                await asyncio.wait_for(reader.read(1), SILENCE_S)  # it ends when it was heard
            except (TimeoutError, ConnectionError, SwarmError):
                _log.debug("audit=not_told peer=%s of=%s", peer[-6:], said[0])
            finally:
                writer.close()

    async def write(
        self,
        peer: str,
        writer: asyncio.StreamWriter,
        header: bytes,
        payload: list[Buffer] | None = None,
        patience_s: float = SILENCE_S,
    ) -> None:
        """A frame. Raises TimeoutError, ConnectionError, SwarmError."""

        def left(count: int) -> None:
            self._reporter.metrics.network_bytes("sent", "audit", count)
            self._reporter.egress.sent("audit", peer, count)

        limits = WriteLimits(self._throttles.upload, waits=bool(payload), patience_s=patience_s)
        await write_frame(writer, frame_parts(header, payload or []), limits, left)

    def came(self, count: int) -> None:
        """So many bytes were read."""
        self._reporter.metrics.network_bytes("received", "audit", count)

    # --- other members' ------------------------------------------------------------------------

    async def serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request. Each peer has so many open.

        Raises RemoteProtocolError, StreamEnded, TimeoutError and ConnectionError.
        """
        if peer not in self._network.linked:
            return
        if self.streams[peer] >= STREAMS_OF_ONE_MAX:
            raise RemoteProtocolError("streams", f"more than {STREAMS_OF_ONE_MAX} streams at a time")
        self.streams[peer] += 1
        try:
            await self._serve(peer, reader, writer)
        finally:
            self.streams[peer] -= 1
            if not self.streams[peer]:
                del self.streams[peer]

    async def _serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        header, _ = await read_header(reader, self._of_requests, SILENCE_S, SILENCE_S, self.came)
        match values(header, 4, "request"):
            case [str() as word, *said] if word in self.requests:
                await self.requests[word](Request(peer, reader, writer, said))
            case _:
                raise no_such_request()

    def turn_of(self, peer: str, what: str) -> asyncio.Lock:
        return self.turns.setdefault((peer, what), asyncio.Lock())


def no_such_request() -> RemoteProtocolError:
    return RemoteProtocolError("malformed", "no such request")


def values(header: bytes, count_max: int, what: str) -> list[Any]:
    """Raises RemoteProtocolError."""
    try:
        return [*strict.sequence(unpack_header(header), count_max, what)]
    except strict.Malformed as error:
        raise RemoteProtocolError("malformed", str(error)) from None
