"""What the core says without being looked into: its snapshot, and the outputs that the shell acts upon."""

from __future__ import annotations

from itertools import pairwise

import pytest
from simulation.faults import Faults
from simulation.shell import EXECUTE, Node
from simulation.world import World

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.messages import Stage


def healthy(peers: int = 3) -> tuple[World, dict[str, list[ev.Output]]]:
    """A world without faults, and all that each of its cores says."""
    world = World(seed=0, peers=peers, faults=Faults())
    said: dict[str, list[ev.Output]] = {name: [] for name in world.nodes}
    for node in world.nodes.values():
        node.execute = {kind: _telling(said[node.name], do) for kind, do in node.execute.items()}
    world.start_all()
    return world, said


def _telling(said: list[ev.Output], do: object) -> object:
    def execute(node: Node, out: ev.Output) -> None:
        said.append(out)
        do(node, out)  # type: ignore[operator]

    return execute


def test_a_snapshot_is_what_the_core_is_and_stays_as_it_was():
    world, _ = healthy()
    world.until(
        lambda: all(n.core.round and len(n.core.round.electorate) == 3 for n in world.nodes.values()), 60
    )
    node = world.nodes["p1"]
    core = node.core
    before = core.snapshot(world.now)
    assert (before.peer_id, before.phase, before.at_head) == ("p1", core.phase(), True)
    assert (before.chain_epoch, before.chain_head) == (core.chain.epoch, core.chain.head)
    assert (before.state_epoch, before.state_head) == (core.chain.epoch, core.chain.head)
    assert [peer.peer_id for peer in before.peers] == ["p0", "p2"]
    assert before.round is not None and before.round.electorate == 3
    world.until(lambda: core.chain.epoch > before.chain_epoch, 60)
    after = core.snapshot(world.now)
    assert after.chain_epoch == before.chain_epoch + 1
    assert after.agreement == core.chain.records[-1].body.agreement != before.agreement
    with pytest.raises(AttributeError):
        before.phase = "other"  # type: ignore[misc]


def test_every_train_names_its_base_and_every_committed_round_what_counted():
    world, said = healthy()
    world.until(lambda: all(n.core and n.core.chain.epoch >= 6 for n in world.nodes.values()), 120)
    for name, outputs in said.items():
        chain = world.nodes[name].core.chain
        for out in outputs:
            if isinstance(out, ev.Train):
                assert (out.base, out.before) == (chain.head_at(out.epoch), chain.head_at(out.epoch - 1))
            elif isinstance(out, ev.EndRound) and out.outcome == "committed":
                named = {m.peer: m.contribution for m in chain.records[out.epoch].body.members}
                assert out.counted == named[name] != ""


def test_a_contribution_made_from_another_base_is_not_heard():
    world, _ = healthy(1)
    node = world.nodes["p0"]
    world.until(lambda: node.core.round is not None and node.core.round.stage == Stage.TRAINING, 30)
    core, epoch = node.core, node.core.round.epoch
    core.handle(ev.Contributed(epoch, "another head", "ab" * 16, 1, 1.0, ()), world.now)
    assert core.round.exchange.mine is None


def test_results_are_handed_out_as_they_come_and_are_those_that_are_voted_for():
    world, said = healthy()
    world.until(lambda: all(n.core and n.core.chain.epoch >= 4 for n in world.nodes.values()), 120)
    for outputs in said.values():
        kept: dict[int, object] = {}
        for out in outputs:
            if isinstance(out, ev.KeepResult):
                kept[out.shard] = out.blob
            elif isinstance(out, ev.PersistResult):
                assert tuple(kept[shard] for shard in range(len(out.blobs))) == out.blobs
                kept.clear()


def test_moves_are_told_once_and_tell_what_the_snapshot_shows():
    world, said = healthy()
    world.until(lambda: all(n.core and n.core.chain.epoch >= 4 for n in world.nodes.values()), 120)
    for name, outputs in said.items():
        moves = [out for out in outputs if isinstance(out, ev.Moved)]
        assert all(a != b for a, b in pairwise(moves))
        now = world.nodes[name].core.snapshot(world.now)
        assert (moves[-1].epoch, moves[-1].phase) == (now.state_epoch, now.phase)
        assert {move.stage for move in moves} > {Stage.TRAINING, Stage.READY}


def test_the_simulators_shell_knows_every_output():
    assert set(ev.Output.__args__) == set(EXECUTE)


def test_a_snapshot_of_a_leader_that_gathers_names_whom_it_waits_for():
    world, _ = healthy()
    waited: dict[tuple[str, ...], None] = {}

    def look() -> bool:
        for node in world.nodes.values():
            shown = node.core.snapshot(world.now)
            if shown.round is not None and "still training" in shown.reason:
                waited[shown.round.waiting_on] = None
                assert all(peer in shown.reason for peer in shown.round.waiting_on)
        return len(waited) > 0

    world.until(look, 60)
    assert all(waited), "the reason names peers, and so does waiting_on"
