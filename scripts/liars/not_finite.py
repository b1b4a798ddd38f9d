"""contributes NaN, infinities, denormal scales and codes that no encoder writes, in turns

Promise: no such number is averaged. Who is to average it refuses it, counted by reason, and the round is made
without it; where it averages a shard itself, the numbers do not enter either. The run goes on, at one head.
"""

from __future__ import annotations

import itertools

import torch

from liars.lying import Contribution, contributes
from liars.seen import Seen, loss_fault, refused_fault
from tapestry.node.daemon.averaging import Averaging

SCALES = (float("nan"), float("inf"), 1e-40)


def lie() -> None:
    kinds = itertools.cycle(range(len(SCALES) + 1))

    def change(averaging: Averaging, taken: Contribution) -> Contribution:
        kind = next(kinds)
        spoilt = []
        for shard, payload in zip(averaging.shards, taken, strict=True):
            bytes_ = payload.clone()
            if kind == len(SCALES):
                bytes_[: shard.n] = 0x80  # the code -128
            else:  # behind the codes lie the scales, in float32
                bytes_[shard.n :].view(torch.float32).fill_(SCALES[kind])
            spoilt.append(bytes_)
        return tuple(spoilt)

    contributes(change)


def broken(seen: Seen) -> list[str]:
    return refused_fault(seen, "not_finite", "scale", "code") + loss_fault(seen)
