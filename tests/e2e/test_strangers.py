"""Who is no member reaches two streams of a run, and nothing that it says there or elsewhere moves it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from pathlib import Path

import msgpack
import pytest
from e2e.enemy import Enemy, framed, said
from e2e.harness import Digests, Node, init
from e2e.test_hostile_peer import (
    a_long_fork_from_the_start,
    chain_of,
    floods,
    forced_records,
    forged_votes,
    refused,
    run,
)

from tapestry.node.net.wire import FrameLimits, read_frame
from tapestry.node.protocol.messages import Stage, Status

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:path is deprecated. Use files:DeprecationWarning"),
]


async def asks_for_state(enemy: Enemy) -> None:
    """The stream ends, and nothing came; so on that of the genesis, which is for everybody."""
    for protocol in ("state", "genesis"):
        reader, writer = await enemy.swarm.open_stream(enemy.victim, enemy.protocols[protocol], 10.0)
        enemy.writers.append(writer)
        writer.write(framed(msgpack.packb({"ask": "checkpoint", "epoch_max": 1000})))
        await nothing_more(reader, protocol)


async def nothing_more(reader: asyncio.StreamReader, what: str) -> None:
    """The node has closed the stream; what we wrote to it afterwards is a broken pipe."""
    async with asyncio.timeout(10.0):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b"", what


async def trains_for_ever(enemy: Enemy) -> None:
    status = await enemy.status()
    epoch, head = status["epoch"], status["head"]
    for _ in range(20):
        await enemy.open("control", said(Status(epoch, head, epoch, "training", Stage.TRAINING, 0, 0, ())))


async def applies_again_and_again(enemy: Enemy) -> None:
    """One identity is one applicant, of the name that it gave last; a second stream of it is not served."""
    reader, writer = await enemy.swarm.open_stream(enemy.victim, enemy.protocols["admission"], 10.0)
    enemy.writers.append(writer)
    for number in range(10):
        question = {"ask": "admission", "name": f"name {number}", "admission": None}
        writer.write(framed(msgpack.packb(question)))
        header, _ = await read_frame(reader, FrameLimits(4096, 0), start_s=10.0, silence_s=10.0)
        assert msgpack.unpackb(header)["is"] == "applicant"
    again, second = await enemy.swarm.open_stream(enemy.victim, enemy.protocols["admission"], 10.0)
    enemy.writers.append(second)
    await nothing_more(again, "a second stream")
    applicants = (await enemy.status())["applicants"]
    assert [one["name"] for one in applicants if one["peer"] == enemy.swarm.peer_id] == ["name 9"]


ATTACKS = (
    asks_for_state,
    trains_for_ever,
    forged_votes,
    forced_records,
    a_long_fork_from_the_start,
    applies_again_and_again,
    floods,
)
UNHEARD = (trains_for_ever, forged_votes, forced_records, a_long_fork_from_the_start, floods)


def test_strangers_move_nothing_and_hold_nobody_up(tmp_path: Path) -> None:
    founder = Node(init(tmp_path / "a", inner_steps="8"))
    with founder:
        founder.wait_ready()
        with Node(tmp_path / "b", "--peer", founder.invitation(), data="stdlib:2/3") as second:
            second.wait_ready()
            founder.wait("an electorate of two", lambda: founder.electorate() == 2)
            members = {founder.json()["peer_id"], second.json()["peer_id"]}
            digests = Digests(founder, second)

            def is_more(before: dict[str, float]) -> bool:
                """The metrics' text is made once a second."""
                return refused(founder).get("not_member", 0) > before.get("not_member", 0)

            async def main() -> None:
                for attack in ATTACKS:
                    folder = tmp_path / attack.__name__
                    folder.mkdir()
                    async with Enemy.of(founder, folder) as enemy:
                        epoch = (await enemy.status())["epoch"]
                        before, chain = await asyncio.to_thread(refused, founder), chain_of(founder)
                        await attack(enemy)
                        await asyncio.to_thread(founder.wait_epoch, epoch + 2, 30.0)
                        if attack in UNHEARD:
                            await asyncio.to_thread(
                                founder.wait, "its refusal", functools.partial(is_more, before)
                            )
                        assert chain_of(founder)[: len(chain)] == chain, "it goes on from its head"
                        assert (await enemy.status())["peers"] == 1, "a stranger has no link"
                        enemy.close_all()

            run(main(), 120.0)
            digests.wait("the same bits at both", lambda: any(len(s) == 2 for s in digests.shared.values()))
            founder.wait("the same electorate", lambda: founder.electorate() == 2)
            for line in chain_of(founder):
                body = json.loads(line)["value"]["body"]
                assert {m[0] for m in body["members"]} <= members and not body["forced"], body
            assert second.stop() == 0
        assert founder.stop() == 0
    assert "Traceback" not in founder.log.read_text()
