"""The learning rate over a run, as a factor of the run's own: warm-up, then constant, cosine or WSD.

    constant  1
    cosine    half a cosine from 1 to `min_lr_ratio`, over `schedule_steps`, the warm-up included
    wsd       1, and a straight line to `min_lr_ratio` in the last `decay_share` of `schedule_steps`
              (warm-up, stable, decay: MiniCPM, 2404.06395; a straight line: 2405.18392)

After `schedule_steps` the factor stays at `min_lr_ratio`.

A step has its number from the epoch that it is of and its place in it: the run has committed
`epoch * inner_steps` before it. So a member that joins late, that was closed early, or that has gone on ahead
of its base, is at the same point as all the others; no member counts for itself. An epoch counts as the
spec's `inner_steps`, also where a record has changed how many steps it takes: nothing jumps, and the schedule
ends at the epoch that the spec says. Only the warm-up counts for itself as well: an optimizer that begins in
the middle of a run, a joiner's, has moments of nothing, and its first steps at the full rate would be as long
as they are blind.

Pure: numbers only.
"""

from __future__ import annotations

import math

from tapestry.node.spec.training import TrainSpec


def run_step(settings: TrainSpec, epoch: int, step: int, steps: int = 0) -> float:
    """The number, in the whole run, of step `step` of `epoch`, which takes `steps` in all; 0: the spec's."""
    share = step * settings.inner_steps / steps if steps else step
    return epoch * settings.inner_steps + share


def lr_factor(
    settings: TrainSpec,
    number: float,  # of the step in the run, from 0
    own: int,  # of the step in this optimizer's life, from 0
) -> float:
    """What every learning rate is multiplied with, above 0 at the first step."""
    return _warm(settings, min(number, own)) * _shape(settings, number)


def _warm(settings: TrainSpec, number: float) -> float:
    return min(1.0, (number + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0


def _shape(settings: TrainSpec, number: float) -> float:
    low, end = settings.min_lr_ratio, settings.schedule_steps
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "cosine":
        begin = min(settings.warmup_steps, end)
        return low + (1 - low) * (1 + math.cos(math.pi * _share(number, begin, end))) / 2
    begin = end - round(settings.decay_share * end)
    return 1 - (1 - low) * _share(number, begin, end)


def _share(number: float, begin: int, end: int) -> float:
    """How far it is from `begin` to `end`, from 0 to 1."""
    return min(1.0, max(0.0, (number - begin) / (end - begin))) if end > begin else float(number >= end)
