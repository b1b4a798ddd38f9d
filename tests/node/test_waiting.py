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
        async with places.place(peer, self, not peer.endswith("!")):  # type: ignore[arg-type]
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


def places(streams_max: int, held_s: float = 60.0, beside_max: int = 0) -> WaitingPlaces:
    return WaitingPlaces(streams_max, held_s, lambda peer: peer.startswith("m"), beside_max)


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


def test_who_had_its_time_goes_on_beside_the_places_if_there_is_room_and_else_leaves() -> None:
    async def main() -> None:
        seen: list[str] = []
        one = places(1, held_s=0.1, beside_max=1)
        first, second, third = await coming(one, seen, "m1", "m2", "m3")
        await second.task
        await asyncio.sleep(0.02)
        assert seen == ["m1", "m2", "m3", "m2 left"] or seen == ["m1", "m2", "m2 left", "m3"]
        first.close()
        await first.task
        (fourth,) = await coming(one, seen, "m4")
        await asyncio.sleep(0.2)
        assert seen[-1] == "m4" and "m3 left" not in seen, "there is room again"
        for stream in (third, fourth):
            stream.close()
            await stream.task
        assert not one._beside and not one._held

    run(main())


def test_a_newcomer_beside_the_places_leaves_that_room_to_a_member() -> None:
    async def main() -> None:
        seen: list[str] = []
        one = places(1, held_s=0.1, beside_max=1)
        newcomer, other = await coming(one, seen, "n1", "n2")
        await asyncio.sleep(0.2)
        assert seen == ["n1", "n2"], "both go on"
        other.close()
        await other.task
        first, second = await coming(one, seen, "m1", "m2")
        await newcomer.task
        await asyncio.sleep(0.05)
        assert seen[3] == "m1" and sorted(seen[4:]) == ["m2", "n1 left"], "m1 goes on as well"
        for stream in (first, second):
            stream.close()
            await stream.task

    run(main())


def test_who_may_not_go_on_leaves_after_its_time_though_there_is_room() -> None:
    async def main() -> None:
        seen: list[str] = []
        first, second = await coming(places(1, held_s=0.1, beside_max=1), seen, "m1!", "m2")
        await first.task
        await asyncio.sleep(0.02)
        assert sorted(seen[1:]) == ["m1! left", "m2"]
        second.close()
        await second.task

    run(main())
