"""What LightningCallback makes of Lightning's steps, told as Lightning tells it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tapestry.node import LightningCallback


class Told:
    """A swarm that writes down its steps."""

    def __init__(self) -> None:
        self.steps: list[tuple[float | None, int]] = []
        self.epoch = 0

    def step(self, loss: float | None, samples: int) -> bool:
        self.steps.append((loss, samples))
        return False


def test_the_loss_of_a_step_is_the_mean_of_its_batches_and_not_its_share_of_the_last() -> None:
    """With four batches for a step /status showed a quarter of the loss beside members with the true one."""
    callback, told = LightningCallback(home="unused"), Told()
    callback.swarm = told
    trainer: Any = SimpleNamespace(global_step=0, accumulate_grad_batches=2)
    for global_step, loss in ((0, 3.0), (1, 5.0), (2, 6.0), (3, None)):  # the third is an epoch's last batch
        trainer.global_step = global_step
        outputs = None if loss is None else {"loss": torch.tensor(loss / trainer.accumulate_grad_batches)}
        callback.on_train_batch_end(trainer, None, outputs, torch.zeros(8, 2), 0)
    assert told.steps == [(4.0, 16), (6.0, 8), (None, 8)]
