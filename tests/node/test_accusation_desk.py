"""Proofs of lies reach everybody once, are judged by each, and keep nobody from anything else."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgpack
import pytest
from audit_table import EPOCH, HEAD, PEERS, SHARD, Desk, Table, run

from tapestry.node.daemon import accusation_desk, audit_streams
from tapestry.node.daemon.accusation_desk import ACCUSED_S, AWAITED_BYTES_PER_SECOND, PROOF
from tapestry.node.disk.accusations import Accusation, keep, kept
from tapestry.node.net.wire import FRAME, RemoteProtocolError, StreamEnded
from tapestry.node.protocol.record import Member, Record


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_streams, "OPENED_PER_S", 1e9)
    monkeypatch.setattr(accusation_desk, "TOLD_AGAIN_S", 0.01)


@pytest.mark.parametrize("of_the_run", [True, False])
def test_a_proof_against_a_key_that_has_no_part_in_the_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_the_run: bool
) -> None:
    """Anybody can sign wrong means of its own; 64 of them filled what a home keeps, and undid epochs. Nor is
    it averaged: each cost a mean, beside those of the round."""
    proven: list[object] = []
    monkeypatch.setattr(accusation_desk, "LATE_S", 0.0)
    monkeypatch.setattr(accusation_desk, "prove", lambda *args: proven.append(args))

    async def scenario(table: Table) -> None:
        desk = table.desks["bob"]
        desk.record = table.record
        head = table.record.body.prev if of_the_run else "ee" * 32
        lie = Accusation(
            *(head, EPOCH, (Member("x", 1, "aa" * 32),), 0, "00" * 32, "x" * 8, "ab" * 64), (((), b"x"),)
        )
        await bring(table, "alice", "bob", lie)

    desk = run(scenario, tmp_path).desks["bob"]
    assert len(kept(tmp_path / "bob")) == len(desk.said("accused")) == of_the_run == bool(proven)
    assert [reason for _, reason, _ in desk.said("refused")] == ([] if of_the_run else ["accusation"])
    assert not desk.said("blamed"), "it may be on another side of a fork"


@pytest.mark.parametrize(("spec", "record", "removed"), [("remove", "mark", False), ("mark", "remove", True)])
def test_a_lie_is_judged_by_the_rule_that_records_had_made_when_it_was_told(
    tmp_path: Path, spec: str, record: str, removed: bool
) -> None:
    (tmp_path / "bob").mkdir()
    members = (Member("x", 1, "aa" * 32),)
    lie = Accusation(HEAD, EPOCH, members, SHARD, "01" * 32, "alice", "ab" * 64, (((), b"x"),))

    async def main() -> Desk:
        desk = Desk("bob", {}, tmp_path, on_lie=spec)
        desk.rule = record
        await desk.accusations.accuse(lie, "carol")
        for task in desk.tasks:
            task.cancel()
        return desk

    assert bool(asyncio.run(main()).roll.removed) is removed


@pytest.mark.parametrize("decoys", [1, 9])
def test_a_liar_that_had_itself_removed_for_other_lies_does_not_save_the_one_in_the_state(
    tmp_path: Path, decoys: int
) -> None:
    """It signs other digests of the same inputs, and tells all of them: the true proof was no news then."""
    (tmp_path / "bob").mkdir()

    async def main() -> Desk:
        desk = Desk("bob", {}, tmp_path, on_lie="rollback")
        members, digest = (Member("x", 1, "aa" * 32),), "0123456789abcdef" * 4
        lie = Accusation(HEAD, EPOCH, members, SHARD, digest, "alice", "ab" * 64, (((), b"x"),))
        for number in range(decoys):
            decoy = dataclasses.replace(lie, digest=digest[:8] + f"{number:056x}", shard=SHARD + number)
            await desk.accusations.accuse(decoy, "alice")
        assert desk.roll.removed and not desk.said("roll_back")
        desk.taken = digest
        await desk.accusations.accuse(lie, "carol")
        for task in desk.tasks:
            task.cancel()
        return desk

    desk = asyncio.run(main())
    assert [entry[:2] for entry in desk.said("roll_back")] == [(EPOCH, HEAD)]
    assert any("0123456789abcdef" * 4 in path.name for path in kept(tmp_path / "bob"))


def lie_of(liar: str, shard: int, digest: str) -> Accusation:
    members = (Member("x", 1, "aa" * 32),)
    return Accusation(HEAD, EPOCH, members, shard, digest, liar, "ab" * 64, (((), b"x"),))


async def bring(table: Table, by: str, to: str, lie: Accusation) -> bool:
    """Whether `to` says that it was judged."""
    return await table.desks[by].accusations._bring(to, lie.name, lie.pack())


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not in ten seconds")


def proven_to_all_but(table: Table, *away: str) -> Accusation:
    """A lie in a record that all have, for bob to tell; nobody has a link to these."""
    lie = lie_of("alice", SHARD, "11" * 32)
    for desk in table.desks.values():
        desk.record = Record(dataclasses.replace(table.record.body, prev=HEAD), HEAD, 0, ())
        desk.accusations._on_lie = "remove"
        desk.network.linked = [peer for peer in PEERS if peer not in away]  # type: ignore[misc]
    table.desks["bob"].members.expel = lambda *args: None  # type: ignore[method-assign]  # it may not ask
    return lie


@pytest.mark.parametrize("late_link", [False, True])
def test_who_was_away_when_a_lie_was_proven_is_told_of_it_when_it_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late_link: bool
) -> None:
    """The founder alone may remove; proofs were told once, so a liar stayed that lied while it was off. One
    side of a link may be up before the other, which hears nothing then."""
    monkeypatch.setattr(accusation_desk, "prove", lambda *args: None)

    async def scenario(table: Table) -> None:
        bob, dora = table.desks["bob"], table.desks["dora"]
        await bob.accusations.accuse(proven_to_all_but(table, "dora"), "bob")
        await bob.accusations.accuse(lie_of("alice", SHARD + 1, "22" * 32), "bob")  # of the same round
        await until(lambda: bool(table.desks["carol"].said("expel")))
        assert not dora.said("expel")
        bob.network.linked = PEERS  # type: ignore[misc]
        dora.network.linked = () if late_link else PEERS  # type: ignore[misc]
        bob.accusations.on_up("dora")
        bob.accusations.on_up("dora")  # it flaps
        await asyncio.sleep(0.05)
        dora.network.linked = PEERS  # type: ignore[misc]
        await until(lambda: bool(dora.said("expel")))
        await table.settle()
        told = len(dora.accusations._told)
        bob.accusations.on_up("dora")
        await table.settle()
        assert len(dora.accusations._told) == told and dora.streams.streams == {}

    desks = run(scenario, tmp_path).desks
    assert len(kept(tmp_path / "dora")) == 1, "one of a round"
    assert not any(desk.said("blamed") or desk.said("refused") for desk in desks.values())


def test_who_was_told_in_vain_is_told_at_once_when_a_new_link_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accusation_desk, "prove", lambda *args: None)
    monkeypatch.setattr(accusation_desk, "TOLD_AGAIN_S", 60.0)

    async def scenario(table: Table) -> None:
        bob, dora = table.desks["bob"], table.desks["dora"]
        await bob.accusations.accuse(proven_to_all_but(table, "dora"), "bob")
        bob.network.linked, dora.network.linked = PEERS, ()  # type: ignore[misc]
        bob.accusations.on_up("dora")
        await asyncio.sleep(0.05)
        assert not dora.said("expel"), "it does not hear us yet"
        dora.network.linked = table.desks["carol"].network.linked = PEERS  # type: ignore[misc]
        bob.accusations.on_up("dora")
        await until(lambda: bool(dora.said("expel")))
        await table.settle()

    run(scenario, tmp_path)


def test_who_comes_back_is_not_told_of_liars_that_are_no_members_or_were_let_in_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accusation_desk, "prove", lambda *args: None)

    async def scenario(table: Table) -> None:
        bob = table.desks["bob"]
        await bob.accusations.accuse(proven_to_all_but(table, "dora"), "bob")
        seat = bob.roll.members.pop("alice")
        bob.network.linked = PEERS  # type: ignore[misc]
        bob.accusations.on_up("dora")
        bob.roll.members["alice"] = SimpleNamespace(since=EPOCH + 1)
        bob.accusations.on_up("dora")
        await asyncio.sleep(0.05)
        assert not table.desks["dora"].said("accused")
        bob.roll.members["alice"] = seat
        bob.accusations.on_up("dora")
        await until(lambda: bool(table.desks["dora"].said("accused")))

    run(scenario, tmp_path)


@pytest.mark.parametrize("is_true", [True, False])
def test_at_a_start_kept_proofs_against_members_are_judged_again_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_true: bool
) -> None:
    """Who was to sign the removal may have been killed before: what it asked for was in memory only."""

    def prove(*args: object) -> None:
        if not is_true:
            raise accusation_desk.FalseAccusation("its disk changed a bit")

    monkeypatch.setattr(accusation_desk, "prove", prove)

    async def scenario(table: Table) -> None:
        lie = proven_to_all_but(table)
        keep(tmp_path / "dora", lie)
        keep(tmp_path / "dora", lie_of("x" * 8, SHARD, "33" * 32))
        (tmp_path / "dora" / f"5-1-alice-{'44' * 32}.accusation").write_bytes(b"torn")
        await table.desks["dora"].accusations.look_again()

    desks = run(scenario, tmp_path).desks
    assert [peer for peer, _ in desks["dora"].said("expel")] == (["alice"] if is_true else [])
    assert bool(desks["carol"].said("expel")) is is_true
    assert not any(desk.said("blamed") for desk in desks.values())


async def sending(desk: Desk, peer: str, name: str, payload_bytes: int) -> asyncio.StreamWriter:
    """A stream of `peer` on which it has said that it brings so much, and begins to."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)

    async def serve() -> None:
        try:
            await desk.streams.serve(peer, reader, writer)
        except RemoteProtocolError as error:
            desk.told.append(("blamed", peer, error.reason))  # type: ignore[arg-type]
        except (StreamEnded, TimeoutError, ConnectionError):
            desk.told.append(("dripped", peer))
        finally:
            writer.close()

    desk.network.linked = (*desk.network.linked, peer)  # type: ignore[misc]
    desk.loop.spawn(serve())
    _, ours_writer = await asyncio.open_connection(sock=ours)
    header = msgpack.packb(["accuse", name, payload_bytes])
    ours_writer.write(FRAME.pack(len(header), 0) + header)
    ours_writer.write(FRAME.pack(len(PROOF), payload_bytes) + PROOF)
    await asyncio.sleep(0.02)
    return ours_writer


async def dripping(desk: Desk, peer: str, payload_bytes: int) -> asyncio.StreamWriter:
    """One that has sent a byte, of what it made up."""
    writer = await sending(desk, peer, f"0-0-{peer}-{'00' * 32}", payload_bytes)
    writer.write(b"x")
    await asyncio.sleep(0.02)
    return writer


@pytest.mark.parametrize("payload_bytes", [audit_streams.PAYLOAD_BYTES_MAX, 1000])
def test_who_drips_accusations_keeps_nobody_from_its_inputs(tmp_path: Path, payload_bytes: int) -> None:
    """Four keys closed a node's audits for an hour, and it was named for giving nothing."""

    async def scenario(table: Table) -> None:
        table.drawn(table.second, table.own(table.second))
        second = table.desks[table.second]
        writers = [await dripping(second, f"x{number}", payload_bytes) for number in range(6)]
        member = next(m for m in table.record.body.members if m.peer == table.second)
        async with asyncio.timeout(5.0):
            first = table.desks[table.first]
            assert await first.audits._given_by(table.second, table.record, SHARD, member) is not None
        for writer in writers:
            writer.close()

    run(scenario, tmp_path)


@pytest.mark.parametrize("payload_bytes", [audit_streams.PAYLOAD_BYTES_MAX, 1000])
def test_who_drips_accusations_makes_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload_bytes: int
) -> None:
    """Large ones keep no small one out at all; and who waits behind small ones that drip gets its turn."""
    monkeypatch.setattr(accusation_desk, "prove", lambda *args: None)
    is_large = payload_bytes > 1000
    monkeypatch.setattr(accusation_desk, "ACCUSED_S", 60.0 if is_large else 0.2, raising=False)

    async def scenario(table: Table) -> None:
        lie = proven_to_all_but(table)
        carol = table.desks["carol"]
        writers = [await dripping(carol, f"x{number}", payload_bytes) for number in range(6)]
        async with asyncio.timeout(5.0):
            assert await bring(table, "bob", "carol", lie)
        assert len(carol.said("accused")) == 1
        assert bool(carol.said("dripped")) is not is_large, "only those in its way"
        for writer in writers:
            writer.close()

    run(scenario, tmp_path)


def test_of_a_liars_round_one_wrong_mean_in_the_state_is_told_and_all_ask_for_the_same_removal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each further one took the place of an older file, was news again, and told on to everybody."""
    monkeypatch.setattr(accusation_desk, "prove", lambda *args: None)

    async def scenario(table: Table) -> None:
        body = dataclasses.replace(table.record.body, prev=HEAD)
        for desk in table.desks.values():
            desk.record, desk.taken, desk.accusations._on_lie = Record(body, HEAD, 0, ()), "11" * 32, "remove"
        lies = [lie_of("alice", shard, "11" * 32) for shard in range(12)]
        found = {"bob": lies[:6], "carol": lies[6:]}  # two auditors
        await asyncio.gather(
            *(table.desks[by].accusations.accuse(lie, by) for by in found for lie in found[by])
        )

    desks = run(scenario, tmp_path).desks
    for peer in ("bob", "carol", "dora"):
        assert len(kept(tmp_path / peer)) == 1 and len(desks[peer].said("accused")) == 1
    assert {why for peer in PEERS for _, why in desks[peer].said("expel")} == {
        f"proven to have signed a wrong mean: round {EPOCH + 1}"
    }
    assert not any(desk.said("blamed") or desk.said("refused") for desk in desks.values())


@pytest.mark.parametrize("behind", [1, 3])
def test_who_is_told_of_a_lie_in_a_record_that_it_lacks_waits_for_it_blames_nobody_and_is_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: int
) -> None:
    """A node that caught up banned, proof by proof, those who could give it what it lacked; and later, of
    one that took longer than a moment, nobody told it of the lie again."""
    monkeypatch.setattr(accusation_desk, "LATE_S", 0.01)
    monkeypatch.setattr(accusation_desk, "prove", lambda *args: None)

    async def scenario(table: Table) -> None:
        def newest(epoch: int) -> Record:
            body = dataclasses.replace(table.record.body, epoch=epoch, prev=HEAD)
            return Record(body, HEAD, 0, ())

        bob, carol = table.desks["bob"], table.desks["carol"]
        table.desks["alice"].record = newest(EPOCH + 1)
        bob.record = carol.record = newest(EPOCH + 1 - behind)
        lie = lie_of("dora", 0, "11" * 32)
        for peer in ("bob", "carol"):
            table.desks["alice"].tasks.append(asyncio.create_task(bring(table, "alice", peer, lie)))
        await asyncio.sleep(0.03)
        bob.record = newest(EPOCH + 1)  # carol does not catch up in time
        await until(lambda: len(carol.said("refused")) > 1)
        assert bob.said("accused") and not carol.said("accused")
        carol.record = newest(EPOCH + 1)
        await until(lambda: bool(carol.said("accused")))

    desks = run(scenario, tmp_path).desks
    assert not any(desk.said("blamed") for desk in desks.values())


def large_lie(bytes_min: int = 4096, liar: str = "alice") -> Accusation:
    """Of a record that all have."""
    return dataclasses.replace(lie_of(liar, SHARD, "11" * 32), inputs=(((), bytes(bytes_min)),))


def all_have_the_record(table: Table) -> None:
    for desk in table.desks.values():
        desk.record = Record(dataclasses.replace(table.record.body, prev=HEAD), HEAD, 0, ())


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is told is true."""
    monkeypatch.setattr(accusation_desk, "prove", lambda *args: None)


@pytest.mark.usefixtures("proven")
def test_of_a_proof_that_many_tell_the_others_send_nothing_while_one_sends_it_and_after(
    tmp_path: Path,
) -> None:
    """A node on a slow line received the same 64 MiB of each that told it."""

    async def scenario(table: Table) -> None:
        all_have_the_record(table)
        carol, lie = table.desks["carol"], large_lie(100_000)
        packed = lie.pack()
        carol.network.linked = ("bob", "dora")  # type: ignore[misc]  # it passes it on to nobody else
        writer = await sending(carol, "x", lie.name, len(packed))
        writer.write(packed[:50_000])
        assert not await bring(table, "bob", "carol", lie)
        writer.write(packed[50_000:])
        await until(lambda: bool(carol.said("accused")))
        for by in ("bob", "dora"):
            assert await bring(table, by, "carol", lie)
            (known,) = carol.accusations._lies.values()
            assert by in known.heard
        assert carol.received_bytes < 1.1 * len(packed)
        writer.close()

    carol = run(scenario, tmp_path).desks["carol"]
    assert len(carol.said("accused")) == 1 and not carol.said("blamed") and not carol.said("refused")


@pytest.mark.usefixtures("proven")
@pytest.mark.parametrize("by", ["x", "newcomer"])
@pytest.mark.parametrize("other_bytes", [0, 1])
def test_who_claims_what_others_have_keeps_them_from_it_for_a_time_and_once(
    tmp_path: Path, by: str, other_bytes: int
) -> None:
    """Else a liar's accomplice could say that it sends the proof, and drip it or break off, for good."""

    async def scenario(table: Table) -> None:
        all_have_the_record(table)
        carol, lie = table.desks["carol"], large_lie()
        count = len(lie.pack()) + other_bytes
        waits = by == "x" and not other_bytes

        async def may_send() -> bool:
            return carol.accusations._answer_without(accusation_desk._Claim("bob", lie.name, count)) is None

        writer = await sending(carol, by, lie.name, len(lie.pack()))
        assert await may_send() is not waits
        carol.clock_s += ACCUSED_S + count / AWAITED_BYTES_PER_SECOND
        assert await may_send(), "it had its time"
        writer.close()
        await until(lambda: bool(carol.said("dripped")))
        writer = await sending(carol, by, lie.name, len(lie.pack()))
        assert await may_send(), "it had its chance"
        assert await bring(table, "bob", "carol", lie)
        writer.write(b"x")
        await until(lambda: not carol.streams.streams)
        assert len(carol.said("dripped")) == 1, "of what is known no more is read"
        writer.close()

    carol = run(scenario, tmp_path).desks["carol"]
    assert len(carol.said("accused")) == 1


@pytest.mark.parametrize(
    "said", [["accuse"], ["accuse", "x" * 200, 5], ["accuse", "x", 0], ["accuse", "x", True]]
)
def test_a_claim_that_none_can_be_is_malformed(tmp_path: Path, said: list[object]) -> None:
    async def scenario(table: Table) -> None:
        await table.desks["bob"].streams.say("carol", said)

    assert run(scenario, tmp_path).desks["carol"].said("blamed") == [("malformed",)]


@pytest.mark.usefixtures("proven")
@pytest.mark.parametrize("wrong", ["name", "count"])
def test_who_sends_another_proof_than_it_said_is_blamed_and_its_proof_is_not_taken(
    tmp_path: Path, wrong: str
) -> None:
    """The name would hold a place that is another's, and be known though nobody has it."""

    async def scenario(table: Table) -> None:
        all_have_the_record(table)
        carol, lie, other = table.desks["carol"], large_lie(), large_lie(liar="dora")
        packed = lie.pack()
        if wrong == "name":
            await table.desks["bob"].accusations._bring("carol", other.name, packed)
        else:
            header = msgpack.packb(["accuse", lie.name, 5])
            _, writer = await table.desks["bob"].network.open_stream("carol", "", 1.0)
            writer.write(FRAME.pack(len(header), 0) + header)
            writer.write(FRAME.pack(len(PROOF), len(packed)) + PROOF + packed)
            await until(lambda: bool(carol.said("blamed")))
            writer.close()
        assert carol.said("blamed") == [("accusation",)] and not carol.said("accused")
        assert carol.accusations._in_vain == {"bob": math.inf} and not carol.accusations._coming
        assert await bring(table, "dora", "carol", lie), "what is true is heard all the same"

    assert len(run(scenario, tmp_path).desks["carol"].said("accused")) == 1


@pytest.mark.usefixtures("proven")
def test_a_large_proof_of_a_record_that_is_still_to_come_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who caught up on a slow line got it again and again, and refused it each time."""
    monkeypatch.setattr(accusation_desk, "LARGE_BYTES_MIN", 4096)

    async def scenario(table: Table) -> None:
        carol, lie = table.desks["carol"], large_lie()
        assert not await bring(table, "bob", "carol", lie)
        assert carol.received_bytes < 200 and not carol.said("refused")
        all_have_the_record(table)
        assert await bring(table, "bob", "carol", lie)

    run(scenario, tmp_path)


@pytest.mark.usefixtures("proven")
def test_a_large_proof_that_takes_long_but_comes_steadily_is_not_cut_off_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was, after a minute, where others waited: on a slow line it never arrived. Who drips is."""
    monkeypatch.setattr(accusation_desk, "LARGE_BYTES_MIN", 1000)
    monkeypatch.setattr(accusation_desk, "ACCUSED_S", 0.5)
    monkeypatch.setattr(audit_streams, "BYTES_PER_SECOND_MIN", 2000)

    async def scenario(table: Table) -> None:
        all_have_the_record(table)
        carol, slow, quick = table.desks["carol"], large_lie(), large_lie(liar="dora")
        carol.network.linked = ("bob",)  # type: ignore[misc]
        packed = slow.pack()
        writer = await sending(carol, "x", slow.name, len(packed))
        writer.write(packed[:1500])
        drips = await dripping(carol, "y", 4096)
        waiting = asyncio.create_task(bring(table, "bob", "carol", quick))
        for start in range(1500, len(packed), 100):
            writer.write(packed[start : start + 100])
            await asyncio.sleep(0.04)
        await until(lambda: len(carol.said("accused")) == 2)
        assert await waiting and carol.said("dripped") == [("y",)]
        for one in (writer, drips):
            one.close()

    run(scenario, tmp_path)


@pytest.mark.usefixtures("proven")
@pytest.mark.parametrize("room_beside", [True, False])
def test_who_broke_off_beside_the_places_may_not_take_long_again_for_a_while_and_others_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room_beside: bool
) -> None:
    """Three keys that drip would see to it that honest ones on slow lines never get done. And whose line
    broke once, in its place, never got done."""
    monkeypatch.setattr(accusation_desk, "LARGE_BYTES_MIN", 1000)
    monkeypatch.setattr(accusation_desk, "ACCUSED_S", 0.2)
    monkeypatch.setattr(accusation_desk, "LARGE_BESIDE_MAX", int(room_beside))
    monkeypatch.setattr(audit_streams, "BYTES_PER_SECOND_MIN", 2000)

    async def scenario(table: Table) -> None:
        all_have_the_record(table)
        carol, lie = table.desks["carol"], large_lie()
        carol.network.linked = ("bob",)  # type: ignore[misc]
        slow = await dripping(carol, "x", 1_000_000)
        slow.write(bytes(10_000))  # it is far ahead of the least speed
        broken = await dripping(carol, "y", 500)
        broken.close()
        assert await bring(table, "bob", "carol", lie)
        slow.close()  # if it was not cut off
        await until(lambda: len(carol.said("dripped")) == 2)
        again_at = accusation_desk.BROKE_OFF_S if room_beside else 0.0
        assert carol.accusations._in_vain == {"x": again_at, "y": 0.0}

        async def goes_on(peer: str) -> bool:
            writer = await dripping(carol, peer, 5000)
            (held,) = carol.accusations._accused_at_length._held.values()
            writer.close()
            await until(lambda: not carol.streams.streams)
            return held.goes_on

        assert await goes_on("x") is not room_beside and await goes_on("y")
        carol.clock_s += accusation_desk.BROKE_OFF_S
        assert await goes_on("x")

    run(scenario, tmp_path)


@pytest.mark.parametrize("rule", ["rollback", "remove"])
@pytest.mark.parametrize("stands", [True, False])
def test_what_a_removed_liar_left_in_the_state_is_undone_by_who_was_stopped_before_it_could_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, stands: bool
) -> None:
    """It may have been removed by hand, or for another lie. Its proof was not looked at again, nor told to
    whoever may undo it and was away."""
    judged: list[object] = []
    monkeypatch.setattr(accusation_desk, "prove", lambda *args: judged.append(args))

    async def scenario(table: Table) -> None:
        all_have_the_record(table)
        lie = large_lie()
        for peer in ("carol", "dora"):
            desk = table.desks[peer]
            desk.rule, desk.taken, desk.stands = rule, lie.digest, stands
            del desk.roll.members["alice"]
        carol, dora = table.desks["carol"], table.desks["dora"]
        keep(tmp_path / "carol", lie)
        carol.network.linked = ()  # type: ignore[misc]
        await carol.accusations.look_again()
        asks = rule == "rollback" and stands
        assert [said[:2] for said in carol.said("roll_back")] == [(EPOCH, HEAD)] * asks
        assert len(carol.said("accused")) == len(judged) == asks
        carol.network.linked = PEERS  # type: ignore[misc]
        carol.accusations.on_up("dora")
        await table.settle()
        assert len(dora.said("roll_back")) == asks

    run(scenario, tmp_path)


def test_old_proofs_against_who_is_no_member_are_not_read_at_a_start(tmp_path: Path) -> None:
    async def scenario(table: Table) -> None:
        all_have_the_record(table)
        carol = table.desks["carol"]
        read: list[object] = []
        carol.loop.compute = lambda function, *args: read.append(function)  # type: ignore[method-assign]
        carol.record = Record(dataclasses.replace(table.record.body, epoch=EPOCH + 65), HEAD, 0, ())
        del carol.roll.members["alice"]
        keep(tmp_path / "carol", large_lie())
        await carol.accusations.look_again()
        assert not read

    run(scenario, tmp_path)
