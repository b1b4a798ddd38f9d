"""averages wrongly: one code of one shard of every mean that it makes is another

Promise: every honest member has a proof that the liar signed a wrong mean, and it is removed; nobody else is
accused. The run goes on, at one head. A quarter of the shards is audited here, so that it takes few rounds;
by default it is a twentieth.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from liars import lying
from liars.seen import Seen, proof_fault
from tapestry.node.daemon.averaging import Averaging, ResultPayload
from tapestry.node.protocol.agreement import ShardSums
from tapestry.node.state.means import payload_digest

RUN = {"share": "0.25"}


def lie() -> None:
    honest = Averaging.reduce

    def reduce(
        self: Averaging, shard: int, payloads: Sequence[Tensor], weights: Sequence[int]
    ) -> tuple[ResultPayload, str, ShardSums]:
        mean, digest, sums = honest(self, shard, payloads, weights)
        if not lying.now():
            return mean, digest, sums
        wrong = mean.tensor.clone()
        wrong[0] = 1 if int(wrong[0]) != 1 else 2
        return ResultPayload(wrong), payload_digest(wrong), sums

    Averaging.reduce = reduce  # type: ignore[method-assign]


def broken(seen: Seen) -> list[str]:
    return proof_fault(seen, "signed a wrong mean")
