"""contributes what it contributed once, in every later round, under its old name

Promise: who is to average it refuses it, as `commitment`: the name of a contribution is of one epoch. The run
goes on without it, at one head.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from liars import lying
from liars.lying import Contribution
from liars.seen import Seen, loss_fault, refused_fault
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.protocol.commitment import Commitment


def lie() -> None:
    honest_commit = Averaging.commit
    old: list[tuple[Contribution, Commitment]] = []

    def commit(self: Averaging, contributor: str, epoch: int, payloads: Sequence[Tensor]) -> str:
        name = honest_commit(self, contributor, epoch, payloads)
        if not lying.now():
            return name
        if not old:
            old.append((tuple(payload.clone() for payload in payloads), self._trees[name]))
        first, tree = old[0]
        for payload, before in zip(payloads, first, strict=True):
            payload.copy_(before)
        self._trees[tree.name] = tree  # its paths are asked for
        return tree.name

    Averaging.commit = commit  # type: ignore[method-assign]


def broken(seen: Seen) -> list[str]:
    return refused_fault(seen, "commitment") + loss_fault(seen)
