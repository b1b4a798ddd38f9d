"""The tensor half of a round: contributions to payloads, payloads to means, and the bytes that travel.

Plain functions of tensors, called in worker threads by node/runtime.py; the protocol core decides what is
called when and never sees a tensor. A *blob* in the core's words is a payload here: uint8, one shard.

With `residual` on (error feedback, 1-bit SGD 2014; off by default: at 8 bits no paper found it to matter),
what encoding rounded away is added to the next contribution, and only if this one was committed: else the
whole of it is lost and must not be counted half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from blake3 import blake3
from torch import Tensor
from typing_extensions import Buffer

from tapestry.compression.codecs import HEADER_BYTES, Codec, pack, unpack
from tapestry.compression.reduce import reduce_shard
from tapestry.compression.refusals import RefusedPayload
from tapestry.compression.shards import Shard as Bounds
from tapestry.compression.shards import shard_bounds
from tapestry.node.protocol.messages import Result, Shard


def _nobody(shard: int, payload: Tensor) -> None:
    """Who does not want to be told."""


class Averaging:
    """What a run's codec and shards make of vectors. One `encode` at a time; `settle` at any time."""

    def __init__(self, codec: Codec, n: int, shard_elements: int, residual: bool) -> None:
        self.codec = codec
        self.shards: tuple[Bounds, ...] = shard_bounds(n, shard_elements)
        self._residual = torch.zeros(n) if residual else None  # f32 (n,), of committed contributions
        self._pending: tuple[str, Tensor] | None = None  # contribution, f32 (n,); of the newest encoded

    @property
    def frame_bytes_max(self) -> int:
        """The largest frame payload that a peer may send."""
        return HEADER_BYTES + max(self.codec.payload_size(s.n) for s in self.shards)

    def encode(
        self,
        vector: Tensor,  # f32 (n,)
        contribution: str = "",  # its name, for `settle`
        on_payload: Callable[[int, Tensor], None] = _nobody,  # told of each shard as soon as it is encoded
    ) -> tuple[Tensor, ...]:  # uint8, one per shard
        """Raises RefusedVector if the contribution is not finite."""
        if self._residual is not None:
            vector = vector + self._residual
        payloads = []
        for shard in self.shards:
            payloads.append(self.codec.encode(vector[shard.start : shard.stop]))
            on_payload(shard.index, payloads[-1])
        if self._residual is not None:
            for s, payload in zip(self.shards, payloads, strict=True):
                vector[s.start : s.stop] -= self.codec.decode(payload, s.n)
            self._pending = contribution, vector  # at once: `settle` may come meanwhile
        return tuple(payloads)

    def settle(self, counted: str | None) -> None:
        """A round is over, in which this contribution of ours counted; None: none did.

        The residual of what counted is kept. If another has been encoded since, it is gone; what it had been
        added to has counted, so it must not stay either.
        """
        pending, self._pending = self._pending, None
        if self._residual is None or counted is None:
            return
        matches = pending is not None and pending[0] == counted
        self._residual = pending[1] if pending is not None and matches else torch.zeros_like(self._residual)

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
