"""`SwarmCallback`: transformers' Trainer, and TRL's trainers, which are Trainers, as a member's loop.

    callback = SwarmCallback(home="mine", peer=ADDRESS, inner_steps=50, until_epoch=10)
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[callback])
    with callback:
        trainer.train()

Each of the Trainer's optimizer steps is an inner step, whatever it accumulates. `with` sees to it that an
exception in the training leaves the swarm at once; without it that happens at the process's end.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from transformers import TrainerCallback

from tapestry.node.api import Swarm
from tapestry.node.library.errors import SwarmError


class SwarmCallback(TrainerCallback):  # type: ignore[misc]  # mypy does not look into transformers
    """Arguments as Swarm's, without module and optimizer, which are the Trainer's.

    `until_epoch`: the Trainer stops when the run has come so far; else at its own end.
    """

    def __init__(self, *, until_epoch: int | None = None, **arguments: Any) -> None:
        self.swarm: Swarm | None = None
        self._until_epoch = until_epoch
        self._arguments = arguments
        self._read = 0  # entries of the Trainer's log

    def __enter__(self) -> SwarmCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Found, join or go on; the model then holds the run's base."""
        if args.world_size > 1:
            raise SwarmError(
                f"the Trainer runs in {args.world_size} processes, a member's script in one",
                "one process and one GPU for each member",
            )
        swarm = Swarm(model, optimizer, **self._arguments)
        self.swarm = swarm.open()
        self._read = len(state.log_history)
        if not swarm.spec.train.inner_steps:
            swarm.close()
            raise SwarmError("a Trainer takes its own steps", "a run with inner_steps above 0")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """An inner step, and at the end of a round the new base."""
        if self.swarm is None:
            return control
        samples = args.train_batch_size * args.gradient_accumulation_steps
        self.swarm.step(self._new_loss(state), samples)
        if self._until_epoch is not None and self.swarm.epoch >= self._until_epoch:
            control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave in good order."""
        self._leave()

    def _leave(self) -> None:
        if self.swarm is not None:
            self.swarm.close()

    def _new_loss(self, state: Any) -> float | None:
        """What the Trainer has logged since the step before; it tells no other."""
        entries, self._read = state.log_history[self._read :], len(state.log_history)
        losses = [entry["loss"] for entry in entries if "loss" in entry]
        return float(losses[-1]) if losses else None
