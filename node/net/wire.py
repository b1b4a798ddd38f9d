"""Frames on a stream. Every length is checked before anything is allocated.

A frame is two big-endian u32 (header length, payload length), a msgpack header, and raw payload bytes.
Control messages have no payload; a shard or result carries a compression frame as its payload, which is read
into one buffer and never copied again. What headers say is in net/vocabulary.py.

Imports asyncio, msgpack and net/throttle.py; no hivemind.
"""

from __future__ import annotations

import asyncio
import functools
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
from typing_extensions import Buffer

from tapestry.node.net.throttle import Throttle

FRAME = struct.Struct(">II")
WRITE_BYTES = 1 << 18  # Guess: written at once before the peer's pace is heeded
READ_BYTES = 1 << 18  # Guess: what a stream's buffer holds (dht/streams.py); more comes in pieces anyway


class RemoteProtocolError(Exception):
    """A peer said what it may not say. `reason` is a short word for counters."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class StreamEnded(Exception):
    """The stream ended: between frames (`clean`) or in the middle of one."""

    def __init__(self, clean: bool) -> None:
        super().__init__("ended" if clean else "ended in the middle of a frame")
        self.clean = clean


@dataclass(frozen=True, slots=True)
class FrameLimits:
    header_bytes_max: int
    payload_bytes_max: int
    bytes_per_second_min: float | None = None  # of a frame that has begun; None: whoever waits sees to it
    throttle: Throttle | None = None  # payloads wait for it; the rest only counts
    # How far a payload may fall behind that speed at any moment; None: only how long all of it takes counts.
    behind_s: float | None = None


async def read_frame(
    reader: asyncio.StreamReader,
    limits: FrameLimits,
    start_s: float | None,
    silence_s: float,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[bytes, bytearray]:
    """The next frame: header, payload.

    `start_s` bounds the wait for the frame's first byte (None: as long as the stream lives), `silence_s`
    every silence after it, and `limits` how long drops may make an ocean; `on_bytes` hears of every piece
    that came. What we wait for our own throttle is held against nobody. Raises StreamEnded,
    RemoteProtocolError and TimeoutError.
    """
    header, payload_bytes = await read_header(reader, limits, start_s, silence_s, on_bytes)
    return header, await read_payload(reader, payload_bytes, limits, silence_s, on_bytes)


async def read_header(
    reader: asyncio.StreamReader,
    limits: FrameLimits,
    start_s: float | None,
    silence_s: float,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[bytes, int]:
    """The next frame's header, and how many bytes of payload follow it. As read_frame."""
    first = await _read_exactly(reader, 1, start_s, on_bytes, at_start=True)
    async with asyncio.timeout(silence_s):
        start = first + await _read_exactly(reader, FRAME.size - 1, None, on_bytes)
    header_bytes, payload_bytes = FRAME.unpack(start)
    if header_bytes > limits.header_bytes_max:
        raise RemoteProtocolError("oversized", f"a header of {header_bytes} bytes")
    if payload_bytes > limits.payload_bytes_max:
        raise RemoteProtocolError("oversized", f"a payload of {payload_bytes} bytes")
    async with asyncio.timeout(_slowest_s(header_bytes, limits, silence_s)):
        header = await _read_exactly(reader, header_bytes, silence_s, on_bytes)
    if limits.throttle is not None:
        limits.throttle.spend(FRAME.size + header_bytes)
    return bytes(header), payload_bytes


async def read_payload(
    reader: asyncio.StreamReader,
    payload_bytes: int,  # by read_header
    limits: FrameLimits,
    silence_s: float,
    on_bytes: Callable[[int], None] | None = None,
) -> bytearray:
    """The rest of a frame. As read_frame."""
    steadily = limits.behind_s is not None
    first_s = limits.behind_s if steadily else _slowest_s(payload_bytes, limits, silence_s)
    async with asyncio.timeout(first_s) as deadline:
        if steadily:
            on_bytes = functools.partial(_earn, limits, deadline, on_bytes)
        may_read = (
            functools.partial(_take, limits.throttle, deadline) if limits.throttle is not None else None
        )
        return await _read_exactly(reader, payload_bytes, silence_s, on_bytes, may_read=may_read)


def _slowest_s(count: int, limits: FrameLimits, silence_s: float) -> float | None:
    slowest = limits.bytes_per_second_min
    return silence_s + count / slowest if slowest else None


def frame_parts(header: bytes, payload: Sequence[Buffer] = ()) -> list[Buffer]:
    """What to write for a frame, unjoined."""
    payload_bytes = sum(memoryview(part).nbytes for part in payload)
    return [FRAME.pack(len(header), payload_bytes) + header, *payload]


@dataclass(frozen=True, slots=True)
class WriteLimits:
    """How a frame is written: within our cap, and as long as the peer takes it."""

    throttle: Throttle
    waits: bool  # for the throttle, as bulk does; control only spends
    patience_s: float  # for the peer to take a piece, or the whole frame
    whole_frame: bool = False


async def write_frame(
    writer: asyncio.StreamWriter,
    parts: Sequence[Buffer],  # of frame_parts
    limits: WriteLimits,
    on_bytes: Callable[[int], None],
) -> None:
    """Write a frame piece by piece; `on_bytes` hears of each that the peer took.

    What we wait for our own throttle is held against nobody. Raises TimeoutError, ConnectionResetError and
    whatever else the stream raises.
    """
    loop, left_s = asyncio.get_running_loop(), limits.patience_s
    for part in parts:
        view = memoryview(part).cast("B")
        while view.nbytes:
            count = min(view.nbytes, WRITE_BYTES)
            if limits.waits:
                count = await limits.throttle.take(count)
            else:
                limits.throttle.spend(count)
            if writer.is_closing():  # uvloop raises RuntimeError when such a one is written to
                raise ConnectionResetError("the stream broke")
            began_at = loop.time()
            writer.write(view[:count])
            async with asyncio.timeout(left_s):
                await writer.drain()
            if limits.whole_frame:
                left_s -= loop.time() - began_at
            on_bytes(count)
            view = view[count:]


def unpack(header: bytes) -> Any:
    """msgpack, strict. Raises RemoteProtocolError."""
    try:
        return msgpack.unpackb(header, raw=False, strict_map_key=True, use_list=False)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as e:
        raise RemoteProtocolError("malformed", f"not msgpack: {e}") from None


async def _read_exactly(
    reader: asyncio.StreamReader,
    size: int,
    timeout_s: float | None,
    on_bytes: Callable[[int], None] | None,
    at_start: bool = False,
    may_read: Callable[[int], Awaitable[int]] | None = None,
) -> bytearray:
    buffer = bytearray(size)
    view, have, room = memoryview(buffer), 0, 0
    while have < size:
        if not room:
            room = size - have if may_read is None else await may_read(size - have)
        async with asyncio.timeout(timeout_s):
            piece = await reader.read(min(room, READ_BYTES))
        if not piece:
            raise StreamEnded(clean=at_start and have == 0)
        view[have : have + len(piece)] = piece
        have += len(piece)
        room -= len(piece)
        if on_bytes is not None:
            on_bytes(len(piece))
    return buffer


def _earn(
    limits: FrameLimits, deadline: asyncio.Timeout, on_bytes: Callable[[int], None] | None, count: int
) -> None:
    """What came moves the frame's deadline by the time that it may take at the least speed."""
    due = deadline.when()
    if due is not None and limits.bytes_per_second_min is not None:
        deadline.reschedule(due + count / limits.bytes_per_second_min)
    if on_bytes is not None:
        on_bytes(count)


async def _take(throttle: Throttle, deadline: asyncio.Timeout, count: int) -> int:
    """How many bytes may be read now. The frame's deadline moves by what we waited: that was us."""
    due, loop = deadline.when(), asyncio.get_running_loop()
    if due is None:
        return await throttle.take(count)
    began_at = loop.time()
    deadline.reschedule(None)
    try:
        return await throttle.take(count)
    finally:
        deadline.reschedule(due + loop.time() - began_at)
