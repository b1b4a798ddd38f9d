"""What a trainer is told of each begin, and what of it a new worker is told again."""

from __future__ import annotations

import pytest

from tapestry.node.spec.training import UNCHANGED, Changed
from tapestry.node.trainer.messages import Abort, Begin, Close, Contribution, Evaluate, GoOn, Validation
from tapestry.node.trainer.orders import UNKNOWN_GENERATION, Orders


def begin(orders: Orders, epoch: int, base: str = "", before: str = "") -> Begin:
    return orders.begin(epoch, base, before, UNCHANGED, 0)


def contribute(orders: Orders, epoch: int) -> None:
    """As a worker does that was told to begin it."""
    report = contribution(epoch, orders.generation)
    assert not orders.is_stale(report)
    orders.done(report)


def contribution(epoch: int, generation: int) -> Contribution:
    return Contribution(epoch, generation, 1, norm=1.0, loss=2.0, tokens=1, steps=1, waited_s=0.0)


@pytest.mark.parametrize(
    ("case", "follows"),
    [
        ("the next state", True),
        ("the next state of another fork", False),
        ("a later state", False),
        ("the same state again", False),
        ("an abort between", False),
        ("a begin between", False),
    ],
)
def test_only_a_begin_from_the_next_state_follows_a_contribution(case: str, follows: bool) -> None:
    orders = Orders()
    assert not begin(orders, 4, "four", "three").follows
    contribute(orders, 4)
    if case == "an abort between":
        orders.abort()
    if case == "a begin between":
        begin(orders, 5, "of another fork", "also")
        contribute(orders, 5)
    epoch, base, before = {
        "the next state of another fork": (5, "five", "another four"),
        "a later state": (6, "six", "five"),
        "the same state again": (4, "four", "three"),
    }.get(case, (5, "five", "four"))
    assert begin(orders, epoch, base, before).follows == follows


def test_a_begin_tells_once_which_contribution_has_counted_since_the_last() -> None:
    orders = Orders()
    first = begin(orders, 4)
    orders.settle(first.generation)
    assert [begin(orders, epoch).counted for epoch in (5, 6)] == [first.generation, 0]
    orders.settle(UNKNOWN_GENERATION)
    assert [begin(orders, epoch).counted for epoch in (7, 8)] == [UNKNOWN_GENERATION, 0]


def test_what_is_undone_is_told_with_each_begin_until_something_has_come_of_one() -> None:
    orders = Orders()
    begin(orders, 4)
    orders.forget()
    begins = [begin(orders, epoch) for epoch in (8, 8, 9)]
    assert [one.afresh for one in begins] == [True] * 3
    assert [one.counted for one in begins] == [UNKNOWN_GENERATION, 0, 0]
    contribute(orders, 9)
    assert not begin(orders, 10).afresh


def test_a_new_worker_is_told_what_is_open_and_only_that() -> None:
    orders = Orders()
    assert orders.again(0) == [] and not orders.open
    changed = Changed(lr=0.5, batches=3, batch_size=2)
    orders.settle(7)
    told = orders.begin(4, "four", "three", changed, 1)
    assert told == Begin(4, 1, False, 7, 1, 0.5, 3, 2, False)
    assert orders.close_round(3) is None and orders.close_round(4) == Close(4)
    assert orders.evaluate(4) == Evaluate(4)
    again = Begin(4, 1, False, 0, 0, 0.5, 3, 2, False)  # the same numbers; it has no residual
    assert orders.again(0) == [Evaluate(4), again, Close(4)]
    orders.done(Validation(3, 2.0))
    assert orders.again(0) == [Evaluate(4), again, Close(4)]
    orders.done(Validation(4, 2.0))
    assert orders.again(0) == [again, Close(4)]
    contribute(orders, 4)
    assert orders.again(0) == [] and not orders.open
    begin(orders, 5)
    assert orders.again(0) == [Begin(5, 2, False, 0, 0)]
    assert orders.abort() == Abort()
    assert orders.again(0) == [] and not orders.open


def test_only_a_worker_that_has_contributed_to_an_epoch_goes_on_after_it() -> None:
    orders = Orders()
    begin(orders, 4, "four")
    assert orders.go_on(4) is None
    contribute(orders, 4)
    assert orders.go_on(4) == GoOn(4) and orders.go_on(3) is None
    begin(orders, 5, "five")
    assert orders.go_on(4) is None


def test_reports_of_another_begin_are_stale_and_those_of_an_epoch_that_is_aborted() -> None:
    orders = Orders()
    begin(orders, 4, "of one fork")
    late = contribution(4, orders.generation)
    assert not orders.is_stale(late) and orders.is_stale(contribution(3, orders.generation))
    orders.abort()
    assert orders.is_stale(late)
    begin(orders, 4, "of the other")
    assert orders.is_stale(late)
