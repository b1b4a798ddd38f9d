"""What the node wants of its trainer: which epoch is begun, and what of it is still to come.

The orders outlive a worker: a new one is told those that are open (`again`). Every `begin` has a number of
its own, its generation, by which a report of another one is known: an epoch may begin twice, on two sides of
a fork.

Pure: each order changes the state and gives the command to be sent, if there is one. Sending is process.py's.
"""

from __future__ import annotations

from tapestry.node.spec.training import UNCHANGED, Changed
from tapestry.node.trainer.messages import (
    Abort,
    Begin,
    Close,
    Command,
    Contribution,
    Evaluate,
    GoOn,
    Progress,
    Validation,
)

UNKNOWN_GENERATION = -1  # of a contribution that is not the latest


class Orders:
    """Nothing is begun at first."""

    def __init__(self) -> None:
        self.generation = 0
        self._begun: int | None = None
        self._changed = UNCHANGED  # of the latest begin
        self._base = ""  # head of the state that was begun from
        self._contributed: tuple[int, str] | None = None  # epoch and base; the worker may be ahead of it
        self._counted = 0  # generation; to be told with the next begin
        self._afresh = False  # to be told with each begin until something has come of one
        self._closing = False
        self._evaluating: int | None = None

    @property
    def open(self) -> bool:
        """Whether something is still to come."""
        return self._begun is not None or self._evaluating is not None

    def begin(self, epoch: int, base: str, before: str, changed: Changed, slot: int) -> Begin:
        """`base` is the head of the state to begin from, `before` that of the one before it.

        The epoch follows a contribution if that was made from `before`.
        """
        follows = before != "" and self._contributed == (epoch - 1, before)
        self._begun, self._base, self._contributed, self._closing = epoch, base, None, False
        self.generation += 1
        self._changed = changed
        counted, self._counted = self._counted, 0
        return self._begin(epoch, follows, counted, slot)

    def settle(self, generation: int) -> None:
        """The contribution of this begin has been committed: the next begin says so."""
        self._counted = generation

    def forget(self) -> None:
        """What was learnt is undone: the next begin says that nothing is to be kept."""
        self._counted, self._afresh = UNKNOWN_GENERATION, True

    def close_round(self, epoch: int) -> Close | None:
        """Only of the epoch that is begun."""
        if epoch != self._begun:
            return None
        self._closing = True
        return Close(epoch)

    def go_on(self, epoch: int) -> GoOn | None:
        """Only after a contribution to this epoch."""
        return GoOn(epoch) if self._contributed == (epoch, self._base) else None

    def abort(self) -> Abort:
        """Nothing will come of what is begun, nor of what came after a contribution."""
        self._begun = self._contributed = None
        self.generation += 1
        return Abort()

    def evaluate(self, epoch: int) -> Evaluate:
        """Supersedes an earlier one that has not been answered."""
        self._evaluating = epoch
        return Evaluate(epoch)

    def again(self, slot: int) -> list[Command]:
        """What a worker that has just come up is told. It has no residual that could be counted."""
        commands: list[Command] = []
        if self._evaluating is not None:
            commands.append(Evaluate(self._evaluating))
        if self._begun is not None:
            commands.append(self._begin(self._begun, False, 0, slot))
            if self._closing:
                commands.append(Close(self._begun))
        return commands

    def is_stale(self, report: Progress | Contribution) -> bool:
        """Of another begin; a Progress may be of the epoch after the one that was contributed to."""
        if report.generation != self.generation:
            return True
        return isinstance(report, Contribution) and report.epoch != self._begun

    def done(self, report: Contribution | Validation) -> None:
        """It has come, and is not stale."""
        if isinstance(report, Contribution):
            self._begun, self._contributed = None, (report.epoch, self._base)
            self._afresh = False
        elif report.epoch == self._evaluating:
            self._evaluating = None

    def _begin(self, epoch: int, follows: bool, counted: int, slot: int) -> Begin:
        changed = self._changed
        return Begin(
            *(epoch, self.generation, follows, counted, slot),
            *(changed.lr, changed.batches, changed.batch_size, self._afresh),
        )
