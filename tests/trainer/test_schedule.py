"""The learning rate over a run: shapes, and that a step's place in the run comes from its epoch."""

from __future__ import annotations

import dataclasses

import pytest

from tapestry.node.spec.training import TrainSpec
from tapestry.node.trainer.schedule import lr_factor, run_step

COSINE = TrainSpec(inner_steps=10, warmup_steps=20, schedule="cosine", schedule_steps=120, min_lr_ratio=0.1)
WSD = dataclasses.replace(COSINE, schedule="wsd", decay_share=0.25)
CONSTANT = TrainSpec(inner_steps=10, warmup_steps=20)


def factors(settings: TrainSpec, numbers: list[int]) -> list[float]:
    """Of a member that has been there from the beginning."""
    return [lr_factor(settings, number, own=number) for number in numbers]


def test_the_rate_rises_from_the_first_step_and_is_whole_at_the_last_of_the_warm_up() -> None:
    for settings in (CONSTANT, COSINE, WSD):
        assert factors(settings, [0, 9, 19]) == pytest.approx([0.05, 0.5, 1.0])
    assert lr_factor(dataclasses.replace(CONSTANT, warmup_steps=0), 0, own=0) == 1.0


def test_a_constant_rate_stays() -> None:
    assert factors(CONSTANT, [20, 10_000_000]) == [1.0, 1.0]


def test_a_cosine_is_half_way_down_in_the_middle_and_stays_at_its_lowest() -> None:
    assert factors(COSINE, [20, 70, 120, 500]) == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_wsd_is_flat_and_then_falls_by_a_straight_line() -> None:
    assert factors(WSD, [20, 90, 105, 120, 500]) == pytest.approx([1.0, 1.0, 0.55, 0.1, 0.1])
    assert factors(dataclasses.replace(WSD, decay_share=0.0), [119, 120]) == pytest.approx([1.0, 0.1])


def test_a_run_that_is_all_warm_up_still_ends_at_its_lowest() -> None:
    short = dataclasses.replace(COSINE, schedule_steps=20)
    assert factors(short, [19, 20]) == pytest.approx([1.0, 0.1])


def test_a_step_is_counted_by_its_epoch_and_not_by_who_takes_it() -> None:
    """A member that joins at epoch 40, or whose epoch 39 was closed early, is where the others are."""
    assert run_step(COSINE, epoch=40, step=3) == 403
    joiner = [lr_factor(COSINE, run_step(COSINE, 40, step), own=40 + step) for step in range(10)]
    old = [lr_factor(COSINE, run_step(COSINE, 40, step), own=400 + step) for step in range(10)]
    assert joiner == old


def test_an_epoch_of_other_length_does_not_move_the_schedule() -> None:
    longer = [run_step(COSINE, 40, step, steps=20) for step in range(21)]
    assert longer[0] == run_step(COSINE, 40, 0), "nothing jumps where the length changes"
    assert longer[-1] == run_step(COSINE, 41, 0), "and the next epoch goes on from there"
    assert longer == sorted(set(longer)), "each step has its own place"


def test_an_optimizer_that_begins_late_warms_up_by_itself_first() -> None:
    assert lr_factor(CONSTANT, 400, own=0) == pytest.approx(0.05)
    assert lr_factor(CONSTANT, 419, own=19) == 1.0
