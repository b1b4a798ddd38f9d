"""libp2p's AutoNAT and relay: we ask as they read it, and take nothing they answer on trust."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tapestry.dht.p2pd import SwarmError
from tapestry.dht.reachability import (
    HOP,
    MESSAGE_BYTES_MAX,
    NotCarried,
    Reservation,
    can_dial_us,
    dial_request,
    dial_verdict,
    reservation,
    reserve,
)

ID = "12D3KooWFAQWzWY2n8KUGGaXykyzafrNgSCsfTmabDmNUZkDoTn5"
# From a p2pd 0.5.0 (go-libp2p 0.32): a dial that failed, a default relay's place, and one with our bounds.
DIAL_FAILED = bytes.fromhex("08011a0f0864120b6469616c206661696c6564")
PLACE = b"\x08\x02\x1a\x06\x08\xe6\x80\xb0\xd8\x06"
SMALL = PLACE + b"\x22\x06\x08\x78\x10\x80\x80\x08\x28\x64"
LARGE = PLACE + b"\x22\x09\x08\x88\x0e\x10\x80\x80\x80\x80\x10\x28\x64"


def test_a_dial_back_is_asked_for_as_libp2p_reads_it():
    packed = dial_request(ID, [f"/ip4/192.168.1.2/tcp/4001/p2p/{ID}", "/ip4/nonsense"])
    assert packed.startswith(b"\x08\x00\x12") and b"\x00\x24\x08\x01\x12\x20" in packed
    assert packed.endswith(b"\x12\x08\x04\xc0\xa8\x01\x02\x06\x0f\xa1")  # the bad one is left out


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (DIAL_FAILED, False),
        (b"\x08\x01\x1a\x02\x08\x00", True),
        (b"\x08\x01\x1a\x07\x1a\x05\x04\x01\x02\x03\x04", True),  # proto3 leaves out what is 0
        (b"\x08\x01\x1a\x02\x08\x65", None),  # refused: it dials no private address
        (b"\x08\x01", None),
    ],
)
def test_a_peer_says_whether_it_could_dial_us(answer: bytes, verdict: bool | None):
    assert dial_verdict(answer) is verdict


def test_a_place_has_its_bounds_and_a_relay_of_a_few_bytes_is_none():
    assert reservation(LARGE) == Reservation(1795948646.0, bytes_max=1 << 32, duration_s=1800)
    assert reservation(PLACE + b"\x28\x64").bytes_max == 0  # it has no limit
    with pytest.raises(NotCarried, match="carries 131072 bytes"):
        reservation(SMALL)
    with pytest.raises(NotCarried, match="status 201"):
        reservation(b"\x08\x02\x28\xc9\x01")


@pytest.mark.parametrize(
    "answer", [b"\x08", b"\x1a\x7f\x00", b"\x0b", b"\xff" * 20, b"\x1a\x02\x08\x80", LARGE[:-3], b"\x28\x80"]
)
def test_a_torn_answer_is_an_error_of_the_peer(answer: bytes):
    for read in (dial_verdict, reservation):
        try:
            read(answer)
        except SwarmError:
            continue


class Stream:
    """A peer that answers with these bytes."""

    def __init__(self, answer: bytes) -> None:
        self.reader = asyncio.StreamReader()
        self.reader.feed_data(answer)
        self.reader.feed_eof()
        self.written = b""
        self.closed = False
        self.asked: tuple[str, str] = ("", "")

    async def open(self, peer: str, protocol: str, timeout_s: float) -> Any:
        self.asked = peer, protocol
        return self.reader, self

    def write(self, data: bytes) -> None:
        self.written += data

    async def drain(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def test_a_place_is_asked_for_in_two_bytes_and_the_stream_is_closed():
    async def main() -> None:
        stream = Stream(bytes([len(LARGE)]) + LARGE)
        assert (await reserve(stream.open, ID, 1.0)).duration_s == 1800
        assert stream.written == b"\x02\x08\x00" and stream.closed and stream.asked == (ID, HOP)

    asyncio.run(main())


@pytest.mark.parametrize(
    "answer", [b"", b"\x13\x08", b"\xff\xff\xff\xff", b"\x80\x80\x04" + bytes(MESSAGE_BYTES_MAX)]
)
def test_an_answer_that_is_cut_or_too_long_is_refused_before_it_is_read(answer: bytes):
    async def main() -> None:
        stream = Stream(answer)
        with pytest.raises(SwarmError):
            await can_dial_us(stream.open, ID, ID, [], 1.0)
        assert stream.closed

    asyncio.run(main())
