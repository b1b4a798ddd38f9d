"""trains nothing, and contributes what others sent it of theirs in the round before

Promise: it takes nothing from the run but its share of the voice. The run goes on, at one head; the loss is
at most a tenth above that of the run without it. Nobody is told: a copy under a name of one's own is a
contribution.
"""

from __future__ import annotations

from torch import Tensor

from liars.lying import Contribution, contributes
from liars.seen import Seen, loss_fault
from tapestry.node.daemon.averaging import Averaging, ResultPayload
from tapestry.node.protocol.messages import Result, Shard


def lie() -> None:
    unpack = Averaging.unpack
    held: dict[int, Tensor] = {}  # shard -> what somebody contributed of it

    def listen(
        self: Averaging, peer: str, message: Shard | Result, frame: bytearray
    ) -> tuple[Tensor | ResultPayload, str]:
        payload, digest = unpack(self, peer, message, frame)
        held[message.shard] = (payload.tensor if isinstance(payload, ResultPayload) else payload).clone()
        return payload, digest

    def change(averaging: Averaging, taken: Contribution) -> Contribution:
        return tuple(held.get(index, payload) for index, payload in enumerate(taken))

    Averaging.unpack = listen  # type: ignore[method-assign]
    contributes(change)


def broken(seen: Seen) -> list[str]:
    return loss_fault(seen)
