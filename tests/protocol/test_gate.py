"""The gate: a result that a majority's own data reject is made again, and nobody stops a run by refusing."""

from __future__ import annotations

import dataclasses
import math
import random
from types import SimpleNamespace

import pytest
from simulation.gates import MARGIN, is_poison
from simulation.shell import Node, SimCrypto
from simulation.world import Faults, World

from tapestry.node.protocol import events as ev
from tapestry.node.protocol import gate as gate_module
from tapestry.node.protocol.agreement import ShardSums
from tapestry.node.protocol.canon import quorum
from tapestry.node.protocol.gate import REFUSALS_MAX, distances, furthest, shares
from tapestry.node.protocol.leader import Leader
from tapestry.node.protocol.messages import Ready, Refuse, Stage
from tapestry.node.protocol.record import Body, Member, head_of
from tapestry.node.protocol.rules import Rules

WORSE = 10 * MARGIN
SIZE = 6


def gated(peers: int, worse, poison: bool = True, **rules) -> World:
    """A healthy swarm; the last member poisons each round. `worse` (node, poisoned): what a node measures."""
    run_id = World(7, peers=1, faults=Faults()).genesis.run_id
    waits = {"straggler_wait_s": 1.0, "closing_grace_s": 0.5, "stall_s": 3.0, "quorum_loss_s": 8.0}
    spec = {**waits, "exchange_max_s": 12.0, "gate_margin": MARGIN, "gate_max_s": 2.0, **rules}
    world = World(7, peers=peers, faults=Faults(), rules=Rules(run_id=run_id, shard_count=3, **spec))
    if poison:
        world.gates.poisoner, world.gates.poisoned_of_16 = f"p{peers - 1}", 16

    def judge(node: Node, out: ev.Judge) -> None:
        poisoned = any(is_poison(m.contribution) for m in out.body.members if m.weight)
        found = worse(node.name, poisoned)
        if found != "never":
            world.later(0.1, node, ev.Judged(out.body.epoch - 1, out.body.prev, out.head, found))

    world.gates.judge = judge
    return world.start_all()


def by_data(name: str, poisoned: bool) -> float:
    return WORSE if poisoned else -0.01


def run(world: World, epochs: int = 6, limit_s: float = 120.0) -> list:
    """Until all have come so far beyond the first rounds, in which few decide; their records."""
    nodes = list(world.nodes.values())
    world.until(lambda: all(n.core and len(n.core.chain.place.electorate) == len(nodes) for n in nodes), 60.0)
    at = world.epoch()
    world.until(
        lambda: all(n.core is None or n.core.chain.epoch >= at + epochs for n in nodes), limit_s=limit_s
    )
    living = next(n for n in nodes if n.core is not None)
    return living.core.chain.records[at + 1 : at + epochs]


def poisoned(record) -> bool:
    return any(is_poison(m.contribution) for m in record.body.members if m.weight)


# --- what a majority's data reject ------------------------------------------------------------------


@pytest.mark.parametrize("peers", [3, 5, 7])
def test_a_poisoned_contribution_is_in_no_record_and_its_member_is_named(peers):
    world = gated(peers, by_data)
    records = run(world)
    assert not any(poisoned(r) for r in records)
    assert all(sum(m.weight > 0 for m in r.body.members) == peers - 1 for r in records)
    assert set(world.gates.left_out) == {f"p{peers - 1}"}


@pytest.mark.parametrize(("peers", "needed"), [(4, 3), (5, 4), (7, 4)])
def test_nor_where_the_others_are_ready_a_moment_later_than_a_quorum_with_it(peers, needed):
    """The leader waits for who is on the way before it takes in again whom a majority refused."""
    world = gated(peers, by_data, min_members=needed)
    assert not any(poisoned(r) for r in run(world, epochs=30, limit_s=600.0))
    assert set(world.gates.left_out) == {f"p{peers - 1}"}


def test_without_the_gate_it_would_be_in_every_record():
    records = run(gated(5, by_data, gate_margin=None))
    assert all(poisoned(r) for r in records)


def test_a_majority_of_the_electorate_is_enough_whoever_accepts():
    """Two accept, so the next leader hears of an accepted value, and must see that no quorum has it."""
    world = gated(5, lambda name, bad: by_data(name, bad) if name in ("p0", "p1", "p2") else None)
    assert not any(poisoned(r) for r in run(world))


def test_the_round_is_made_again_by_the_next_leader_if_the_first_dies_of_it():
    world = gated(5, by_data)
    nodes = world.nodes
    world.until(lambda: all(len(n.core.chain.place.electorate) == 5 for n in nodes.values()), 60)

    def refused() -> Node | None:
        for node in nodes.values():
            round_ = node.core.round if node.core else None
            if round_ and round_.state.leading and len(round_.state.refusals) == 2:
                return node
        return None

    world.until(lambda: refused() is not None, 60)
    dead = refused()
    epoch = dead.core.chain.epoch
    dead.crash()
    world.until(lambda: all(n.core is None or n.core.chain.epoch > epoch for n in nodes.values()), 60)
    record = next(n for n in nodes.values() if n.core is not None).core.chain.records[epoch]
    assert dead.name == "p4" or not poisoned(record)


def test_a_refused_value_is_dropped_only_where_a_quorum_has_accepted_nothing():
    """Else it may have been decided, by some of those who are not heard and those who accepted it."""
    crypto, electorate = SimCrypto("p0"), ("p0", "p1", "p2", "p3", "p4")
    body = Body("ab" * 32, 4, "cd" * 32, "ef" * 32, (Member("p0", 1, "12" * 32, "", 1),), "34" * 32)
    refused = head_of(body, crypto)

    def found(accepted: int, refusals: int, silent: int = 0, both: int = 0) -> Body | None:
        leader = object.__new__(Leader)
        leader.unserved, leader.ctx = {}, SimpleNamespace(crypto=crypto)
        plain = Ready(3, "cd" * 32, 1, False, "ef" * 32, "12" * 32, 1, 1.0, -1, None)
        kinds = accepted * [dataclasses.replace(plain, accepted_ballot=0, accepted=body)]
        kinds += refusals * [dataclasses.replace(plain, refused=refused)]
        kinds += both * [dataclasses.replace(plain, refused=refused, accepted_ballot=0, accepted=body)]
        kinds += (5 - accepted - refusals - silent - both) * [plain]
        ready = dict(zip(electorate, kinds, strict=False))
        leader.state = SimpleNamespace(ready=ready, voters=electorate, need=quorum(len(electorate)))
        return leader._accepted()

    assert found(accepted=1, refusals=3) is None, "three of five refused, and have accepted nothing"
    assert found(accepted=1, refusals=2) == body, "a minority that refused decides nothing"
    assert found(accepted=1, refusals=2, silent=2) == body
    assert found(accepted=2, refusals=3, silent=0) is None
    assert found(accepted=3, refusals=2) == body, "a quorum accepted it"
    assert found(accepted=1, refusals=2, both=1) is None, (
        "a majority refused, and three have accepted nothing"
    )
    assert found(accepted=1, refusals=2, both=1, silent=1) == body, "of whom is silent nobody knows"


# --- what stops nobody ------------------------------------------------------------------------------


def test_a_minority_that_refuses_holds_nobody_up_and_follows():
    world = gated(5, lambda name, bad: WORSE if name in ("p0", "p1") else 0.0)
    records = run(world)
    assert all(sum(m.weight > 0 for m in r.body.members) == 5 and r.ballot == 0 for r in records)
    heads = {n.core.chain.head_at(records[-1].body.epoch) for n in world.nodes.values()}
    assert heads == {records[-1].head} and world.gates.outcomes["refused"] >= 2 * len(records)


def test_where_everybody_always_refuses_the_run_goes_on_and_says_so():
    world = gated(9, lambda name, bad: WORSE, poison=False)
    again_max = (
        9 * REFUSALS_MAX // 5
    )  # five refusals make a ballot again, and some have not been asked by then
    for record in run(world, epochs=3, limit_s=200.0):
        left_out = 9 - sum(m.weight > 0 for m in record.body.members)
        assert REFUSALS_MAX <= left_out <= again_max
    assert world.gates.outcomes["went_on"] > 0


def test_two_contributions_are_never_refused():
    world = gated(2, lambda name, bad: WORSE)
    assert all(sum(m.weight > 0 for m in r.body.members) == 2 for r in run(world))
    assert "refused" not in world.gates.outcomes and world.gates.outcomes["went_on"] > 0


def test_who_has_no_data_or_does_not_answer_in_time_accepts():
    world = gated(5, lambda name, bad: None if name < "p3" else "never")
    assert all(sum(m.weight > 0 for m in r.body.members) == 5 for r in run(world))
    assert world.gates.outcomes.keys() == {"unmeasured"}


def test_one_member_that_refuses_whatever_comes_changes_nothing():
    world = gated(5, lambda name, bad: 0.0)
    world.gates.grudger = "p4"
    world.gates._grudge()
    assert all(sum(m.weight > 0 for m in r.body.members) == 5 for r in run(world))
    assert not world.gates.left_out


def test_a_refusal_of_another_ballot_or_by_who_is_not_in_the_roster_counts_for_nothing():
    world = gated(4, lambda name, bad: "never")
    nodes = list(world.nodes.values())

    def leads() -> Node | None:
        for node in nodes:
            round_ = node.core.round if node.core else None
            if (
                round_
                and round_.state.leading
                and round_.stage == Stage.EXCHANGING
                and len(round_.electorate) == 4
            ):
                return node
        return None

    world.until(lambda: leads() is not None, 60)
    node = leads()
    round_ = node.core.round
    for peer, ballot in (("stranger", round_.ballot), ("p0", round_.ballot + 4), ("p1", round_.ballot - 4)):
        round_.on_refuse(peer, Refuse(round_.epoch, round_.head, ballot, "0" * 64, 1.0), world.now)
    assert not round_.state.refusals


def test_the_bound_of_refusals_is_what_ends_them(monkeypatch):
    monkeypatch.setattr(gate_module, "REFUSALS_MAX", 10**6)
    world = gated(9, lambda name, bad: WORSE, poison=False)
    with pytest.raises(Exception, match="refused in 4 ballots"):
        run(world, epochs=3, limit_s=200.0)


# --- who differs most -------------------------------------------------------------------------------


def test_the_furthest_is_the_one_that_lies_furthest_from_the_mean_of_all_others():
    """Against vectors: the plain mean's sums say whose distance to the mean of the others is largest."""
    rng = random.Random(5)
    for _ in range(200):
        count = rng.randint(3, 7)
        xs = [[rng.gauss(0, rng.choice([0.1, 1, 5])) for _ in range(SIZE)] for _ in range(count)]
        weights = [rng.randint(1, 9) for _ in range(count)]
        shards = [sums_of_vectors([x[a : a + 3] for x in xs], weights) for a in range(0, SIZE, 3)]

        def distance(i: int, xs=xs, weights=weights) -> float:
            rest = sum(weights) - weights[i]
            others = [
                sum(w * x[k] for j, (w, x) in enumerate(zip(weights, xs, strict=True)) if j != i) / rest
                for k in range(SIZE)
            ]
            return math.dist(xs[i], others)

        expected = max(range(count), key=distance)
        found = distances(shards, weights)
        assert found.index(max(found)) == expected
        assert found == pytest.approx([distance(i) ** 2 for i in range(count)])


def sums_of_vectors(xs: list[list[float]], weights: list[int]) -> ShardSums:
    mean = [sum(w * x[k] for w, x in zip(weights, xs, strict=True)) / sum(weights) for k in range(len(xs[0]))]

    def dot(a: list[float], b: list[float]) -> float:
        return math.fsum(p * q for p, q in zip(a, b, strict=True))

    squares = tuple(dot(x, x) for x in xs)
    return ShardSums(
        squares, dot(mean, mean), squares, tuple(dot(x, mean) for x in xs), dot(mean, mean), 0, 0
    )


@pytest.mark.parametrize("liars", [1, 2])
def test_reducers_that_lie_in_their_sums_leave_no_honest_member_out(liars):
    """They are far from the others, say that of a victim as loudly as they can, and nothing of each other."""
    honest = [f"h{i}" for i in range(2 * liars)]
    bad = [f"l{i}" for i in range(liars)]
    peers = sorted(honest + bad)
    true = shares([9.0 if peer in bad else 1.0 for peer in peers])
    for victim in honest:
        lie = shares([1e30 if peer == victim else 0.0 for peer in peers])
        said = {peer: lie if peer in bad else true for peer in peers}
        assert furthest(said, peers) in bad


def test_where_one_reducer_has_all_shards_its_word_is_all_there_is():
    assert furthest({"a": [0.7, 0.2, 0.1]}, ["a", "b", "c"]) == "a"


def test_a_single_contribution_and_contributions_that_are_all_alike_have_shares_too():
    assert shares(distances([sums_of_vectors([[1.0, 2.0]], [3])], [3])) == [1.0]
    assert shares([0.0, 0.0]) == [0.5, 0.5]
