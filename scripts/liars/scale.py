"""contributes a hundred times its own numbers

Promise: it counts for no more than norm_max times the median norm. The run goes on, at one head; the loss is
at most a tenth above that of the run without it. It is not named: the mean `clipped` makes it short.
"""

from __future__ import annotations

from liars.lying import contributes_times
from liars.seen import Seen, loss_fault


def lie() -> None:
    contributes_times(100.0)


def broken(seen: Seen) -> list[str]:
    return loss_fault(seen)
