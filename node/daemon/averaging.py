"""The tensor half of a round: the payloads that the trainer made, their means, and the bytes that travel.

Plain functions of tensors, called in worker threads by node/runtime.py; the protocol core decides what is
called when and never sees a tensor. A *blob* in the core's words is a payload here: uint8, one shard.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from blake3 import blake3
from torch import Tensor
from typing_extensions import Buffer

from tapestry.compression.codecs import HEADER_BYTES, Codec, pack, unpack
from tapestry.compression.payloads import PayloadLayout
from tapestry.compression.reduce import reduce_shard
from tapestry.compression.refusals import RefusedPayload
from tapestry.node.protocol.messages import Result, Shard


class Averaging:
    """What a run's codec and shards make of payloads."""

    def __init__(self, codec: Codec, n: int, shard_elements: int) -> None:
        self.codec = codec
        self._layout = PayloadLayout.of(codec, n, shard_elements)
        self.shards = self._layout.shards

    @property
    def frame_bytes_max(self) -> int:
        """The largest frame payload that a peer may send."""
        return HEADER_BYTES + max(self.codec.payload_size(s.n) for s in self.shards)

    def take(
        self,
        buffer: Tensor,  # uint8 (size,): a contribution as the trainer encoded it; PayloadLayout
    ) -> tuple[Tensor, ...]:  # uint8, one per shard
        """Copies, for the trainer writes its next one there while links still send this one.

        All are checked: what goes to a reducer, to our own as well, has passed the codec. Raises
        RefusedPayload: then the trainer's process has gone wrong.
        """
        copy = torch.empty_like(buffer)
        payloads = self._layout.views(copy)
        for shard, theirs, payload in zip(self.shards, self._layout.views(buffer), payloads, strict=True):
            self.codec.check(payload.copy_(theirs), shard.n)
        return payloads

    def reduce(
        self,
        shard: int,
        payloads: Sequence[Tensor],  # uint8, in roster order
        weights: Sequence[int],
    ) -> tuple[Tensor, str]:
        """The encoded mean and its digest. Raises Refused if there is none."""
        mean = reduce_shard(payloads, weights, self.codec, self.shards[shard].n)
        return mean, payload_digest(mean)

    def frame(self, shard: int, payload: Tensor) -> list[Buffer]:
        """What travels: header and payload, unjoined."""
        return [pack(self.codec, self.shards[shard].n, payload), memoryview(payload.numpy())]  # type: ignore[arg-type]

    def unpack(self, message: Shard | Result, frame: bytearray) -> tuple[Tensor, str]:
        """A peer's frame, checked to the last code: payload (a view of the frame), digest of a result.

        Raises Refused.
        """
        if message.shard >= len(self.shards):
            raise RefusedPayload("shard", f"shard {message.shard} of {len(self.shards)}")
        payload = unpack(frame, self.codec, self.shards[message.shard].n)
        return payload, payload_digest(payload) if isinstance(message, Result) else ""


def payload_digest(payload: Tensor) -> str:
    """blake3 of the encoded bytes, as `Result.digest` names a shard."""
    return blake3(memoryview(payload.numpy())).hexdigest()  # type: ignore[arg-type]
