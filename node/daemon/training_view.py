"""What /status says of a node's own training: losses, speed, tokens; kept from the trainer's reports."""

from __future__ import annotations

import math

from tapestry.node.trainer import messages as tm
from tapestry.node.trainer.process import Event


def known(loss: float | None) -> float:
    """NaN for one that a script did not tell."""
    return math.nan if loss is None else loss


class TrainingView:
    """NaN is said of a loss that is not known."""

    def __init__(self) -> None:
        self.loss = math.nan  # mean over the steps of `loss_epoch` so far
        self.loss_epoch = -1  # the state that the steps began from; -1: none yet
        self.val_loss = math.nan
        self.val_loss_epoch = -1  # the state that it was measured on
        self.trouble = ""  # of the trainer: trainer_health.py
        self.val_losses: dict[str, float] = {}  # by the set's name
        self.data_passes = 0.0
        self.tokens_per_second = 0.0
        self.tokens_total = 0
        self._contributed = -1, math.nan  # epoch that the latest contribution is made from, and its loss
        self._epoch = -1  # that the trainer is at; with overlap perhaps the one after the round's
        self._epoch_tokens = 0
        self._epoch_steps = 0
        self._taken = (0, 0)  # steps and tokens that the metrics have been told
        self._validation_began = -math.inf
        self._validation_s = 0.0

    def on_event(self, event: Event, now: float) -> None:
        if isinstance(event, tm.Progress):
            if event.epoch != self._epoch or event.tokens < self._epoch_tokens:  # another, or this one again
                self._taken = (0, 0)
            self._smooth(event)
            self._epoch, self._epoch_tokens, self._epoch_steps = event.epoch, event.tokens, event.step
            self.tokens_per_second = event.tokens_per_second
        elif isinstance(event, tm.Contribution):
            self.data_passes = event.passes
            self.loss, self.loss_epoch = known(event.loss), event.epoch  # of all its steps
            self._contributed = event.epoch, self.loss
        elif isinstance(event, tm.Hello):
            self.val_losses = {name: self.val_losses.get(name, math.nan) for name in event.sets}
        elif isinstance(event, tm.Validation):
            self.val_loss, self.val_loss_epoch = event.loss, event.epoch
            self.val_losses = dict(zip(event.sets, event.losses, strict=False))
            self._validation_s = now - self._validation_began

    def loss_of(self, epoch: int) -> float:
        """The mean of this node's steps from state `epoch`, if that is what it contributed last."""
        contributed, loss = self._contributed
        return loss if contributed == epoch else math.nan

    def _smooth(self, event: tm.Progress) -> None:
        """The mean over the epoch, each report for the steps since the one before: one batch's loss jumps."""
        again = event.epoch != self._epoch or event.tokens < self._epoch_tokens
        done = 0 if again else self._epoch_steps
        if again or not math.isfinite(self.loss):
            done = 0
        if event.loss is None:
            self.loss = math.nan
        elif event.step > done:
            before = self.loss * done if done else 0.0
            self.loss = (before + event.loss * (event.step - done)) / event.step
        self.loss_epoch = event.epoch

    def take_progress(self) -> tuple[int, int]:
        """Steps and tokens since the last call."""
        steps, tokens = self._epoch_steps - self._taken[0], self._epoch_tokens - self._taken[1]
        self._taken = (self._epoch_steps, self._epoch_tokens)
        self.tokens_total += tokens
        return steps, tokens

    def validating(self, now: float) -> None:
        self._validation_began = now

    def validation_due(self, now: float, share: float) -> bool:
        return now - self._validation_began >= self._validation_s / share
