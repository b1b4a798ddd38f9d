"""Attacks at the peers' door: TCP, streams, members' messages, admission, the DHT."""

from __future__ import annotations

import asyncio
import os
import random
import time

from strangers.parts import framed, held, many
from strangers.stranger import stranger
from strangers.target import LINK, Target, attack


@attack("TCP connections to the peers' port that say nothing or nonsense, opened again when they are closed")
async def connections(target: Target) -> None:
    words = (b"", b"\x13/multistream/1.0.0\n", os.urandom(4096))
    await many(target, lambda i: held(("127.0.0.1", target.p2p_port), words[i % 3]))


@attack("streams of every protocol, opened and closed without end")
async def streams(target: Target) -> None:
    async with stranger(target) as enemy:
        await many(target, lambda i: enemy.opened_and_closed(i), width=16)


@attack("valid STATUS messages as fast as they go", LINK)
async def messages(target: Target) -> None:
    from tapestry.node.net.vocabulary import encode_message
    from tapestry.node.protocol.messages import Stage, Status

    status = Status(0, "ab" * 32, 0, "training", Stage.AWAY, 0, 0, ())
    async with stranger(target) as enemy:
        await enemy.pour("control", framed(encode_message(status)) * 500)


@attack("questions for records, whose answers are many times as long, none of them taken", LINK)
async def records(target: Target) -> None:
    from tapestry.node.net.vocabulary import encode_message
    from tapestry.node.protocol.messages import GetRecords

    ask = framed(encode_message(GetRecords(((0, target.run_id),))))
    async with stranger(target) as enemy:
        await enemy.pour("control", ask * 500)


@attack("junk on the bulk stream, as fast as it goes", LINK)
async def junk(target: Target) -> None:
    async with stranger(target) as enemy:
        await enemy.pour("bulk", framed(b"\x93\xa5shard\x00\x00", os.urandom(1 << 16)) * 8)


@attack("streams whose answers are asked for and never read", LINK)
async def slow_readers(target: Target) -> None:
    import msgpack

    ask = framed(msgpack.packb({"ask": "checkpoint", "epoch_max": 2**40}))
    async with stranger(target) as enemy:

        async def one() -> None:
            _, writer = await enemy.open("state")
            writer.write(ask * 100)
            await asyncio.sleep(30.0)
            writer.close()

        await many(target, lambda i: one(), width=16)


@attack("applications for membership without end, each under another name")
async def applications(target: Target) -> None:
    import msgpack

    names = (f"name {number}" for number in range(10**9))
    async with stranger(target) as enemy:

        async def one() -> None:
            reader, writer = await enemy.open("admission")
            for _ in range(100):
                writer.write(
                    framed(msgpack.packb({"ask": "admission", "name": next(names), "admission": None}))
                )
            while await reader.read(1 << 16):
                pass
            writer.close()

        await many(target, lambda i: one(), width=16)


@attack("calls to the DHT with 20,000 equal keys, ids out of range, forged dictionaries")
async def dht_calls(target: Target) -> None:
    from hivemind.dht.routing import DHTID
    from hivemind.proto import dht_pb2

    from tapestry.dht.directory import presence_key

    key = DHTID.generate(source=presence_key(target.run_id)).to_bytes()
    async with stranger(target) as enemy:
        find = dht_pb2.FindRequest(keys=[key] * 20_000, peer=dht_pb2.NodeInfo(node_id=key))
        ping = dht_pb2.PingRequest(peer=dht_pb2.NodeInfo(node_id=b"\xff" * 40), validate=True)
        small = dht_pb2.FindRequest(keys=[key])
        calls = (("rpc_find", find), ("rpc_ping", ping), ("rpc_find", small))

        async def one(index: int) -> None:
            name, request = calls[index % 3]
            await enemy.call(name, request, dht_pb2)

        await many(target, one, width=16)


@attack("pings of the DHT under ids without number: an eclipse")
async def pings(target: Target) -> None:
    from hivemind.proto import dht_pb2

    async with stranger(target) as enemy:

        async def one() -> None:
            node = dht_pb2.NodeInfo(node_id=random.randbytes(20))
            await enemy.call("rpc_ping", dht_pb2.PingRequest(peer=node), dht_pb2)

        await many(target, lambda i: one(), width=16)


@attack("presence of 300 made-up peers that name a third party's address")
async def presence(target: Target) -> None:
    from tapestry.dht.identity import Identity
    from tapestry.dht.presence import Presence, encode

    async with stranger(target) as enemy:
        await enemy.swarm.join_dht(target.run_id, [enemy.member])
        made = [Identity.load_or_create(target.folder / f"made-up-{i}") for i in range(300)]
        target.begin()
        while True:
            now = time.time()
            for one in made:
                said = Presence(
                    target.run_id,
                    one.peer_id,
                    1,
                    "cd" * 32,
                    "training",
                    (f"/ip4/127.0.0.1/tcp/9/p2p/{one.peer_id}",),
                    now,
                    now + 500.0,
                )
                await enemy.store(one.peer_id, encode(said, one.sign), said.expires_at)
            await asyncio.sleep(1.0)
