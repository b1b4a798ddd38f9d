"""Gates: what is promoted, what is not, and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapestry.node.errors import UserError
from tapestry.node.sovereign.derivative import Measure
from tapestry.node.sovereign.gates import Gate, Gates, judge


def loss(value: float, name: str = "fr/loss", *, own: bool = True) -> Measure:
    return Measure(name, value, False, 100, own)


def acc(value: float, name: str = "quiz/acc") -> Measure:
    return Measure(name, value, True, 100)


def test_without_a_file_own_loss_must_not_be_worse_than_the_bases() -> None:
    assert judge(Gates(), [loss(1.9)], [loss(2.0)]).holds
    verdict = judge(Gates(), [loss(2.1), loss(1.0, "en/loss")], [loss(2.0), loss(2.0, "en/loss")])
    assert not verdict.holds
    assert verdict.reasons[0].startswith(
        "fr/loss: fails: 2.0000 to 2.1000 against the base, a gain of -5.00 %"
    )


def test_a_set_that_is_not_ones_own_does_not_count_without_a_file() -> None:
    assert judge(
        Gates(), [loss(1.9), loss(9.0, "web/loss", own=False)], [loss(2.0), loss(2.0, "web/loss")]
    ).holds


def test_what_was_not_measured_is_not_held_to_be_good() -> None:
    gates = Gates((Gate("quiz/acc", fall_max=0.05),))
    assert judge(gates, [loss(1.0)], [loss(2.0)]).reasons == ("quiz/acc: was not measured",)
    assert judge(gates, [acc(0.9)], []).reasons == ("quiz/acc: was not measured on the base",)


def test_every_measure_that_a_gate_names_must_have_been_measured() -> None:
    gates, base = Gates((Gate("general/loss|our_quiz/acc", fall_max=0.01),)), [loss(2.0, "general/loss")]
    verdict = judge(gates, [loss(1.0, "general/loss")], base)
    assert not verdict.holds and verdict.reasons[0] == "our_quiz/acc: was not measured"
    now, base = [loss(1.0, "general/loss"), acc(0.9, "our_quiz/acc")], [*base, acc(0.8, "our_quiz/acc")]
    assert judge(gates, now, base).holds
    assert judge(Gates(), [loss(1.0)], [loss(2.0)]).holds and not judge(Gates(), [], []).holds


@pytest.mark.parametrize(("value", "holds"), [(0.48, True), (0.47, False)])
def test_a_capability_may_fall_by_so_much_and_no_more(value: float, holds: bool) -> None:
    gates = Gates((Gate("quiz/*", fall_max=0.05),))
    assert judge(gates, [acc(value)], [acc(0.5)]).holds is holds


def test_gains_may_be_asked_in_the_measures_own_unit() -> None:
    gates = Gates((Gate("quiz/acc", gain_min=0.1, absolute=True),))
    assert judge(gates, [acc(0.61)], [acc(0.5)]).holds
    assert not judge(gates, [acc(0.59)], [acc(0.5)]).holds


def test_a_rebase_must_keep_its_share_of_the_gain() -> None:
    before, ground = [loss(1.0)], [loss(2.0)]
    assert judge(Gates(), [loss(1.04)], [loss(1.5)], before, ground).holds
    verdict = judge(Gates(), [loss(1.06)], [loss(1.5)], before, ground)
    assert (
        verdict.reasons[0] == "fr/loss: fails: keeps 94.0 % of the gain of the version before "
        "(the new base alone has 50.0 %), asked 95.0 %"
    )


def test_a_base_that_knows_by_itself_what_a_version_knew_is_no_reason_to_refuse_one_that_is_better() -> None:
    before, ground = [loss(1.0)], [loss(2.0)]
    verdict = judge(Gates(), [loss(0.97)], [loss(0.98)], before, ground)
    assert verdict.holds and any("(the new base alone has 102.0 %)" in reason for reason in verdict.reasons)
    assert not judge(Gates(), [loss(0.99)], [loss(0.98)], before, ground).holds, (
        "the new base is better alone"
    )


def test_a_file_with_a_wrong_key_is_refused_with_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "gates.toml").write_text('[[gate]]\nmeasure = "a"\nfall_mx = 1.0\n')
    with pytest.raises(UserError, match=r"gate\[1\].fall_mx: unknown key; did you mean gate\[1\].fall_max"):
        Gates.load(tmp_path / "gates.toml")
