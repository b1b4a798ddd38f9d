"""The node's bandwidth caps: one budget per direction, shared by all its streams.

Bulk (contributions, results, state) takes a turn for every piece, in the order of asking: with several peers
each gets a piece in its turn, and who does not ask, because its peer takes nothing, holds nobody up. Control
only spends. bucket.py has the arithmetic; here are the clock and the queue.

What is counted is what we write on streams and read from them: frames, headers included. Not counted: what
libp2p (Noise, yamux), TCP and IP put around it, and p2pd's own talk (DHT, pings, identify).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tapestry.node.net.bucket import Bucket

SLEEP_MIN_S = 0.001  # uvloop's timers count milliseconds, and round


class Throttle:
    """One direction. Without a rate, everything passes."""

    def __init__(
        self,
        bytes_per_second: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.bytes_per_second = bytes_per_second
        self._clock = clock
        self._sleep = sleep
        self._bucket = None if bytes_per_second is None else Bucket(bytes_per_second, clock())
        self._turn = asyncio.Lock()  # first come, first served

    async def take(self, count: int) -> int:
        """Wait for a turn and for room. How many of these `count` bytes may pass now: one piece."""
        bucket = self._bucket
        if bucket is None:
            return count
        count = min(count, bucket.piece_bytes)
        async with self._turn:
            while wait_s := bucket.wait_s(count, self._clock()):  # again: control may have spent meanwhile
                await self._sleep(max(wait_s, SLEEP_MIN_S))
            bucket.spend(count, self._clock())
        return count

    def spend(self, count: int) -> None:
        """`count` bytes pass without waiting. Bulk will wait for them."""
        if self._bucket is not None:
            self._bucket.spend(count, self._clock())


@dataclass(frozen=True, slots=True)
class Throttles:
    """Of one node, for as long as its process lives."""

    upload: Throttle = field(default_factory=Throttle)
    download: Throttle = field(default_factory=Throttle)
