"""contributes what it contributed once, in every later round, under its old name

Promise: who is to average it refuses it, as `commitment`: the name of a contribution is of one epoch. The run
goes on without it, at one head.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from liars.lying import Contribution, contributes
from liars.seen import Seen, loss_fault, refused_fault
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.protocol.commitment import Commitment


def lie() -> None:
    honest = Averaging.commit
    kept: list[Contribution] = []
    trees: list[Commitment] = []

    def change(averaging: Averaging, taken: Contribution) -> Contribution:
        if not kept:
            kept.append(tuple(payload.clone() for payload in taken))
        return kept[0]

    def commit(self: Averaging, contributor: str, epoch: int, payloads: Sequence[Tensor]) -> str:
        if not kept or payloads is not kept[0]:
            return honest(self, contributor, epoch, payloads)
        if not trees:
            trees.append(self._trees[honest(self, contributor, epoch, payloads)])
        self._trees[trees[0].name] = trees[0]  # its paths are asked for
        return trees[0].name

    Averaging.commit = commit  # type: ignore[method-assign]
    contributes(change)


def broken(seen: Seen) -> list[str]:
    return refused_fault(seen, "commitment") + loss_fault(seen)
