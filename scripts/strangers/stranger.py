"""A libp2p peer that is no member, and what it can ask of one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import psutil
from _processes import group_like_process

from strangers.target import Target


class Stranger:
    """Connected to its target."""

    def __init__(self, swarm: object, target: Target) -> None:
        from tapestry.dht.addresses import parse_peer
        from tapestry.node.net.admission import admission_protocol
        from tapestry.node.net.join import GENESIS_PROTOCOL, state_protocol

        self.swarm, self.target, self.member = swarm, target, parse_peer(target.address)
        run = f"/tapestry/{target.run_id}"
        self.protocols = {
            "control": f"{run}/control/1",
            "bulk": f"{run}/bulk/1",
            "peers": f"{run}/peers/1",
            "state": state_protocol(target.run_id),
            "genesis": GENESIS_PROTOCOL,
            "admission": admission_protocol(target.run_id),
        }

    async def open(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        await self.swarm.connect(self.member, 5.0)
        return await self.swarm.open_stream(self.target.peer_id, self.protocols[name], 5.0)

    async def opened_and_closed(self, index: int) -> None:
        names = list(self.protocols)
        _, writer = await self.open(names[index % len(names)])
        writer.close()

    async def pour(self, name: str, data: bytes) -> None:
        """This, again and again, on as few streams as it takes."""
        self.target.begin()
        while True:
            with contextlib.suppress(Exception):
                _, writer = await self.open(name)
                try:
                    while True:
                        writer.write(data)
                        await writer.drain()
                finally:
                    writer.close()
            await asyncio.sleep(0.1)

    async def call(self, name: str, request: object, dht_pb2: object) -> None:
        from hivemind.p2p import PeerID

        kind = getattr(dht_pb2, {"rpc_find": "FindResponse", "rpc_ping": "PingResponse"}[name])
        peer = PeerID.from_base58(self.target.peer_id)
        await asyncio.wait_for(
            self.swarm._p2p.call_protobuf_handler(peer, f"DHTProtocol.{name}", request, kind), 5.0
        )

    async def store(self, subkey: str, record: bytes, expires_at: float) -> None:
        from hivemind.dht.routing import DHTID
        from hivemind.p2p import PeerID
        from hivemind.utils import MSGPackSerializer

        from tapestry.dht.directory import presence_key

        key = DHTID.generate(source=presence_key(self.target.run_id))
        peer, value = PeerID.from_base58(self.target.peer_id), MSGPackSerializer.dumps(record)
        await self.swarm._dht.protocol.call_store(peer, [key], [value], [expires_at], [subkey])


@contextlib.asynccontextmanager
async def stranger(target: Target) -> AsyncIterator[Stranger]:
    from tapestry.dht.identity import Identity
    from tapestry.dht.p2pd import SwarmConfig
    from tapestry.dht.swarm import Swarm

    key = target.folder / "stranger.key"
    Identity.load_or_create(key)
    swarm = await Swarm.start(SwarmConfig(key, ("/ip4/127.0.0.1/tcp/0",), nat_port_map=False))
    for child in psutil.Process().children():
        group_like_process(child.pid)  # p2pd has a session of its own
    try:
        enemy = Stranger(swarm, target)
        for name in ("control", "bulk"):
            await swarm.serve(enemy.protocols[name], _swallow)
        await swarm.connect(enemy.member, 10.0)
        yield enemy
    finally:
        await swarm.close()


async def _swallow(peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(1 << 16):
        pass
