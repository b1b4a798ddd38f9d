"""/events: what a browser must know to show this node as it is, pushed to it (server-sent events).

    event: history   data: as /history; at the start, and when something in between was forgotten
    event: point | record | event   data: one of the history's, as it comes
    event: now       data: {"status": as /status, "peers": as /peers, "ready", "reason"}, each second

Each stream has its own place in the history and no queue: one that reads slowly misses nothing but time, and
one that does not read is dropped. The JSON of `now` is made once for all streams.

HTML living standard, 9.2 Server-sent events.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tapestry.node.surface.history import History, kind_of, plain

STREAMS_MAX = 16  # Guess: browsers' tabs that look at one node
TICK_S = 1.0
WRITE_S = 8.0  # a stream that takes nothing for so long is closed; door.py would after ten
RETRY_MS = 1000  # after which a browser calls again

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Accel-Buffering": "no",  # a proxy must not gather them
}


class EventStreams:
    """All streams of one endpoint."""

    def __init__(
        self,
        look: Callable[[], Any],
        history: History,
        goes_on: Callable[[web.Request], None] = lambda request: (
            None
        ),  # called after each piece that is taken
    ) -> None:
        self._look = look  # the value of `now`, as JSON values
        self._history = history
        self._goes_on = goes_on
        self._open = 0
        self._closing = asyncio.Event()
        self._now = b""
        self._now_at = -TICK_S

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """The handler: a stream until the browser goes, or the node stops."""
        if self._open >= STREAMS_MAX:
            text = f"{STREAMS_MAX} pages are open already: close one, or read /status\n"
            return web.Response(text=text, status=503)
        self._open += 1
        try:
            response = web.StreamResponse(headers=HEADERS)
            await response.prepare(request)
            await self._write_all(request, response)
            return response
        finally:
            self._open -= 1

    async def close(self, _: object = None) -> None:
        """End all of them soon; a node that stops waits for none."""
        self._closing.set()

    async def _write_all(self, request: web.Request, response: web.StreamResponse) -> None:
        told: int | None = None
        try:
            await response.write(f"retry: {RETRY_MS}\n\n".encode())
            while not self._closing.is_set():
                news, told = self._news(told), self._history.count
                async with asyncio.timeout(WRITE_S):
                    await response.write(news + self._now_event())
                self._goes_on(request)
                try:
                    await asyncio.wait_for(self._closing.wait(), TICK_S)
                except TimeoutError:
                    continue
        except (ConnectionError, TimeoutError):
            return

    def _news(self, told: int | None) -> bytes:
        """What came after news number `told`."""
        entries = None if told is None else self._history.since(told)
        if entries is None:
            return _event("history", self._history.everything())
        return b"".join(_event(kind_of(entry), plain(entry)) for entry in entries)

    def _now_event(self) -> bytes:
        if time.monotonic() - self._now_at >= TICK_S / 2:
            self._now, self._now_at = _event("now", self._look()), time.monotonic()
        return self._now


def _event(name: str, value: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(value, allow_nan=False, separators=(',', ':'))}\n\n".encode()
