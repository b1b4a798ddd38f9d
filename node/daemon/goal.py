"""Whether a node trains on: it may be told to end after so many epochs more, or at a given one; and its data
may be withdrawn (permit.py).

"More" counts from the first round that the node is in, so that a joiner counts its own rounds and not those
that the run had before it.
"""

from __future__ import annotations

from collections.abc import Callable

from tapestry.node.spec.node import Ending


class Goal:
    """Asked by the trainer's desk (no training beyond it) and by the runtime (the node is done)."""

    def __init__(self, ending: Ending, forbidden: Callable[[], str] = lambda: "") -> None:
        self.forbidden = forbidden  # why this node's data may not be used any more; "": they may
        self._more = ending.epochs
        self.epoch = ending.until_epoch  # committed updates to end with; None: not known yet, or never

    def begin(self, epoch: int) -> None:
        """A round on state `epoch` begins: the first one is what "more" counts from."""
        if self.epoch is None and self._more is not None:
            self.epoch = epoch + self._more

    def reached(self, epoch: int) -> bool:
        """Whether a node with state `epoch` has nothing more to do."""
        return self.epoch is not None and epoch >= self.epoch
