"""The presence record: who lives, where, and how far; short-lived and signed by the peer it speaks of.

Pure: no clock, no I/O, no libp2p; the standard library and msgpack only. `node/protocol` may import it.

On the wire a record is one msgpack array [1, run id, peer id, epoch, head, phase, addresses, issued at,
expires at, signature]. There is exactly one encoding of a record: whatever does not come out the same when
encoded again is refused, so fields that are missing, extra, or written at more length than needed are refused
too. The signature covers a domain word and everything before it, run id included: a record can be replayed
neither in another run nor as another kind of message.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

PHASES = ("starting", "joining", "training", "averaging", "degraded", "stopping")
REASONS = ("forged", "stale", "oversized", "foreign", "malformed", "future")

# Several records share one DHT answer, which breaks above 4 MiB (hivemind, control.py): 1024 of these fit.
RECORD_BYTES_MAX = 2000
ADDRESSES_MAX = 8
ADDRESS_BYTES_MAX = 200
EPOCH_MAX = 2**53
# Guess: far above any sensible refresh interval; bounds how long a vanished peer can seem alive.
LIFETIME_S_MAX = 600.0
# Guess: machines without NTP drift by seconds; a minute off is a wrong clock.
CLOCK_SKEW_S = 60.0
# Seconds since 1970; the year 2100. What lies beyond is not a time.
_TIME_S_MAX = 4_102_444_800.0

_VERSION = 1
_DOMAIN = b"tapestry presence v1"
_SIGNATURE_BYTES = 64
_HASH_BYTES = 32
_HEX_HASH = re.compile(r"[0-9a-f]{64}")
_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{52}")
_ADDRESS = re.compile(r"/[!-~]+")

Sign = Callable[[bytes], bytes]
Verify = Callable[[str, bytes, bytes], bool]  # (peer id, signature, message)


class PresenceError(Exception):
    """A record is refused. `reason` is one of REASONS, for counting; the text is one line for people."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Presence:
    """What a peer says of itself. Times are seconds since 1970, by the clock of that peer."""

    run_id: str  # 64 hex characters
    peer_id: str  # Ed25519: 52 base58 characters
    epoch: int  # committed updates, 0..EPOCH_MAX
    head: str  # 64 hex characters
    phase: str  # one of PHASES
    addresses: tuple[str, ...]  # the best first, at most ADDRESSES_MAX
    issued_at: float
    expires_at: float  # at most LIFETIME_S_MAX after issued_at


def encode(presence: Presence, sign: Sign) -> bytes:
    """The signed record. Raises PresenceError when a field is out of its bounds."""
    _check_fields(presence)
    fields = _pack_fields(presence)
    data = _attach_signature(fields, sign(_signed_message(fields)))
    if len(data) > RECORD_BYTES_MAX:
        raise PresenceError("oversized", f"the record has {len(data)} bytes, the limit is {RECORD_BYTES_MAX}")
    return data


def decode(
    data: bytes, verify: Verify, *, run_id: str, now: float, clock_skew_s: float = CLOCK_SKEW_S
) -> Presence:
    """The record in `data`, checked in full. Raises PresenceError.

    `now` is seconds since 1970 by our clock; the clock of the peer may differ by `clock_skew_s`.
    """
    if len(data) > RECORD_BYTES_MAX:
        raise PresenceError("oversized", f"a record of {len(data)} bytes, the limit is {RECORD_BYTES_MAX}")
    presence, signature = _unpack(data)
    _check_fields(presence)
    fields = _pack_fields(presence)
    if _attach_signature(fields, signature) != data:
        raise PresenceError("malformed", "the record is not in its canonical encoding")
    if presence.run_id != run_id:
        raise PresenceError("foreign", f"the record is of run {presence.run_id[:12]}, this is {run_id[:12]}")
    if not verify(presence.peer_id, signature, _signed_message(fields)):
        raise PresenceError("forged", f"the signature is not of peer {presence.peer_id[-8:]}")
    _check_times(presence, now, clock_skew_s)
    return presence


def _pack_fields(presence: Presence) -> list[bytes]:
    """Each field in msgpack, in the order of the wire; the signature is not among them."""
    values = (
        _VERSION,
        bytes.fromhex(presence.run_id),
        presence.peer_id,
        presence.epoch,
        bytes.fromhex(presence.head),
        presence.phase,
        list(presence.addresses),
        presence.issued_at,
        presence.expires_at,
    )
    return [msgpack.packb(value) for value in values]


def _attach_signature(fields: list[bytes], signature: bytes) -> bytes:
    array_header = bytes([0x90 | (len(fields) + 1)])  # msgpack fixarray
    return b"".join([array_header, *fields, msgpack.packb(signature)])


def _signed_message(fields: list[bytes]) -> bytes:
    return _DOMAIN + b"\0" + b"".join(fields)


def _unpack(data: bytes) -> tuple[Presence, bytes]:
    try:
        # Every length inside is bounded by len(data), which the caller has bounded.
        array = msgpack.unpackb(data, use_list=False)
    except ValueError as error:  # all of msgpack's own errors are ValueErrors
        raise PresenceError("malformed", "the record is not msgpack") from error
    if not isinstance(array, tuple) or len(array) != 10:
        raise PresenceError("malformed", "the record is not an array of 10 fields")
    version, run_id, peer_id, epoch, head, phase, addresses, issued_at, expires_at, signature = array
    if type(version) is not int or version != _VERSION:
        raise PresenceError("malformed", f"the record's version is not {_VERSION}")
    if not isinstance(signature, bytes) or len(signature) != _SIGNATURE_BYTES:
        raise PresenceError("malformed", f"the signature is not {_SIGNATURE_BYTES} bytes")
    presence = Presence(
        run_id=_hex(run_id, "run id"),
        peer_id=peer_id,
        epoch=epoch,
        head=_hex(head, "head"),
        phase=phase,
        addresses=addresses,
        issued_at=issued_at,
        expires_at=expires_at,
    )
    return presence, signature


def _hex(value: Any, what: str) -> str:
    if not isinstance(value, bytes) or len(value) != _HASH_BYTES:
        raise PresenceError("malformed", f"the {what} is not {_HASH_BYTES} bytes")
    return value.hex()


def _check_fields(presence: Presence) -> None:
    """Types and bounds of every field; what came from the network may hold anything here."""
    _require(_matches(_HEX_HASH, presence.run_id), "the run id is not 64 hex characters")
    _require(_matches(_HEX_HASH, presence.head), "the head is not 64 hex characters")
    _require(_matches(_PEER_ID, presence.peer_id), "the peer id is not one of an Ed25519 key")
    _require(
        type(presence.epoch) is int and 0 <= presence.epoch <= EPOCH_MAX,
        f"the epoch is not in 0..{EPOCH_MAX}",
    )
    _require(presence.phase in PHASES, f"the phase is not one of {', '.join(PHASES)}")
    _check_addresses(presence.addresses)
    _require(
        _is_time(presence.issued_at) and _is_time(presence.expires_at),
        "issued_at or expires_at is not a time",
    )
    lifetime_s = presence.expires_at - presence.issued_at
    _require(0.0 < lifetime_s <= LIFETIME_S_MAX, f"the lifetime is not in 0..{LIFETIME_S_MAX:.0f} s")


def _check_addresses(addresses: Any) -> None:
    _require(isinstance(addresses, tuple), "the addresses are not a list")
    if len(addresses) > ADDRESSES_MAX:
        raise PresenceError("oversized", f"{len(addresses)} addresses, the limit is {ADDRESSES_MAX}")
    for address in addresses:
        _require(_matches(_ADDRESS, address), "an address is not a multiaddr in printable ASCII")
        if len(address) > ADDRESS_BYTES_MAX:
            raise PresenceError(
                "oversized", f"an address of {len(address)} bytes, the limit is {ADDRESS_BYTES_MAX}"
            )


def _check_times(presence: Presence, now: float, clock_skew_s: float) -> None:
    if presence.issued_at > now + clock_skew_s:
        raise PresenceError("future", f"the record is from {presence.issued_at - now:.0f} s in the future")
    if presence.expires_at <= now - clock_skew_s:
        raise PresenceError("stale", f"the record expired {now - presence.expires_at:.0f} s ago")


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise PresenceError("malformed", text)


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_time(value: Any) -> bool:
    return type(value) is float and math.isfinite(value) and 0.0 <= value <= _TIME_S_MAX
