"""The tensor half of a round: the payloads that the trainer made, their means, and the bytes that travel.

Plain functions of tensors, called in worker threads by the daemon's desks; the protocol core decides what is
called when and never sees a tensor. A *blob* in the core's words is a payload here: uint8, one shard; of a
result it is a `ResultPayload`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from blake3 import blake3
from torch import Tensor
from typing_extensions import Buffer

from tapestry.compression.agreement import agreement_sums
from tapestry.compression.codecs import HEADER_BYTES, Codec, pack, unpack
from tapestry.compression.means.api import Mean
from tapestry.compression.payloads import PayloadLayout
from tapestry.compression.reduce import reduce_shard
from tapestry.compression.refusals import RefusedPayload
from tapestry.node.protocol.agreement import ShardSums
from tapestry.node.protocol.commitment import Commitment, is_committed
from tapestry.node.protocol.messages import Result, Shard
from tapestry.node.state.means import mean_digest_of, payload_digest

TREES_HELD = 3  # of the contribution in the round, of one that took its place, and of the one made ahead


class ResultPayload:
    """A shard of a result, wherever its bytes lie: in memory, and once written, in the update's file.

    Whoever reads takes `tensor` once, and keeps what it took.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # uint8 (payload size,); what takes its place is equal


class Averaging:
    """What a run's codec, shards and mean make of payloads."""

    def __init__(self, codec: Codec, n: int, shard_elements: int, mean: Mean) -> None:
        self.codec = codec
        self._mean = mean
        self._layout = PayloadLayout.of(codec, n, shard_elements)
        self.shards = self._layout.shards
        self.mean_digest = mean_digest_of(codec, self.shards, mean)
        self._trees: dict[str, Commitment] = {}  # of our latest contributions, by name

    @property
    def frame_bytes_max(self) -> int:
        """The largest frame payload that a peer may send."""
        return HEADER_BYTES + max(self.codec.payload_size(s.n) for s in self.shards)

    @property
    def float32_ratio(self) -> float:
        """How many times as large a vector is in float32 as in this codec."""
        return 4 * sum(s.n for s in self.shards) / sum(self.codec.payload_size(s.n) for s in self.shards)

    def take(
        self,
        buffer: Tensor,  # uint8 (size,): a contribution as the trainer encoded it; PayloadLayout
        copy: bool,
    ) -> tuple[Tensor, ...]:  # uint8, one per shard
        """Where they lie, for the trainer writes nowhere that is held; or copies, if it has no other place.

        All are checked: what goes to a reducer, to our own as well, has passed the codec. Raises
        RefusedPayload: then the trainer's process has gone wrong.
        """
        payloads = self._layout.views(buffer.clone() if copy else buffer)
        for shard, payload in zip(self.shards, payloads, strict=True):
            self.codec.check(payload, shard.n)
        return payloads

    def reduce(
        self,
        shard: int,
        payloads: Sequence[Tensor],  # uint8, in roster order
        weights: Sequence[int],
    ) -> tuple[ResultPayload, str, ShardSums]:
        """The encoded mean, its digest, and the sums that say how far the payloads agree.

        Raises Refused if there is no mean.
        """
        n = self.shards[shard].n
        mean = reduce_shard(payloads, weights, self.codec, n, mean=self._mean)
        found = agreement_sums(payloads, mean, self.codec, n)
        return ResultPayload(mean), payload_digest(mean), ShardSums(*dataclasses.astuple(found))

    def longest(
        self,
        shard: int,
        payloads: Sequence[Tensor],  # uint8, at least one
    ) -> int:
        """Index of the payload with the largest L2 norm; of equal ones the first. Raises Refused."""
        n = self.shards[shard].n
        pieces = range(len(self.codec.pieces(n)))
        opened = [self.codec.open(payload, n) for payload in payloads]
        squares = [math.fsum(map(one.square_of_piece, pieces)) for one in opened]
        return squares.index(max(squares))

    def commit(self, contributor: str, epoch: int, payloads: Sequence[Tensor]) -> str:
        """The name of a contribution: protocol/commitment.py. Its tree is held until the second after it."""
        tree = Commitment([payload_digest(p) for p in payloads], contributor, epoch, _digest)
        self._trees[tree.name] = tree
        while len(self._trees) > TREES_HELD:
            del self._trees[next(iter(self._trees))]
        return tree.name

    def path(self, contribution: str, shard: int) -> tuple[str, ...]:
        """What proves a shard of a contribution of ours that was committed to lately."""
        return self._trees[contribution].path(shard)

    def frame(self, shard: int, blob: Tensor | ResultPayload) -> list[Buffer]:
        """What travels: header and payload, unjoined."""
        payload = blob.tensor if isinstance(blob, ResultPayload) else blob
        return [pack(self.codec, self.shards[shard].n, payload), memoryview(payload.numpy())]  # type: ignore[arg-type]

    def unpack(
        self, peer: str, message: Shard | Result, frame: bytearray
    ) -> tuple[Tensor | ResultPayload, str]:
        """A peer's frame, checked to the last code: payload (a view of the frame), and its digest.

        A shard is one of the contribution that it is said to be of. Raises Refused.
        """
        if message.shard >= len(self.shards):
            raise RefusedPayload("shard", f"shard {message.shard} of {len(self.shards)}")
        payload = unpack(frame, self.codec, self.shards[message.shard].n)
        digest = payload_digest(payload)
        if isinstance(message, Result):
            return ResultPayload(payload), digest
        name, count = message.contribution, len(self.shards)
        if not is_committed(name, peer, message.epoch, count, message.shard, digest, message.path, _digest):
            raise RefusedPayload("commitment", "a shard that is not of the contribution it names")
        return payload, digest


def _digest(data: bytes) -> str:
    """The chain's: disk/store.py."""
    return blake3(data).hexdigest()
