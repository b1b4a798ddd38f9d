"""Whatever goes wrong with one guest, the listener takes the next."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import gc
import logging
import socket
import warnings
from collections.abc import AsyncIterator, Callable

import pytest

from tapestry.node.surface import listener as listener_module
from tapestry.node.surface.listener import Listener, ListenerLimits

LIMITS = ListenerLimits(
    connections_per_s=20.0, connections_burst=5, handshakes_max=4, handshake_s=5.0, backlog=8
)


class Greeter(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"come in")
        transport.close()


@contextlib.asynccontextmanager
async def listening(
    context: Callable[[], None] | None = None, limits: ListenerLimits = LIMITS
) -> AsyncIterator[Listener]:
    """For 10 seconds at most."""
    listener = await Listener.open(Greeter, "127.0.0.1", 0, limits, context)  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(10.0):
            yield listener
    finally:
        listener.close()
        await asyncio.sleep(0.01)  # its tasks end


async def said_to_a_guest(listener: Listener) -> bytes:
    """b"" if it is shown the door."""
    reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
    try:
        return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize("why", [errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.EMFILE])
def test_a_guest_that_is_gone_stops_nothing_and_a_lack_of_files_is_said(
    why: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Linux tells errors of the new connection as errors of accept: each stopped all for a second."""
    is_ours = why == errno.EMFILE
    monkeypatch.setattr(listener_module, "AGAIN_S", 0.01 if is_ours else 60.0)

    async def main() -> None:
        loop, failures = asyncio.get_running_loop(), [OSError(why, "no")] * 12
        accept = loop.sock_accept

        async def sock_accept(one: socket.socket) -> tuple[socket.socket, object]:
            if failures:
                raise failures.pop()
            return await accept(one)

        monkeypatch.setattr(loop, "sock_accept", sock_accept)
        async with listening() as listener:
            began_s = loop.time()
            assert await said_to_a_guest(listener) == b"come in"
            assert is_ours or loop.time() - began_s > 0.2, "what fails at once takes turns too"

    with caplog.at_level(logging.WARNING, "tapestry.http"):
        asyncio.run(main())
    assert len(caplog.records) == (12 if is_ours else 0)


def test_a_bug_of_ours_in_accepting_is_told_and_does_not_end_the_endpoint(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody awaits that task: the endpoint was gone, and no line said so."""
    monkeypatch.setattr(listener_module, "AGAIN_S", 0.01)

    async def main() -> None:
        loop, failures = asyncio.get_running_loop(), [RuntimeError("a bug of ours")]
        accept = loop.sock_accept

        async def sock_accept(one: socket.socket) -> tuple[socket.socket, object]:
            if failures:
                raise failures.pop()
            return await accept(one)

        monkeypatch.setattr(loop, "sock_accept", sock_accept)
        async with listening() as listener:
            assert await said_to_a_guest(listener) == b"come in"

    asyncio.run(main())
    (record,) = caplog.records
    assert record.name == "tapestry.http" and record.exc_info is not None


def test_a_certificate_that_breaks_something_closes_the_connection_and_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The socket was left to the garbage collector, and the error to whoever reads of unretrieved ones."""
    broken = [True]

    def context() -> None:
        if broken.pop():
            raise ValueError("no such certificate")

    async def main() -> None:
        async with listening(context) as listener:
            assert await said_to_a_guest(listener) == b""
            broken.append(False)
            assert await said_to_a_guest(listener) == b"come in"

    asyncio.run(main())
    (record,) = caplog.records
    assert record.name == "tapestry.http" and record.exc_info is not None


def test_guests_that_come_all_at_once_are_shown_the_door_or_let_in_and_none_is_left_open() -> None:
    """Of them some were to make room before their own turn had begun, and lay there."""

    async def main() -> None:
        async with listening(limits=dataclasses.replace(LIMITS, handshakes_max=1)) as listener:
            guests = [socket.create_connection(listener.sockets[0].getsockname()) for _ in range(5)]
            readers = [(await asyncio.open_connection(sock=guest)) for guest in guests]
            said = [await reader.read() for reader, _ in readers]
            assert said.count(b"") > 0 and said.count(b"come in") > 0
            for _, writer in readers:
                writer.close()

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        asyncio.run(main())
        gc.collect()
    assert [str(one.message) for one in warned] == []
