"""What strangers at the endpoint's door can do: nothing, over real sockets on loopback."""

from __future__ import annotations

import asyncio
import base64
import logging
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tapestry.node.errors import UserError
from tapestry.node.surface.door import Door, DoorLimits
from tapestry.node.surface.http import HttpServer, needs_token, start_http
from tapestry.node.surface.metrics import Metrics
from tapestry.node.surface.token import Token, bearer

QUICK = DoorLimits(connections_max=4, idle_s=0.2, answer_s=5.0, requests_per_s=1e6)
ASK = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


class View:
    def status(self) -> dict[str, object]:
        return {"epoch": 3}

    def peers(self) -> list[dict[str, object]]:
        return []

    def ready(self) -> tuple[bool, str]:
        return True, ""


class CountedMetrics(Metrics):
    rendered = 0

    def render(self) -> bytes:
        self.rendered += 1
        return super().render()


def with_server(
    use: Callable[[HttpServer], Awaitable[None]],
    limits: DoorLimits | None = None,
    host: str = "127.0.0.1",
    token: Token | None = None,
    metrics: Metrics | None = None,
) -> None:
    async def main() -> None:
        server = await start_http(View(), metrics or Metrics("0.1.0"), host, 0, token, limits)
        try:
            async with asyncio.timeout(20):
                await use(server)
        finally:
            await server.close()

    asyncio.run(main())


async def opened(server: HttpServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", server.port)


async def asked(server: HttpServer, request: bytes = ASK) -> bytes:
    """The answer's first line."""
    reader, writer = await opened(server)
    writer.write(request)
    line = await reader.readline()
    writer.close()
    return line


async def ended(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read(1) == b""
    except ConnectionError:
        return True


def test_a_connection_without_a_request_is_closed() -> None:
    async def use(server: HttpServer) -> None:
        reader, writer = await opened(server)
        assert await ended(reader)
        writer.close()

    with_server(use, QUICK)


def test_a_request_that_drips_is_closed_however_busy_it_looks() -> None:
    async def use(server: HttpServer) -> None:
        reader, writer = await opened(server)
        end = asyncio.create_task(ended(reader))
        writer.write(b"GET /healthz HTTP/1.1\r\n")
        for _ in range(100):
            if end.done():
                break
            writer.write(b"X: y\r\n")
            await asyncio.sleep(0.02)
        assert end.done() and await end
        writer.close()

    with_server(use, QUICK)


def test_an_answer_that_is_not_taken_is_given_up() -> None:
    """The client sends requests and reads no answer: aiohttp waits for it, the door does not."""

    async def use(server: HttpServer) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
        with pytest.raises(ConnectionError):
            while True:
                sent = asyncio.get_running_loop().sock_sendall(
                    sock, ASK.replace(b"/healthz", b"/metrics") * 50
                )
                await asyncio.wait_for(sent, 10)
        sock.close()

    with_server(use, QUICK)


def test_when_all_places_are_held_the_longest_silent_one_goes() -> None:
    async def use(server: HttpServer) -> None:
        held = [await opened(server) for _ in range(40)]
        assert await asked(server) == b"HTTP/1.1 200 OK\r\n"
        assert await ended(held[0][0])
        for _, writer in held:
            writer.close()

    with_server(use, DoorLimits(connections_max=4, idle_s=60.0))


def test_a_connection_whose_request_is_answered_keeps_its_place() -> None:
    class Transport:
        aborted = closing = False

        def is_closing(self) -> bool:
            return self.closing

        def abort(self) -> None:
            self.aborted = True

    async def main() -> None:
        door = Door(asyncio.Protocol, DoorLimits(connections_max=2))
        guests, transports = [door() for _ in range(3)], [Transport() for _ in range(3)]
        for guest, transport in zip(guests[:2], transports[:2], strict=True):
            guest.connection_made(transport)  # type: ignore[arg-type]
        with door.answering(guests[0].inner):
            guests[2].connection_made(transports[2])  # type: ignore[arg-type]
        assert [t.aborted for t in transports] == [False, True, False]
        assert door.open == 2
        for guest in guests:
            guest.connection_lost(None)

    asyncio.run(main())


def test_requests_above_the_rate_wait_for_their_turn() -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def main() -> None:
        door = Door(asyncio.Protocol, DoorLimits(requests_per_s=10.0, requests_burst=5), sleep)
        for _ in range(8):
            await door.turn()

    asyncio.run(main())
    assert waits == pytest.approx([0.1, 0.2], abs=0.05) or waits == pytest.approx([0.0, 0.1, 0.2], abs=0.05)


def test_requests_of_who_has_left_again_keep_nobody_waiting() -> None:
    """Thousands ask and leave: who comes after them is answered within the time of those who have places."""
    limits = DoorLimits(connections_max=8, requests_per_s=40.0, requests_burst=4, connections_per_s=1e6)

    async def use(server: HttpServer) -> None:
        for _ in range(300):
            _, writer = await opened(server)
            writer.write(ASK)
            writer.close()
        await asyncio.sleep(0.05)
        began = asyncio.get_running_loop().time()
        answers = [await asked(server)]
        while answers[-1] != b"HTTP/1.1 200 OK\r\n":
            assert answers[-1].startswith(b"HTTP/1.1 503")
            await asyncio.sleep(0.05)
            answers.append(await asked(server))
        assert asyncio.get_running_loop().time() - began < 1.5  # 300 turns take 7.5 s
        assert len(asyncio.all_tasks()) < 40

    with_server(use, limits)


def test_who_is_refused_loses_its_connection_and_takes_nobodys_turn() -> None:
    """A refusal is charged to nobody; so it costs a connection, of which so many a second are taken."""
    limits = DoorLimits(requests_per_s=1.0, requests_burst=1, connections_max=2)

    async def use(server: HttpServer) -> None:
        for _ in range(5):
            answer = await all_of(server, ASK.replace(b"127.0.0.1", b"elsewhere") * 2)
            assert answer.startswith(b"HTTP/1.1 403") and answer.count(b"HTTP/1.1") == 1
        assert await asked(server) == b"HTTP/1.1 200 OK\r\n"
        for _ in range(5):
            _, writer = await opened(server)
            writer.write(ASK)
            await asyncio.sleep(0.02)
            writer.close()
        answer = await all_of(server, ASK * 2)
        assert answer.startswith(b"HTTP/1.1 503") and answer.count(b"HTTP/1.1") == 1

    async def all_of(server: HttpServer, request: bytes) -> bytes:
        reader, writer = await opened(server)
        writer.write(request)
        answer = await reader.read(-1)
        writer.close()
        return answer

    with_server(use, limits)


def test_connections_are_taken_at_a_rate_and_all_of_them() -> None:
    limits = DoorLimits(connections_per_s=50.0, connections_burst=5, requests_per_s=1e6)

    async def use(server: HttpServer) -> None:
        began = asyncio.get_running_loop().time()
        lines = await asyncio.gather(*(asked(server) for _ in range(25)))
        assert set(lines) == {b"HTTP/1.1 200 OK\r\n"}
        assert asyncio.get_running_loop().time() - began > 0.3  # 20 of them at 50 a second
        assert await asked(server) == b"HTTP/1.1 200 OK\r\n"

    with_server(use, limits)


def test_metrics_are_made_once_however_many_ask() -> None:
    metrics = CountedMetrics("0.1.0")

    async def use(server: HttpServer) -> None:
        for _ in range(20):
            assert await asked(server, ASK.replace(b"/healthz", b"/metrics")) == b"HTTP/1.1 200 OK\r\n"
        assert metrics.rendered <= 2

    with_server(use, metrics=metrics)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /status HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nzzzz",
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -7\r\n\r\n",
        b"POST /status HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999\r\n\r\n" + b"a" * 100_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 nonsense\r\n\r\n",
    ],
)
def test_what_a_client_does_wrong_is_answered_and_no_traceback(
    request_bytes: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def use(server: HttpServer) -> None:
        assert (await asked(server, request_bytes)).startswith(b"HTTP/1.")
        assert await asked(server) == b"HTTP/1.1 200 OK\r\n"

    with caplog.at_level(logging.INFO):
        with_server(use)
    assert not [record for record in caplog.records if record.name != "asyncio" or record.levelno >= 40]


# --- the token --------------------------------------------------------------------------------------


def test_beyond_loopback_only_who_shows_the_token_is_answered(tmp_path: Path) -> None:
    token = Token.load_or_create(tmp_path / "http.token")
    basic = base64.b64encode(f"me:{token.text}".encode()).decode()

    async def use(server: HttpServer) -> None:
        def with_header(value: str, path: str = "/status") -> bytes:
            header = f"Authorization: {value}\r\n" if value else ""
            return f"GET {path} HTTP/1.1\r\nHost: node.example\r\n{header}\r\n".encode()

        for wrong in (
            "",
            f"Bearer {token.text}x",
            "Bearer",
            "Basic !!",
            f"Digest {token.text}",
            "Bearer \xff",
        ):
            for path in ("/status", "/metrics", "/peers", "/readyz", "/", "/none"):
                assert b" 401 " in await asked(server, with_header(wrong, path)), (wrong, path)
        assert b" 200 " in await asked(server, with_header(f"Bearer {token.text}"))
        assert b" 200 " in await asked(server, with_header(f"Basic {basic}"))
        assert b" 200 " in await asked(server, with_header("", "/healthz"))

    with_server(use, host="0.0.0.0", token=token)


def test_a_token_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "http.token"
    made, again = Token.load_or_create(path), Token.load_or_create(path)
    assert made.new and not again.new and made.text == again.text and len(made.text) >= 40
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert bearer(path) == {"Authorization": f"Bearer {made.text}"}
    assert bearer(tmp_path / "none") == {}


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "http.token"
    Token.load_or_create(path)
    path.chmod(0o640)
    with pytest.raises(UserError, match="can be read by other users"):
        Token.load_or_create(path)


def test_loopback_needs_no_token_and_every_other_address_does() -> None:
    assert [needs_token(host) for host in ("127.0.0.1", "localhost", "::1")] == [False] * 3
    assert [needs_token(host) for host in ("0.0.0.0", "::", "10.0.0.3", "node.example")] == [True] * 4


def test_of_a_request_without_an_end_so_many_bytes_are_read_and_no_more() -> None:
    class Reader(asyncio.Protocol):
        got = 0

        def data_received(self, data: bytes) -> None:
            Reader.got += len(data)

    async def main() -> None:
        door = Door(Reader, DoorLimits(request_bytes=100_000, idle_s=2.0))
        server = await asyncio.get_running_loop().create_server(door, "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        writer.write(b"a" * 50_000_000)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.drain(), 1.0)
        assert Reader.got == 100_000 and door.open == 1
        for _ in range(200):  # until its time is over
            if door.open:
                await asyncio.sleep(0.05)
        assert door.open == 0
        writer.transport.abort()
        server.close()

    asyncio.run(main())
