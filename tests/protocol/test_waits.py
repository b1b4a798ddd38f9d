"""A node that waits says for what, since when, and what would end it; and what is usual is no news."""

from __future__ import annotations

import pytest
from simulation.faults import Faults
from simulation.world import Node, World

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.members import Change
from tapestry.node.protocol.messages import Stage
from tapestry.node.protocol.rules import Rules
from tapestry.node.protocol.waits import KINDS, UNMEASURED_S, USUAL_S, Wait, span


def world_of(peers: int, **rules: object) -> World:
    world = World(1, peers=peers, faults=Faults())
    world.rules = Rules(run_id=world.genesis.run_id, shard_count=1, **rules)  # type: ignore[arg-type]
    world.start_all()
    return world


def wait_of(node: Node) -> Wait:
    wait = node.core.snapshot(node.world.now).wait
    assert wait is not None and wait.kind in KINDS and wait.what and wait.ends
    return wait


def later(world: World, seconds: float) -> None:
    until = world.now + seconds
    world.until(lambda: world.now >= until, 2 * seconds)


def test_a_founder_that_waits_for_min_members_says_so_since_when_and_what_ends_it() -> None:
    world = world_of(1, min_members=2)
    later(world, 30)
    founder = world.nodes["p0"]
    first = wait_of(founder)
    assert (first.kind, first.lasting) == ("members", False)
    assert first.what == "1 contribution, the run asks for 2"
    assert (
        "one more member contributes: `tapestry invite`" in first.ends and "round.min_members" in first.ends
    )
    later(world, 60)
    second = wait_of(founder)
    assert second.lasting and second.for_s == pytest.approx(first.for_s + 60, abs=2)
    shown = founder.core.snapshot(world.now)
    assert shown.phase == "averaging" and shown.reason == second.text and "for 1." in second.text


def test_followers_say_what_their_leader_waits_for() -> None:
    world = world_of(2, min_members=3)
    later(world, 90)
    waits = [wait_of(node) for node in world.nodes.values()]
    assert [wait.kind for wait in waits] == ["members", "members"] and all(wait.lasting for wait in waits)
    assert all("the run asks for 3" in wait.what for wait in waits)


def test_a_lost_quorum_says_who_is_missing_since_when_and_what_ends_it() -> None:
    world = world_of(3, on_quorum_loss="wait")
    world.until(lambda: world.epoch() >= 3, 60)
    lone, *others = world.nodes.values()
    for node in others:
        node.crash()
    lost_at = world.now
    later(world, 100)
    wait = wait_of(lone)
    assert wait.kind == "quorum" and wait.lasting and "1 of 3 of the electorate alive, need 2" in wait.what
    assert wait.for_s == pytest.approx(world.now - lost_at, abs=10)
    assert wait.ends.startswith("ends when 1 more are back") and all(p.name in wait.what for p in others)


def test_a_quorum_that_is_lost_while_the_node_trains_is_told_at_once() -> None:
    world = world_of(3, on_quorum_loss="wait")
    world.until(lambda: world.epoch() >= 3, 60)
    lone, *others = world.nodes.values()
    world.train_s = (1e6, 1e6)
    later(world, 10)
    world.until(lambda: lone.core.phase() == "training", 60)
    for node in others:
        node.crash()
    world.until(lambda: lone.core.phase() == "degraded", 60)
    assert lone.core.round.stage == Stage.TRAINING and wait_of(lone).kind == "quorum"


def test_who_goes_on_alone_says_when() -> None:
    world = world_of(3, on_quorum_loss="continue", quorum_loss_s=40.0)
    world.until(lambda: world.epoch() >= 3, 60)
    lone, *others = world.nodes.values()
    for node in others:
        node.crash()
    later(world, 20)
    assert "goes on alone in " in wait_of(lone).ends


def test_a_joiner_whom_nobody_can_give_a_state_says_since_when() -> None:
    world = world_of(2)
    elector, other = world.nodes.values()
    other.crash()
    other.disk.records.clear()
    world.until(lambda: world.epoch() >= 3, 60)
    other.start()
    world.until(lambda: other.core.chain.epoch >= 3, 60)
    elector.crash()
    world.until(lambda: "no peer that we hear can give it" in other.core.snapshot(world.now).reason, 60)
    first = wait_of(other)
    later(world, 60)
    second = wait_of(other)
    assert (first.kind, second.lasting) == ("state", True)
    assert second.for_s == pytest.approx(first.for_s + 60, abs=2) and "--peer" in second.ends


def test_a_trainer_that_ends_again_and_again_is_down_since_the_first_time() -> None:
    world = world_of(1)
    world.train_s = (1e6, 1e6)
    later(world, 10)
    node, began_at = world.nodes["p0"], world.now
    for _ in range(4):
        node.feed(ev.TrainerState(False, "out of memory", "next start in 8 s"))
        wait = wait_of(node)
        assert wait.for_s == pytest.approx(world.now - began_at, abs=1)
        later(world, 30)
        world.train_s = (1.0, 1.0) if world.now - began_at > 120 else world.train_s
        node.feed(ev.TrainerState(True, ""))
        later(world, 1)
    assert (wait.kind, wait.what, wait.ends) == (
        "trainer",
        "not contributing: out of memory",
        "next start in 8 s",
    )
    epoch = world.epoch()
    world.until(lambda: world.epoch() > epoch, 30)
    node.feed(ev.TrainerState(False, "out of memory", "next start in 8 s"))
    assert wait_of(node).for_s == 0, "it has contributed meanwhile"


def test_a_disk_that_was_lost_says_since_when_its_node_stands_by() -> None:
    world = world_of(3, on_quorum_loss="wait")
    world.until(lambda: world.epoch() >= 3, 60)
    node, *others = world.nodes.values()
    for one in (node, *others):
        one.crash()
    node.disk.life, node.disk.vote = world.token(), None
    node.start()
    later(world, 70)
    wait = wait_of(node)
    assert wait.kind == "vote" and wait.lasting and wait.for_s == pytest.approx(70, abs=2)
    assert "our disk was lost" in wait.what and "others" in wait.ends


def test_who_was_removed_says_who_can_let_it_in() -> None:
    world = World(1, peers=2, faults=Faults(), late=["p1"], admission="members")
    world.start_all()
    world.until(lambda: world.epoch() >= 2, 60)
    world.nodes["p1"].start()
    node = world.nodes["p1"]
    node.core.sync.need_state, node.core.sync.state_epoch = False, node.core.chain.epoch
    later(world, 3)
    wait = node.core.own.stands_by()
    assert wait is not None and wait.kind == "admission" and wait.ends.endswith("tapestry admit p1")


def test_who_was_removed_is_told_so_though_nobody_gives_it_the_state_of_that_record() -> None:
    world = world_of(3)
    world.until(lambda: world.epoch() >= 3, 60)
    change = Change("remove", "p2", "no licence", world.epoch() + 10_000, "a" * 32)
    for node in world.nodes.values():
        node.feed(ev.ChangeAsked(change))
    removed = world.nodes["p2"].core
    world.until(lambda: "p2" in removed.ctx.roll.removed, 60)
    for name in ("p0", "p1"):
        world.nodes[name].crash()
    later(world, 5)
    removed.sync.state_epoch -= 1  # as where its links ended before the update came
    later(world, 70)
    wait = removed.wait(world.now)
    assert removed.phase() == "joining" and wait is not None
    assert (wait.kind, wait.what) == ("admission", "removed from this run: no licence")
    assert wait.ends.endswith("tapestry admit p2")


@pytest.mark.parametrize("seed", range(4))
def test_the_waits_of_a_healthy_run_are_no_news(seed: int) -> None:
    world = World(seed, peers=4, faults=Faults())
    world.start_all()
    seen: dict[str, float] = {}

    def look() -> bool:
        for node in world.nodes.values():
            wait = node.core.snapshot(world.now).wait if node.core is not None else None
            if wait is not None:
                assert wait.kind in KINDS and wait.what and wait.ends and wait.for_s >= 0 and not wait.lasting
                seen[wait.kind] = max(seen.get(wait.kind, 0.0), wait.for_s)
        return world.epoch() >= 20

    world.until(look, 300)
    assert "round" in seen and max(seen.values()) < USUAL_S


def test_an_epoch_may_take_hours_before_a_wait_for_those_who_train_is_news() -> None:
    world = world_of(2)
    pace = world.nodes["p0"].core.ctx.pace
    assert pace.training_usual_s() == UNMEASURED_S
    pace.epochs.append(7200.0)
    assert pace.training_usual_s() == 14_400
    pace.epochs.extend([1.0] * 5)
    assert pace.training_usual_s() == USUAL_S


@pytest.mark.parametrize(
    ("seconds", "text"), [(-0.1, "0 s"), (59.4, "59 s"), (90, "1.5 min"), (9000, "2.5 h"), (180_000, "2.1 d")]
)
def test_spans_are_short(seconds: float, text: str) -> None:
    assert span(seconds) == text
