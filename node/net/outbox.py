"""What waits to be sent to one peer while its link is up: messages in order, and bulk, each with an end.

Bulk are references to payloads, not their bytes, and the same frame waits once. Who is faster than its one
stream is told from who is slow by what went out while some always waited: `behind` says that another stream
would help.

Knows no streams: links.py writes. Pure but for asyncio's queues: `now` comes in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import Buffer

WIDEN_S = 0.25  # Guess: frames that wait so long are worth another stream, if the line is as fast as this:
WIDEN_BYTES_PER_S = (
    25e6  # what one stream carries at 670 ms. Below it something else is the bound, as a cap is
)


@dataclass(frozen=True, slots=True)
class OutboxLimits:
    control_frames_max: int
    control_bytes_max: int
    bulk_frames_max: int


@dataclass(frozen=True, slots=True)
class Bulk:
    """One frame. `kind` is for the metrics."""

    header: bytes
    kind: str
    parts: Sequence[Buffer]  # what is written, header included


class Outbox:
    """Of one link, from its beginning to its end. On its loop."""

    def __init__(self, limits: OutboxLimits) -> None:
        self._limits = limits
        self._control: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._control_bytes = 0
        self._bulk: asyncio.Queue[Bulk] = asyncio.Queue()
        self._queued: dict[bytes, None] = {}  # headers of the bulk that waits or is being written
        self._busy_since = 0.0  # since then some bulk has always waited
        self._busy_bytes = 0  # that went out meanwhile
        self.behind = asyncio.Event()  # bulk has waited for WIDEN_S, on a fast line

    def put_control(self, header: bytes) -> bool:
        """Queue a message. False: there is no room, for the peer takes too little."""
        full = self._control.qsize() >= self._limits.control_frames_max
        if full or self._control_bytes + len(header) > self._limits.control_bytes_max:
            return False
        self._control_bytes += len(header)
        self._control.put_nowait(header)
        return True

    def put_farewell(self) -> None:
        """Who writes is to look, once all before it was written, whether the peer is to have a link."""
        self._control.put_nowait(None)

    async def next_control(self) -> bytes | None:
        """The next message; None is the farewell."""
        header = await self._control.get()
        self._control_bytes -= len(header or b"")
        return header

    def put_bulk(self, bulk: Bulk, now: float) -> bool:
        """Queue it, unless the same one waits. False: there is no room."""
        if bulk.header in self._queued:
            return True
        if self._bulk.qsize() >= self._limits.bulk_frames_max:
            return False
        self._queued[bulk.header] = None
        if self._bulk.empty():
            self._busy_since, self._busy_bytes = now, 0
        self._bulk.put_nowait(bulk)
        return True

    async def next_bulk(self) -> Bulk:
        return await self._bulk.get()

    def begin(self, now: float) -> None:
        """A frame is written from now on; says by `behind` whether those that wait have waited for long."""
        busy_s = now - self._busy_since
        is_fast = self._busy_bytes >= WIDEN_BYTES_PER_S * busy_s
        if not self._bulk.empty() and busy_s >= WIDEN_S and is_fast:
            self.behind.set()

    def wrote(self, bulk: Bulk) -> None:
        """A frame went out, or the link ends."""
        self._busy_bytes += sum(memoryview(part).nbytes for part in bulk.parts)
        self._queued.pop(bulk.header, None)

    def widened(self, now: float) -> None:
        """There is another stream; whether it is enough is seen from now on."""
        self._busy_since, self._busy_bytes = now, 0
        self.behind.clear()

    def drop_bulk(self) -> None:
        """Forget the bulk that still waits."""
        while not self._bulk.empty():
            self._bulk.get_nowait()
        self._queued.clear()
