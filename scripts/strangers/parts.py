"""What attacks are made of: many at a time, connections that are held, frames of the members' streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from strangers.target import Target


async def many(target: Target, one: Callable[[int], Awaitable[None]], width: int | None = None) -> None:
    """So many at a time, each again when it has ended."""
    target.begin()

    async def again(index: int) -> None:
        while True:
            with contextlib.suppress(Exception):
                await one(index)
            await asyncio.sleep(0.01)

    await asyncio.gather(*(again(index) for index in range(width or target.strength)))


async def held(
    where: tuple[str, int],
    first: bytes,
    then: Callable[[asyncio.StreamWriter], Awaitable[None]] | None = None,
) -> None:
    """A connection that is held until the other side ends it."""
    reader, writer = await asyncio.open_connection(*where)
    try:
        writer.write(first)
        talking = asyncio.ensure_future(then(writer)) if then else None
        try:
            while await reader.read(1 << 16):
                pass
        finally:
            if talking is not None:
                talking.cancel()
    finally:
        writer.close()


def framed(header: bytes, payload: bytes = b"") -> bytes:
    from tapestry.node.net.wire import frame_parts

    return b"".join(bytes(part) for part in frame_parts(header, [payload] if payload else ()))
