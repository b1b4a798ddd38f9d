"""Whether this node learns its own text by heart: its training loss falls while its validation loss rises.

The rule: over the last MEASURED measurements of the validation loss, each beside the mean training loss
since the one before, lines are fitted to both. The training line falls and the validation line rises, each
by CHANGE_MIN of its mean and SURE times its standard error; and that is found LASTING times in a row.

Why so: a loss goes up or down from epoch to epoch by chance, and a plateau is no trouble. Noisy points do
not make a sure slope, and least of all five times. What is next to each other is alike, so the standard
error is that of so many independent points as the residuals' correlation leaves (B. D. Santer et al., 2000,
doi:10.1029/1999JD901105). Where training falls anyway, a flat validation loss with independent noise of 0.5
to 3 % gave no alarm in 900 runs of 1,000 measurements, and noise that is by half like the one before, 11.
One that wanders for tens of measurements does rise, and is told. A rise by 5 % in 20 measurements is told
after 18 to 20.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

MEASURED = 20  # measurements that a line is fitted to
CHANGE_MIN = 0.01  # of the mean, from one end of the line to the other
SURE = 6.0  # standard errors
LASTING = 5  # measurements in a row
ALIKE_MAX = 0.9  # correlation that is believed at most: of 20 points more is not to be told

CURE = (
    "it learns its own text by heart, or validates on another kind: give it more text (--data), look at what "
    "--validation reads, or have all take fewer steps (tapestry propose set)"
)


@dataclass(frozen=True, slots=True)
class Line:
    """What was fitted: its ends, and how sure its slope is."""

    first: float
    last: float
    errors: float  # slope in standard errors, with its sign

    def rises(self) -> bool:
        return self.errors >= SURE and self.last - self.first >= CHANGE_MIN * (self.first + self.last) / 2

    def falls(self) -> bool:
        return Line(self.last, self.first, -self.errors).rises()


class LossWatch:
    """Of one node."""

    def __init__(self) -> None:
        self.trouble = ""  # what is wrong, and the cure; "" if nothing is
        self._apart = 0  # measurements in a row
        self._losses: list[float] = []  # of the contributions since the latest measurement
        self._pairs: deque[tuple[int, float, float]] = deque(maxlen=MEASURED)  # epoch, training, validation

    def trained(self, loss: float) -> None:
        """A contribution's mean loss, in nats."""
        if math.isfinite(loss):
            self._losses = [*self._losses, loss][-MEASURED:]

    def validated(self, epoch: int, loss: float) -> bool:
        """The shared base's validation loss at `epoch`. Returns whether `trouble` is another than before."""
        while self._pairs and self._pairs[-1][0] >= epoch:
            self._pairs.pop()  # on a fork that was left, or rolled back
        if self._losses and math.isfinite(loss):
            self._pairs.append((epoch, sum(self._losses) / len(self._losses), loss))
            self._losses = []
        before, self.trouble = self.trouble, self._judged()
        return bool(before) != bool(self.trouble)

    def _judged(self) -> str:
        """A trouble stays until the validation loss no longer rises."""
        if len(self._pairs) < MEASURED:
            return ""
        epochs, trained, validated = zip(*self._pairs, strict=True)
        training, validation = fitted(trained), fitted(validated)
        self._apart = self._apart + 1 if training.falls() and validation.rises() else 0
        if self._apart >= LASTING:
            return (
                f"over epochs {epochs[0]} to {epochs[-1]} this node's training loss fell from "
                f"{training.first:.3f} to {training.last:.3f}, its validation loss rose from "
                f"{validation.first:.3f} to {validation.last:.3f}: {CURE}"
            )
        return self.trouble if validation.last > validation.first else ""


def fitted(values: Sequence[float]) -> Line:
    """Least squares, the values being equally far apart; at least three."""
    count = len(values)
    middle, mean = (count - 1) / 2, sum(values) / count
    spread = sum((i - middle) ** 2 for i in range(count))
    slope = sum((i - middle) * value for i, value in enumerate(values)) / spread
    rest = [value - mean - slope * (i - middle) for i, value in enumerate(values)]
    squares = sum(r * r for r in rest)
    beside = sum(a * b for a, b in itertools.pairwise(rest))
    alike = min(ALIKE_MAX, max(0.0, beside / squares)) if squares else 0.0
    error = math.sqrt(squares / (count - 2) / spread * (1 + alike) / (1 - alike))
    errors = slope / error if error else math.copysign(math.inf, slope) if slope else 0.0
    return Line(mean - slope * middle, mean + slope * middle, errors)
