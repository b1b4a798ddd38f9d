"""Training loss down and validation loss up: told, and nothing else is."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from tapestry.node.daemon.loss_watch import MEASURED, LossWatch, fitted
from tapestry.node.surface.history import TEXT_CHARS_MAX

Curve = Callable[[int], float]


def _told(training: Curve, validation: Curve, epochs: int) -> list[tuple[int, str]]:
    """Epoch and trouble, at each change of it."""
    watch, told = LossWatch(), []
    for epoch in range(epochs):
        watch.trained(training(epoch))
        if watch.validated(epoch, validation(epoch)):
            told.append((epoch, watch.trouble))
    return told


def _noisy(rng: random.Random, share: float, curve: Curve) -> Curve:
    return lambda epoch: curve(epoch) * (1 + rng.gauss(0, share))


def test_a_node_that_learns_its_text_by_heart_is_told_once_with_the_cure() -> None:
    rng = random.Random(1)
    training = _noisy(rng, 0.01, lambda e: 2.5 - 0.01 * e)
    validation = _noisy(rng, 0.005, lambda e: 2.6 - 0.005 * e if e < 40 else 2.2 + 0.005 * e)
    ((epoch, trouble),) = _told(training, validation, 100)
    assert 45 < epoch < 65 and "training loss fell" in trouble and "validation loss rose" in trouble
    assert "--data" in trouble and "propose set" in trouble and len(trouble) <= TEXT_CHARS_MAX


def test_it_is_over_when_the_validation_loss_no_longer_rises() -> None:
    told = _told(lambda e: 3.0 - 0.01 * e, lambda e: 2.0 + 0.01 * min(e, 60 - e), 80)
    assert [bool(trouble) for _, trouble in told] == [True, False] and told[1][0] > 30


@pytest.mark.parametrize("noise", [0.0, 0.005, 0.03])
@pytest.mark.parametrize(
    "curves",
    [
        (lambda e: 2.5, lambda e: 2.6),
        (lambda e: 2 + 3 / (1 + e / 10), lambda e: 2.1 + 3 / (1 + e / 10)),  # both fall
        (lambda e: 2 + 0.01 * e, lambda e: 2.1 + 0.01 * e),  # both rise: it diverges
        (lambda e: 2.5 - 0.005 * e, lambda e: 2.6),  # a plateau
    ],
)
def test_no_alarm_on_noisy_flat_curves_nor_where_both_go_one_way(
    noise: float, curves: tuple[Curve, Curve]
) -> None:
    for seed in range(10):
        rng = random.Random(seed)
        assert _told(_noisy(rng, noise, curves[0]), _noisy(rng, noise, curves[1]), 300) == [], seed


def test_a_loss_that_a_script_does_not_tell_and_an_epoch_that_comes_again_count_for_nothing() -> None:
    watch = LossWatch()
    for epoch in range(2 * MEASURED):
        watch.trained(math.nan)
        assert not watch.validated(epoch, 2.0 + epoch)
    for epoch in range(MEASURED - 1):
        watch.trained(3.0 - 0.1 * epoch)
        assert not watch.validated(epoch, 2.0 + epoch)
    watch.trained(1.0)
    assert not watch.validated(3, 30.0)  # after a rollback: the later ones are void


def test_points_that_hang_together_make_a_slope_less_sure() -> None:
    line = [0.1 * i for i in range(MEASURED)]
    apart = [v + (0.1 if i % 2 else -0.1) for i, v in enumerate(line)]
    in_waves = [v + (0.1 if i // 5 % 2 else -0.1) for i, v in enumerate(line)]
    assert fitted(apart).errors > 1.5 * fitted(in_waves).errors > 0
    assert fitted([1.0] * MEASURED).errors == 0.0 and fitted(line).errors > 1e6
