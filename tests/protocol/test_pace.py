"""Waits that follow what was measured: as long as the run's own epochs and exchanges ask, and no longer."""

from collections import Counter
from dataclasses import replace

import pytest
from simulation.shell import EXECUTE
from simulation.world import COMPUTED, Faults, World

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.pace import EXCHANGE_MIN_S, Pace
from tapestry.node.protocol.rules import Rules

COMPUTES = Rules("run", 4, **COMPUTED)
EPOCH_S = 40.0  # of the others
STEPS = 4
FIXED = {"straggler_wait_s": 5.0, "closing_grace_s": 2.0}


def measured(epochs: list[float], exchanges: list[float] = [], rules: Rules = COMPUTES) -> Pace:  # noqa: B006
    """One that saw epochs of these lengths, the exchange before each not counted."""
    pace, now = Pace(rules), 0.0
    for epoch, length_s in enumerate(epochs):
        pace.round_began(2 * epoch, now)
        pace.quorum_ready(now + length_s)
        now += length_s
    for epoch, length_s in enumerate(exchanges, 100):
        pace.round_began(2 * epoch, now)
        pace.exchange_began(2 * epoch, now)
        now += length_s
        pace.round_began(2 * epoch + 1, now)
    return pace


def slow_swarm(seed: int, lag: float, **rules) -> World:
    """Three members whose epochs take 40 s in four steps; the last one's trainer is `lag` times slower."""
    world = World(seed, peers=3, faults=Faults(), rules=replace(COMPUTES, **rules))
    world.train_s, world.steps, world.laggard, world.lag = (EPOCH_S, EPOCH_S), STEPS, "p2", lag
    return world.start_all()


def contributions(world: World, epochs: int) -> Counter[str]:
    """How often each contributed to so many epochs, once all were in one."""
    chain = world.nodes["p0"].core.chain
    world.until(lambda: chain.epoch >= 3 + epochs, 400 * epochs)
    return Counter(m.peer for r in chain.records[3 : 3 + epochs] for m in r.body.members if m.weight)


# --- how long is waited -----------------------------------------------------------------------------


def test_waits_are_what_they_were_before_anything_is_measured_and_where_epochs_are_short():
    for pace in (Pace(COMPUTES), measured([0.5, 2.0, 2.0])):
        assert (pace.straggler_wait_s(), pace.closing_grace_s(), pace.quorum_loss_s()) == (5.0, 2.0, 30.0)
    assert Pace(COMPUTES).exchange_max_s() == 300.0


def test_a_round_waits_at_most_as_long_again_as_its_quorum_took():
    pace = measured([400.0])
    assert pace.straggler_wait_s() + pace.closing_grace_s() == 400.0
    assert pace.quorum_loss_s() == 400.0
    assert pace.leaders_wait_s() > 400.0  # a follower's patience is longer than a leader's wait


def test_one_epoch_that_took_a_night_moves_no_wait():
    assert measured([40.0, 40.0, 30_000.0]).epoch_s() == 40.0
    assert measured([90_000.0]).quorum_loss_s() == COMPUTES.wait_max_s


def test_a_quorum_that_is_seen_again_in_a_round_is_measured_once():
    pace = Pace(COMPUTES)
    pace.round_began(0, 0.0)
    pace.quorum_ready(10.0)
    pace.quorum_ready(500.0)
    assert pace.epoch_s() == 10.0 and len(pace.epochs) == 1


def test_an_epoch_is_measured_from_the_exchange_before_it():
    pace = Pace(COMPUTES)
    pace.round_began(0, 0.0)
    pace.exchange_began(0, 50.0)
    pace.round_began(1, 80.0)  # with overlap, trainers went on at 50
    pace.quorum_ready(90.0)
    assert pace.epoch_s() == 40.0 and list(pace.exchanges) == [30.0]


def test_an_exchange_may_take_what_the_model_takes_on_a_slow_line_and_less_where_exchanges_are_short():
    large = replace(COMPUTES, exchange_sized_s=12_000.0)
    assert Pace(large).exchange_max_s() == 12_000.0
    assert measured([], [1.0]).exchange_max_s() == EXCHANGE_MIN_S
    assert measured([], [1000.0], large).exchange_max_s() == 10_000.0


def test_an_exchange_that_was_given_up_gets_twice_as_long_within_bounds():
    pace = Pace(COMPUTES)
    pace.round_began(0, 0.0)
    now, limits = 0.0, []
    for _ in range(8):
        pace.exchange_began(0, now)
        limits.append(pace.exchange_max_s())
        now += limits[-1]
        assert pace.exchange_overdue(now) and not pace.exchange_overdue(now - 1.0)
    assert limits[:3] == [300.0, 600.0, 1200.0] and limits[-1] == 16 * 300.0
    pace.exchange_began(0, now)
    pace.round_began(1, now + 20.0)
    assert pace.exchange_max_s() == 200.0


def test_numbers_of_the_spec_stay_numbers():
    pace = measured([400.0], [50.0], Rules("run", 4, 1.0, 0.5, quorum_loss_s=8.0, exchange_max_s=12.0))
    waits = pace.straggler_wait_s(), pace.closing_grace_s(), pace.quorum_loss_s(), pace.exchange_max_s()
    assert waits == (1.0, 0.5, 8.0, 12.0) and pace.leaders_wait_s() == 6.5


# --- in a swarm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [1.3, 2.0, 3.0])
def test_a_member_whose_step_outlasts_the_fixed_wait_is_in_every_round(lag):
    assert contributions(slow_swarm(1, lag), 5)["p2"] == 5


def test_with_the_fixed_waits_it_misses_rounds():
    assert contributions(slow_swarm(1, 2.0, **FIXED), 5)["p2"] < 5


def epochs_s(world: World, epochs: int) -> list[float]:
    begin = world.epoch() + 1
    world.until(lambda: world.epoch() >= begin, 2000)
    return [world.until(lambda e=e: world.epoch() >= e, 2000) for e in range(begin + 1, begin + 1 + epochs)]


def test_a_member_that_trains_for_ever_costs_a_round_its_own_length_at_most_and_ever_fewer_rounds():
    world = slow_swarm(2, 1.0)
    rogue = world.nodes["p2"]
    rogue.execute = {**EXECUTE, ev.Train: lambda self, out: None, ev.CloseTraining: lambda self, out: None}
    lengths = epochs_s(world, 30)
    assert max(lengths) < 2.5 * EPOCH_S
    assert sum(length > 1.3 * EPOCH_S for length in lengths) <= 6
    assert sum(length > 1.3 * EPOCH_S for length in lengths[17:]) == 0


def test_whoever_has_delivered_is_waited_for_longer_than_whoever_never_did():
    def rounds_held_up(delivers: int) -> int:
        world = slow_swarm(3, 1.0)
        rogue = world.nodes["p2"]
        contributed = EXECUTE[ev.Train]

        def train(self, out: ev.Train) -> None:
            if out.epoch < delivers:
                contributed(self, out)

        rogue.execute = {**EXECUTE, ev.Train: train, ev.CloseTraining: lambda self, out: None}
        world.until(lambda: world.epoch() >= 4, 2000)
        return sum(length > 1.3 * EPOCH_S for length in epochs_s(world, 8))

    assert rounds_held_up(4) > rounds_held_up(0)


def test_a_long_exchange_that_makes_progress_is_not_given_up():
    world = slow_swarm(4, 1.0, exchange_sized_s=1200.0)
    world.bulk_s = 100.0
    contributions(world, 3)
    assert world.outcomes.get("aborted", 0) == 0 and world.outcomes.get("missed", 0) <= 2
