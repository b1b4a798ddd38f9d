"""The local endpoint, over real sockets on loopback, port 0."""

from __future__ import annotations

import asyncio
import json
import math
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.surface.http import HttpServer, start_http
from tapestry.node.surface.metrics import Metrics


@dataclass
class FakeView:
    state: dict[str, Any] = field(default_factory=lambda: {"epoch": 3, "loss": 2.5})
    others: list[dict[str, Any]] = field(default_factory=list)
    readiness: tuple[bool, str] = (True, "")

    def status(self) -> dict[str, Any]:
        return self.state

    def peers(self) -> list[dict[str, Any]]:
        return self.others

    def ready(self) -> tuple[bool, str]:
        return self.readiness


@dataclass(frozen=True)
class Answer:
    status: int
    body: str
    headers: dict[str, str]


Get = Callable[..., Awaitable[Answer]]


def _with_server(
    view: FakeView, use: Callable[[HttpServer, Get], Awaitable[None]], host: str = "127.0.0.1"
) -> None:
    async def run() -> None:
        server = await start_http(view, Metrics("0.1.0"), host, 0)
        try:
            async with aiohttp.ClientSession() as session:

                async def get(path: str, method: str = "GET", **headers: str) -> Answer:
                    async with session.request(method, server.url + path, headers=headers) as response:
                        return Answer(response.status, await response.text(), dict(response.headers))

                await use(server, get)
        finally:
            await server.close()

    asyncio.run(run())


def test_metrics_are_prometheus_text() -> None:
    async def use(_: HttpServer, get: Get) -> None:
        answer = await get("/metrics")
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert "tapestry_epoch 0.0\n" in answer.body

    _with_server(FakeView(), use)


def test_status_and_peers_are_json_with_null_for_what_is_not_finite() -> None:
    view = FakeView({"loss": math.nan, "round": {"norms": [math.inf, 1.5]}, "name": "ü"}, [{"peer_id": "a"}])

    async def use(_: HttpServer, get: Get) -> None:
        answer = await get("/status")
        assert answer.headers["Content-Type"].startswith("application/json")
        assert json.loads(answer.body) == {"loss": None, "round": {"norms": [None, 1.5]}, "name": "ü"}
        assert json.loads((await get("/peers")).body) == [{"peer_id": "a"}]

    _with_server(view, use)


def test_readyz_is_503_with_the_reason_until_the_node_is_ready() -> None:
    view = FakeView(readiness=(False, "joining: 3 of 10 parts of the state are here"))

    async def use(_: HttpServer, get: Get) -> None:
        answer = await get("/readyz")
        assert (answer.status, answer.body) == (503, "joining: 3 of 10 parts of the state are here\n")
        view.readiness = (True, "")
        answer = await get("/readyz")
        assert (answer.status, answer.body) == (200, "ready\n")
        view.readiness = (True, "1 contributions, the run asks for 2, for 5 min; invite one")
        answer = await get("/readyz")
        assert answer.status == 200
        assert answer.body == "ready; 1 contributions, the run asks for 2, for 5 min; invite one\n"

    _with_server(view, use)


def test_healthz_is_200_whether_or_not_the_node_is_ready() -> None:
    async def use(_: HttpServer, get: Get) -> None:
        assert (await get("/healthz")).status == 200

    _with_server(FakeView(readiness=(False, "joining")), use)


def test_answers_are_not_cached_nor_sniffed() -> None:
    async def use(_: HttpServer, get: Get) -> None:
        for path in ("/", "/page/app.js", "/metrics", "/status", "/peers", "/history", "/healthz", "/readyz"):
            headers = (await get(path)).headers
            assert headers["Cache-Control"] == "no-store"
            assert headers["X-Content-Type-Options"] == "nosniff"

    _with_server(FakeView(), use)


@pytest.mark.parametrize(
    "name", ["localhost", "localhost:8080", "127.0.0.1", "127.0.0.2:1", "[::1]:80", "LOCALHOST"]
)
def test_on_loopback_loopback_names_are_answered_on_whatever_port(name: str) -> None:
    async def use(_: HttpServer, get: Get) -> None:
        assert (await get("/status", Host=name)).status == 200

    _with_server(FakeView(), use)


@pytest.mark.parametrize(
    "name", ["evil.example", "evil.example:80", "localhost.evil.example", "10.0.0.1", "[::2]", ""]
)
def test_on_loopback_a_name_that_was_rebound_to_us_gets_403(name: str) -> None:
    async def use(_: HttpServer, get: Get) -> None:
        for path in ("/status", "/metrics", "/", "/none"):
            assert (await get(path, Host=name)).status == 403

    _with_server(FakeView(), use)


def test_bound_to_every_interface_any_name_is_answered_and_the_url_is_loopback() -> None:
    async def use(server: HttpServer, get: Get) -> None:
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert (await get("/status", Host="node.example.org")).status == 200

    _with_server(FakeView(), use, host="0.0.0.0")


def test_nothing_can_be_changed_over_http() -> None:
    async def use(_: HttpServer, get: Get) -> None:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert (await get("/status", method)).status == 405
        assert (await get("/none")).status == 404

    _with_server(FakeView(), use)


def test_port_0_takes_a_free_port_and_close_gives_it_back() -> None:
    async def run() -> None:
        server = await start_http(FakeView(), Metrics("0.1.0"), "127.0.0.1", 0)
        assert server.port > 0
        await server.close()
        again = await start_http(FakeView(), Metrics("0.1.0"), "127.0.0.1", server.port)
        await again.close()

    asyncio.run(run())


def test_a_port_in_use_is_one_line_with_the_port_and_the_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as caught:
            asyncio.run(start_http(FakeView(), Metrics("0.1.0"), "127.0.0.1", port))
    assert caught.value.line == f"--http: port {port} on 127.0.0.1 is in use"
    assert caught.value.hint == "--http HOST:PORT; port 0 takes a free one"
    assert caught.value.exit_code == ExitCode.USAGE


def test_an_address_of_another_machine_is_one_line() -> None:
    with pytest.raises(UserError, match=r"--http: 192\.0\.2\.1 is not an address of this machine"):
        asyncio.run(start_http(FakeView(), Metrics("0.1.0"), "192.0.2.1", 0))
