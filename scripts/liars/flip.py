"""contributes its own numbers with all signs flipped

Promise: it pulls by no more than its share. The run goes on, at one head, and learns; the loss is at most a
tenth above that of the run without it. Nothing is refused, and it is not named: it is a contribution like any
other under the mean `clipped`.
"""

from __future__ import annotations

from liars.lying import contributes_times
from liars.seen import Seen, loss_fault


def lie() -> None:
    contributes_times(-1.0)


def broken(seen: Seen) -> list[str]:
    return loss_fault(seen)
