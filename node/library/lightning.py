"""`LightningCallback`: Lightning's Trainer as a member's loop.

    callback = LightningCallback(home="mine", peer=ADDRESS, inner_steps=50, until_epoch=10)
    Trainer(max_epochs=-1, accelerator="cpu", devices=1, callbacks=[callback]).fit(module, loader)

Each optimizer step is an inner step, whatever the Trainer accumulates. An exception in the training leaves
the swarm. The module must have one optimizer and take its steps by itself (automatic optimization).
"""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities.data import extract_batch_size

from tapestry.node.api import Swarm
from tapestry.node.library.errors import SwarmError


class LightningCallback(Callback):  # type: ignore[misc]  # mypy does not look into lightning
    """Arguments as Swarm's, without module and optimizer, which are the Trainer's.

    `until_epoch`: the Trainer stops when the run has come so far; else at its own end.
    """

    def __init__(self, *, until_epoch: int | None = None, **arguments: Any) -> None:
        self.swarm: Swarm | None = None
        self._until_epoch = until_epoch
        self._arguments = arguments
        self._steps = 0  # of the Trainer's optimizer, as many as were told
        self._losses: list[Any] = []  # of the batches since then, where training_step gives any
        self._samples = 0  # in those batches

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Found, join or go on; the module then holds the run's base."""
        if trainer.world_size > 1:
            raise SwarmError(
                f"the Trainer runs in {trainer.world_size} processes, a member's script in one",
                "devices=1: one process and one GPU for each member",
            )
        if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization:
            raise SwarmError(
                "a member's module has one optimizer, whose steps the Trainer takes",
                "Swarm itself, for a loop of your own",
            )
        swarm = Swarm(pl_module, trainer.optimizers[0], **self._arguments)
        self.swarm = swarm.open()
        self._steps = trainer.global_step
        if not swarm.spec.train.inner_steps:
            swarm.close()
            raise SwarmError("a Trainer takes its own steps", "a run with inner_steps above 0")

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """If that was an optimizer step: an inner step, and at the end of a round the new base."""
        if self.swarm is None:
            return
        if (loss := _loss(outputs)) is not None:
            self._losses.append(loss)
        self._samples += extract_batch_size(batch)
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        losses = [float(one) * trainer.accumulate_grad_batches for one in self._losses]
        samples, self._losses, self._samples = self._samples, [], 0
        self.swarm.step(math.fsum(losses) / len(losses) if losses else None, samples)
        if self._until_epoch is not None and self.swarm.epoch >= self._until_epoch:
            trainer.should_stop = True

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave."""
        self._leave()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave in good order."""
        self._leave()

    def _leave(self) -> None:
        if self.swarm is not None:
            self.swarm.close()


def _loss(outputs: Any) -> Any:
    """Of the batch, where training_step gives it, alone or in a dict; Lightning has divided it by the batches
    that it accumulates (2.6, loops/optimization/automatic.py)."""
    return outputs.get("loss") if isinstance(outputs, dict) else outputs
