"""Auditors get what they need of whoever has it, and name who gives nothing: desks at both stream ends."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tapestry.compression.codecs import get_codec
from tapestry.compression.reduce import WEIGHTED
from tapestry.dht.identity import Identity
from tapestry.dht.p2pd import SwarmError
from tapestry.dht.swarm import STREAMS_BURST, STREAMS_PER_S
from tapestry.node.daemon import audit_desk
from tapestry.node.daemon.audit_desk import KEPT_RECORDS, OPENED_PER_S, AuditDesk, Auditor
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.disk.accusations import Accusation, kept
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.net.throttle import Throttles
from tapestry.node.net.wire import FRAME, RemoteProtocolError, StreamEnded
from tapestry.node.protocol import events as ev
from tapestry.node.protocol.audit import Input, Order, second_auditor
from tapestry.node.protocol.chain import Body, Member, Record
from tapestry.node.protocol.commitment import Commitment
from tapestry.node.protocol.settings import Settings
from tapestry.node.state.means import payload_digest, payload_of

N, RUN, HEAD, EPOCH = 600, "ab" * 32, "cd" * 32, 5
PEERS = ("alice", "bob", "carol", "dora")
SHARD = 1
CODEC = get_codec("int8-block")
CRYPTO = NodeCrypto(Identity(Ed25519PrivateKey.from_private_bytes(b"tapestry audit tests ed25519 key")))


class Desk(AuditDesk):
    """One member's, with all that it tells, and links to the others of its table."""

    def __init__(self, name: str, table: dict[str, Desk], folder: Path, on_lie: Any = "mark") -> None:
        self.told: list[tuple[str, object]] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.clock_s = 0.0
        self.averaging = Averaging(CODEC, N, 256, WEIGHTED)
        self.hides = False  # it ends streams without an answer
        self.holds = False  # it takes them, and gives none
        self.tells_again = True  # who has not heard

        def tell(what: str) -> Callable[..., None]:
            return lambda *args: self.told.append((what, *args))  # type: ignore[arg-type]

        async def compute(function: Callable[..., Any], *args: Any) -> Any:
            return function(*args)

        def spawn(job: Coroutine[Any, Any, None]) -> None:
            self.tasks.append(asyncio.get_running_loop().create_task(job))

        async def open_stream(peer: str, protocol: str, open_s: float) -> Any:
            other = table.get(peer)
            if other is None:
                raise SwarmError("no such peer")
            ours, theirs = socket.socketpair()
            reader, writer = await asyncio.open_connection(sock=theirs)
            spawn(serve(other, reader, writer))
            return await asyncio.open_connection(sock=ours)

        async def serve(other: Desk, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                if other.holds:
                    await reader.read()
                elif not other.hides:
                    await other.serve(name, reader, writer)
            except RemoteProtocolError as error:
                other.told.append(("blamed", error.reason))
            except StreamEnded:
                other.told.append(("ended",))
            finally:
                writer.close()

        egress = SimpleNamespace(part=tell("part"), sent=lambda *args: None)
        metrics = SimpleNamespace(network_bytes=lambda *args: None)
        reporter = SimpleNamespace(
            audited=tell("audited"),
            withheld=tell("withheld"),
            refused=tell("refused"),
            accused=tell("accused"),
            egress=egress,
            metrics=metrics,
        )
        network = SimpleNamespace(open_stream=open_stream, linked=PEERS)
        loop = SimpleNamespace(spawn=spawn, compute=compute, now=lambda: self.clock_s)
        auditor = Auditor(CRYPTO, name, RUN, folder / name, Throttles(), on_lie)
        self.record: Record | None = None  # the newest of its chain
        self.rule = ""  # what a record has made of on_lie
        self.taken = ""  # digest of the wrong mean that is in its state
        self.roll = SimpleNamespace(members=dict.fromkeys(PEERS, SimpleNamespace(since=0)), removed={})
        members = SimpleNamespace(
            roll=self.roll, expel=self.expel, roll_back=tell("roll_back"), is_member=lambda peer: True
        )
        super().__init__(loop, network, self.averaging, reporter, auditor, members, self)  # type: ignore[arg-type]

    @property
    def epoch(self) -> int:
        return self.record.body.epoch if self.record is not None else EPOCH

    def of_a_record(self, lie: Accusation) -> bool:
        newest = self.record.body if self.record is not None else None
        return newest is not None and (lie.head, lie.epoch) == (newest.prev, newest.epoch - 1)

    def in_the_state(self, lie: Accusation) -> bool:
        return lie.digest == self.taken

    def settings_at(self, epoch: int) -> Settings:
        return {"audit.on_lie": self.rule} if self.rule else {}

    async def _tell_once(self, *args: Any) -> bool:
        return await super()._tell_once(*args) or not self.tells_again

    def expel(self, peer: str, why: str, epoch: int) -> None:
        self.told.append(("expel", peer, why))  # type: ignore[arg-type]
        if self.roll.members.pop(peer, None) is not None:
            self.roll.removed[peer] = why

    def said(self, what: str) -> list[Any]:
        return [entry[1:] for entry in self.told if entry[0] == what]


class Table:
    """Four members that contributed to one record; the reducer of SHARD is drawn by nobody."""

    def __init__(self, folder: Path) -> None:
        self.desks: dict[str, Desk] = {}
        for peer in PEERS:
            self.desks[peer] = Desk(peer, self.desks, folder)
        members, self.payloads = [], {}
        for seed, peer in enumerate(PEERS):
            one = self.desks[peer].averaging
            x = torch.randn(N, generator=torch.Generator().manual_seed(seed))
            encoded = one.take(
                torch.cat([CODEC.encode(x[i : i + 256]) for i in range(0, N, 256)]), copy=False
            )
            members.append(Member(peer, 1, one.commit(peer, EPOCH, encoded)))
            self.payloads[peer] = encoded[SHARD]
        body = Body(RUN, EPOCH + 1, "00" * 32, "00" * 32, tuple(members), "00" * 32)
        self.record = Record(body, HEAD, 0, ())
        self.reducer = PEERS[0]
        self.first = PEERS[1]
        second = second_auditor(HEAD, SHARD, self.reducer, self.first, PEERS, CRYPTO)
        assert second is not None
        self.second = second
        (self.other,) = set(PEERS) - {self.reducer, self.first, self.second}
        mean = self.desks[self.first].averaging.mean_digest
        self.order = Order(SHARD, self.reducer, mean(SHARD, list(self.payloads.values()), [1] * 4), "")

    def own(self, peer: str) -> Input:
        member = next(m for m in self.record.body.members if m.peer == peer)
        return Input(SHARD, peer, member.contribution, (), self.payloads[peer])

    def at_reducer(self) -> list[Input]:
        """All others' inputs, with the paths that came with them."""
        owns = [self.own(peer) for peer in PEERS if peer != self.reducer]
        return [
            Input(
                o.shard,
                o.peer,
                o.contribution,
                self.desks[o.peer].averaging.path(o.contribution, SHARD),
                o.blob,
            )
            for o in owns
        ]

    def drawn(self, peer: str, *kept: Input, order: Order | None = None, second: Order | None = None) -> None:
        orders = (order,) if order else ()
        seconds = (dataclasses.replace(second, first=self.first),) if second else ()
        self.desks[peer].do_audit(ev.Audit(self.record, (), orders, seconds, kept))

    async def settle(self) -> None:
        while pending := [t for desk in self.desks.values() for t in desk.tasks if not t.done()]:
            await asyncio.gather(*pending)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_desk, "AGAIN_S", (0.0, 1e-9))
    monkeypatch.setattr(audit_desk, "OPENED_PER_S", 1e9, raising=False)
    monkeypatch.setattr(audit_desk, "TOLD_AGAIN_S", 0.01, raising=False)


def run(scenario: Callable[[Table], Coroutine[Any, Any, None]], folder: Path) -> Table:
    async def begin() -> Table:
        table = Table(folder)
        await scenario(table)
        for desk in table.desks.values():
            desk.tells_again = False
        await table.settle()
        return table

    return asyncio.run(begin())


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
        table.desks[table.reducer]._own = ""  # its own path lies in its own tree
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
            await table.desks[peer]._say(table.second, ["second", HEAD, SHARD])

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
        first._begin_audits(table.record, [table.order] * 12, first=True)

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
        first._begin_audits(table.record, [*[table.order] * 20, lie], first=True)
        assert first._auditing == 2

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
        first._begin_audits(table.record, orders, first=True)
        waiting = [order.shard for _, order, _ in first._waiting]
        assert len(waiting) == 7 and first.said("audited") == [("skipped",)] * 192
        assert max(waiting) > 100
        first._kept.clear()  # rounds have passed: nobody has the inputs of those that wait any more

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
        ask = first._ask

        async def counting(peer: str, said: list[Any]) -> tuple[bytes, bytearray]:
            nonlocal now, most
            now += peer == table.reducer
            most = max(most, now)
            try:
                return await ask(peer, said)
            finally:
                now -= peer == table.reducer

        first._ask = counting  # type: ignore[method-assign]
        table.drawn(table.first, order=table.order)

    monkeypatch.setattr(audit_desk, "ASKED_OF_REDUCER_MAX", 1)
    table = run(scenario, tmp_path)
    assert table.desks[table.first].said("audited") == [("agreed",)] and most == 1


def test_a_peer_that_holds_its_streams_open_takes_one_place_only(tmp_path: Path) -> None:
    """Auditors would find nobody at home, and name who is."""

    async def scenario(table: Table) -> None:
        table.drawn(table.second, table.own(table.second))
        writers = []
        for _ in range(audit_desk.STREAMS_OF_ONE_MAX):
            _, writer = await table.desks[table.other]._network.open_stream(table.second, "", 1.0)
            writers.append(writer)
        await asyncio.sleep(0.05)
        member = next(m for m in table.record.body.members if m.peer == table.second)
        first = table.desks[table.first]
        async with asyncio.timeout(5.0):
            assert await first._given_by(table.second, table.record, SHARD, member) is not None
        for writer in writers:
            writer.close()

    table = run(scenario, tmp_path)
    assert not table.desks[table.second].said("blamed") and not table.desks[table.second]._turns


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
                desk.do_audit(ev.Audit(record, (), (), (), (table.own("alice"),)))

        heads: list[str] = []
        draw(50)
        assert len(desk._kept) == 50
        desk.clock_s += audit_desk.KEPT_S + 1
        draw(1)
        assert list(desk._kept) == heads[-KEPT_RECORDS:]
        monkeypatch.setattr(audit_desk, "KEPT_BYTES_MAX", 1)
        draw(20)
        assert list(desk._kept) == heads[-KEPT_RECORDS:]
        assert desk._kept.keys() == desk._records.keys() == desk._seconds.keys() == desk._kept_at.keys()

    run(scenario, tmp_path)


@pytest.mark.parametrize("of_the_run", [True, False])
def test_a_proof_against_a_key_that_has_no_part_in_the_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_the_run: bool
) -> None:
    """Anybody can sign wrong means of its own; 64 of them filled what a home keeps, and undid epochs. Nor is
    it averaged: each cost a mean, beside those of the round."""
    proven: list[object] = []
    monkeypatch.setattr(audit_desk, "LATE_S", 0.0)
    monkeypatch.setattr(audit_desk, "prove", lambda *args: proven.append(args))

    async def scenario(table: Table) -> None:
        desk = table.desks["bob"]
        desk.record = table.record
        head = table.record.body.prev if of_the_run else "ee" * 32
        lie = Accusation(
            *(head, EPOCH, (Member("x", 1, "aa" * 32),), 0, "00" * 32, "x" * 8, "ab" * 64), (((), b"x"),)
        )
        await table.desks["alice"]._say("bob", ["accuse"], [lie.pack()])

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
        await desk._accuse(lie, "carol")
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
            await desk._accuse(decoy, "alice")
        assert desk.roll.removed and not desk.said("roll_back")
        desk.taken = digest
        await desk._accuse(lie, "carol")
        for task in desk.tasks:
            task.cancel()
        return desk

    desk = asyncio.run(main())
    assert [entry[:2] for entry in desk.said("roll_back")] == [(EPOCH, HEAD)]
    assert any("0123456789abcdef" * 4 in path.name for path in kept(tmp_path / "bob"))


def lie_of(liar: str, shard: int, digest: str) -> Accusation:
    members = (Member("x", 1, "aa" * 32),)
    return Accusation(HEAD, EPOCH, members, shard, digest, liar, "ab" * 64, (((), b"x"),))


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
        desk._on_lie = "remove"
        desk._network.linked = [peer for peer in PEERS if peer not in away]  # type: ignore[misc]
    table.desks["bob"]._members.expel = lambda *args: None  # type: ignore[method-assign]  # it may not ask
    return lie


@pytest.mark.parametrize("late_link", [False, True])
def test_who_was_away_when_a_lie_was_proven_is_told_of_it_when_it_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late_link: bool
) -> None:
    """The founder alone may remove; proofs were told once, so a liar stayed that lied while it was off. One
    side of a link may be up before the other, which hears nothing then."""
    monkeypatch.setattr(audit_desk, "prove", lambda *args: None)

    async def scenario(table: Table) -> None:
        bob, dora = table.desks["bob"], table.desks["dora"]
        await bob._accuse(proven_to_all_but(table, "dora"), "bob")
        await bob._accuse(lie_of("alice", SHARD + 1, "22" * 32), "bob")  # of the same round
        await until(lambda: bool(table.desks["carol"].said("expel")))
        assert not dora.said("expel")
        bob._network.linked = PEERS  # type: ignore[misc]
        dora._network.linked = () if late_link else PEERS  # type: ignore[misc]
        bob.on_up("dora")
        bob.on_up("dora")  # it flaps
        await asyncio.sleep(0.05)
        dora._network.linked = PEERS  # type: ignore[misc]
        await until(lambda: bool(dora.said("expel")))
        await table.settle()
        told = len(dora._told)
        bob.on_up("dora")
        await table.settle()
        assert len(dora._told) == told and dora._streams == {}

    desks = run(scenario, tmp_path).desks
    assert len(kept(tmp_path / "dora")) == 1, "one of a round"
    assert not any(desk.said("blamed") or desk.said("refused") for desk in desks.values())


def test_who_was_told_in_vain_is_told_at_once_when_a_new_link_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_desk, "prove", lambda *args: None)
    monkeypatch.setattr(audit_desk, "TOLD_AGAIN_S", 60.0)

    async def scenario(table: Table) -> None:
        bob, dora = table.desks["bob"], table.desks["dora"]
        await bob._accuse(proven_to_all_but(table, "dora"), "bob")
        bob._network.linked, dora._network.linked = PEERS, ()  # type: ignore[misc]
        bob.on_up("dora")
        await asyncio.sleep(0.05)
        assert not dora.said("expel"), "it does not hear us yet"
        dora._network.linked = PEERS  # type: ignore[misc]
        bob.on_up("dora")
        await until(lambda: bool(dora.said("expel")))
        await table.settle()

    run(scenario, tmp_path)


def test_who_comes_back_is_not_told_of_liars_that_are_no_members_or_were_let_in_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_desk, "prove", lambda *args: None)

    async def scenario(table: Table) -> None:
        bob = table.desks["bob"]
        await bob._accuse(proven_to_all_but(table, "dora"), "bob")
        seat = bob.roll.members.pop("alice")
        bob._network.linked = PEERS  # type: ignore[misc]
        bob.on_up("dora")
        bob.roll.members["alice"] = SimpleNamespace(since=EPOCH + 1)
        bob.on_up("dora")
        await asyncio.sleep(0.05)
        assert not table.desks["dora"].said("accused")
        bob.roll.members["alice"] = seat
        bob.on_up("dora")
        await until(lambda: bool(table.desks["dora"].said("accused")))

    run(scenario, tmp_path)


@pytest.mark.parametrize("is_true", [True, False])
def test_at_a_start_kept_proofs_against_members_are_judged_again_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_true: bool
) -> None:
    """Who was to sign the removal may have been killed before: what it asked for was in memory only."""

    def prove(*args: object) -> None:
        if not is_true:
            raise audit_desk.FalseAccusation("its disk changed a bit")

    monkeypatch.setattr(audit_desk, "prove", prove)

    async def scenario(table: Table) -> None:
        lie = proven_to_all_but(table)
        audit_desk.keep(tmp_path / "dora", lie)
        audit_desk.keep(tmp_path / "dora", lie_of("x" * 8, SHARD, "33" * 32))
        (tmp_path / "dora" / f"5-1-alice-{'44' * 32}.accusation").write_bytes(b"torn")
        await table.desks["dora"].look_again()

    desks = run(scenario, tmp_path).desks
    assert [peer for peer, _ in desks["dora"].said("expel")] == (["alice"] if is_true else [])
    assert bool(desks["carol"].said("expel")) is is_true
    assert not any(desk.said("blamed") for desk in desks.values())


async def dripping(desk: Desk, name: str, payload_bytes: int) -> asyncio.StreamWriter:
    """A stream of `name` that has begun to accuse somebody at length."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)

    async def serve() -> None:
        try:
            await desk.serve(name, reader, writer)
        except (StreamEnded, ConnectionError):
            desk.told.append(("dripped", name))
        finally:
            writer.close()

    desk._network.linked = (*desk._network.linked, name)  # type: ignore[misc]
    desk._loop.spawn(serve())
    _, ours_writer = await asyncio.open_connection(sock=ours)
    header = msgpack.packb(["accuse"])
    ours_writer.write(FRAME.pack(len(header), payload_bytes) + header + b"x")
    await asyncio.sleep(0.02)
    return ours_writer


@pytest.mark.parametrize("payload_bytes", [audit_desk.ACCUSATION_BYTES_MAX, 1000])
def test_who_drips_accusations_keeps_nobody_from_its_inputs(tmp_path: Path, payload_bytes: int) -> None:
    """Four keys closed a node's audits for an hour, and it was named for giving nothing."""

    async def scenario(table: Table) -> None:
        table.drawn(table.second, table.own(table.second))
        second = table.desks[table.second]
        writers = [await dripping(second, f"x{number}", payload_bytes) for number in range(6)]
        member = next(m for m in table.record.body.members if m.peer == table.second)
        async with asyncio.timeout(5.0):
            first = table.desks[table.first]
            assert await first._given_by(table.second, table.record, SHARD, member) is not None
        for writer in writers:
            writer.close()

    run(scenario, tmp_path)


@pytest.mark.parametrize("payload_bytes", [audit_desk.ACCUSATION_BYTES_MAX, 1000])
def test_who_drips_accusations_makes_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload_bytes: int
) -> None:
    """Large ones keep no small one out at all; and who waits behind small ones that drip gets its turn."""
    monkeypatch.setattr(audit_desk, "prove", lambda *args: None)
    is_large = payload_bytes > 1000
    monkeypatch.setattr(audit_desk, "ACCUSED_S", 60.0 if is_large else 0.2, raising=False)

    async def scenario(table: Table) -> None:
        lie = proven_to_all_but(table)
        carol = table.desks["carol"]
        writers = [await dripping(carol, f"x{number}", payload_bytes) for number in range(6)]
        async with asyncio.timeout(5.0):
            assert await table.desks["bob"]._say_now("carol", ["accuse"], [lie.pack()], 5.0)
        assert len(carol.said("accused")) == 1
        assert bool(carol.said("dripped")) is not is_large, "only those in its way"
        for writer in writers:
            writer.close()

    run(scenario, tmp_path)


def test_whoever_has_much_to_say_to_a_peer_says_it_one_by_one(tmp_path: Path) -> None:
    """Dozens of proofs against one liar were told at once: the surplus was lost, and the teller banned."""

    async def scenario(table: Table) -> None:
        words = [table.desks["alice"]._say("bob", ["second", HEAD, shard]) for shard in range(30)]
        await asyncio.gather(*words)

    bob = run(scenario, tmp_path).desks["bob"]
    assert not bob.said("blamed")


def test_of_a_liars_round_one_wrong_mean_in_the_state_is_told_and_all_ask_for_the_same_removal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each further one took the place of an older file, was news again, and told on to everybody."""
    monkeypatch.setattr(audit_desk, "prove", lambda *args: None)

    async def scenario(table: Table) -> None:
        body = dataclasses.replace(table.record.body, prev=HEAD)
        for desk in table.desks.values():
            desk.record, desk.taken, desk._on_lie = Record(body, HEAD, 0, ()), "11" * 32, "remove"
        lies = [lie_of("alice", shard, "11" * 32) for shard in range(12)]
        found = {"bob": lies[:6], "carol": lies[6:]}  # two auditors
        await asyncio.gather(*(table.desks[by]._accuse(lie, by) for by in found for lie in found[by]))

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
    monkeypatch.setattr(audit_desk, "LATE_S", 0.01)
    monkeypatch.setattr(audit_desk, "prove", lambda *args: None)

    async def scenario(table: Table) -> None:
        def newest(epoch: int) -> Record:
            body = dataclasses.replace(table.record.body, epoch=epoch, prev=HEAD)
            return Record(body, HEAD, 0, ())

        bob, carol = table.desks["bob"], table.desks["carol"]
        table.desks["alice"].record = newest(EPOCH + 1)
        bob.record = carol.record = newest(EPOCH + 1 - behind)
        lie = lie_of("dora", 0, "11" * 32)
        for peer in ("bob", "carol"):
            table.desks["alice"]._loop.spawn(table.desks["alice"]._say(peer, ["accuse"], [lie.pack()]))
        await asyncio.sleep(0.03)
        bob.record = newest(EPOCH + 1)  # carol does not catch up in time
        await until(lambda: len(carol.said("refused")) > 1)
        assert bob.said("accused") and not carol.said("accused")
        carol.record = newest(EPOCH + 1)
        await until(lambda: bool(carol.said("accused")))

    desks = run(scenario, tmp_path).desks
    assert not any(desk.said("blamed") for desk in desks.values())


def test_an_auditor_of_many_shards_opens_no_more_streams_a_second_than_a_peer_lets_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 1.4 billion parameters on a fast line had an honest auditor banned by all that it audited."""
    opened: list[float] = []
    monkeypatch.setattr(audit_desk, "OPENED_PER_S", OPENED_PER_S)

    async def scenario(table: Table) -> None:
        desk, member = Desk("alice", {}, tmp_path), table.record.body.members[1]

        async def sleep(time_s: float) -> None:
            desk.clock_s += time_s

        async def open_stream(*args: object) -> Any:
            opened.append(desk.clock_s)
            raise SwarmError("nobody is there")

        desk._network.open_stream = open_stream  # type: ignore[method-assign]
        monkeypatch.setattr(audit_desk.asyncio, "sleep", sleep)
        for shard in range(int(STREAMS_BURST) // 2):
            await desk._given_by("bob", table.record, shard, member)
            await desk._say("bob", ["second", HEAD, shard])
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
        first._begin_audits(table.record, [table.order] * 12, first=True)
        await asyncio.gather(*first.tasks)
        assert asyncio.get_running_loop().time() - began < 3.0, "one audit's wait, and not those of six"

        table.desks[table.other].holds = False  # it comes to its senses
        table.drawn(table.other, table.own(table.other))
        member = next(m for m in table.record.body.members if m.peer == table.other)
        assert table.other in first._silent
        monkeypatch.setattr(audit_desk, "SILENT_S", 5.0)
        assert await first._given_by(table.other, table.record, SHARD, member) is not None
        assert not first._silent

    table = run(scenario, tmp_path)
    assert table.desks[table.first].said("audited") == [("agreed",)] * 12
