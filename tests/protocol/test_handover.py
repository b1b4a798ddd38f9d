"""Who stops in good order, of two electors, hands over: the other goes on at once, with one decision."""

import dataclasses

import pytest
from simulation.shell import SimCrypto
from simulation.world import Faults, World

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.agreement import ALIKE
from tapestry.node.protocol.canon import InvalidRecord
from tapestry.node.protocol.handover import Handover, leave_message
from tapestry.node.protocol.leader import commit_gap
from tapestry.node.protocol.members import UNIT, Charter, first_roll
from tapestry.node.protocol.messages import Accept, Leave, Propose, Stage
from tapestry.node.protocol.place import Place, Standing, check_record
from tapestry.node.protocol.record import (
    Body,
    Member,
    Record,
    accept_message,
    draw_message,
    head_of,
    record_from_dict,
    record_to_dict,
    seat_message,
)
from tapestry.node.protocol.rules import Rules
from tapestry.node.protocol.validity import value_fault
from tapestry.node.protocol.voice import voice_weights

LOSS_S = 30.0
ROLL = first_roll("ef" * 32, Charter(), ("a", "b", "c"))


def swarm(peers: int, seed: int, on_quorum_loss: str = "wait") -> World:
    run_id = World(seed, peers=1, faults=Faults()).genesis.run_id
    rules = Rules(
        run_id=run_id,
        shard_count=3,
        straggler_wait_s=1.0,
        closing_grace_s=0.5,
        stall_s=5.0,
        quorum_loss_s=LOSS_S,
        exchange_max_s=12.0,
        on_quorum_loss=on_quorum_loss,
    )
    world = World(seed, peers=peers, faults=Faults(), rules=rules).start_all()
    everybody = tuple(world.nodes)
    world.until(lambda: all(electorate(n) == everybody for n in world.nodes.values()), 60)
    return world


def electorate(node) -> tuple[str, ...]:
    return node.core.round.electorate if node.core.round is not None else ()


def stop(world: World, name: str) -> None:
    """As the shell does: its farewell is written before its links close."""
    world.nodes[name].feed(ev.Stopping())
    closed_at = world.now + 0.1
    world.until(lambda: world.now >= closed_at, 10)
    world.nodes[name].crash()


@pytest.mark.parametrize("on_quorum_loss", ["continue", "wait"])
@pytest.mark.parametrize("seed", range(12))
def test_the_other_of_two_goes_on_at_once(seed, on_quorum_loss):
    world = swarm(2, seed, on_quorum_loss)
    moment = world.now + 0.17 * seed  # each in another part of its round
    world.until(lambda: world.now >= moment, 10)
    stays = world.nodes["p0"]
    epoch = stays.core.chain.epoch
    stop(world, "p1")
    # Of what it was amid it ends the exchange and trains one epoch more: seconds, and no clock runs out.
    assert world.until(lambda: stays.core.chain.epoch >= epoch + 3, 60) < 14
    records = stays.core.chain.records
    assert not any(r.body.forced for r in records)
    alone = [r for r in records if r.handover is not None]
    assert 1 <= len(alone) <= 2 and all(r.handover.peer == "p1" for r in alone)
    world.nodes["p1"].start()
    goal = stays.core.chain.epoch + 3
    world.until(lambda: all(n.core.chain.epoch >= goal for n in world.nodes.values()), 60)
    world.until(lambda: electorate(stays) == ("p0", "p1"), 10)


def test_who_has_left_and_is_back_does_not_decide_in_the_others_place():
    """Found by the simulator: it was ready first, and its promise and its vote were taken for the quorum."""
    led = (world for world in (swarm(2, seed) for seed in range(20)) if leads_next(world, "p0"))
    world = next(led)
    stays = world.nodes["p0"]
    stop(world, "p1")
    world.nodes["p1"].start()
    state = stays.core.round.state
    world.until(lambda: "p1" in state.ready, 20)
    assert state.stage == Stage.TRAINING and state.handover is not None and state.need == 1
    assert stays.core.round.lead._promises(world.now) == 0
    vote = Accept(state.epoch, state.head, state.ballot, "", "", ALIKE, "", "")
    body = lone_record()[0].body
    assert commit_gap(body, {"p1": vote}, state.voters) is not None
    assert commit_gap(body, {"p0": vote}, state.voters) is None


def test_who_has_not_left_accepts_nothing_that_leaves_it_out():
    """A liar of two would be the only elector from the next round on."""
    world = swarm(2, 6)
    state = world.nodes["p1"].core.round.state
    weight = voice_weights(state.at.roll, [("p0", 5)], 1.0)[0]
    member = Member("p0", weight, "cd" * 32, world.nodes["p0"].disk.life, 5)
    run_id = world.genesis.run_id
    lone = Body(run_id, state.epoch + 1, state.head, state.state_digest, (member,), "34" * 32)
    assert value_fault(state, lone) == "electorate"
    state.vote = dataclasses.replace(state.vote, left=state.head)
    assert value_fault(state, lone) is None, "it has left, and the other may have decided alone"
    state.vote = dataclasses.replace(state.vote, left="", accepted=lone, accepted_ballot=0)
    assert value_fault(state, lone) is None
    propose = Propose(state.epoch, state.head, state.ballot + 2, lone, ("p0",))
    state.vote = dataclasses.replace(state.vote, accepted=None, accepted_ballot=-1)
    leader = state.leader_of(propose.ballot)
    world.nodes["p1"].feed(ev.Received(leader, propose))
    assert leader != "p0" or world.refused.get("electorate")


def test_where_both_have_left_nobody_counts_on_either():
    world = swarm(2, 6)
    node = world.nodes["p0"]
    head, state = node.core.chain.head, node.core.round.state
    for name in ("p0", "p1"):
        leave = Leave(state.epoch, head, SimCrypto(name).sign(leave_message(head)))
        node.core.ctx.leaves[name] = leave
    assert state.handover.peer == "p1"
    node.core.ctx.me = "p9"
    assert state.handover is None
    node.core.ctx.me = "p0"


def leads_next(world: World, name: str) -> bool:
    """Whether `name` leads the next round; there it trains for long."""
    world.laggard, world.lag = name, 1000.0
    core, epoch = world.nodes[name].core, world.epoch()
    world.until(lambda: core.round is not None and core.chain.epoch > epoch, 60)
    return core.round.leader == name


def test_without_a_word_it_waits():
    world = swarm(2, 3)
    epoch = world.nodes["p0"].core.chain.epoch
    world.nodes["p1"].crash()
    with pytest.raises(AssertionError, match="not within"):
        world.until(lambda: world.nodes["p0"].core.chain.epoch >= epoch + 3, 2 * LOSS_S)


def test_where_both_stop_neither_decides_alone_before_both_are_back():
    world = swarm(2, 5)
    epoch = world.nodes["p0"].core.chain.epoch
    for name in world.nodes:
        world.nodes[name].feed(ev.Stopping())
    for name in world.nodes:
        stop(world, name)
    world.nodes["p0"].start()
    p1 = SimCrypto("p1")
    head = world.nodes["p0"].core.chain.head
    p0 = world.nodes["p0"]
    p0.feed(ev.PeerUp("p1"))
    p0.feed(ev.Received("p1", Leave(epoch, head, p1.sign(leave_message(head)))))
    p0.feed(ev.PeerDown("p1"))
    assert p0.disk.vote.left and p0.core.ctx.leaves
    with pytest.raises(AssertionError, match="not within"):
        world.until(lambda: p0.core.chain.epoch > epoch, 2 * LOSS_S)
    world.nodes["p1"].start()
    world.until(lambda: all(n.core.chain.epoch >= epoch + 3 for n in world.nodes.values()), 60)


@pytest.mark.parametrize("peers", [1, 3, 4])
def test_of_more_than_two_nothing_is_handed_over(peers):
    world = swarm(peers, 7)
    node = world.nodes["p0"]
    node.feed(ev.Stopping())
    assert node.disk.vote is None or not node.disk.vote.left


def test_a_leave_that_another_signed_is_refused_and_one_of_a_stranger():
    world = swarm(2, 2)
    node = world.nodes["p0"]
    head = node.core.chain.head
    other = SimCrypto("p1").sign(leave_message("00" * 32))
    node.feed(ev.Received("p1", Leave(0, head, other)))
    assert not node.core.ctx.leaves and world.refused


def lone_record(signers=("a",), leaver="b", head="ab" * 32, forced=False, electors=("a", "b")):
    seat = "" if forced else SimCrypto("a").sign(seat_message("ab" * 32, ""))
    members = (Member("a", UNIT, "cd" * 32, "", 1, seat),)
    at = Place(3, "ab" * 32, electors, ROLL, Standing(3, electors, ROLL, (), 0, 0))
    body = Body("ef" * 32, 4, "ab" * 32, "12" * 32, members, "34" * 32, forced)
    record = signed(body, signers)
    handover = Handover(leaver, head, SimCrypto(leaver).sign(leave_message(head)))
    return dataclasses.replace(record, handover=handover), at


def signed(body: Body, signers) -> Record:
    crypto = SimCrypto("a")
    head = head_of(body, crypto)
    vote, draw = (
        tuple((p, SimCrypto(p).sign(message)) for p in signers)
        for message in (accept_message(head, 5), draw_message(head))
    )
    return Record(body, head, 5, vote, None, draw)


def test_a_record_with_a_leave_is_decided_by_one_of_two():
    record, at = lone_record()
    check_record(record, at, SimCrypto("a"))
    text = record_to_dict(record)
    assert record_from_dict(text, SimCrypto("a")) == record
    del text["handover"]
    with pytest.raises(InvalidRecord, match="1 signed, need 2"):
        check_record(record_from_dict(text, SimCrypto("a")), at, SimCrypto("a"))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"head": "ba" * 32}, "handover"),
        ({"leaver": "c"}, "handover"),
        ({"leaver": "a"}, "handover"),
        ({"electors": ("a", "b", "c")}, "electorate"),
        ({"forced": True}, "handover"),
    ],
)
def test_a_leave_that_stands_for_no_vote(given, reason):
    record, at = lone_record(**given)
    with pytest.raises(InvalidRecord) as caught:
        check_record(record, at, SimCrypto("a"))
    assert caught.value.reason == reason
