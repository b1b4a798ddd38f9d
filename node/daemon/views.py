"""What a node tells of its own training and rounds: kept beside the core, for status and metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tapestry.node.protocol.messages import Stage
from tapestry.node.surface.metrics import Metrics
from tapestry.node.trainer import messages as tm
from tapestry.node.trainer.process import Event


@dataclass(frozen=True, slots=True)
class Dropped:
    """What this node gave up since its start, because the chain on the other side of a fork was better."""

    records: int
    weight: int


class TrainingView:
    """What /status says of the training: kept from the trainer's reports."""

    def __init__(self) -> None:
        self.loss = math.nan
        self.val_loss = math.nan
        self.tokens_per_second = 0.0
        self.tokens_total = 0
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
            self._epoch, self._epoch_tokens, self._epoch_steps = event.epoch, event.tokens, event.step
            self.loss = event.loss
            self.tokens_per_second = event.tokens_per_second
        elif isinstance(event, tm.Validation):
            self.val_loss = event.loss
            self._validation_s = now - self._validation_began

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


class PhaseClock:
    """Times the stages of a round for the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._stage = Stage.AWAY
        self._since = 0.0
        self._ready_at: float | None = None

    def stage(self, stage: Stage, now: float) -> bool:
        """Whether it is another than before."""
        if stage == self._stage:
            return False
        if self._stage != Stage.AWAY:
            self._metrics.round_phase_ended(self._stage.name.lower(), now - self._since)
        if stage >= Stage.READY and self._ready_at is None:
            self._ready_at = now
        self._stage, self._since = stage, now
        return True

    def train(self, now: float) -> None:
        self._ready_at = None

    def round_ended(self, now: float) -> float | None:
        """Seconds from having a contribution to the end: what averaging cost. None if there was none."""
        ready_at, self._ready_at = self._ready_at, None
        return None if ready_at is None else now - ready_at
