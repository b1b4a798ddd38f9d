"""Frames: lengths are checked before anything is allocated, and silence has a limit."""

import asyncio

import pytest

from tapestry.node.net.throttle import Throttle
from tapestry.node.net.wire import (
    FRAME,
    WRITE_BYTES,
    FrameLimits,
    RemoteProtocolError,
    StreamEnded,
    WriteLimits,
    frame_parts,
    read_frame,
    write_frame,
)

LIMITS = FrameLimits(header_bytes_max=100, payload_bytes_max=1000)


def read(data: bytes, *, end: bool = True, start_s: float | None = None) -> tuple[bytes, bytearray]:
    async def run() -> tuple[bytes, bytearray]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        if end:
            reader.feed_eof()
        return await read_frame(reader, LIMITS, start_s, 0.01)

    return asyncio.run(run())


def test_a_frame_is_read_back():
    data = b"".join(frame_parts(b"header", [b"pay", b"load"]))
    assert read(data) == (b"header", bytearray(b"payload"))


def test_every_truncation_of_a_frame_is_an_end_and_only_the_empty_one_is_clean():
    data = b"".join(frame_parts(b"header", [b"payload"]))
    for length in range(len(data)):
        with pytest.raises(StreamEnded) as ended:
            read(data[:length])
        assert ended.value.clean == (length == 0)


@pytest.mark.parametrize("lengths", [(101, 0), (0, 1001), (2**32 - 1, 0), (0, 2**32 - 1)])
def test_an_oversized_frame_is_refused_by_its_first_eight_bytes(lengths):
    with pytest.raises(RemoteProtocolError) as refused:
        read(FRAME.pack(*lengths), end=False)
    assert refused.value.reason == "oversized"


def test_silence_inside_a_frame_times_out():
    with pytest.raises(TimeoutError):
        read(FRAME.pack(10, 0) + b"half", end=False)


def test_silence_before_a_frame_times_out_only_if_asked():
    with pytest.raises(TimeoutError):
        read(b"", end=False, start_s=0.01)


def test_silence_after_the_first_byte_times_out_even_if_the_wait_for_it_has_no_end():
    with pytest.raises(TimeoutError):
        read(b"\0", end=False)


def test_a_frame_that_comes_in_drops_has_an_end():
    async def run() -> None:
        reader = asyncio.StreamReader()
        limits = FrameLimits(100, 1000, bytes_per_second_min=1e6)
        reader.feed_data(FRAME.pack(0, 1000))

        async def drip() -> None:
            while True:
                reader.feed_data(b"x")
                await asyncio.sleep(0)

        dripping = asyncio.create_task(drip())
        try:
            await read_frame(reader, limits, None, 0.0)
        finally:
            dripping.cancel()

    with pytest.raises(TimeoutError):
        asyncio.run(run())


@pytest.mark.parametrize("steadily", [True, False])
def test_a_payload_may_take_as_long_as_it_comes_steadily_and_not_fall_behind(steadily):
    """At 1000 bytes a second all of it may take 1.5 s here, and what stops after a byte has half a second."""

    async def run() -> float:
        reader = asyncio.StreamReader()
        limits = FrameLimits(100, 1000, bytes_per_second_min=1000.0, behind_s=0.5)
        reader.feed_data(FRAME.pack(0, 1000) + b"x")
        loop = asyncio.get_running_loop()
        began_at = loop.time()

        async def feed() -> None:
            for _ in range(20):
                await asyncio.sleep(0.03)
                reader.feed_data(bytes(50))

        feeding = asyncio.create_task(feed()) if steadily else None
        try:
            await read_frame(reader, limits, None, 5.0)
        except TimeoutError:
            assert not steadily
        if feeding is not None:
            await feeding
        return loop.time() - began_at

    took_s = asyncio.run(run())
    assert took_s > 0.5 and (steadily or took_s < 1.5)


def test_progress_is_told_for_every_byte():
    counts = []

    async def run() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(b"".join(frame_parts(b"header", [b"payload"])))
        await read_frame(reader, LIMITS, None, 1.0, counts.append)

    asyncio.run(run())
    assert sum(counts) == FRAME.size + 6 + 7


class FakeWriter:
    """Takes what is written, at once or never."""

    def __init__(self, takes: bool = True, closing: bool = False) -> None:
        self.written, self.takes, self.closing = b"", takes, closing

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: memoryview) -> None:
        self.written += bytes(data)

    async def drain(self) -> None:
        if not self.takes:
            await asyncio.get_running_loop().create_future()


def written(writer: FakeWriter, waits: bool = True) -> list[int]:
    """The pieces of a frame with a payload of two pieces and a byte."""
    pieces: list[int] = []
    parts = frame_parts(b"header", [bytes(2 * WRITE_BYTES), memoryview(b"x")])
    limits = WriteLimits(Throttle(), waits, patience_s=0.01)
    asyncio.run(write_frame(writer, parts, limits, pieces.append))  # type: ignore[arg-type]
    return pieces


@pytest.mark.parametrize("waits", [True, False])
def test_a_frame_is_written_in_pieces_and_each_is_counted(waits):
    writer = FakeWriter()
    assert written(writer, waits) == [FRAME.size + 6, WRITE_BYTES, WRITE_BYTES, 1]
    assert writer.written == FRAME.pack(6, 2 * WRITE_BYTES + 1) + b"header" + bytes(2 * WRITE_BYTES) + b"x"


def test_a_peer_that_takes_nothing_is_waited_for_only_so_long():
    with pytest.raises(TimeoutError):
        written(FakeWriter(takes=False))


def test_nothing_is_written_to_a_stream_that_is_closing():
    writer = FakeWriter(closing=True)
    with pytest.raises(ConnectionResetError):
        written(writer)
    assert writer.written == b""
