"""Where a node ends by itself, and what it says of a trainer that does not work."""

from __future__ import annotations

import math
from datetime import datetime

from tapestry.node.daemon.goal import Goal
from tapestry.node.daemon.trainer_health import REPEATS_MAX, TrainerHealth
from tapestry.node.daemon.training_view import TrainingView
from tapestry.node.spec.node import ENDLESS, Ending
from tapestry.node.spec.run import preset_spec
from tapestry.node.trainer.messages import Contribution, Failed, Progress, Validation
from tapestry.node.trainer.process import Died


def test_epochs_counts_from_the_first_round_that_the_node_is_in():
    goal = Goal(Ending(epochs=2))
    assert not goal.reached(40), "nothing is counted before the first round"
    goal.begin(40)
    goal.begin(41)
    assert [goal.reached(epoch) for epoch in (40, 41, 42)] == [False, False, True]


def test_until_epoch_is_an_epoch_of_the_run_and_without_either_there_is_no_end():
    assert [Goal(Ending(until_epoch=3)).reached(epoch) for epoch in (2, 3, 9)] == [False, True, True]
    endless = Goal(ENDLESS)
    endless.begin(0)
    assert not endless.reached(10**9)


GONE = Failed("data", "/texts: there is nothing")


def ends(health: TrainerHealth, failed: Failed | None, died: Died) -> str:
    if failed is not None:
        health.failed(failed)
    return health.died(died)


def test_a_cause_is_kept_through_the_pauses_until_a_contribution_is_made():
    health = TrainerHealth()
    text = ends(health, GONE, Died(3, 8.0, ("some output",)))
    assert text == "trainer ended: data: /texts: there is nothing; next start in 8 s"
    assert health.trouble == text
    health.contributed()
    assert health.trouble == ""


def test_a_trainer_that_ends_again_and_again_is_said_not_to_mend_itself_and_what_would():
    clock = iter([datetime(2026, 11, 29, 14, 3), datetime(2026, 11, 29, 15, 3)])
    health = TrainerHealth(lambda: next(clock))
    texts = [ends(health, GONE, Died(3, 60.0, ())) for _ in range(REPEATS_MAX)]
    assert "mend" not in texts[-2]
    assert f"{REPEATS_MAX} times in a row since 2026-11-29 14:03 UTC" in texts[-1]
    assert "it cannot mend itself: put the data back, or start the node again with other --data" in texts[-1]


def test_ends_for_different_causes_are_not_added_up():
    health = TrainerHealth()
    for _ in range(REPEATS_MAX):
        ends(health, GONE, Died(3, 1.0, ()))
        text = ends(health, None, Died(-9, 1.0, ()))
    assert "times in a row" not in text and "memory runs out" in text


def test_the_same_end_is_told_ever_more_seldom():
    health, told = TrainerHealth(), []
    for end in range(1, 40):
        ends(health, GONE, Died(3, 60.0, ()))
        if health.worth_telling:
            told.append(end)
    assert told == [1, 2, 3, 4, 8, 16, 32]


def progress(epoch: int, step: int, loss: float) -> Progress:
    return Progress(epoch, 1, step, 8, loss, 100 * step, 50.0)


def test_a_loss_is_the_mean_over_its_epochs_steps_and_names_that_epoch():
    view = TrainingView()
    for event in (progress(4, 2, 8.0), progress(4, 8, 4.0)):
        view.on_event(event, 0.0)
    assert (view.loss, view.loss_epoch) == (5.0, 4)
    view.on_event(progress(5, 1, 2.0), 1.0)
    assert (view.loss, view.loss_epoch) == (2.0, 5), "the epoch before is not mixed in"
    view.on_event(Contribution(5, 1, 800, 1.0, 3.0, 800, 8, 0.0, 0.5), 2.0)
    assert (view.loss, view.loss_epoch) == (3.0, 5), "the trainer knows all the steps"


def test_a_validation_loss_names_the_state_that_was_measured():
    view = TrainingView()
    assert math.isnan(view.val_loss) and view.val_loss_epoch == -1
    view.on_event(Validation(7, 1.5, ("held-out",), (1.5,)), 0.0)
    assert (view.val_loss, view.val_loss_epoch) == (1.5, 7)


def test_an_island_waits_for_nobody_whatever_the_run_says():
    from tapestry.node.daemon.assembly import alone, rules_of

    rules = alone(rules_of(preset_spec("nano", "a run"), "ab" * 32, 1))
    assert (rules.on_quorum_loss, rules.min_members) == ("continue", 1) and rules.quorum_loss_s <= 1.0


def test_an_island_keeps_its_own_waits_where_records_of_its_run_have_set_others():
    from tapestry.node.daemon.assembly import alone, rules_of
    from tapestry.node.protocol.rules import settled

    rules = alone(rules_of(preset_spec("nano", "a run"), "ab" * 32, 1))
    set_by_records = {"round.min_members": 3.0, "round.quorum_loss_s": 600.0, "round.stall_s": 2.0}
    now = settled(rules, set_by_records)
    assert (now.min_members, now.quorum_loss_s, now.stall_s) == (1, rules.quorum_loss_s, 2.0)
