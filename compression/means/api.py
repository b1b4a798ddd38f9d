"""What a mean is: the checked contributions of a shard -> its pieces, one after another.

A mean may look at the whole shard as often as it needs (norms, say) before it gives the first piece, and it
holds a few pieces at a time, never the shard. What it gives is a function of the weights and the payloads, in
roster order; every operation on vectors is elementwise and rounded by itself, every sum has a fixed order.

Must not import: anything outside this package of ours; asyncio; anything that does I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tapestry.compression.codecs import OpenPayload

GivePiece = Callable[[int, Tensor], None]  # (index, f32 (stop - start,) to be written)


@dataclass(frozen=True, slots=True)
class Contribution:
    """One member's payload of the shard, checked."""

    payload: OpenPayload
    weight: int  # >= 0
    share: float  # weight / total, correctly rounded


class Mean(Protocol):
    """Pure; may be used from several threads at once."""

    def over(
        self,
        contributions: Sequence[Contribution],  # in roster order; at least one weighs something
        spans: Sequence[tuple[int, int]],  # start and stop of each piece of the shard
    ) -> GivePiece:
        """Look at the contributions; give what writes a piece of the result. It may be asked in any order.

        Sums of finite values may pass the largest f32: whoever asks checks the piece.
        """
