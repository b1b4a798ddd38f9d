"""A leader that writes who the next electors are, and on which disk: nobody is named without its own word."""

from dataclasses import replace

import pytest
from simulation.world import Faults, World

from tapestry.node.protocol import events as ev
from tapestry.node.protocol import place as place_module
from tapestry.node.protocol.leader import Leader
from tapestry.node.protocol.members import Change
from tapestry.node.protocol.messages import Ready, Status
from tapestry.node.protocol.rules import Rules

ENOUGH_S = 60.0  # in which an honest swarm makes some 40 epochs
STOPPED_S = 200.0
UNCHECKED = [(place_module, "_seats_fault"), (Leader, "seat_fault")]


def swarm(peers: int, policy: str) -> World:
    run_id = World(7, peers=1, faults=Faults()).genesis.run_id
    rules = Rules(
        run_id=run_id,
        shard_count=3,
        straggler_wait_s=1.0,
        closing_grace_s=0.5,
        stall_s=3.0,
        quorum_loss_s=8.0,
        exchange_max_s=12.0,
        on_quorum_loss=policy,
    )
    world = World(7, peers=peers, faults=Faults(), rules=rules).start_all()
    world.until(lambda: all(n.core.round and len(n.core.round.electorate) == peers for n in nodes(world)), 30)
    return world


def nodes(world: World):
    return list(world.nodes.values())


def forges(world: World, liar: str, kind: str) -> None:
    """It names electors on other disks, or members that are not there, once; then it never votes again."""
    world.forgers.name, world.forgers.kind = liar, kind
    honest = world.send

    def named() -> bool:
        chain = nodes(world)[0].core.chain
        return any(m.life == world.forgers.life for r in chain.records for m in r.body.members)

    def send(sender, to, message, bulk=False):
        if sender.name != liar or not named() or isinstance(message, Status):
            honest(sender, to, message, bulk)

    world.send = send


def admit(world: World, guests: list[str]) -> None:
    for number, guest in enumerate(guests):
        change = Change("admit", guest, "x", world.epoch() + 1000, f"{number:032x}")
        nodes(world)[0].feed(ev.ChangeAsked(change))
    world.until(lambda: all(g in n.core.chain.roll.members for g in guests for n in nodes(world)), 30)


def unchecked(monkeypatch) -> None:
    for owner, name in UNCHECKED:
        monkeypatch.setattr(owner, name, lambda *args: None)
    monkeypatch.setattr("simulation.invariants.Invariants._check_seats", lambda *args: None)


@pytest.mark.parametrize(("peers", "policy"), [(4, "auto"), (4, "continue"), (7, "auto")])
@pytest.mark.parametrize("checked", [True, False])
def test_a_leader_that_names_electors_on_other_disks_stops_nobody(peers, policy, checked, monkeypatch):
    if not checked:
        unchecked(monkeypatch)
    world = swarm(peers, policy)
    forges(world, f"p{peers - 1}", "lives")
    goal = world.epoch() + 20
    if checked:
        world.until(lambda: world.epoch() >= goal, 10 * ENOUGH_S)
        assert world.forgers.lied and world.refused["seat"]
        return
    with pytest.raises(AssertionError, match="our disk was lost"):
        world.until(lambda: world.epoch() >= goal, STOPPED_S)


@pytest.mark.parametrize("policy", ["auto", "continue"])
@pytest.mark.parametrize("checked", [True, False])
def test_a_leader_that_names_members_who_are_not_there_stops_nobody(policy, checked, monkeypatch):
    if not checked:
        unchecked(monkeypatch)
    world = swarm(4, policy)
    admit(world, ["guest0", "guest1"])
    forges(world, "p3", "absent")
    goal = world.epoch() + 20
    if checked:
        world.until(lambda: world.epoch() >= goal, 10 * ENOUGH_S)
        assert world.forgers.lied and world.refused["seat"]
        return
    with pytest.raises(AssertionError, match="not within"):
        world.until(lambda: world.epoch() >= goal, STOPPED_S)
    assert len(nodes(world)[0].core.chain.place.electorate) == 6


def test_who_says_ready_without_a_word_that_holds_is_not_named():
    world = swarm(3, "wait")
    world.forgers.name, world.forgers.kind = "p2", "ready"
    goal = world.epoch() + 12
    world.until(lambda: all(n.core.chain.epoch >= goal for n in nodes(world)), ENOUGH_S)
    assert world.refused["seat"]
    named = [{m.peer for m in r.body.members} for r in nodes(world)[0].core.chain.records[-8:]]
    assert {"p0", "p1"} in named, "by who hears it; its own rosters may name it"


def test_a_seat_is_signed_once_a_round_and_looked_at_once():
    world = swarm(3, "wait")
    signed, looked = [], []
    for node in nodes(world):
        sign, verify = node.crypto.sign, node.crypto.verify

        def count_sign(message, sign=sign, name=node.name):
            signed.append((name, message))
            return sign(message)

        def count_verify(peer, signature, message, verify=verify, name=node.name):
            looked.append((name, peer, message))
            return verify(peer, signature, message)

        node.crypto.sign, node.crypto.verify = count_sign, count_verify
    goal = world.epoch() + 5
    world.until(lambda: all(n.core.chain.epoch >= goal for n in nodes(world)), ENOUGH_S)
    for calls in (signed, looked):
        seats = [call for call in calls if call[-1].startswith(b"tapestry seat")]
        assert seats and len(seats) == len(set(seats))
    core = nodes(world)[0].core
    assert not any(m.seat for m in core.chain.records[-1].body.members), "all contribute, on known disks"


def test_a_leader_looks_again_at_another_word_of_the_same_peer():
    world = swarm(3, "wait")
    world.until(lambda: any(len(n.core.round.state.ready) > 1 for n in nodes(world) if n.core.round), 60)
    node = next(n for n in nodes(world) if n.core.round and len(n.core.round.state.ready) > 1)
    round_ = node.core.round
    peer, ready = next((p, r) for p, r in round_.state.ready.items() if p != node.name)
    assert isinstance(ready, Ready)
    assert round_.lead.seat_fault(peer, ready.life, ready.seat) is None
    for wrong in (replace(ready, seat="ab" * 32), replace(ready, life="12" * 16), replace(ready, seat="")):
        assert round_.on_ready(peer, wrong, world.now) == "seat"
    assert round_.state.ready[peer] == ready
