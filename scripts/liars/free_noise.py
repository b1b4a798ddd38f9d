"""trains nothing, and contributes noise that is as long as what it would have sent

Promise: as of any contribution within the bounds. The run goes on, at one head; the loss is at most a tenth
above that of the run without it. Nobody is told.
"""

from __future__ import annotations

import torch

from liars.lying import Contribution, contributes
from liars.seen import Seen, loss_fault
from tapestry.node.daemon.averaging import Averaging


def lie() -> None:
    def change(averaging: Averaging, taken: Contribution) -> Contribution:
        codec, noise = averaging.codec, []
        for shard, payload in zip(averaging.shards, taken, strict=True):
            length = codec.decode(payload, shard.n).norm()
            values = torch.randn(shard.n)
            noise.append(codec.encode(values * (length / values.norm())))
        return tuple(noise)

    contributes(change)


def broken(seen: Seen) -> list[str]:
    return loss_fault(seen)
