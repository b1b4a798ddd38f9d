"""The local endpoint: /metrics /status /peers /history /events /healthz /readyz, and at / the page.

Reads the node through `View` and `Metrics`; the one thing that changes something, POST /admit, asks for the
home's token wherever it comes from (admit.py). Bound to a loopback address the endpoint answers only
requests that name a loopback host: a web page that points its own name at 127.0.0.1 (DNS rebinding) gets
403. Bound to any other address it answers who shows the home's token (token.py), and of /healthz only that
the loop is alive.

Whoever reaches it cannot harm the node: door.py bounds connections, their time and the rate of requests;
requests are small; /metrics is answered from a text made at most once a second.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

from tapestry.node.surface.admit import Admit
from tapestry.node.surface.assets import PREFIX, get_asset, get_page
from tapestry.node.surface.door import Door, DoorLimits
from tapestry.node.surface.history import History
from tapestry.node.surface.listener import Listener, ListenerLimits, cannot_listen
from tapestry.node.surface.metrics import CONTENT_TYPE, Metrics
from tapestry.node.surface.sse import EventStreams
from tapestry.node.surface.tls import ServerTls
from tapestry.node.surface.token import Token

CLOSE_TIMEOUT_S = 1.0  # requests under way get so long when the node stops
REQUEST_BYTES_MAX = 1024  # of a body; /admit alone takes one
LINE_BYTES_MAX = 4096  # of a request, and of each of its headers. Guess: browsers send one of a kilobyte
HEADERS_MAX = 64  # Guess
BACKLOG = 64  # that wait in the kernel, and so are taken at once at most
METRICS_EVERY_S = 1.0  # Guess: a scraper asks every 15 s
OPEN_PATHS = ("/healthz",)  # that need no token

# What a client did: a request that is none, or that ended in the middle of its body.
THEIRS = (web.HTTPException, HttpProcessingError, ConnectionError)

_log = logging.getLogger("tapestry.http")


class View(Protocol):
    """What the endpoint may know of the node. Called on the event loop; must not block."""

    def status(self) -> dict[str, Any]:
        """The keys of /status, as JSON values. NaN and infinities become null."""

    def peers(self) -> list[dict[str, Any]]:
        """One table per live peer."""

    def ready(self) -> tuple[bool, str]:
        """Whether the node has joined and is at the head; and why not, or what it waits for all the same."""


@dataclass(frozen=True, slots=True)
class HttpServer:
    """A running endpoint. `host` and `port` are what it is bound to, `url` is where to find it."""

    host: str
    port: int
    url: str
    runner: web.AppRunner
    listener: Listener

    async def close(self) -> None:
        """Stop listening; returns when the last request is answered, or after CLOSE_TIMEOUT_S."""
        self.listener.close()
        await self.runner.cleanup()


async def start_http(
    view: View,
    metrics: Metrics,
    host: str,
    port: int,
    token: Token | None = None,  # None: whoever passes the host check is answered
    limits: DoorLimits | None = None,
    history: History | None = None,  # None: an empty one
    admit: Admit | None = None,  # None: nobody is admitted from here
    tls: ServerTls | None = None,  # None: not encrypted
) -> HttpServer:
    """Listen on host:port, where port 0 takes a free one; raises UserError if that cannot be."""
    doors: list[Door] = []  # one, as soon as there is aiohttp's server behind it
    guard = _guard(host, token, doors)
    runner = _runner(_application(view, metrics, history or History(), admit, guard, doors))
    await runner.setup()
    assert runner.server is not None
    doors.append(Door(runner.server, limits := limits or DoorLimits()))
    try:
        listener = await Listener.open(
            doors[0], host, port, _listener_limits(limits), None if tls is None else tls.context
        )
    except OSError as error:
        await runner.cleanup()
        raise cannot_listen(host, port, error) from error
    bound_port = int(listener.sockets[0].getsockname()[1])
    scheme = "http" if tls is None else "https"
    return HttpServer(host, bound_port, _url(scheme, host, bound_port), runner, listener)


def _listener_limits(limits: DoorLimits) -> ListenerLimits:
    return ListenerLimits(
        limits.connections_per_s, limits.connections_burst, limits.connections_max, limits.idle_s, BACKLOG
    )


def _runner(application: web.Application) -> web.AppRunner:
    return web.AppRunner(
        application,
        access_log=None,
        handle_signals=False,
        shutdown_timeout=CLOSE_TIMEOUT_S,
        logger=_Library(_log),
        auto_decompress=False,  # bodies are not read, packed ones neither
        lingering_time=0.0,
        max_line_size=LINE_BYTES_MAX,
        max_field_size=LINE_BYTES_MAX,
        max_headers=HEADERS_MAX,
    )


def needs_token(host: str) -> bool:
    """Whether an endpoint bound to `host` can be reached from other machines."""
    return not _is_loopback(host)


class _Library(logging.LoggerAdapter[logging.Logger]):
    """aiohttp's log: what a client did wrong is a line for who looks for it, never a traceback."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        error = kwargs.pop("exc_info", None)
        ours = isinstance(error, Exception) and not isinstance(error, THEIRS)
        self.logger.log(level if ours else logging.DEBUG, msg, *args, exc_info=error if ours else None)


class _Rendered:
    """The text of /metrics, made again when it is old."""

    def __init__(self, render: Callable[[], bytes]) -> None:
        self._render = render
        self._text = b""
        self._made_at = -math.inf

    def text(self) -> bytes:
        now = asyncio.get_running_loop().time()
        if now - self._made_at >= METRICS_EVERY_S:
            self._text, self._made_at = self._render(), now
        return self._text


def _application(
    view: View,
    metrics: Metrics,
    history: History,
    admit: Admit | None,
    guard: Middleware,
    doors: list[Door],
) -> web.Application:
    rendered = _Rendered(metrics.render)

    async def get_metrics(_: web.Request) -> web.Response:
        return web.Response(body=rendered.text(), headers={"Content-Type": CONTENT_TYPE})

    async def get_status(_: web.Request) -> web.Response:
        return _json(view.status())

    async def get_peers(_: web.Request) -> web.Response:
        return _json(view.peers())

    async def get_history(_: web.Request) -> web.Response:
        return _json(history.everything())

    async def get_healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def get_readyz(_: web.Request) -> web.Response:
        ready, reason = view.ready()
        text = "; ".join(filter(None, ["ready" if ready else "", reason]))
        return web.Response(text=f"{text}\n", status=200 if ready else 503)

    def now() -> object:
        ready, reason = view.ready()
        return _finite({"status": view.status(), "peers": view.peers(), "ready": ready, "reason": reason})

    def goes_on(request: web.Request) -> None:
        for door in doors:
            door.goes_on(request.protocol)

    streams = EventStreams(now, history, goes_on)
    app = web.Application(middlewares=[guard], client_max_size=REQUEST_BYTES_MAX)
    app.router.add_get("/metrics", get_metrics)
    app.router.add_get("/status", get_status)
    app.router.add_get("/peers", get_peers)
    app.router.add_get("/history", get_history)
    app.router.add_get("/events", streams.serve)
    app.router.add_get("/healthz", get_healthz)
    app.router.add_get("/readyz", get_readyz)
    if admit is not None:
        app.router.add_post("/admit", admit.serve)
    app.router.add_get("/", get_page)
    app.router.add_get(PREFIX + "{path:[a-zA-Z0-9./_-]+}", get_asset)
    app.on_shutdown.append(streams.close)
    return app


def _guard(bound_host: str, token: Token | None, doors: list[Door]) -> Middleware:
    """Refuse foreign Host headers on a loopback binding, and elsewhere who does not show the token."""
    loopback_only = _is_loopback(bound_host)

    def refusal(request: web.Request) -> web.Response | None:
        if loopback_only and not _is_loopback(_host_of(request.headers.get("Host", ""))):
            return web.Response(text="this endpoint answers to localhost and 127.0.0.1 only\n", status=403)
        shown = request.headers.get("Authorization", "")
        if token is None or request.path in OPEN_PATHS or token.is_in(shown):
            return None
        text = f"this endpoint needs a token; it is in {token.path.name} in the node's home\n"
        return web.Response(text=text, status=401, headers={"WWW-Authenticate": 'Basic realm="tapestry"'})

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        with doors[0].answering(request.protocol):
            refused = refusal(request)
            if refused is None and not await doors[0].turn():
                refused = _too_many()
            if refused is not None:  # each costs a connection, and those are taken at a rate
                refused.force_close()
            response = await handler(request) if refused is None else refused
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    return guard


def _too_many() -> web.Response:
    return web.Response(text="too many requests; ask again\n", status=503, headers={"Retry-After": "1"})


def _host_of(header: str) -> str:
    """The host in a Host header, without the port: it changes when the port is forwarded."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _json(value: object) -> web.Response:
    return web.json_response(_finite(value), dumps=_dumps)


def _dumps(value: object) -> str:
    return json.dumps(value, allow_nan=False)


def _finite(value: object) -> object:
    """The value with None for NaN and infinities, which JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _url(scheme: str, host: str, port: int) -> str:
    """Where this machine finds the endpoint; a wildcard address is found on loopback."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{reachable}]:{port}" if ":" in reachable else f"{scheme}://{reachable}:{port}"
