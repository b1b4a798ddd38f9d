"""A peer that breaks every rule it can reach: it is counted, and the node stays small, quick and at work."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest
import torch
import uvloop
from e2e.enemy import Enemy, framed, said
from e2e.harness import Node, init

from tapestry.compression.codecs import get_codec, pack
from tapestry.compression.shards import shard_bounds
from tapestry.node.net.vocabulary import encode_message
from tapestry.node.net.wire import FRAME
from tapestry.node.protocol.agreement import ALIKE
from tapestry.node.protocol.canon import WEIGHT_MAX
from tapestry.node.protocol.members import UNIT
from tapestry.node.protocol.messages import (
    Accept,
    Commit,
    GetRecords,
    Ready,
    Records,
    Shard,
    Stage,
    Status,
)
from tapestry.node.protocol.record import Body, Member, Record, accept_message, draw_message, head_of
from tapestry.node.spec.run import RunSpec

pytestmark = [
    pytest.mark.e2e,
    # P2P.create finds its p2pd by an old function of importlib.resources.
    pytest.mark.filterwarnings("ignore:path is deprecated. Use files:DeprecationWarning"),
]

RSS_GROWTH_MAX = 50 << 20
ANSWER_S_MAX = 1.0
TOKEN = "cd" * 32
FORK_RECORDS = 50


# --- attacks ----------------------------------------------------------------------------------------


async def garbage(enemy: Enemy) -> None:
    for name in enemy.protocols:
        await enemy.open(name, framed(b"\xc1garbage"))
        await enemy.open(name, b"GET / HTTP/1.1\r\n\r\n")


async def oversized_lengths(enemy: Enemy) -> None:
    for name in enemy.protocols:
        await enemy.open(name, FRAME.pack(2**32 - 1, 0))
        await enemy.open(name, FRAME.pack(0, 2**32 - 1))


async def a_header_and_silence(enemy: Enemy) -> None:
    for name in enemy.protocols:
        await enemy.open(name, FRAME.pack(10, 0))
        await enemy.open(name, b"\0\0\0")


async def wrong_types(enemy: Enemy) -> None:
    for raw in (["status", "three"], ["status"], {"a": 1}, ["status", *[[]] * 7], ["x" * 50], [None], 7, []):
        await enemy.open("control", framed(msgpack.packb(raw)))
    await enemy.open("control", framed(b"\x91" * 5000))
    bad_phase = Status(3, "ab" * 32, 3, "\x1b[2J\nforged", Stage.AWAY, 0, 0, ())
    await enemy.open("control", said(bad_phase))


async def unknown_requests(enemy: Enemy) -> None:
    for raw in ({"ask": "everything"}, {"ask": "chunk", "epoch": -1, "head": "x", "index": 2**62}, {}, [1]):
        await enemy.open("state", framed(msgpack.packb(raw)))
        await enemy.open("genesis", framed(msgpack.packb(raw)))


async def shards_that_cannot_be_used(enemy: Enemy) -> None:
    """NaN scales, codes that no encoder makes, a length that lies, rubbish; all of the round under way."""
    spec = RunSpec.load(enemy.node.home / "run.toml")
    status = await enemy.status()
    codec = get_codec(spec.compression.codec)
    bounds = shard_bounds(status["params"], spec.compression.shard_elements)[0]
    good = codec.encode(torch.ones(bounds.n))
    head = pack(codec, bounds.n, good)
    size = good.numel()
    header = encode_message(Shard(status["epoch"], TOKEN, 0, None))
    frames = [head + b"\xff" * size, head + b"\x80" * size, head + bytes(size - 1), bytes(size), b""]
    await enemy.open("bulk", b"".join(framed(header, frame) for frame in frames) * 20)
    header = encode_message(Shard(status["epoch"], TOKEN, 2**20 - 1, None))
    await enemy.open("bulk", framed(header, head + bytes(good.numpy())))


def sealed(enemy: Enemy, body: Body, name: str) -> Record:
    """`body` with a signature and a draw of ours, said to be `name`'s."""
    head = head_of(body, enemy.crypto)
    signature = enemy.crypto.sign(accept_message(head, 0))
    draw = enemy.crypto.sign(draw_message(head))
    return Record(body, head, 0, ((name, signature),), None, ((name, draw),))


async def forged_votes(enemy: Enemy) -> None:
    """A wrong state, a signature of nothing, and a record that only we have signed: for the present head."""
    me = enemy.swarm.peer_id
    for _ in range(5):
        status = await enemy.status()
        epoch, head = status["epoch"], status["head"]
        body = Body(enemy.run_id, epoch + 1, head, status["state_digest"], (Member(me, 1, TOKEN),), "ab" * 32)
        record, stolen = sealed(enemy, body, me), sealed(enemy, body, enemy.victim)
        new_head, signature, draw = record.head, record.signatures[0][1], record.draws[0][1]
        await enemy.open(
            "control",
            said(
                Ready(epoch, head, 0, False, "00" * 32, TOKEN, 2**40, 1.0, -1, None),
                Accept(epoch, head, 0, new_head, "ab" * 32, ALIKE, signature, draw),
                Accept(epoch, head, 0, new_head, "ab" * 32, ALIKE, "00", draw),
                Commit(record),
                Commit(stolen),
                Records(epoch, (record,)),
                Records(epoch, (stolen,)),
                GetRecords(((0, "ab" * 32),)),
            ),
        )
        await asyncio.sleep(0.1)


async def forced_records(enemy: Enemy) -> None:
    """That all are gone but us, who weigh 2^53; and that all are gone but the node itself."""
    us = Member(enemy.swarm.peer_id, WEIGHT_MAX, TOKEN, "", WEIGHT_MAX)
    itself = Member(enemy.victim, UNIT, TOKEN, "", WEIGHT_MAX)
    for _ in range(5):
        status = await enemy.status()
        epoch, head = status["epoch"], status["head"]
        for alone in (us, itself):
            body = Body(enemy.run_id, epoch + 1, head, status["state_digest"], (alone,), "ab" * 32, True)
            record = sealed(enemy, body, alone.peer)
            await enemy.open("control", said(Commit(record), Records(epoch, (record,))))
        await asyncio.sleep(0.1)


async def a_long_fork_from_the_start(enemy: Enemy) -> None:
    """FORK_RECORDS forced records of ours after the genesis, of weight 2^53 each: longer than the run."""
    us = Member(enemy.swarm.peer_id, WEIGHT_MAX, TOKEN, "", WEIGHT_MAX)
    records: list[Record] = []
    for epoch in range(1, FORK_RECORDS + 1):
        head = records[-1].head if records else enemy.run_id
        body = Body(enemy.run_id, epoch, head, "ab" * 32, (us,), "ab" * 32, True)
        records.append(sealed(enemy, body, us.peer))
    end = Status(FORK_RECORDS, records[-1].head, FORK_RECORDS, "training", Stage.TRAINING, 0, 0, ())
    for _ in range(5):
        await enemy.open("control", said(end, Records(0, tuple(records))))
        await asyncio.sleep(0.1)


async def two_hundred_streams_at_once(enemy: Enemy) -> None:
    """Each with the header of a largest frame: what it announces must not be allocated 200 times."""
    spec = RunSpec.load(enemy.node.home / "run.toml")
    codec = get_codec(spec.compression.codec)
    bounds = shard_bounds((await enemy.status())["params"], spec.compression.shard_elements)[0]
    announced = FRAME.pack(100, codec.payload_size(bounds.n))
    for name in enemy.protocols:
        data = announced if name == "bulk" else FRAME.pack(1000, 0)
        await asyncio.gather(*(enemy.open(name, data) for _ in range(50)))


async def floods(enemy: Enemy) -> None:
    """Valid messages as fast as they go, and questions whose answers are long and not taken."""
    genesis = ((0, enemy.run_id),)
    calm = Status(0, "ab" * 32, 0, "training", Stage.AWAY, 0, 0, ())
    for message in (calm, GetRecords(genesis)):
        await enemy.open("control", said(message) * 20_000)
        await asyncio.sleep(1.0)


async def sudden_closes(enemy: Enemy) -> None:
    for _ in range(10):
        for name in enemy.protocols:
            writer = await enemy.open(name, FRAME.pack(10, 0) + b"half")
            if writer is not None:
                writer.transport.abort()


ATTACKS: tuple[Callable[[Enemy], Awaitable[None]], ...] = (
    garbage,
    oversized_lengths,
    a_header_and_silence,
    wrong_types,
    unknown_requests,
    shards_that_cannot_be_used,
    forged_votes,
    forced_records,
    a_long_fork_from_the_start,
    two_hundred_streams_at_once,
    floods,
    sudden_closes,
)
TRIES = 10
# What its records are refused for in an open run, where it is heard.
REASONS: dict[str, tuple[str, ...]] = {
    "forged_votes": ("electorate",),
    "forced_records": ("weights", "forced"),
    "a_long_fork_from_the_start": ("weights",),
}


# --- the test ---------------------------------------------------------------------------------------


class Watcher:
    """Asks /healthz all the time, and remembers the slowest answer."""

    def __init__(self, url: str) -> None:
        self.url, self.slowest_s, self.count = url.rstrip("/") + "/healthz", 0.0, 0

    async def run(self) -> None:
        while True:
            began_at = time.monotonic()
            await asyncio.to_thread(self._ask)
            self.slowest_s = max(self.slowest_s, time.monotonic() - began_at)
            self.count += 1
            await asyncio.sleep(0.05)

    def _ask(self) -> None:
        with urllib.request.urlopen(self.url, timeout=10) as answer:
            assert answer.read() == b"ok\n"


def refused(node: Node) -> dict[str, float]:
    """tapestry_refused_total by reason, where it is not zero."""
    lines = [line for line in node.get("/metrics").splitlines() if line.startswith("tapestry_refused_total{")]
    counts = {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in lines}
    return {reason: count for reason, count in counts.items() if count}


def chain_of(node: Node) -> list[str]:
    return (node.home / "chain.jsonl").read_text().splitlines()


def run(main: Coroutine[Any, Any, None], timeout_s: float) -> None:
    async def within_time() -> None:
        async with asyncio.timeout(timeout_s):
            await main

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(within_time())


def test_a_hostile_peer_is_counted_and_stops_nothing(tmp_path: Path) -> None:
    async def main(node: Node) -> None:
        """Each attack has an identity of its own: who goes on for long is banned, and not heard any more."""
        watcher = Watcher(node.json()["http"])
        watching = asyncio.create_task(watcher.run())
        banned: set[str] = set()
        for attack in ATTACKS:
            folder = tmp_path / attack.__name__
            folder.mkdir()
            async with Enemy.of(node, folder) as enemy:
                await enemy.open("control", said(Status(0, "ab" * 32, 0, "joining", Stage.AWAY, 0, 0, ())))
                epoch = (await enemy.status())["epoch"]
                before, chain = await asyncio.to_thread(refused, node), chain_of(node)
                wanted, after = REASONS.get(attack.__name__, ()), before
                for _ in range(TRIES):  # a record is judged only where it follows the newest one
                    await attack(enemy)
                    after = await asyncio.to_thread(refused, node)
                    if all(after.get(reason, 0) > before.get(reason, 0) for reason in wanted):
                        break
                await asyncio.to_thread(node.wait_epoch, epoch + 1, 15.0)
                for reason in wanted:
                    assert after.get(reason, 0) > before.get(reason, 0), (attack.__name__, reason, after)
                assert chain_of(node)[: len(chain)] == chain, "it goes on from the head that it had"
                peers = json.loads(await asyncio.to_thread(node.get, "/peers"))
                banned |= {attack.__name__ for peer in peers if peer["phase"] == "banned"}
                enemy.close_all()
        assert "two_hundred_streams_at_once" in banned, banned
        assert not watching.done()
        watching.cancel()
        assert watcher.count > 20 and watcher.slowest_s < ANSWER_S_MAX, watcher.slowest_s

    with Node(
        init(
            tmp_path / "a",
            is_open=True,  # so that it is heard
            straggler_wait_s="1.0",  # so long it can make rounds wait
            on_quorum_loss='"wait"',
        )
    ) as node:
        node.wait_ready()
        node.wait_epoch(3)
        process = psutil.Process(node.pid)
        rss = process.memory_info().rss
        run(main(node), 120.0)
        for line in chain_of(node):
            body = json.loads(line)["value"]["body"]
            assert [m[0] for m in body["members"]] == [node.json()["peer_id"]] and not body["forced"], body
        counts = refused(node)
        for reason in ("malformed", "oversized", "state_digest", "streams", "no_common_record"):
            assert counts.get(reason), counts
        assert counts.get("not_finite") or counts.get("scale"), counts
        assert process.memory_info().rss - rss < RSS_GROWTH_MAX
        node.wait("good health", lambda: node.get("/readyz") == "ready\n")
        assert node.stop() == 0, node.tail()
    log = node.log.read_text()
    assert "Traceback" not in log and "\x1b" not in log, log
    assert len(log) < 200_000, "a peer can fill the disk with what is said of it"
    assert not (node.home / "node.json").exists()
