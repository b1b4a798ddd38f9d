"""The caps for real: links between p2pd daemons on loopback, saturated for some seconds."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tapestry.dht.addresses import parse_peer
from tapestry.dht.identity import Identity
from tapestry.dht.p2pd import SwarmConfig
from tapestry.dht.swarm import Swarm
from tapestry.node.net.bucket import BURST_S
from tapestry.node.net.links import LinkLimits, Links
from tapestry.node.net.throttle import Throttle, Throttles
from tapestry.node.net.vocabulary import Reader
from tapestry.node.protocol.messages import Control, Result, Shard, Stage, Status

pytestmark = [
    pytest.mark.e2e,
    # hivemind finds its p2pd by an old function of importlib.resources.
    pytest.mark.filterwarnings("ignore:path is deprecated. Use files:DeprecationWarning"),
]

RUN = "ab" * 32
STATUS = Status(3, "cd" * 32, 3, "training", Stage.TRAINING, 0, 0, ())
PAYLOAD = bytes(32 * 1024)  # small: what is received is counted frame by frame
RATE = 2.5e6  # bytes per second: 20mbit
MEASURED_S = 4.0
CONTROL_EVERY_S = 0.05


class Member:
    """A swarm with links, and what it heard of them and when."""

    def __init__(self, swarm: Swarm, address: str, throttles: Throttles) -> None:
        self.swarm, self.address = swarm, address
        self.counted: Counter[tuple[str, str]] = Counter()
        self.control: asyncio.Queue[float] = asyncio.Queue()  # when messages came
        self.linked: asyncio.Queue[str] = asyncio.Queue()
        self.downs = 0
        limits = LinkLimits(4096, len(PAYLOAD), peers_max=8, silence_s=5.0, throttles=throttles)
        reader = Reader(None)  # type: ignore[arg-type]  # no records here
        self.links = Links(swarm, RUN, reader, lambda peer, message, payload: (payload, ""), self, limits)

    def admits(self, peer: str) -> bool:
        return True

    def is_member(self, peer: str) -> bool:
        return True

    def on_up(self, peer: str) -> None:
        self.linked.put_nowait(peer)

    def on_down(self, peer: str) -> None:
        self.downs += 1

    def on_message(self, peer: str, message: Control | Shard | Result) -> None:
        if isinstance(message, Status):
            self.control.put_nowait(asyncio.get_running_loop().time())

    def on_bulk_progress(self, peer: str) -> None: ...

    def on_unusable(self, peer: str, reason: str, text: str) -> None:
        raise AssertionError(text)

    def on_refused(self, peer: str, reason: str, text: str) -> None:
        raise AssertionError(text)

    def on_bytes(self, direction: str, kind: str, count: int, peer: str) -> None:
        self.counted[direction, kind] += count

    def bulk(self, direction: str) -> int:
        return self.counted[direction, "contribution"]


@contextlib.asynccontextmanager
async def star(folder: Path, throttles: Throttles, others: int) -> AsyncIterator[list[Member]]:
    """One member with these caps, linked with others that have none; the capped one first."""
    async with contextlib.AsyncExitStack() as cleanup:
        members = []
        for index in range(1 + others):
            Identity.load_or_create(folder / f"{index}")
            config = SwarmConfig(folder / f"{index}", ("/ip4/127.0.0.1/tcp/0",), nat_port_map=False)
            swarm = await Swarm.start(config)
            cleanup.push_async_callback(swarm.close)
            address = parse_peer((await swarm.addresses())[0]).maddr
            members.append(Member(swarm, address, Throttles() if index else throttles))
        running = [asyncio.create_task(member.links.run()) for member in members]
        try:
            await asyncio.sleep(0)
            for other in members[1:]:
                members[0].links.want(other.swarm.peer_id, (other.address,))
                await members[0].linked.get()
                await other.linked.get()
            yield members
            assert not any(member.downs for member in members), "no link broke"
        finally:
            for task in running:
                task.cancel()
            await asyncio.wait(running)


def saturate(sender: Member, receiver: Member) -> None:
    """More than the measured time has room for."""
    for shard in range(int(2 * RATE * MEASURED_S / len(PAYLOAD))):
        message = Shard(3, "cd" * 32, shard, None)
        sender.links.send_bulk(receiver.swarm.peer_id, message, "contribution", [PAYLOAD])


async def slowest_control_s(sender: Member, receiver: Member) -> float:
    """Messages one by one for MEASURED_S: the longest way of one."""
    loop, slowest_s = asyncio.get_running_loop(), 0.0
    until = loop.time() + MEASURED_S
    while loop.time() < until:
        sent_at = loop.time()
        sender.links.send_control(receiver.swarm.peer_id, STATUS)
        slowest_s = max(slowest_s, await receiver.control.get() - sent_at)
        await asyncio.sleep(CONTROL_EVERY_S)
    return slowest_s


def run(main: Coroutine[Any, Any, None]) -> None:
    async def within_time() -> None:
        async with asyncio.timeout(40):
            await main

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(within_time())


def test_uploads_to_several_peers_keep_the_cap_together_share_it_and_let_control_by(tmp_path: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with star(tmp_path, Throttles(upload=Throttle(RATE)), 3) as (me, *others):
            for other in others:
                saturate(me, other)
            began_at = loop.time()
            slowest_s = await slowest_control_s(me, others[0])
            shares = [other.bulk("received") for other in others]
            allowed = RATE * (loop.time() - began_at)
            sent = sum(count for (direction, _), count in me.counted.items() if direction == "sent")
            print(f"upload {sent / allowed:.4f} of the cap, control at most {slowest_s:.3f} s")  # noqa: T201
            assert sent == pytest.approx(allowed, rel=0.05)
            # The first has the burst, in whole frames; one's turn has come, another's frame is not whole yet.
            assert max(shares) - min(shares) <= BURST_S * RATE + 3 * len(PAYLOAD)
            assert slowest_s < 0.5

    run(main())


def test_downloads_from_several_peers_keep_the_cap_together_and_let_control_by(tmp_path: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with star(tmp_path, Throttles(download=Throttle(RATE)), 3) as (me, *others):
            for other in others:
                saturate(other, me)
            before, began_at = [other.bulk("sent") for other in others], loop.time()
            slowest_s = await slowest_control_s(others[0], me)
            allowed = RATE * (loop.time() - began_at)
            received = me.bulk("received")
            print(f"download {received / allowed:.4f} of the cap, control at most {slowest_s:.3f} s")  # noqa: T201
            assert received == pytest.approx(allowed, rel=0.05)
            in_buffers = sum(other.bulk("sent") for other in others) - sum(before) - received
            assert in_buffers < 3 * (2 << 20), "who does not read holds the senders back"
            assert slowest_s < 0.5

    run(main())
