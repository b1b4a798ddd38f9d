"""A real libp2p peer that says what it likes to a daemon."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from e2e.harness import Node

from tapestry.dht.addresses import parse_peer
from tapestry.dht.identity import Identity
from tapestry.dht.p2pd import SwarmConfig, SwarmError
from tapestry.dht.swarm import Swarm
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.net.admission import admission_protocol
from tapestry.node.net.join import GENESIS_PROTOCOL, state_protocol
from tapestry.node.net.links import FORM
from tapestry.node.net.vocabulary import encode_message
from tapestry.node.net.wire import frame_parts
from tapestry.node.protocol.messages import Control


class Enemy:
    """A real peer of the node's run, linked to it both ways as a member is."""

    def __init__(self, swarm: Swarm, identity: Identity, node: Node) -> None:
        self.swarm, self.crypto, self.node = swarm, NodeCrypto(identity), node
        about = node.json()
        self.victim, self.run_id = about["peer_id"], about["run_id"]
        self.protocols = {
            "control": f"/tapestry/{self.run_id}/control/{FORM}",
            "bulk": f"/tapestry/{self.run_id}/bulk/{FORM}",
            "state": state_protocol(self.run_id),
            "admission": admission_protocol(self.run_id),
            "genesis": GENESIS_PROTOCOL,
        }
        self.writers: list[asyncio.StreamWriter] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def of(cls, node: Node, folder: Path) -> AsyncIterator[Enemy]:
        identity = Identity.load_or_create(folder / "enemy.key")
        config = SwarmConfig(folder / "enemy.key", ("/ip4/127.0.0.1/tcp/0",), nat_port_map=False)
        swarm = await Swarm.start(config)
        try:
            enemy = cls(swarm, identity, node)
            for name in ("control", "bulk"):
                await swarm.serve(enemy.protocols[name], _swallow)
            await swarm.connect(parse_peer(node.address), 10.0)
            yield enemy
        finally:
            await swarm.close()

    async def open(self, name: str, data: bytes) -> asyncio.StreamWriter | None:
        """A stream with `data` on it. The node may close it at any moment: that is its right."""
        try:
            _, writer = await self.swarm.open_stream(self.victim, self.protocols[name], 10.0)
        except SwarmError:
            return None
        self.writers.append(writer)
        with contextlib.suppress(OSError, RuntimeError, TimeoutError):
            writer.write(data)
            async with asyncio.timeout(1.0):
                await writer.drain()
        return writer

    def close_all(self) -> None:
        for writer in self.writers:
            writer.close()
        self.writers.clear()

    async def status(self) -> dict[str, Any]:
        return await asyncio.to_thread(self.node.status)


async def _swallow(peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(1 << 16):
        pass


def framed(header: bytes, payload: bytes = b"") -> bytes:
    return b"".join(bytes(part) for part in frame_parts(header, [payload] if payload else ()))


def said(*messages: Control) -> bytes:
    return b"".join(framed(encode_message(message)) for message in messages)
