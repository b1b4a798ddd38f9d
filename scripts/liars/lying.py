"""What several liars are made of."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import Tensor

from tapestry.node.daemon.averaging import Averaging

Contribution = tuple[Tensor, ...]  # encoded, uint8, one per shard


def now() -> bool:
    """Whether to lie."""
    path = os.environ.get("LIE_WHILE")
    return path is None or os.path.exists(path)


def contributes(change: Callable[[Averaging, Contribution], Contribution]) -> None:
    """Everything that this member contributes is what `change` makes of what it trained."""
    honest = Averaging.take

    def take(self: Averaging, buffer: Tensor, copy: bool) -> Contribution:
        taken = honest(self, buffer, copy)
        return change(self, taken) if now() else taken

    Averaging.take = take  # type: ignore[method-assign]


def contributes_times(factor: float) -> None:
    """Its own numbers, so many times as large."""

    def change(averaging: Averaging, taken: Contribution) -> Contribution:
        codec, shards = averaging.codec, averaging.shards
        return tuple(
            codec.encode(factor * codec.decode(payload, shard.n))
            for shard, payload in zip(shards, taken, strict=True)
        )

    contributes(change)
