"""What is asked of p2pd, by a p2pd that answers wrongly or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import base58
import pytest
from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2

from tapestry.dht import control as control_module
from tapestry.dht.control import Control, Unreachable
from tapestry.dht.p2pd import SwarmError

PEER = "12D3KooWFAQWzWY2n8KUGGaXykyzafrNgSCsfTmabDmNUZkDoTn5"
Answers = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def _asked(folder: Path, answers: Answers, question: Callable[[Control], Awaitable[object]]) -> object:
    async def main() -> object:
        ended: list[asyncio.Event] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            ended.append(asyncio.Event())
            try:
                await answers(reader, writer)
                assert await reader.read(-1) == b"", "our end is closed, whatever came of it"
            finally:
                writer.close()
                ended[-1].set()

        server = await asyncio.start_unix_server(serve, path=folder / "control")
        try:
            return await question(Control(str(folder / "control")))
        finally:
            async with asyncio.timeout(5.0):
                for one in ended:
                    await one.wait()
            server.close()
            await server.wait_closed()

    return asyncio.run(main())


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_pbmsg_safe(reader, p2pd_pb2.Request())


async def ending(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await silent(reader, writer)
    writer.close()


async def refusing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await silent(reader, writer)
    response = p2pd_pb2.Response(type=p2pd_pb2.Response.ERROR)
    response.error.msg = "dial tcp4: connect: connection refused"
    await write_pbmsg(writer, response)


def test_a_p2pd_that_is_silent_or_ends_is_told_from_a_peer_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "CONTROL_TIMEOUT_S", 0.1)
    for answers, why in ((silent, "does not answer in"), (ending, "has ended"), (refusing, "refused")):
        with pytest.raises(SwarmError, match=why):
            _asked(tmp_path, answers, lambda control: control.connections())


def test_what_p2pd_says_of_a_dial_becomes_one_word_and_the_address(tmp_path: Path) -> None:
    def connect(control: Control) -> Awaitable[object]:
        return control.connect(PEER, ("/ip4/127.0.0.1/tcp/1",), 0.1)

    for answers, reason in ((silent, "timeout"), (refusing, "refused")):
        with pytest.raises(Unreachable, match=r"/ip4/127\.0\.0\.1/tcp/1: ") as failure:
            _asked(tmp_path, answers, connect)
        assert failure.value.reason == reason
    with pytest.raises(Unreachable) as failure:
        asyncio.run(Control("nowhere").connect(PEER, ("no address",), 0.1))
    assert failure.value.reason == "unroutable"


def test_a_peer_with_several_connections_is_listed_once(tmp_path: Path) -> None:
    async def listing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await silent(reader, writer)
        response = p2pd_pb2.Response(type=p2pd_pb2.Response.OK)
        for address in (b"\x04\x7f\x00\x00\x01\x06\x0f\xa1", b"\x04\x0a\x00\x00\x01\x06\x0f\xa1", b"\xff"):
            response.peers.add(id=base58.b58decode(PEER), addrs=[address])
        await write_pbmsg(writer, response)

    assert _asked(tmp_path, listing, lambda control: control.connections()) == {
        PEER: ["/ip4/127.0.0.1/tcp/4001", "/ip4/10.0.0.1/tcp/4001"]
    }
