"""One member that leads whenever it can: it takes no run over, stops none, and is removed."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from simulation.shell import Disk, SimCrypto
from simulation.world import Faults, World

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.agreement import ALIKE
from tapestry.node.protocol.core import Core
from tapestry.node.protocol.leader import Leader
from tapestry.node.protocol.members import Change, Seat
from tapestry.node.protocol.messages import Call, Commit, Result, Stage, Status
from tapestry.node.protocol.movers import FREE, Movers
from tapestry.node.protocol.place import UNNAMED_MAX, genesis_place, next_place
from tapestry.node.protocol.proposals import Proposals
from tapestry.node.protocol.record import Body, Member, Record, accept_message, head_of
from tapestry.node.protocol.rules import Rules

LIAR = "p3"


def swarm(peers: int, seed: int = 7, **rules: object) -> World:
    run_id = World(seed, peers=1, faults=Faults()).genesis.run_id
    fixed = {"straggler_wait_s": 1.0, "closing_grace_s": 0.5, "stall_s": 3.0, "quorum_loss_s": 8.0}
    given = Rules(run_id=run_id, shard_count=12, **{**fixed, "exchange_max_s": 12.0, **rules})  # type: ignore[arg-type]
    world = World(seed, peers=peers, faults=Faults(), rules=given).start_all()
    world.until(lambda: all(n.core.round and len(n.core.round.electorate) == peers for n in nodes(world)), 60)
    return world


def nodes(world: World):
    return list(world.nodes.values())


def epochs_s(world: World, count: int, limit_s: float = 60.0) -> list[float]:
    begin = world.epoch()
    return [world.until(lambda e=e: world.epoch() > e, limit_s) for e in range(begin, begin + count)]


def stop(world: World, name: str) -> None:
    """As the shell does: its farewell is written before its links close."""
    world.nodes[name].feed(ev.Stopping())
    closed_at = world.now + 0.1
    world.until(lambda: world.now >= closed_at, 10)
    world.nodes[name].crash()


class Usurper:
    """Calls everybody to the first ballot of each round that is its own."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.seen: set[str] = set()

    def call(self) -> None:
        node = self.world.nodes[self.name]
        round_ = node.core.round
        if round_ is None or round_.head in self.seen or round_.ballot or self.name not in round_.electorate:
            return
        self.seen.add(round_.head)
        ballot = next(b for b in range(len(round_.electorate)) if round_.state.leader_of(b) == self.name)
        if not ballot:
            return
        round_.lead.open(ballot, self.world.now)
        node.core._after(self.world.now)
        for other in nodes(self.world):
            there = other.core.round
            if other is not node and there is not None and there.head == round_.head:
                other.feed(ev.Received(self.name, Call(round_.epoch, round_.head, ballot, False)))


# --- the electorate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("on_quorum_loss", ["auto", "continue", "wait"])
@pytest.mark.parametrize("peers", [4, 7])
def test_a_leader_that_names_a_bare_quorum_does_not_become_the_electorate(peers, on_quorum_loss, monkeypatch):
    world = swarm(peers, on_quorum_loss=on_quorum_loss)
    liar = f"p{peers - 1}"
    send_roster = Leader._send_roster

    def names_few(self: Leader, now: float):
        if self.ctx.me == liar and not self.state.forced and len(self.state.electorate) > 2:
            others = [p for p in self.state.electorate if p != liar and p in self.state.ready]
            for peer in others[self.state.need - 1 :]:
                del self.state.ready[peer]
        return send_roster(self, now)

    monkeypatch.setattr(Leader, "_send_roster", names_few)
    usurper = Usurper(world, liar)
    begin = world.now
    while world.now < begin + 60:
        usurper.call()
        world.step()
        for node in nodes(world):
            assert len(node.core.chain.place.electorate) >= 3
    assert world.epoch() > 15
    honest = nodes(world)[0].core
    assert takes_forced_record(world, honest, liar) == "forced" or on_quorum_loss == "continue"


def takes_forced_record(world: World, core: Core, liar: str) -> str:
    """Why `core` refuses a record by which `liar` alone goes on; "" if it takes it."""
    place, crypto = core.chain.place, SimCrypto(liar)
    line = Member(liar, 1, "ab" * 32, world.nodes[liar].disk.life, 1)
    state_digest = core.sync.state_digest
    body = Body(
        core.ctx.rules.run_id, place.epoch + 1, place.head, state_digest, (line,), "ee" * 32, True, ALIKE
    )
    head = head_of(body, crypto)
    record = Record(body, head, 9, ((liar, crypto.sign(accept_message(head, 9))),))
    out = core.handle(ev.Received(liar, Commit(record)), world.now)
    return next((o.reason for o in out if isinstance(o, ev.Verdict)), "")


def test_an_electorate_of_three_stays_three_and_one_that_is_back_votes():
    world = swarm(3, on_quorum_loss="auto")
    world.nodes["p2"].crash()
    epochs_s(world, 3)
    assert world.nodes["p0"].core.chain.place.electorate == ("p0", "p1", "p2")
    world.nodes["p1"].crash()
    epoch, until = world.epoch(), world.now + 30
    world.until(lambda: world.now >= until, 40)
    assert world.epoch() <= epoch + 1, "one of three goes on by itself"
    world.nodes["p2"].start()
    epochs_s(world, 2)


def test_who_stays_an_elector_and_has_lost_its_disk_does_not_vote_before_a_record_names_it():
    world = swarm(3, on_quorum_loss="auto")
    gone = world.nodes["p2"]
    gone.crash()
    epochs_s(world, 3)
    place = world.nodes["p0"].core.chain.place
    assert "p2" in place.electorate and ("p2", gone.disk.life) in place.seats
    gone.disk = Disk(life=world.token())
    world.invariants.on_disk_lost(gone)
    gone.start()
    stood_by: set[str] = set()

    def is_named() -> bool:
        place, named = gone.core.chain.place, ("p2", gone.disk.life) in gone.core.chain.place.seats
        if "p2" in place.electorate and not named:
            stood_by.add(gone.core.own.stands_by().what)
        return named

    world.until(is_named, 60)
    assert stood_by == {"our disk was lost: no vote before the next record"}
    epochs_s(world, 2)


def test_an_electorate_of_two_falls_to_one_by_a_leave_and_islands_are_who_is_on_them():
    world = swarm(2, on_quorum_loss="continue")
    stop(world, "p1")
    epochs_s(world, 2)
    assert world.nodes["p0"].core.chain.place.electorate == ("p0",)
    world = swarm(3, on_quorum_loss="continue")
    for name in ("p1", "p2"):
        world.nodes[name].crash()
    epochs_s(world, 2)
    assert world.nodes["p0"].core.chain.place.electorate == ("p0",)


def test_a_removed_elector_does_not_stay():
    world = swarm(4)
    epoch = world.epoch()
    change = Change("remove", LIAR, "left", epoch + 10_000, "a" * 32)
    world.nodes[LIAR].crash()
    nodes(world)[0].feed(ev.ChangeAsked(change))
    world.until(lambda: LIAR not in nodes(world)[0].core.chain.roll.members, 60)
    assert LIAR not in nodes(world)[0].core.chain.place.electorate


# --- who leads ----------------------------------------------------------------------------------------


def test_a_leader_of_every_round_that_carries_no_changes_is_removed_all_the_same(monkeypatch):
    world = swarm(4)
    contributors = Leader._contributors

    def without_p1(self: Leader, now: float) -> list[str]:
        found = contributors(self, now)
        return [p for p in found if p != "p1"] if self.ctx.me == LIAR else found

    monkeypatch.setattr(Leader, "_contributors", without_p1)
    silent = type("Silent", (Proposals,), {"ready": lambda *_: ()})
    world.nodes[LIAR].core.ctx.proposals.__class__ = silent
    usurper, begin, epoch = Usurper(world, LIAR), world.now, world.epoch()
    change = Change("remove", LIAR, "it leads and carries nothing", epoch + 10_000, "a" * 32)
    nodes(world)[0].feed(ev.ChangeAsked(change))
    while LIAR in world.nodes["p0"].core.chain.roll.members:
        assert world.now < begin + 60
        usurper.call()
        world.step()


def test_a_leader_that_only_says_that_it_exchanges_costs_a_leaders_patience_each_time(monkeypatch):
    world = swarm(4, straggler_wait_s=None, closing_grace_s=None, stall_s=5.0, exchange_max_s=None)
    status_of, honest = Core._status, world.send

    def pretends(core: Core) -> bool:
        round_ = core.round
        return core.ctx.me == LIAR and round_ is not None and round_.state.leader_of(0) == LIAR

    def status(self: Core) -> Status:
        said = status_of(self)
        if pretends(self) and self.round is not None and said.head == self.round.head:
            return dataclasses.replace(said, stage=Stage.EXCHANGING, ballot=0, progress=1, waiting_on=())
        return said

    def send(sender, to, message, bulk=False):
        if isinstance(message, Status) or not pretends(sender.core):
            honest(sender, to, message, bulk)

    monkeypatch.setattr(Core, "_status", status)
    world.send = send
    lengths = epochs_s(world, 40, 150.0)
    assert max(lengths) < 35 and sum(length > 3 for length in lengths) >= 3


def test_sums_that_differ_for_each_member_cost_no_stall(monkeypatch):
    world = swarm(4, stall_s=5.0)
    monkeypatch.setattr("simulation.invariants.Invariants._check_mean", lambda *_: None)
    honest, lies = world.send, Counter[str]()

    def send(sender, to, message, bulk=False):
        if sender.name == LIAR and isinstance(message, Result):
            by = 1 + sorted(world.nodes).index(to)
            sums = message.sums
            said = dataclasses.replace(
                sums, same_sign=sums.same_sign + by, other_sign=sums.other_sign + 3 * by
            )
            message, lies[to] = dataclasses.replace(message, sums=said), lies[to] + 1
        honest(sender, to, message, bulk)

    world.send = send
    lengths = epochs_s(world, 15)
    assert lies and max(lengths) < world.rules.stall_s


def test_who_is_gone_for_many_records_is_no_elector_any_more():
    """Else a lost disk, or a stop, of one of the two that are left would hold the run for good."""
    at, electors = genesis_place(World(7, peers=1, faults=Faults()).genesis), ("a", "b", "c")
    seats = {peer: Seat(peer, 1, 0) for peer in electors}
    at = at._replace(electorate=electors, roll=dataclasses.replace(at.roll, members=seats))
    line = Member("a", 1, "ab" * 32), Member("b", 1, "cd" * 32)
    for count in range(UNNAMED_MAX + 1):
        assert at.electorate == electors and dict(at.unnamed).get("c", 0) == count
        body = Body(at.roll.run_id, at.epoch + 1, at.head, "0" * 64, line, "ee" * 32)
        at = next_place(at, Record(body, f"{count:064x}", 0, ()))
    assert at.electorate == ("a", "b") and not at.unnamed
    assert {peer for peer, _ in at.seats} == {"a", "b"}


def test_an_elector_that_is_linked_and_at_no_head_is_no_leader_to_wait_for():
    world = swarm(3, stall_s=5.0, on_quorum_loss="auto")
    away, status_of = world.nodes["p2"], Core._status

    def status(self: Core) -> Status:
        return dataclasses.replace(status_of(self), stage=Stage.AWAY)

    away.core._status = status.__get__(away.core)
    honest = world.send

    def send(sender, to, message, bulk=False):
        if sender is not away or isinstance(message, Status):
            honest(sender, to, message, bulk)

    world.send = send
    epochs_s(world, 2)
    lengths = epochs_s(world, 20)
    assert max(lengths) < 4.0
    assert "p2" in world.nodes["p0"].core.chain.place.electorate


def test_a_leader_may_give_up_a_value_that_was_accepted_some_times_only():
    movers = Movers()
    for _ in range(FREE):
        assert movers.is_excused("x") and movers.is_excused("x"), "once in a round"
        movers.end_round(3, "y", {"x": None})
    assert not movers.is_excused("x")
