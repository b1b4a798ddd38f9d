"""A few members that fork the run together: taken by nobody who hears a quorum, and what is left."""

from __future__ import annotations

import random

import pytest
from simulation.forks import Forgery, Fork
from simulation.shell import SimCrypto
from simulation.world import Faults, World

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.messages import Commit, Records, Stage, Status
from tapestry.node.protocol.rules import Rules

LONG = 40  # records


def swarm(peers: int, policy: str) -> World:
    """All at one head that a full electorate of all of them decides."""
    run_id = World(7, peers=1, faults=Faults()).genesis.run_id
    waits = {"straggler_wait_s": 1.0, "closing_grace_s": 0.5, "stall_s": 3.0, "quorum_loss_s": 8.0}
    rules = Rules(run_id=run_id, shard_count=4, exchange_max_s=12.0, on_quorum_loss=policy, **waits)
    world = World(7, peers=peers, faults=Faults(), rules=rules).start_all()
    cores = [n.core for n in world.nodes.values()]
    world.until(lambda: all(c.round and len(c.round.electorate) == peers for c in cores), 60)
    world.until(lambda: len({c.chain.head for c in cores}) == 1 and all(c.sync.at_head for c in cores), 60)
    return world


def fork_of(world: World, liars: list[str], kind: str, gives: bool, count: int = 1, back: int = 0) -> Fork:
    """Made from `back` records before the first liar's head on."""
    node = world.nodes[liars[0]]
    chain, rules = node.core.chain, node.core.ctx.rules
    at = chain.epoch - back
    state = chain.state_digest_at(at) if back else node.core.sync.state_digest
    base = node.disk.records[:at]
    fork = Fork(kind, base, chain.place_at(at), state, gives, base[-1], [])
    lives = {p: world.nodes[p].core.own.life for p in liars}
    forgery = Forgery(random.Random(1), {p: SimCrypto(p) for p in liars}, lives)
    for _ in range(count):
        forgery.extend(fork, rules.max_influence, rules.shard_count, [world.nodes[p] for p in liars])
    return fork


def tell(world: World, liar: str, fork: Fork, honest: list[str]) -> None:
    end, head = len(fork.chain), fork.chain[-1].head
    for name in honest:
        node = world.nodes[name]
        node.feed(ev.Received(liar, Status(end, head, end, "training", Stage.TRAINING, 0, 0, ())))
        node.feed(ev.Received(liar, Commit(fork.records[0])))
        node.feed(ev.Received(liar, Records(len(fork.base), tuple(fork.records))))


def heads(fork: Fork) -> set[str]:
    return {r.head for r in fork.records}


def taken(world: World, fork: Fork, honest: list[str]) -> bool:
    chains = [world.nodes[name].core.chain for name in honest]
    return any(chain.head_at(len(fork.base) + 1) in heads(fork) for chain in chains)


@pytest.mark.parametrize("policy", ["auto", "continue", "wait"])
@pytest.mark.parametrize("kind", ["island", "named", "behind", "change", "alone", "absent", "copied"])
def test_no_fork_of_a_minority_is_taken_where_a_quorum_is_heard(policy, kind):
    world = swarm(5, policy)
    liars, honest = ["p3", "p4"], ["p0", "p1", "p2"]
    world.colluders.names = liars  # who may be proven to have voted twice
    world.until(lambda: world.epoch() >= 6, 60)
    for back in (0, 3):
        for liar in liars:
            fork = fork_of(world, liars, kind, gives=True, count=LONG, back=back)
            tell(world, liar, fork, honest)
            assert not taken(world, fork, honest)
    goal = world.epoch() + 3
    world.until(lambda: all(world.nodes[p].core.chain.epoch >= goal for p in honest), 60)


def test_a_node_that_begins_anew_leaves_a_fork_that_it_was_told_first():
    world = swarm(5, "continue")
    liars = ["p3", "p4"]
    world.until(lambda: world.epoch() >= 6, 60)
    late = world.nodes["p0"]
    late.crash()
    late.disk.records.clear()
    late.disk.states.clear()
    late.disk.vote, late.disk.state_head, late.disk.life = None, "", "12" * 16
    world.invariants.on_disk_lost(late)
    fork = fork_of(world, liars, "island", gives=True, count=LONG, back=3)
    for name in ("p1", "p2"):
        world.cut(name, "p0", 5.0)
    late.start()
    world.until(lambda: late.core.ctx.peers.get("p3") is not None and late.core.ctx.peers["p3"].up, 5)
    late.feed(ev.Received("p3", Records(0, tuple(fork.chain))))
    assert taken(world, fork, ["p0"])
    world.until(lambda: not taken(world, fork, ["p0"]) and late.core.sync.at_head, 60)


def test_an_island_whose_numbers_can_be_had_is_gone_on_from():
    world = swarm(2, "auto")
    fork = fork_of(world, ["p1"], "island", gives=True)
    tell(world, "p1", fork, ["p0"])
    assert taken(world, fork, ["p0"])
    world.until(lambda: world.nodes["p0"].core.chain.epoch >= len(fork.base) + 4, 60)


@pytest.mark.parametrize(("peers", "policy"), [(2, "auto"), (4, "continue")])
def test_an_island_whose_numbers_nobody_has_stops_nobody(peers, policy):
    """Who hears no quorum takes the forced record of one, and cannot come to its state."""
    world = swarm(peers, policy)
    *honest, liar = world.nodes
    for a in honest:
        for b in honest:
            if a != b:
                world.cut(a, b, 6.0)
    cut_at = world.now
    world.until(lambda: world.now >= cut_at + 4.0, 10)
    fork = fork_of(world, [liar], "island", gives=False)
    tell(world, liar, fork, honest)
    goal = len(fork.base) + 3
    world.until(lambda: all(world.nodes[p].core.chain.epoch >= goal for p in honest), 120)
