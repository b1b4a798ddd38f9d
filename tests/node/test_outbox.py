"""What waits to be sent to a peer has an end, nothing waits twice, and fast lines are told from slow ones."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from tapestry.node.net.outbox import WIDEN_BYTES_PER_S, WIDEN_S, Bulk, Outbox, OutboxLimits

LIMITS = OutboxLimits(control_frames_max=3, control_bytes_max=100, bulk_frames_max=2)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 5.0))


def shard(name: bytes, size: int = 1) -> Bulk:
    return Bulk(name, "contribution", [bytes(size)])


def test_messages_come_in_order_and_are_bounded_in_count_and_bytes() -> None:
    async def main() -> None:
        box = Outbox(LIMITS)
        assert box.put_control(b"1" * 60) and not box.put_control(b"2" * 41) and box.put_control(b"3" * 40)
        assert await box.next_control() == b"1" * 60
        assert box.put_control(b"4" * 60), "what was taken makes room"
        box.put_farewell()
        assert not box.put_control(b"5"), "there are three"
        assert [await box.next_control() for _ in range(3)] == [b"3" * 40, b"4" * 60, None]
        assert box.put_control(b"6" * 100)

    run(main())


def test_the_same_bulk_waits_once_and_again_when_it_was_written() -> None:
    async def main() -> None:
        box = Outbox(LIMITS)
        assert [box.put_bulk(shard(name), 0.0) for name in (b"a", b"b", b"a", b"c")] == [
            True,
            True,
            True,
            False,
        ]
        first = await box.next_bulk()
        assert first.header == b"a" and box.put_bulk(shard(b"a"), 0.0)
        assert box.put_bulk(shard(b"c"), 0.0), "the one that is being written was not queued again"
        box.drop_bulk()
        box.wrote(first)
        assert box.put_bulk(shard(b"d"), 0.0) and (await box.next_bulk()).header == b"d"

    run(main())


@pytest.mark.parametrize(
    ("waited_s", "bytes_per_s", "waits", "is_behind"),
    [
        (2 * WIDEN_S, 2 * WIDEN_BYTES_PER_S, True, True),
        (WIDEN_S / 2, 2 * WIDEN_BYTES_PER_S, True, False),
        (2 * WIDEN_S, WIDEN_BYTES_PER_S / 2, True, False),
        (2 * WIDEN_S, 2 * WIDEN_BYTES_PER_S, False, False),
    ],
)
def test_another_stream_helps_where_bulk_waits_for_long_on_a_fast_line(
    waited_s: float, bytes_per_s: float, waits: bool, is_behind: bool
) -> None:
    async def main() -> None:
        box = Outbox(LIMITS)
        for bulk in (shard(b"a", int(waited_s * bytes_per_s)), shard(b"b"))[: 1 + waits]:
            box.put_bulk(bulk, 10.0)
        first = await box.next_bulk()
        box.begin(10.0)
        box.wrote(first)
        box.put_bulk(shard(b"c"), 10.0)
        await box.next_bulk()
        box.begin(10.0 + waited_s)
        assert box.behind.is_set() is is_behind
        box.widened(10.0 + waited_s)
        assert not box.behind.is_set()

    run(main())
