"""The door without a p2pd: whose stream gets its handler, and who is disconnected."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import base58
import pytest
from hivemind.proto import p2pd_pb2

from tapestry.dht import door as door_module
from tapestry.dht.conduct import Conduct
from tapestry.dht.door import STUCK_MAX, Door
from tapestry.dht.p2pd import SwarmConfig

PEER, OTHER = (f"12D3KooWFAQWzWY2n8KUGGaXykyzafrNgSCsfTmabDmNUZkDoTn{n}" for n in "56")
PROTOCOL = "/tapestry/test/1"


class FakeWriter:
    """A stream whose peer takes everything, or leaves `pending` bytes."""

    def __init__(self, pending: int = 0) -> None:
        self.pending, self.is_closed = pending, False
        self.transport = self

    def get_write_buffer_size(self) -> int:
        return self.pending

    def close(self) -> None:
        self.is_closed = True

    abort = close

    async def wait_closed(self) -> None: ...


class Bench:
    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        self.served: list[str] = []
        self.disconnected: list[str] = []
        config = SwarmConfig(identity_path=Path("key"))
        self.door = Door(config, Conduct(), self.disconnect, lambda peer: True, self.on_refused)
        self.door.handlers[PROTOCOL] = self.serve

    async def disconnect(self, peer: str) -> None:
        self.disconnected.append(peer)

    def on_refused(self, reason: str) -> None:
        self.refused[reason] += 1

    async def serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.served.append(peer)

    async def opens(self, peer: str, pending: int = 0) -> None:
        """A stream of this peer, to its end."""
        info = p2pd_pb2.StreamInfo(peer=base58.b58decode(peer), addr=b"", proto=PROTOCOL).SerializeToString()
        reader, writer = asyncio.StreamReader(), FakeWriter(pending)
        reader.feed_data(bytes([len(info)]) + info)
        await asyncio.create_task(self.door.on_stream(reader, writer))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert writer.is_closed


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 5.0))


def test_who_opens_too_many_streams_is_refused_then_banned_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door_module, "STREAMS_BURST", 3.0)
    monkeypatch.setattr(door_module, "STREAMS_PER_S", 0.0)

    async def main() -> None:
        bench = Bench()
        for _ in range(60):
            await bench.opens(PEER)
        assert bench.served == [PEER] * 3 and 50 <= bench.refused["streams"] < 57
        assert [ban.peer for ban in bench.door.bans()] == [PEER] and set(bench.disconnected) == {PEER}
        await bench.opens(OTHER)
        assert bench.served[-1] == OTHER and not bench.door.is_banned(OTHER)

    run(main())


def test_who_leaves_many_streams_untaken_is_disconnected_and_may_come_again() -> None:
    async def main() -> None:
        bench = Bench()
        for _ in range(STUCK_MAX):
            await bench.opens(PEER, pending=1)
            await bench.opens(OTHER)
        assert not bench.disconnected
        await bench.opens(PEER, pending=1)
        assert bench.disconnected == [PEER] and not bench.door.is_banned(PEER)
        await bench.opens(PEER)
        assert bench.served[-1] == PEER and len(bench.disconnected) == 1

    run(main())
