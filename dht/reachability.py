"""Two of libp2p's own protocols, spoken over p2pd's streams: be called back, and be carried.

- AutoNAT 1 (libp2p specs, autonat): a peer dials us, on a connection of its own, at the ports that we name
  and the address it sees us at, and says whether it got through.
- Circuit relay 2 (specs, relay/circuit-v2): a peer that others reach keeps a place for us, and hands on the
  connections that they open to `<its address>/p2p/<its id>/p2p-circuit/p2p/<our id>`. The place is lost with
  the connection that asked for it. What is carried is encrypted between the two ends.

p2pd can do both by itself, but asks only peers that it was started with, takes minutes, and tells us nothing.
It answers AutoNAT, and takes in what a relay hands on. Its own relay is of no use: it takes all the world as
guests, and under load it starts with its default of 128 KiB whatever it was told. So relay.py of the node
answers in its place, with what is here.

The messages are protobuf behind a length; of their fields only those are read that are needed here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import base58
import multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from tapestry.dht.p2pd import SwarmError

AUTONAT = "/libp2p/autonat/1.0.0"
HOP = "/libp2p/circuit/relay/0.2.0/hop"
MESSAGE_BYTES_MAX = 8192  # Guess: a reservation has 300 bytes, and at most 1,000 more of addresses
STOP = "/libp2p/circuit/relay/0.2.0/stop"  # from the relay to its guest
# A p2pd alone is a relay of 128 KiB: too few to take part in a run.
RELAYED_BYTES_MIN = 1 << 30
# The relay's Status:
OK, PLACE_REFUSED, TOO_MANY, DENIED, NOT_REACHED, NO_PLACE, MALFORMED = 100, 200, 201, 202, 203, 204, 400
RESERVING, CONNECTING = 0, 1  # of the hop protocol's Type
_DIAL_OK, _DIAL_FAILED = 0, 100  # of AutoNAT's ResponseStatus
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

OpenStream = Callable[[str, str, float], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
Fields = list[tuple[int, int | bytes]]  # (number, value), in their order


class NotCarried(SwarmError):
    """A peer keeps no place for us; the text says why. `is_final`: nor will it soon, for we are linked."""

    def __init__(self, text: str, is_final: bool = True) -> None:
        super().__init__(text)
        self.is_final = is_final


@dataclass(frozen=True, slots=True)
class Reservation:
    """A place at a relay."""

    expires_at: float  # seconds since 1970, by the relay's clock
    bytes_max: int  # of one connection, each way; 0: it has no limit
    duration_s: int  # of one connection; 0: it has no limit


async def can_dial_us(
    open_stream: OpenStream, peer: str, own_id: str, addresses: Sequence[str], timeout_s: float
) -> bool | None:
    """Whether `peer` can dial us at the ports of our addresses; None: it does not say. Raises SwarmError."""
    answer = await _ask(open_stream, peer, AUTONAT, dial_request(own_id, addresses), timeout_s)
    return dial_verdict(answer)


async def reserve(open_stream: OpenStream, relay: str, timeout_s: float) -> Reservation:
    """Ask for a place, or to keep the one we have. Raises NotCarried, SwarmError."""
    return reservation(await _ask(open_stream, relay, HOP, RESERVE, timeout_s))


async def _ask(open_stream: OpenStream, peer: str, protocol: str, message: bytes, timeout_s: float) -> bytes:
    reader, writer = await open_stream(peer, protocol, timeout_s)
    try:
        async with asyncio.timeout(timeout_s):
            return await exchange(reader, writer, message)
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise SwarmError(f"peer {peer[-8:]} does not answer on {protocol}: {error!r}") from error
    finally:
        writer.close()


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: bytes) -> bytes:
    """One message there and one back. Raises SwarmError, OSError, IncompleteReadError."""
    await write_message(writer, message)
    return await read_message(reader)


async def write_message(writer: asyncio.StreamWriter, message: bytes) -> None:
    """Raises OSError."""
    writer.write(_varint(len(message)) + message)
    await writer.drain()


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """Raises SwarmError where it is too long, OSError, IncompleteReadError."""
    length = shift = 0
    while shift < 21:
        byte = (await reader.readexactly(1))[0]
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80 and length <= MESSAGE_BYTES_MAX:
            return await reader.readexactly(length)
    raise SwarmError("an answer of libp2p is longer than any")


# --- the messages -----------------------------------------------------------------------------------


def dial_request(own_id: str, addresses: Sequence[str]) -> bytes:
    """Message{type: DIAL, dial: {peer: {id, addrs}}}; addresses that cannot be packed are left out."""
    peer = _field(1, base58.b58decode(own_id))
    for address in addresses:
        with contextlib.suppress(MultiaddrError):
            peer += _field(2, multiaddr.Multiaddr(address.removesuffix(f"/p2p/{own_id}")).to_bytes())
    return b"\x08\x00" + _field(2, _field(1, peer))


def dial_verdict(answer: bytes) -> bool | None:
    """Of Message{type: DIAL_RESPONSE, dialResponse: {status, ...}}. Raises SwarmError."""
    response = _last(_fields(answer), 3, b"")
    status = _last(_fields(response), 1, _DIAL_OK) if isinstance(response, bytes) and response else None
    return {_DIAL_OK: True, _DIAL_FAILED: False}.get(status) if isinstance(status, int) else None


RESERVE = b"\x08\x00"  # HopMessage{type: RESERVE}


def reservation(answer: bytes) -> Reservation:
    """Of HopMessage{type: STATUS, reservation: {expire}, limit: {duration, data}, status}.

    Raises NotCarried, also where a connection could carry less than RELAYED_BYTES_MIN; SwarmError.
    """
    fields = _fields(answer)
    status = _number(fields, 5)
    if status != OK:
        raise NotCarried(f"it keeps no place for us, status {status}", is_final=status != DENIED)
    place, limit = _last(fields, 3, b""), _last(fields, 4, b"")
    if not isinstance(place, bytes) or not isinstance(limit, bytes):
        raise SwarmError("an answer of libp2p is none")
    bounds = _fields(limit)
    kept = Reservation(
        float(_number(_fields(place), 1)), bytes_max=_number(bounds, 2), duration_s=_number(bounds, 1)
    )
    if 0 < kept.bytes_max < RELAYED_BYTES_MIN:
        raise NotCarried(f"it carries {kept.bytes_max} bytes of a connection, and no more")
    return kept


def hop_request(message: bytes) -> tuple[int, str]:
    """What is asked of a relay: its type, and the peer that it names, "" if none. Raises SwarmError."""
    fields = _fields(message)
    peer = _last(fields, 2, b"")
    named = _last(_fields(peer), 1, b"") if isinstance(peer, bytes) else b""
    if not isinstance(named, bytes) or len(named) > 64:
        raise SwarmError("a request to the relay names no peer")
    return _number(fields, 1), base58.b58encode(named).decode()


def hop_answer(status: int, expires_at: float | None = None) -> bytes:
    """HopMessage{type: STATUS, reservation: {expire}, status}; it names no limit."""
    place = b"" if expires_at is None else _field(3, b"\x08" + _varint(int(expires_at)))
    return b"\x08\x02" + place + b"\x28" + _varint(status)


def stop_request(caller: str) -> bytes:
    """StopMessage{type: CONNECT, peer: {id}}."""
    return b"\x08\x00" + _field(2, _field(1, base58.b58decode(caller)))


def stop_status(answer: bytes) -> int:
    """Of StopMessage{type: STATUS, status}. Raises SwarmError."""
    return _number(_fields(answer), 4)


def _number(fields: Fields, number: int) -> int:
    value = _last(fields, number, 0)
    return value if isinstance(value, int) else 0


def _last(fields: Fields, number: int, default: int | bytes) -> int | bytes:
    """As protobuf has it: of a field that comes twice the last counts."""
    return next((value for n, value in reversed(fields) if n == number), default)


def _fields(message: bytes) -> Fields:
    """Raises SwarmError."""
    try:
        return list(_parsed(message))
    except IndexError:
        raise SwarmError("an answer of libp2p is torn") from None


def _parsed(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _read_varint(message, at)
            yield key >> 3, value
            continue
        length, at = _read_varint(message, at) if kind == _BYTES else (_length_of(kind), at)
        if at + length > len(message):
            raise IndexError
        yield key >> 3, message[at : at + length]
        at += length


def _length_of(kind: int) -> int:
    if kind not in (_FIXED32, _FIXED64):
        raise SwarmError("an answer of libp2p is no protobuf")
    return 4 if kind == _FIXED32 else 8


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """Raises IndexError where the message ends, SwarmError."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise SwarmError("an answer of libp2p is no protobuf")


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])
