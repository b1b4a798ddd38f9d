"""Target of fuzz.py: what comes in at the endpoint's port, from its first byte to the answer, with no socket.

The application, its guard and its door are those of surface/http.py; a transport in memory stands for the
connection. A request must get an answer that is no server error, or be dropped; /events sends its first piece
and is left.
"""

from __future__ import annotations

import asyncio
import logging
from functools import cache
from pathlib import Path
from typing import Any

from _fuzzing import Target

from tapestry.node.surface import http
from tapestry.node.surface.admit import Admit
from tapestry.node.surface.door import Door, DoorLimits
from tapestry.node.surface.history import History
from tapestry.node.surface.metrics import Metrics
from tapestry.node.surface.token import Token

TOKEN = Token("t" * 43, Path("http.token"))
TURNS = 12  # of the loop: a request takes about six to its answer


class Failed(Exception):
    """An answer of 500, or an error in the log."""


class View:
    def status(self) -> dict[str, Any]:
        return {"epoch": 3, "loss": float("nan")}

    def peers(self) -> list[dict[str, Any]]:
        return [{"peer_id": "a"}]

    def ready(self) -> tuple[bool, str]:
        return True, ""


class Wire(asyncio.Transport):
    """A connection: what is written lies in `sent`."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.closed = bytearray(), False

    def write(self, data: Any) -> None:
        self.sent += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default


class Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record)


class Endpoint:
    """Made once; one connection after another."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(self._lost)
        self.lost: list[dict[str, Any]] = []
        self.errors = Errors()
        for name in ("tapestry.http", "aiohttp", "asyncio"):
            logging.getLogger(name).addHandler(self.errors)
        self.door = self.loop.run_until_complete(self._opened())

    async def _opened(self) -> Door:
        doors: list[Door] = []
        guard, admit = http._guard("127.0.0.1", None, doors), Admit(TOKEN, lambda peer, name: "")
        app = http._application(View(), Metrics("0"), History(), admit, guard, doors)
        runner = http._runner(app)
        await runner.setup()
        doors.append(Door(runner.server, DoorLimits(requests_per_s=1e9)))
        return doors[0]

    def _lost(self, _: Any, context: dict[str, Any]) -> None:
        self.lost.append(context)

    def take(self, data: bytes) -> None:
        """One connection that sends this and goes."""
        self.loop.run_until_complete(self._take(data))
        if self.lost:
            raise Failed(self.lost.pop().get("message")) from None
        if self.errors.seen:
            raise Failed(self.errors.seen.pop().getMessage())

    async def _take(self, data: bytes) -> None:
        guest, wire = self.door(), Wire()
        guest.connection_made(wire)
        guest.data_received(data)
        for _ in range(TURNS):
            await asyncio.sleep(0)
        guest.eof_received()
        guest.connection_lost(None)
        for _ in range(TURNS):
            await asyncio.sleep(0)
        if b"HTTP/1.1 500" in wire.sent or b"HTTP/1.0 500" in wire.sent:
            raise Failed(bytes(wire.sent[:200]))


@cache
def endpoint() -> Endpoint:
    return Endpoint()


def _get(path: str, *headers: str, method: str = "GET", body: str = "") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost:9470", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


def of_endpoint() -> dict[str, Target]:
    """What comes from browsers and scrapers."""
    here, asked = (
        endpoint(),
        '{"peer": "12D3KooWFAQWzWY2n8KUGGaXykyzafrNgSCsfTmabDmNUZkDoTn5", "name": "lab"}',
    )
    shown = (f"Authorization: Bearer {TOKEN.text}", f"Content-Length: {len(asked)}")
    admitted = _get("/admit", *shown, method="POST", body=asked)
    paths = ("/", "/status", "/events", "/history", "/metrics", "/readyz", "/page/app.js")
    return {"http": Target(here.take, (), (*map(_get, paths), admitted), None, 100)}
