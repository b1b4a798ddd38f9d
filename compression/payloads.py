"""Where the payloads of a vector's shards lie in one buffer: one after another, without gaps.

Two processes share such a buffer, and both ask `PayloadLayout.of` for it: so they agree to the byte.

Must not import: anything outside this package of ours; asyncio; anything that does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tapestry.compression.codecs import Codec
from tapestry.compression.shards import Shard, shard_bounds


@dataclass(frozen=True, slots=True)
class PayloadLayout:
    """A codec's payloads of all shards of n elements. Make one with `of`."""

    codec: Codec
    shards: tuple[Shard, ...]
    offsets: tuple[int, ...]  # of each shard's first byte, and at the end of all: one more than shards

    @classmethod
    def of(cls, codec: Codec, n: int, shard_elements: int) -> PayloadLayout:
        """Raises RefusedLayout("shard") as shard_bounds."""
        shards = shard_bounds(n, shard_elements)
        offsets = [0]
        for shard in shards:
            offsets.append(offsets[-1] + codec.payload_size(shard.n))
        return cls(codec, shards, tuple(offsets))

    @property
    def n(self) -> int:
        """Elements of the vector."""
        return self.shards[-1].stop if self.shards else 0

    @property
    def size(self) -> int:
        """Bytes of the buffer."""
        return self.offsets[-1]

    def views(
        self,
        buffer: Tensor,  # uint8 (size,)
    ) -> tuple[Tensor, ...]:  # uint8 (codec.payload_size(shard.n),) for each shard
        """Each shard's payload, in place: nothing is copied."""
        assert buffer.dtype == torch.uint8 and buffer.shape == (self.size,)
        return tuple(buffer[start:stop] for start, stop in pairwise(self.offsets))
