"""Forced records whose numbers nobody gives: who took them goes back, and doubts those who signed them."""

from __future__ import annotations

import pytest
from protocol.test_colluders import fork_of, swarm, tell
from simulation.world import World

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.doubts import Doubts
from tapestry.node.protocol.messages import Stage, Status


def hollow(world: World, liar: str, honest: list[str]):
    fork = fork_of(world, [liar], "island", gives=False)
    tell(world, liar, fork, honest)
    return fork


def switches_of(world: World, name: str) -> list[ev.SwitchChain]:
    """Of this node, from now on: the switches of its chain."""
    seen: list[ev.SwitchChain] = []
    trace = world.trace

    def watching(who, out):
        if who == name and isinstance(out, ev.SwitchChain):
            seen.append(out)
        trace(who, out)

    world.trace = watching
    return seen


def test_a_doubt_is_twice_as_long_each_time_and_ends_when_an_update_is_given():
    world = swarm(2, "auto")
    (record,) = fork_of(world, ["p1"], "island", gives=False).records
    doubts = Doubts()
    assert not doubts.hold_back([record], 0.0)
    for first in (10.0, 20.0, 40.0):
        doubts.add([record], 100.0, 10.0)
        assert doubts.hold_back([record], 100.0 + first - 0.1)
        assert not doubts.hold_back([record], 100.0 + first)
    doubts.dispel(record)
    assert not doubts.hold_back([record], 100.0)


def test_who_took_it_says_what_it_waits_for_and_goes_back_to_the_record_whose_state_it_has():
    world = swarm(2, "auto")
    node, switches = world.nodes["p0"], switches_of(world, "p0")
    at = node.core.chain.place
    fork = hollow(world, "p1", ["p0"])
    assert node.core.chain.head == fork.records[-1].head
    world.until(lambda: node.core.sync.stuck_since is not None, 10)
    world.until(lambda: f"by going back to record {at.epoch}" in node.core.wait(world.now).ends, 10)
    world.until(lambda: bool(switches), 15)
    assert switches[0] == ev.SwitchChain(at.epoch, ())
    world.until(lambda: node.core.chain.epoch >= at.epoch + 3, 60)
    assert node.core.chain.head_at(at.epoch) == at.head
    assert node.core.chain.head_at(at.epoch + 1) != fork.records[0].head


def test_it_goes_back_after_a_restart_as_well():
    world = swarm(2, "auto")
    node = world.nodes["p0"]
    epoch = node.core.chain.epoch
    fork = hollow(world, "p1", ["p0"])
    node.crash()
    node.start()
    assert node.core.chain.head == fork.records[-1].head
    world.until(lambda: node.core.chain.head_at(epoch + 1) not in ("", fork.records[0].head), 60)


def test_who_left_records_of_its_own_for_it_does_not_go_back():
    """It has voted after them: it would enter an older round without its vote (docs/decisions/007)."""
    world = swarm(2, "auto")
    node = world.nodes["p0"]
    common = node.core.chain.epoch
    fork = fork_of(world, ["p1"], "island", gives=False, count=60)
    world.nodes["p1"].crash()
    world.until(lambda: node.core.chain.epoch >= common + 3, 60)
    node.feed(ev.PeerUp("p1"))
    tell(world, "p1", fork, ["p0"])
    assert node.core.chain.head == fork.records[-1].head
    switches = switches_of(world, "p0")
    until = world.now + 100.0
    world.until(lambda: world.now >= until, 110)
    assert switches == [] and node.core.sync.state_epoch == common and node.core.round is None


@pytest.mark.parametrize("says", ["another head", "no head"])
def test_an_elector_that_stays_elsewhere_does_not_hold_the_other_up(says):
    """It is heard all the time, and never comes to the head of the only other one."""
    world = swarm(2, "auto")
    core = world.nodes["p0"].core
    epoch = core.chain.epoch
    world.nodes["p1"].crash()
    other = Status(epoch + 7, "ab" * 32, epoch + 7, "training", Stage.TRAINING, 0, 0, ())

    def speaks() -> None:
        world.nodes["p0"].feed(ev.PeerUp("p1"))
        if says == "another head":
            world.nodes["p0"].feed(ev.Received("p1", other))
        world.later(0.5, None, speaks)

    speaks()
    world.until(lambda: core.chain.epoch >= epoch + 3, 60)


def test_no_older_state_than_ours_is_fetched():
    """One that says it is ahead, and has dropped the update, would take us back."""
    world = swarm(2, "auto")
    node = world.nodes["p0"]
    asked: list[ev.FetchState] = []

    def missing(node, out):
        world.later(0.05, node, ev.FetchFailed(out.donor, out.head, "missing"))

    def note(node, out):
        asked.append(out)
        world.later(0.05, node, ev.FetchFailed(out.donors[0], "", "missing"))

    node.execute = {**node.execute, ev.FetchUpdate: missing, ev.FetchState: note}
    epoch = node.core.chain.epoch
    fork = fork_of(world, ["p1"], "island", gives=False, count=3)
    world.nodes["p1"].crash()
    node.feed(ev.PeerUp("p1"))
    tell(world, "p1", fork, ["p0"])
    says = Status(epoch + 3, fork.records[-1].head, epoch + 3, "training", Stage.TRAINING, 0, 0, ())

    def speaks() -> None:
        node.feed(ev.PeerUp("p1"))
        node.feed(ev.Received("p1", says))
        world.later(0.5, None, speaks)

    speaks()
    world.until(lambda: bool(asked), 20)
    assert {out.epoch_min for out in asked} == {epoch + 1}
