"""Auditors get what they need of whoever has it, and name who gives nothing: desks at both stream ends."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
from audit_table import CRYPTO, EPOCH, HEAD, PEERS, SHARD, Desk, Table, run

from tapestry.dht.door import STREAMS_BURST, STREAMS_PER_S
from tapestry.dht.p2pd import SwarmError
from tapestry.node.daemon import audit_desk, audit_streams
from tapestry.node.daemon.audit_desk import KEPT_RECORDS
from tapestry.node.daemon.audit_streams import OPENED_PER_S
from tapestry.node.protocol import events as ev
from tapestry.node.protocol.audit import Input
from tapestry.node.protocol.commitment import Commitment
from tapestry.node.protocol.record import Member, Record
from tapestry.node.state.means import payload_digest, payload_of


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_desk, "AGAIN_S", (0.0, 1e-9))
    monkeypatch.setattr(audit_streams, "OPENED_PER_S", 1e9)


def test_an_auditor_that_has_all_inputs_agrees(tmp_path: Path) -> None:
    async def scenario(table: Table) -> None:
        for peer in PEERS:
            if peer != table.first:
                table.drawn(peer, table.own(peer))
        table.drawn(table.first, table.own(table.first), order=table.order)

    table = run(scenario, tmp_path)
    assert table.desks[table.first].said("audited") == [("agreed",)]


def test_who_is_late_for_the_record_is_asked_again(tmp_path: Path) -> None:
    async def scenario(table: Table) -> None:
        for peer in (table.reducer, table.second):
            table.drawn(peer, table.own(peer))
        table.drawn(table.first, table.own(table.first), order=table.order)
        for _ in range(3):
            await asyncio.sleep(0)
        table.drawn(table.other, table.own(table.other))  # it hears of the record only now

    table = run(scenario, tmp_path)
    assert table.desks[table.first].said("audited") == [("agreed",)]
    assert not table.desks[table.first].said("withheld")


def test_what_a_contributor_does_not_give_its_reducer_gives(tmp_path: Path) -> None:
    """And so does a contributor that lies: who hides hides nothing, unless the reducer hides it too."""

    async def scenario(table: Table) -> None:
        lie = table.order.__class__(SHARD, table.reducer, "11" * 32, "")
        table.drawn(table.reducer, table.own(table.reducer), *table.at_reducer())
        table.drawn(table.second, table.own(table.second))
        table.desks[table.other].hides = True
        table.drawn(table.first, table.own(table.first), order=lie)

    table = run(scenario, tmp_path)
    assert table.desks[table.first].said("audited") == [("lie",)]
    assert not table.desks[table.first].said("withheld")


@pytest.mark.parametrize("junk", [b"\xff" * 64, b""], ids=["junk", "nothing"])
def test_who_averages_junk_of_its_own_is_accused_by_who_audits_it(tmp_path: Path, junk: bytes) -> None:
    """The bytes are those that it committed to, and no payload: it signed a mean where there is none."""

    async def scenario(table: Table) -> None:
        blob = payload_of(junk)
        tree = Commitment([payload_digest(blob)] * 3, table.reducer, EPOCH, CRYPTO.digest)
        liar = Member(table.reducer, 1, tree.name)
        members = tuple(liar if m.peer == liar.peer else m for m in table.record.body.members)
        table.record = dataclasses.replace(
            table.record, body=dataclasses.replace(table.record.body, members=members)
        )
        for peer in (table.second, table.other):
            table.drawn(peer, table.own(peer))
        as_if_of_another = Input(SHARD, table.reducer, tree.name, tree.path(SHARD), blob)
        table.desks[table.reducer].audits._own = ""  # its own path lies in its own tree
        table.drawn(table.reducer, as_if_of_another)
        table.drawn(table.first, table.own(table.first), order=table.order)

    table = run(scenario, tmp_path)
    assert table.desks[table.first].said("audited") == [("lie",)]
    assert [entry[0] for entry in table.desks[table.first].said("accused")] == [table.reducer]


def test_what_nobody_gives_is_counted_and_named_and_another_auditor_tries(tmp_path: Path) -> None:
    async def scenario(table: Table) -> None:
        for peer in (table.reducer, table.second):
            table.drawn(peer, table.own(peer), second=table.order if peer == table.second else None)
        table.desks[table.other].hides = True
        table.drawn(table.first, table.own(table.first), order=table.order)

    table = run(scenario, tmp_path)
    for auditor in (table.first, table.second):
        assert table.desks[auditor].said("audited") == [("incomplete",)]
        assert table.desks[auditor].said("withheld") == [([table.other], EPOCH + 1, SHARD)]
    assert not any(desk.said("accused") for desk in table.desks.values())


def test_only_the_first_auditor_can_have_a_second_one_look(tmp_path: Path) -> None:
    async def scenario(table: Table) -> None:
        table.drawn(table.second, table.own(table.second), second=table.order)
        for peer in (table.other, table.reducer):
            await table.desks[peer].streams.say(table.second, ["second", HEAD, SHARD])

    table = run(scenario, tmp_path)
    assert not table.desks[table.second].said("audited")


def test_an_input_that_is_not_the_contributors_is_refused_whoever_gives_it(tmp_path: Path) -> None:
    async def scenario(table: Table) -> None:
        false = Input(SHARD, table.other, "ee" * 32, (), table.payloads[table.second])
        path = table.at_reducer()[0].path
        table.drawn(table.reducer, table.own(table.reducer), Input(SHARD, table.other, "", path, false.blob))
        table.drawn(table.second, table.own(table.second))
        table.drawn(table.first, table.own(table.first), order=table.order)

    table = run(scenario, tmp_path)
    assert table.desks[table.first].said("audited") == [("incomplete",)]
    assert (table.reducer, "commitment") in [entry[:2] for entry in table.desks[table.first].said("refused")]


def test_many_streams_of_one_peer_wait_their_turn_and_more_are_refused(tmp_path: Path) -> None:
    """Twelve shards of a large model that are drawn at once are no offence of anybody's auditor."""

    async def scenario(table: Table) -> None:
        for peer in PEERS:
            table.drawn(peer, table.own(peer), *(table.at_reducer() if peer == table.reducer else ()))
        first = table.desks[table.first]
        first.audits._begin_audits(table.record, [table.order] * 12, first=True)

    table = run(scenario, tmp_path)
    assert table.desks[table.first].said("audited") == [("agreed",)] * 12
    assert not any(desk.said("blamed") for desk in table.desks.values())


def test_more_audits_than_there_are_places_for_wait_and_are_all_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large model's drawn shards those beyond the 64th, by index, were never looked at in any round."""
    monkeypatch.setattr(audit_desk, "AUDITS_MAX", 2)

    async def scenario(table: Table) -> None:
        for peer in PEERS:
            table.drawn(peer, table.own(peer))
        first, lie = table.desks[table.first], dataclasses.replace(table.order, digest="11" * 32)
        first.audits._begin_audits(table.record, [*[table.order] * 20, lie], first=True)
        assert first.audits._auditing == 2

    table = run(scenario, tmp_path)
    assert sorted(table.desks[table.first].said("audited")) == [*[("agreed",)] * 20, ("lie",)]


def test_audits_that_cannot_be_done_are_drawn_by_lot_and_counted_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is first by index would be who is looked at, and everybody could foresee it."""
    monkeypatch.setattr(audit_desk, "AUDITS_MAX", 1)
    monkeypatch.setattr(audit_desk, "WAITING_MAX", 8)
    monkeypatch.setattr(audit_desk.random, "randrange", random.Random(1).randrange)

    async def scenario(table: Table) -> None:
        for peer in PEERS:
            table.drawn(peer, table.own(peer))
        first = table.desks[table.first]
        orders = [dataclasses.replace(table.order, shard=shard) for shard in range(200)]
        first.audits._begin_audits(table.record, orders, first=True)
        waiting = [order.shard for _, order, _ in first.audits._waiting]
        assert len(waiting) == 7 and first.said("audited") == [("skipped",)] * 192
        assert max(waiting) > 100
        first.audits._kept.clear()  # rounds have passed: nobody has the inputs of those that wait any more

    table = run(scenario, tmp_path)
    assert table.desks[table.first].said("audited").count(("skipped",)) == 199
    assert len(table.desks[table.first].said("withheld")) <= 1  # of the one that was under way


def test_who_asks_a_reducer_for_many_does_not_ask_for_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer refuses many streams of one, and counts them against it: an honest auditor's too."""
    now, most = 0, 0

    async def scenario(table: Table) -> None:
        table.drawn(table.reducer, table.own(table.reducer), *table.at_reducer())
        for peer in (table.second, table.other):
            table.desks[peer].hides = True
        first = table.desks[table.first]
        ask = first.audits._ask

        async def counting(peer: str, said: list[Any]) -> tuple[bytes, bytearray]:
            nonlocal now, most
            now += peer == table.reducer
            most = max(most, now)
            try:
                return await ask(peer, said)
            finally:
                now -= peer == table.reducer

        first.audits._ask = counting  # type: ignore[method-assign]
        table.drawn(table.first, order=table.order)

    monkeypatch.setattr(audit_desk, "ASKED_OF_REDUCER_MAX", 1)
    table = run(scenario, tmp_path)
    assert table.desks[table.first].said("audited") == [("agreed",)] and most == 1


def test_a_peer_that_holds_its_streams_open_takes_one_place_only(tmp_path: Path) -> None:
    """Auditors would find nobody at home, and name who is."""

    async def scenario(table: Table) -> None:
        table.drawn(table.second, table.own(table.second))
        writers = []
        for _ in range(audit_streams.STREAMS_OF_ONE_MAX):
            _, writer = await table.desks[table.other].network.open_stream(table.second, "", 1.0)
            writers.append(writer)
        await asyncio.sleep(0.05)
        member = next(m for m in table.record.body.members if m.peer == table.second)
        first = table.desks[table.first]
        async with asyncio.timeout(5.0):
            assert await first.audits._given_by(table.second, table.record, SHARD, member) is not None
        for writer in writers:
            writer.close()

    table = run(scenario, tmp_path)
    assert not table.desks[table.second].said("blamed") and not table.desks[table.second].streams.turns


def test_copies_of_short_rounds_are_kept_for_a_time_and_of_long_ones_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(table: Table) -> None:
        desk = table.desks["alice"]

        def draw(count: int) -> None:
            for _ in range(count):
                head = f"{len(heads):064x}"
                heads.append(head)
                record = Record(table.record.body, head, 0, ())
                desk.audits.do_audit(ev.Audit(record, (), (), (), (table.own("alice"),)))

        heads: list[str] = []
        draw(50)
        assert len(desk.audits._kept) == 50
        desk.clock_s += audit_desk.KEPT_S + 1
        draw(1)
        assert list(desk.audits._kept) == heads[-KEPT_RECORDS:]
        monkeypatch.setattr(audit_desk, "KEPT_BYTES_MAX", 1)
        draw(20)
        assert list(desk.audits._kept) == heads[-KEPT_RECORDS:]
        assert (
            desk.audits._kept.keys()
            == desk.audits._records.keys()
            == desk.audits._seconds.keys()
            == desk.audits._kept_at.keys()
        )

    run(scenario, tmp_path)


def test_whoever_has_much_to_say_to_a_peer_says_it_one_by_one(tmp_path: Path) -> None:
    """Dozens of proofs against one liar were told at once: the surplus was lost, and the teller banned."""

    async def scenario(table: Table) -> None:
        words = [table.desks["alice"].streams.say("bob", ["second", HEAD, shard]) for shard in range(30)]
        await asyncio.gather(*words)

    bob = run(scenario, tmp_path).desks["bob"]
    assert not bob.said("blamed")


def test_an_auditor_of_many_shards_opens_no_more_streams_a_second_than_a_peer_lets_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 1.4 billion parameters on a fast line had an honest auditor banned by all that it audited."""
    opened: list[float] = []
    monkeypatch.setattr(audit_streams, "OPENED_PER_S", OPENED_PER_S)

    async def scenario(table: Table) -> None:
        desk, member = Desk("alice", {}, tmp_path), table.record.body.members[1]

        async def sleep(time_s: float) -> None:
            desk.clock_s += time_s

        async def open_stream(*args: object) -> Any:
            opened.append(desk.clock_s)
            raise SwarmError("nobody is there")

        desk.network.open_stream = open_stream  # type: ignore[method-assign]
        monkeypatch.setattr(audit_streams.asyncio, "sleep", sleep)
        for shard in range(int(STREAMS_BURST) // 2):
            await desk.audits._given_by("bob", table.record, shard, member)
            await desk.streams.say("bob", ["second", HEAD, shard])
        monkeypatch.undo()

    run(scenario, tmp_path)
    assert opened[-1] - opened[0] >= (STREAMS_BURST - 1) / (STREAMS_PER_S / 2)


def test_a_member_that_takes_streams_and_answers_nothing_does_not_take_all_the_time_for_audits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each audit waited a minute for it, two at a time: the others were skipped, and nobody named."""
    monkeypatch.setattr(audit_desk, "ANSWER_S", 0.5)
    monkeypatch.setattr(audit_desk, "SILENT_S", 0.01, raising=False)

    async def scenario(table: Table) -> None:
        table.drawn(table.reducer, table.own(table.reducer), *table.at_reducer())
        table.drawn(table.second, table.own(table.second))
        table.desks[table.other].holds = True
        first, began = table.desks[table.first], asyncio.get_running_loop().time()
        table.drawn(table.first, table.own(table.first))
        first.audits._begin_audits(table.record, [table.order] * 12, first=True)
        await asyncio.gather(*first.tasks)
        assert asyncio.get_running_loop().time() - began < 3.0, "one audit's wait, and not those of six"

        table.desks[table.other].holds = False  # it comes to its senses
        table.drawn(table.other, table.own(table.other))
        member = next(m for m in table.record.body.members if m.peer == table.other)
        assert table.other in first.audits._silent
        monkeypatch.setattr(audit_desk, "SILENT_S", 5.0)
        assert await first.audits._given_by(table.other, table.record, SHARD, member) is not None
        assert not first.audits._silent

    table = run(scenario, tmp_path)
    assert table.desks[table.first].said("audited") == [("agreed",)] * 12
