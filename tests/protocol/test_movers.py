"""Whose word takes a node to a higher ballot: what an elector can do with it, and what it costs a run."""

from dataclasses import replace

import pytest
from simulation.world import Faults, World

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.messages import Call, Closing, Member, Roster, Stage, Status
from tapestry.node.protocol.movers import FREE, OWN_MORE, REPAID, Movers
from tapestry.node.protocol.place import seat_of
from tapestry.node.protocol.receipts import signed
from tapestry.node.protocol.record import seat_message
from tapestry.node.protocol.round import NARROW, Round
from tapestry.node.protocol.rules import Rules

# --- the account ------------------------------------------------------------------------------------


def test_a_word_that_leads_to_nothing_counts_so_often():
    movers = Movers()
    for ballot in range(FREE):
        assert movers.is_heeded("x")
        movers.count("x", ballot, hasty=False)
    assert not movers.is_heeded("x") and movers.is_heeded("y")
    movers.end_round(None, "", {"x": None})
    assert not movers.is_heeded("x"), "the next round remembers"
    movers.end_round(None, "", {})
    assert movers.is_heeded("x"), "who left the table of peers is forgotten"


def test_ballots_that_made_a_record_take_moves_back():
    movers = Movers()
    for _ in range(FREE - 1):
        movers.count("x", 1, hasty=False)
        movers.end_round(0, "y", {"x": None})
    for _ in range((FREE - 1) * REPAID):
        movers.count("x", 2, hasty=False)
        movers.end_round(2, "x", {"x": None})
    assert not movers.accounts


def test_who_is_heeded_no_more_is_again_by_leading_when_it_is_its_turn():
    movers = Movers()
    for ballot in range(FREE):
        movers.count("x", ballot, hasty=False)
    for _ in range(REPAID):
        assert not movers.is_heeded("x")
        movers.end_round(7, "x", {"x": None})
    assert movers.is_heeded("x")


def test_a_leader_goes_on_once_for_each_that_it_may_leave_out_and_seldom_without_a_roster():
    movers = Movers()
    assert [movers.may_go_on("x", True, 5) for _ in range(6)] == [True] * 4 + [False] * 2
    assert [movers.may_go_on("x", False, 5) for _ in range(5)] == [True] * OWN_MORE + [False]


def test_a_round_in_which_a_leader_went_on_in_vain_counts_and_one_that_it_decided_does_not():
    movers = Movers()
    for _ in range(FREE):
        assert movers.is_heeded("x")
        movers.may_go_on("x", True, 5)
        movers.end_round(4, "y", {"x": None})
    assert not movers.is_heeded("x")
    movers.may_go_on("z", True, 5)
    movers.end_round(3, "z", {"z": None})
    assert "z" not in movers.accounts


# --- in a run ---------------------------------------------------------------------------------------


def swarm(peers: int = 4) -> World:
    run_id = World(7, peers=1, faults=Faults()).genesis.run_id
    rules = Rules(
        run_id=run_id,
        shard_count=3,
        straggler_wait_s=1.0,
        closing_grace_s=0.5,
        stall_s=3.0,
        quorum_loss_s=8.0,
        exchange_max_s=12.0,
    )
    world = World(7, peers=peers, faults=Faults(), rules=rules).start_all()
    world.until(lambda: all(n.core.round and len(n.core.round.electorate) == peers for n in nodes(world)), 30)
    return world


def nodes(world: World):
    return list(world.nodes.values())


def says(world: World, liar: str, message) -> None:
    for node in nodes(world):
        if node.name != liar:
            node.feed(ev.Received(liar, message))


def disturbed(world: World, liar: str, by_status: bool, epochs: int, limit_s: float) -> None:
    """Whenever others exchange, `liar` calls them to its next ballot, or says that it is in a higher one."""
    goal = world.epoch() + epochs

    def reached() -> bool:
        for node in nodes(world):
            round_ = node.core.round
            if node.name == liar or round_ is None or round_.stage != Stage.EXCHANGING:
                continue
            if liar not in round_.electorate:
                continue  # it was left out of the record before, and leads no ballot
            epoch, head, ballot = round_.epoch, round_.head, round_.ballot + 1
            if by_status:
                says(world, liar, Status(epoch, head, epoch, "x", Stage.READY, ballot, 0, ()))
                continue
            while round_.state.leader_of(ballot) != liar:
                ballot += 1
            says(world, liar, Call(epoch, head, ballot, False))
        return all(n.core.chain.epoch >= goal for n in nodes(world))

    world.until(reached, limit_s)


@pytest.mark.parametrize("by_status", [False, True])
def test_an_elector_that_opens_ballot_after_ballot_holds_nobody_up_for_long(by_status, monkeypatch):
    disturbed(swarm(), "p3", by_status, epochs=6, limit_s=120)
    if by_status:
        return  # where the others meet in one of these ballots, that one ends
    monkeypatch.setattr(Movers, "is_heeded", lambda self, peer: True)
    with pytest.raises(AssertionError, match="not within"):
        disturbed(swarm(), "p3", by_status, epochs=6, limit_s=120)


def alone(world: World, leader: str) -> Roster:
    """A quorum of the electors, of which `leader` alone has a contribution."""
    round_ = world.nodes[leader].core.round
    members = []
    for node in nodes(world)[:3]:
        mine = node.core.round.exchange.mine
        member = Member(node.name, 0, "", node.disk.life)
        if node.name == leader:
            member = replace(member, weight=mine.weight, contribution=mine.contribution, tokens=mine.weight)
        said = node.crypto.sign(seat_message(round_.head, node.disk.life))
        members.append(replace(member, seat=seat_of(round_.state.at, member, False, said)))
    state = round_.state
    reducers = tuple(i for i, m in enumerate(members) if m.peer != leader)[:1] * 3
    roster = Roster(
        round_.epoch, round_.head, round_.ballot, False, state.state_digest, tuple(members), reducers
    )
    return signed(roster, world.rules.run_id, leader, world.nodes[leader].crypto)


def test_a_leader_that_names_itself_alone_is_not_followed_and_named(monkeypatch):
    def told() -> tuple[World, str, Roster]:
        world = swarm()
        world.until(lambda: all(n.core.round and n.core.round.exchange.mine for n in nodes(world)), 60)
        round_ = nodes(world)[0].core.round
        leader = next(p for p in round_.state.order if p in ("p0", "p1", "p2"))
        for node in nodes(world):
            ballot = round_.state.order.index(leader)
            if ballot > node.core.round.ballot:
                node.core.round.acceptor.enter(ballot, world.now)
        return world, leader, alone(world, leader)

    world, leader, roster = told()
    says(world, leader, roster)
    assert world.refused[NARROW] == 2, "the two others that it names"
    assert all(n.core.round.exchange.roster != roster for n in nodes(world) if n.name != leader)
    monkeypatch.setattr("tapestry.node.protocol.round.is_followed", lambda *a: True)
    world, leader, roster = told()
    says(world, leader, roster)
    assert sum(n.core.round.exchange.roster == roster for n in nodes(world)) == 2


def test_no_leader_ends_the_others_training_before_a_quorum_is_ready(monkeypatch):
    def closed() -> list[ev.CloseTraining]:
        world, told = swarm(), []
        world.until(
            lambda: all(n.core.round and n.core.round.stage == Stage.TRAINING for n in nodes(world)), 60
        )
        for node in nodes(world):
            node.execute = {**node.execute, ev.CloseTraining: lambda node, out: told.append(out)}
        round_ = nodes(world)[0].core.round
        ballot = round_.ballot + 1
        says(world, round_.state.leader_of(ballot), Closing(round_.epoch, round_.head, ballot))
        return told

    assert closed() == []
    monkeypatch.setattr(Round, "_quorum_is_ready", lambda self, leader, now: True)
    assert len(closed()) == 3


def test_a_leader_goes_on_so_often_and_then_alone():
    """It names a roster in each of its ballots, and none is decided: as one that tells others another one."""
    world = swarm()
    world.until(lambda: all(n.core.round and n.core.round.exchange.mine for n in nodes(world)), 60)
    node = nodes(world)[0]
    state = node.core.round.state
    liar = next(p for p in state.order if p != node.name)
    node.core.round.acceptor.enter(state.order.index(liar), world.now)
    followed = []
    for _ in range(6):
        state.roster_ballot = state.ballot
        ballot = state.ballot + len(state.order)
        node.core.round.reach = ballot
        node.core.round.on_call(liar, Call(state.epoch, state.head, ballot, False), world.now)
        followed.append(state.ballot == ballot)
    assert followed == [True] * 3 + [False] * 3
    assert node.core.ctx.movers.accounts[liar].vain == 1, "the same ballot again and again counts once"


@pytest.mark.parametrize(("ahead", "counts"), [(0, True), (1, False)])
def test_who_gets_on_in_another_ballot_hides_no_stall_of_ours(ahead, counts):
    world = swarm()
    world.until(
        lambda: all(n.core.round and n.core.round.stage == Stage.EXCHANGING for n in nodes(world)), 60
    )
    node = next(n for n in nodes(world) if not n.core.round.exchange.owing())  # it averages nothing
    other = next(n for n in nodes(world) if n is not node)
    round_ = node.core.round
    at, ballot = round_.state.progress_at, round_.ballot + ahead
    status = Status(round_.epoch, round_.head, round_.epoch, "x", Stage.EXCHANGING, ballot, 10**6, ())
    node.core.ctx.peers[other.name].status = status
    round_.watch.progress(world.now + 1.0)
    assert (round_.state.progress_at > at) == counts


@pytest.mark.parametrize(("peers", "calls"), [(3, True), (4, True), (3, False)])
def test_a_leader_that_tells_half_another_roster_costs_some_stalls_and_a_change_of_leader(peers, calls):
    """In its round they go on with it once for each other elector, and then give up on it by their clock.
    Whether it calls them to its next ballot, or sends that one's roster at once."""
    world = swarm(peers)
    world.splitters.name, world.splitters.unsigned = "p1", False
    honest = world.send

    def send(sender, to, message, bulk=False):
        if calls or sender.name != "p1" or not isinstance(message, Call):
            honest(sender, to, message, bulk)

    world.send = send
    stall_s, longest = world.rules.stall_s, 0.0
    struck_off: set[str] = set()
    honest_nodes = [n for n in nodes(world) if n.name != "p1"]
    for _ in range(60):
        goal = world.epoch() + 1
        longest = max(longest, world.until(lambda goal=goal: world.epoch() >= goal, 120.0))
        struck_off |= {n.name for n in honest_nodes if not n.core.ctx.movers.is_heeded("p1")}
    assert stall_s < longest < ((peers - 1) + 2 + 1) * (stall_s + 1.0)
    assert struck_off == {n.name for n in honest_nodes}
    assert world.splitters.proven, "and each leader after it had both of its rosters"
