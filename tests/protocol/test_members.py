"""Who belongs to a run decides what its rounds wait for; in worlds without faults."""

from unittest.mock import patch

import pytest
from simulation import shell as shell_module
from simulation.shell import EXECUTE
from simulation.world import Faults, World

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.members import Change, change_message
from tapestry.node.protocol.messages import Changes
from tapestry.node.protocol.rules import Rules
from tapestry.node.protocol.settings import read_setting
from tapestry.node.protocol.strict import Malformed


def test_a_run_that_waits_for_a_second_member_takes_it_in_and_then_goes_on_with_both():
    world = World(1, peers=2, faults=Faults(), late=["p1"])
    world.rules = Rules(run_id=world.genesis.run_id, shard_count=2, min_members=2)
    world.start_all()
    founder = world.nodes["p0"]
    for _ in range(2000):
        world.step()
    assert world.epoch() == 0, "it was to start with two"
    founder.feed(ev.ChangeAsked(Change("admit", "p1", "", 1000, "0" * 32)))
    world.until(lambda: founder.core.chain.epoch >= 4, 60)
    records = founder.core.chain.records
    assert [len(record.body.members) for record in records[:4]] == [1, 2, 2, 2]
    assert [change.kind for change in records[0].body.changes] == ["admit"]


def founded(**rules) -> World:
    world = World(1, peers=3, faults=Faults())
    world.rules = Rules(run_id=world.genesis.run_id, shard_count=2, **rules)
    world.start_all()
    nodes = world.nodes.values()
    world.until(lambda: all(n.core.round and len(n.core.round.electorate) == 3 for n in nodes), 60)
    return world


def agree(world: World, change: Change) -> int:
    """Ask for it, and wait until everybody has the record; returns its epoch."""
    world.nodes["p0"].feed(ev.ChangeAsked(change))
    chains = [node.core.chain for node in world.nodes.values()]

    def carries(chain) -> list[int]:
        return [record.body.epoch for record in chain.records if record.body.changes]

    world.until(lambda: all(map(carries, chains)), 60)
    return carries(chains[0])[0]


def test_a_setting_holds_from_the_record_after_the_one_that_carries_it_at_everybody_alike():
    world = founded()
    epoch = agree(world, Change("set", "", "round.max_influence 0.34", 1000, "0" * 32))
    world.until(lambda: world.epoch() >= epoch + 3, 60)
    shares = {}
    for record in world.nodes["p1"].core.chain.records:
        weights = [m.weight for m in record.body.members if m.weight]
        if len(weights) == 3:
            shares[record.body.epoch] = max(weights) / sum(weights)
    assert max(shares[e] for e in shares if e <= epoch) > 0.35, "tokens differ, and nothing caps them"
    assert all(shares[e] <= 0.341 for e in shares if e > epoch)


def test_the_waits_of_every_node_follow_a_setting_and_go_back_with_a_chain_that_is_left():
    world = founded(stall_s=3.0)
    epoch = agree(world, Change("set", "", "round.stall_s 2", 1000, "0" * 32))
    for node in world.nodes.values():
        assert (node.core.ctx.rules.stall_s, node.core.ctx.rules.heartbeat_s) == (2.0, 0.4)
    core = world.nodes["p2"].core
    core.ctx.enrol(core.chain.place_at(epoch - 1).roll)
    assert core.ctx.rules == world.rules


@pytest.mark.parametrize(
    "change",
    [Change("set", "", "round.min_members 2", 1000, "0" * 32), Change("remove", "p2", "", 1000, "0" * 32)],
)
def test_who_is_gone_holds_up_no_change_of_a_run_that_asks_for_everybody(change: Change):
    world = founded(min_members=3)
    world.nodes["p2"].crash()
    stands = world.epoch()
    for _ in range(500):
        world.step()
    assert world.epoch() <= stands + 1, "a round needs all three"
    there = [world.nodes[name] for name in ("p0", "p1")]
    there[0].feed(ev.ChangeAsked(change))
    world.until(lambda: all(n.core.ctx.roll != n.core.chain.place_at(0).roll for n in there), 60)


@pytest.mark.parametrize("word", ["0", "1"])
def test_the_record_that_changes_the_share_of_audits_is_drawn_by_the_old_one_and_the_next_by_the_new(word):
    world = founded(audit_share=0.0 if word == "1" else 1.0)
    drawn = {}

    def seen(self, out):
        drawn.setdefault(out.record.body.epoch, []).append(len(out.kept))
        self.do_audit(out)

    with patch.dict(EXECUTE, {ev.Audit: seen}):
        epoch = agree(world, Change("set", "", f"audit.share {word}", 1000, "0" * 32))
        world.until(lambda: world.epoch() >= epoch + 3, 60)
    before, after = (epoch in drawn), (epoch + 1 in drawn and epoch + 2 in drawn)
    assert (before, after) == ((False, True) if word == "1" else (True, False))
    if word == "0":
        assert not [e for e in drawn if e > epoch]


def test_a_gate_is_set_up_and_taken_away_by_records():
    world = founded()
    for value, margin in (("gate.margin 0.5", 0.5), ("gate.margin 0", None)):
        nonce = f"{len(value):032x}"
        world.nodes["p0"].feed(ev.ChangeAsked(Change("set", "", value, 1000, nonce)))
        cores = [node.core for node in world.nodes.values()]
        world.until(lambda m=margin, c=cores: all(one.ctx.rules.gate_margin == m for one in c), 60)
        stands = world.epoch()
        world.until(lambda s=stands: world.epoch() >= s + 2, 60)
    assert world.gates.outcomes["passed"] > 0, "with the gate on, results were measured"


def test_a_node_that_starts_again_and_one_that_joins_go_by_what_records_have_set():
    world = World(1, peers=3, faults=Faults(), late=["p2"])
    world.rules = Rules(run_id=world.genesis.run_id, shard_count=2, straggler_wait_s=1.0)
    for name in ("p0", "p1"):
        world.nodes[name].start()
    there = [world.nodes[name] for name in ("p0", "p1")]
    world.until(lambda: all(n.core.round and len(n.core.round.electorate) == 2 for n in there), 60)
    there[0].feed(ev.ChangeAsked(Change("set", "", "round.straggler_wait_s auto", 1000, "0" * 32)))
    world.until(lambda: all(n.core.ctx.rules.straggler_wait_s is None for n in there), 60)
    there[1].crash()
    there[1].start()
    world.nodes["p2"].start()
    there[0].feed(ev.ChangeAsked(Change("admit", "p2", "", 1000, "1" * 32)))
    cores = [node.core for node in world.nodes.values()]
    world.until(lambda: all(core.sync.at_head and len(core.round.electorate) == 3 for core in cores), 60)
    assert [core.ctx.rules.straggler_wait_s for core in cores] == [None] * 3


def test_a_bad_setting_of_a_peer_is_refused_and_counted():
    world = founded()
    victim = world.nodes["p1"]
    changes = [Change("set", "", value, 1000, "0" * 32) for value in ("round.wait_max_s 1", "audit.share 2")]
    for change in changes:
        signature = victim.world.nodes["p0"].crypto.sign(change_message(world.genesis.run_id, change))
        victim.feed(ev.Received("p0", Changes((change.signed("p0", signature),))))
    world.until(lambda: world.refused.get("malformed", 0) == 2, 10)
    assert not victim.core.ctx.proposals.pending


def test_newcomers_that_weigh_nothing_are_none_of_min_members(monkeypatch):
    """The lone member trained so little that the newcomers' share of it is less than one token."""
    monkeypatch.setattr(shell_module, "randint", lambda rng, low, high: 1)
    world = World(3, peers=3, faults=Faults(), late=["p1", "p2"], admission="open", epochs=3, keep_story=True)
    world.rules = Rules(run_id=world.genesis.run_id, shard_count=2, min_members=2)
    world.start_all()
    world.until(lambda: "weigh nothing" in world.nodes["p0"].core.snapshot(world.now).reason, 30)
    assert world.nodes["p0"].core.snapshot(world.now).reason.startswith("1 contribution, ")
    world.until(lambda: world.now > 60, 60)
    assert world.epoch() == 0
    assert not [text for *_, text in world.story if "roster_impossible" in str(text)]


NO_SETTINGS = ("train.lr", "train.lr 0", "train.lr 1e-3", "train.lr 0.10", "train.lr 11", "train.lr +1")
NO_SETTINGS += ("round.min_members 1.5", "train.inner_steps 0", "train.batch_size 2.5", "x.y 1")
NO_SETTINGS += ("round.wait_max_s 59", "audit.share 1.1", "audit.on_lie forgive", "audit.on_lie 1")
NO_SETTINGS += ("round.stall_s auto", "round.stall_s 0.1", "round.exchange_max_s Auto", "gate.margin 11")


@pytest.mark.parametrize("value", NO_SETTINGS)
def test_what_is_no_setting_is_refused(value: str):
    with pytest.raises(Malformed):
        read_setting(value)
