"""Who waits for a place gets it: members first, then by their coming, and whoever holds one too long goes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

from tapestry.node.net.waiting import WaitingPlaces


class Stream(SimpleNamespace):
    """A peer's, which holds its place until it is let go or closed."""

    def __init__(self, peer: str, places: WaitingPlaces, seen: list[str]) -> None:
        super().__init__()
        self.done = asyncio.Event()
        self.task = asyncio.get_running_loop().create_task(self._hold(peer, places, seen))

    __hash__ = object.__hash__  # type: ignore[assignment]

    def close(self) -> None:
        self.done.set()

    async def _hold(self, peer: str, places: WaitingPlaces, seen: list[str]) -> None:
        async with places.place(peer, self):  # type: ignore[arg-type]
            seen.append(peer)
            await self.done.wait()
        seen.append(f"{peer} left")


async def coming(places: WaitingPlaces, seen: list[str], *peers: str) -> list[Stream]:
    streams = []
    for peer in peers:
        streams.append(Stream(peer, places, seen))
        await asyncio.sleep(0.01)
    return streams


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 10.0))


def places(streams_max: int, held_s: float = 60.0) -> WaitingPlaces:
    return WaitingPlaces(streams_max, held_s, lambda peer: peer.startswith("m"))


def test_those_that_wait_come_in_the_order_of_their_coming() -> None:
    async def main() -> None:
        seen: list[str] = []
        streams = await coming(places(1), seen, "m1", "m2", "m3")
        for stream in streams:
            stream.close()
            await stream.task
        assert seen == ["m1", "m1 left", "m2", "m2 left", "m3", "m3 left"]

    run(main())


def test_a_member_waits_for_no_newcomer_and_goes_before_those_that_wait() -> None:
    async def main() -> None:
        seen: list[str] = []
        streams = await coming(places(1), seen, "n1", "n2", "m1", "m2")
        assert seen == ["n1", "m1", "n1 left"]
        for stream in (streams[2], streams[3], streams[1]):
            stream.close()
            await stream.task
        assert seen[3:] == ["m1 left", "m2", "m2 left", "n2", "n2 left"]

    run(main())


def test_who_holds_a_place_too_long_leaves_it_to_who_waits_and_else_keeps_it() -> None:
    async def main() -> None:
        seen: list[str] = []
        one = places(1, held_s=0.1)
        (first,) = await coming(one, seen, "m1")
        await asyncio.sleep(0.2)
        assert seen == ["m1"]
        (newcomer,) = await coming(one, seen, "n1")
        await asyncio.sleep(0.2)
        assert seen == ["m1"], "a newcomer makes no member leave"
        (second,) = await coming(one, seen, "m2")
        await first.task
        assert sorted(seen) == ["m1", "m1 left", "m2"]
        for stream in (second, newcomer):
            stream.close()
            await stream.task

    run(main())


def test_who_gives_up_waiting_takes_no_place() -> None:
    async def main() -> None:
        seen: list[str] = []
        first, second, third = await coming(places(1), seen, "m1", "m2", "m3")
        second.task.cancel()
        first.close()
        third.close()
        await third.task
        assert seen == ["m1", "m1 left", "m3", "m3 left"]

    run(main())
