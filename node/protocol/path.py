"""Which states lead to which, in a run that was rolled back: a function of the chain (decisions/018).

Record e makes state e out of state e - 1 by its update; a record that carries a rollback to k makes it of
state k, with the same numbers, and its update is not applied. So the epochs on the way to a state fall into
*stretches*: within one, each state is the one before it and an update; the first state of the next one is the
last of the one before, under another epoch. What lies between two stretches was abandoned.

`rolled` are the rollbacks of a chain (Roll.rolled): epoch of the record -> k, oldest first. Pure; standard
library only.
"""

from __future__ import annotations

from collections.abc import Mapping


def stretches(rolled: Mapping[int, int], epoch: int) -> list[range]:
    """Of the path to state `epoch`, oldest first; the last one ends there."""
    found, last = [], epoch
    for at in reversed([*rolled]):
        if at <= last:
            found.append(range(at, last + 1))
            last = rolled[at]
    found.append(range(last + 1))
    return found[::-1]


def leads(rolled: Mapping[int, int], at: int, epoch: int) -> bool:
    """Whether state `at` lies on the path to state `epoch`."""
    return at <= epoch and (not rolled or any(at in stretch for stretch in stretches(rolled, epoch)))


def step_from(rolled: Mapping[int, int], at: int, epoch: int) -> int:
    """The next epoch on the way to state `epoch` > `at`: the one after, which an update makes; or the first
    of a stretch, which is a state that was there before."""
    if not rolled:
        return at + 1
    path = stretches(rolled, epoch)
    if any(at in stretch and at + 1 in stretch for stretch in path):
        return at + 1
    return next(stretch.start for stretch in path if stretch.start > at)


def updates_from(rolled: Mapping[int, int], at: int, epoch: int) -> int:
    """How many updates in a row lead on from state `at` to state `epoch`, up to the end of its stretch."""
    found = [stretch.stop - 1 - at for stretch in stretches(rolled, epoch) if at in stretch]
    return found[0] if found else 0


def last_before(rolled: Mapping[int, int], at: int, epoch: int) -> int:
    """The newest epoch on the path to state `epoch` that is not after `at`."""
    return max(min(stretch.stop - 1, at) for stretch in stretches(rolled, epoch) if stretch.start <= at)
