"""Turns at a cap: who asks first goes first, control passes by, who leaves the queue takes nothing along."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tapestry.node.net.throttle import Throttle
from tapestry.node.net.wire import FRAME, FrameLimits, frame_parts, read_frame

RATE = 2.5e6
PIECE = 50_000
BURST = 250_000


class Clock:
    """Time that passes only in sleep."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.now += seconds


def throttled(main: Callable[[Throttle, Clock], Coroutine[Any, Any, None]]) -> None:
    async def within_time() -> None:
        clock = Clock()
        async with asyncio.timeout(10):
            await main(Throttle(RATE, clock, clock.sleep), clock)

    asyncio.run(within_time())


async def took(throttle: Throttle, count: int) -> int:
    """Pieces that `count` bytes needed."""
    pieces = 0
    while count:
        count -= await throttle.take(count)
        pieces += 1
    return pieces


def test_without_a_rate_everything_passes_at_once():
    assert asyncio.run(Throttle().take(1 << 30)) == 1 << 30


def test_what_is_taken_takes_its_time():
    async def main(throttle: Throttle, clock: Clock) -> None:
        assert await took(throttle, 5_000_000) == 100
        assert clock.now == pytest.approx((5_000_000 - BURST) / RATE, rel=0.01)

    throttled(main)


def test_writers_take_turns_whatever_they_have_to_send():
    async def main(throttle: Throttle, clock: Clock) -> None:
        await took(throttle, BURST)
        taken: dict[str, int] = {"a": 0, "b": 0, "c": 0}

        async def writer(name: str, size: int) -> None:
            for _ in range(20):
                taken[name] += await throttle.take(size)

        writers = [asyncio.create_task(writer(name, 10 * PIECE)) for name in taken]
        while not any(task.done() for task in writers):
            await asyncio.sleep(0)
            assert max(taken.values()) - min(taken.values()) <= PIECE
        await asyncio.wait(writers)

    throttled(main)


def test_control_never_waits_and_bulk_waits_for_it():
    async def main(throttle: Throttle, clock: Clock) -> None:
        await took(throttle, BURST)
        waiting = asyncio.create_task(throttle.take(PIECE))
        await asyncio.sleep(0)
        throttle.spend(2_500_000)  # while a piece waits
        assert clock.now == 0
        await waiting
        assert clock.now == pytest.approx(1.0 + PIECE / RATE, rel=0.01)

    throttled(main)


def test_who_leaves_the_queue_takes_nothing_with_it():
    async def main(throttle: Throttle, clock: Clock) -> None:
        await took(throttle, BURST)
        queue = [asyncio.create_task(throttle.take(PIECE)) for _ in range(10)]
        await asyncio.sleep(0)
        for task in queue[:9]:
            task.cancel()
        await queue[9]
        assert clock.now <= 2 * PIECE / RATE

    throttled(main)


def test_waiting_for_our_own_throttle_is_not_the_peers_silence():
    """A frame that is there already, at a cap a thousand times below what we demand of a peer."""

    async def main() -> None:
        throttle = Throttle(100_000.0)
        await took(throttle, 10_000)
        reader = asyncio.StreamReader()
        reader.feed_data(b"".join(frame_parts(b"header", [bytes(20_000)])))
        limits = FrameLimits(100, 20_000, bytes_per_second_min=1e8, throttle=throttle)
        began_at = asyncio.get_running_loop().time()
        header, payload = await read_frame(reader, limits, None, 0.02)
        assert (header, len(payload)) == (b"header", 20_000)
        assert asyncio.get_running_loop().time() - began_at > 0.1

    asyncio.run(main())


def test_silence_under_a_throttle_times_out_all_the_same():
    async def main() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(FRAME.pack(0, 1000) + bytes(500))
        with pytest.raises(TimeoutError):
            await read_frame(reader, FrameLimits(100, 1000, 1e6, Throttle(RATE)), None, 0.01)

    asyncio.run(main())


def test_a_control_frame_is_counted_and_not_delayed():
    async def main() -> None:
        clock = Clock()
        throttle = Throttle(RATE, clock, clock.sleep)
        await took(throttle, BURST)
        reader = asyncio.StreamReader()
        reader.feed_data(b"".join(frame_parts(bytes(25_000 - FRAME.size))))
        await read_frame(reader, FrameLimits(25_000, 0, None, throttle), None, 1.0)
        assert clock.now == 0
        await throttle.take(1)
        assert clock.now == pytest.approx(0.01, rel=0.15)

    asyncio.run(main())
