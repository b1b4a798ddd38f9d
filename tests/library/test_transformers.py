"""What SwarmCallback makes of the Trainer's log, told as the Trainer tells it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tapestry.node import SwarmCallback


def test_a_loss_that_the_trainer_logged_is_told_once() -> None:
    """With logging_steps=500 and 50 inner steps, ten epochs had the loss of long before."""
    callback, told = SwarmCallback(home="unused"), list[float | None]()
    callback.swarm = SimpleNamespace(  # type: ignore[assignment]
        step=lambda loss, samples: told.append(loss), epoch=0
    )
    state: Any = SimpleNamespace(log_history=[])
    arguments = SimpleNamespace(train_batch_size=4, gradient_accumulation_steps=1)
    for logged in ([], [{"loss": 3.0}], [], [{"loss": 2.0}, {"eval_loss": 9.0}], [{"eval_loss": 8.0}]):
        state.log_history += logged
        callback.on_step_end(arguments, state, SimpleNamespace())
    assert told == [None, 3.0, None, 2.0, None]
