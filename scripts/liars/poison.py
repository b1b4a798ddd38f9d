"""contributes -30 times its own numbers to a run with the plain mean and a gate

Promise: the others' held-out data refuse the result. The round is made again without it, its name stands in
their logs as the furthest, and the run goes on; the loss is at most a tenth above that of the run without it.
"""

from __future__ import annotations

from liars.lying import contributes_times
from liars.seen import Seen, loss_fault

RUN = {"rule": '"mean"', "margin": "0.02"}


def lie() -> None:
    contributes_times(-30.0)


def broken(seen: Seen) -> list[str]:
    return loss_fault(seen) + ([] if seen.gated else ["the gate has not named it"])
