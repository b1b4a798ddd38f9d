"""Peers that say READY and give nothing: what they cost a run, and how one is in again."""

import pytest
from simulation.consortium import Consortium
from simulation.world import Faults, World

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.deliveries import DELIVERED_AGAIN, FAILURES_MAX, Deliveries
from tapestry.node.protocol.rules import Rules
from tapestry.node.protocol.watch import Watch

STALL_S = 5.0
EPOCH_S = 2.5  # a round in which nobody is waited for in vain, at the most


# --- the account ------------------------------------------------------------------------------------


def seated(deliveries: Deliveries, epochs: int) -> list[int]:
    """The epochs in which one that never delivers is named, if this node leads all of them."""
    named = []
    for epoch in range(epochs):
        if not deliveries.left_out("x", epoch):
            named.append(epoch)
            deliveries.failed("x", epoch, "me", "me")
    return named


def test_whoever_never_delivers_is_named_in_ever_fewer_rounds_and_never_in_none():
    assert seated(Deliveries(), 400) == [0, 1, 3, 7, 15, 31, 63, 127, 191, 255, 319, 383]


def test_what_happens_under_one_other_leader_again_and_again_counts_once():
    deliveries = Deliveries()
    for epoch in range(100):
        deliveries.failed("x", epoch, "liar", "me")
        assert not deliveries.left_out("x", epoch + 1)
    deliveries.failed("x", 100, "another", "me")
    assert deliveries.left_out("x", 101)


def test_contributions_take_failures_back():
    deliveries = Deliveries()
    for epoch in range(FAILURES_MAX + 3):
        deliveries.failed("x", epoch, "me", "me")
    for _ in range(FAILURES_MAX * DELIVERED_AGAIN):
        deliveries.succeeded("x")
    assert not deliveries.accounts


def test_whoever_left_the_table_of_peers_is_forgotten():
    deliveries = Deliveries()
    for key in ("x", "y", "me", ""):
        deliveries.failed(key, 3, "me", "me")
    deliveries.keep_only({"y": None}, "me")
    assert sorted(deliveries.accounts) == ["", "me", "y"]


# --- in a run ---------------------------------------------------------------------------------------


def run(peers: int, strangers: int = 0, **rules) -> World:
    """Of short epochs; the last `strangers` nodes are no members of a run that is open then."""
    waits = {"straggler_wait_s": 1.0, "closing_grace_s": 0.5, "quorum_loss_s": 30.0, "exchange_max_s": 60.0}
    names = [f"p{i}" for i in range(peers)]
    rule = Rules(run_id="", shard_count=8, stall_s=STALL_S, **{**waits, **rules})
    late = names[peers - strangers :] if strangers else []
    world = World(7, peers=peers, faults=Faults(), rules=rule, late=late, admission="open" if late else "")
    world.train_s = (0.5, 1.0)
    return world


def mute(world: World, count: int, boast: bool = False) -> None:
    world.mutes.names, world.mutes.boast = list(world.nodes)[-count:], boast


def epochs_s(world: World, epochs: int) -> list[float]:
    begin = world.epoch()
    return [world.until(lambda e=e: world.epoch() > e, 40) for e in range(begin, begin + epochs)]


@pytest.mark.parametrize(("peers", "count", "strangers"), [(3, 2, 0), (3, 2, 2), (5, 2, 0), (7, 2, 0)])
def test_a_run_begins_though_most_of_those_that_are_ready_give_nothing(peers, count, strangers, monkeypatch):
    monkeypatch.setattr(Consortium, "_change", lambda self: None)  # nobody is admitted
    world = run(peers, strangers)
    mute(world, count)
    world.start_all()
    assert world.until(lambda: world.epoch() >= 3, 60) < 3 * (2 * STALL_S + EPOCH_S)


@pytest.mark.parametrize(("peers", "count"), [(7, 4), (9, 5)])
def test_an_open_run_goes_on_though_more_strangers_than_members_give_nothing(peers, count, monkeypatch):
    """The electors average: each waits for all of them, and is waited for by all of them."""
    monkeypatch.setattr(Consortium, "_change", lambda self: None)
    world = run(peers, count).start_all()
    world.until(lambda: world.epoch() >= 6, 60)
    mute(world, count)
    lengths = epochs_s(world, 20)
    assert max(lengths) < 3 * STALL_S + EPOCH_S
    assert sum(length > EPOCH_S for length in lengths[8:]) <= 3
    members = world.nodes["p0"].core.chain.records[-1].body.members
    assert [m.peer for m in members if m.weight] == list(world.nodes)[: peers - count]


@pytest.mark.parametrize(("peers", "count", "boast"), [(7, 1, True), (7, 2, True), (9, 4, False)])
def test_members_that_give_nothing_cost_ever_fewer_rounds_a_stall_whatever_they_say(peers, count, boast):
    world = run(peers).start_all()
    world.until(lambda: len(world.nodes["p0"].core.chain.place.electorate) == peers, 60)
    mute(world, count, boast)
    lengths = epochs_s(world, 30)
    # They vote all the same, and so lead: each that does costs three stalls more, one in which it leaves out
    # another, and two till the others give it up.
    assert max(lengths) < (3 * count + 1) * STALL_S + EPOCH_S
    assert sum(length > EPOCH_S for length in lengths) <= 9
    assert sum(length > EPOCH_S for length in lengths[20:]) <= 1 + count // 2


def test_a_member_whose_line_is_mended_is_in_again():
    world = run(5).start_all()
    world.until(lambda: len(world.nodes["p0"].core.chain.place.electorate) == 5, 60)
    mute(world, 1)
    epochs_s(world, 10)
    world.mutes.names = []

    def is_in() -> bool:
        return any(m.peer == "p4" and m.weight for m in world.nodes["p0"].core.chain.records[-1].body.members)

    begin = world.epoch()
    world.until(is_in, 60)
    assert world.epoch() - begin <= 16
    epochs_s(world, 30)
    assert not any(node.core.ctx.undelivered("p4", world.epoch()) for node in world.nodes.values())


def test_too_few_others_are_no_reason_to_do_without():
    """Where min_members asks for all of them, all are named again and again."""
    world = run(3, min_members=3).start_all()
    world.until(lambda: len(world.nodes["p0"].core.chain.place.electorate) == 3, 60)
    mute(world, 1)
    epoch = world.epoch()
    world.until(lambda: world.now > 100, 120)
    assert world.epoch() <= epoch + 1
    world.mutes.names = []
    world.until(lambda: world.epoch() >= epoch + 5, 40)


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_member_on_a_slow_line_is_in_every_round_however_long_its_shards_take(way):
    world = run(5, exchange_max_s=300.0)

    def drips(sender, receiver, bulk: bool) -> float:
        """Each of its shards takes several stalls, and bytes of it come every second."""
        if not bulk or (sender if way == "up" else receiver).name != "p4":
            return 0.0
        takes_s = 12.0 + 10.0 * world.random()
        for second in range(1, int(takes_s) + 1):
            world.later(float(second), receiver, ev.BulkProgress(sender.name))
        return takes_s

    world.drips = drips
    world.start_all()
    world.until(lambda: world.epoch() >= 8, 500)
    records = world.nodes["p0"].core.chain.records[3:]
    assert all(any(m.peer == "p4" and m.weight for m in record.body.members) for record in records)


def test_whoever_believed_them_would_wait_as_long_as_an_exchange_may_last(monkeypatch):
    monkeypatch.setattr(Watch, "_believed", lambda self, said: True)
    with pytest.raises(AssertionError):
        test_members_that_give_nothing_cost_ever_fewer_rounds_a_stall_whatever_they_say(7, 1, True)
