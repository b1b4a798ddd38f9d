"""Presence: one encoding, signed, bounded; everything else is refused with its reason."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapestry.dht.presence import (
    ADDRESS_BYTES_MAX,
    ADDRESSES_MAX,
    EPOCH_MAX,
    LIFETIME_S_MAX,
    PHASES,
    REASONS,
    RECORD_BYTES_MAX,
    Presence,
    PresenceError,
    decode,
    encode,
)

RUN, HEAD, NOW = "ab" * 32, "cd" * 32, 1_800_000_000.0
PEER, STRANGER = "12D3KooW" + "A" * 44, "12D3KooW" + "B" * 44
RECORD = Presence(RUN, PEER, 7, HEAD, "training", ("/ip4/1.2.3.4/tcp/1",), NOW, NOW + 60.0)

BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
HEX_HASHES = st.binary(min_size=32, max_size=32).map(bytes.hex)
PRESENCES = st.builds(
    Presence,
    run_id=st.just(RUN),
    peer_id=st.text(alphabet=BASE58, min_size=52, max_size=52),
    epoch=st.integers(0, EPOCH_MAX),
    head=HEX_HASHES,
    phase=st.sampled_from(PHASES),
    addresses=st.lists(
        st.text(
            alphabet=st.characters(min_codepoint=33, max_codepoint=126), max_size=ADDRESS_BYTES_MAX - 1
        ).map(lambda text: f"/{text}x"[:ADDRESS_BYTES_MAX]),
        max_size=ADDRESSES_MAX,
    ).map(tuple),
    issued_at=st.floats(NOW - 1.0, NOW),
    expires_at=st.floats(NOW + 1.0, NOW + LIFETIME_S_MAX - 2.0),
)


def sign_as(peer_id: str, message: bytes) -> bytes:
    """A stand-in for Ed25519 of the same length: fast, and as strict."""
    return hashlib.sha512(peer_id.encode() + message).digest()


def verify(peer_id: str, signature: bytes, message: bytes) -> bool:
    return signature == sign_as(peer_id, message)


def signed(presence: Presence) -> bytes:
    return encode(presence, lambda message: sign_as(presence.peer_id, message))


def refusal(data: bytes, *, run_id: str = RUN, now: float = NOW) -> str:
    with pytest.raises(PresenceError) as caught:
        decode(data, verify, run_id=run_id, now=now)
    assert caught.value.reason in REASONS
    assert "\n" not in str(caught.value)
    return caught.value.reason


def with_field(index: int, value: Any) -> bytes:
    fields = msgpack.unpackb(signed(RECORD))
    fields[index] = value
    return bytes(msgpack.packb(fields))


@given(PRESENCES)
def test_what_is_encoded_is_decoded(presence: Presence) -> None:
    assert decode(signed(presence), verify, run_id=RUN, now=NOW) == presence


def test_a_record_of_every_bound_at_once_fits() -> None:
    address = "/" + "x" * (ADDRESS_BYTES_MAX - 1)
    largest = dataclasses.replace(
        RECORD, epoch=EPOCH_MAX, phase="averaging", addresses=(address,) * ADDRESSES_MAX
    )
    assert len(signed(largest)) <= RECORD_BYTES_MAX


def test_every_truncation_is_malformed() -> None:
    data = signed(RECORD)
    for length in range(len(data)):
        assert refusal(data[:length]) == "malformed"


def test_every_flipped_bit_is_refused() -> None:
    data = bytearray(signed(RECORD))
    for index in range(len(data)):
        for bit in range(8):
            data[index] ^= 1 << bit
            refusal(bytes(data))
            data[index] ^= 1 << bit


def test_trailing_bytes_are_malformed() -> None:
    assert refusal(signed(RECORD) + b"\0") == "malformed"


@given(st.binary(max_size=300))
@settings(max_examples=500)
def test_noise_is_refused(data: bytes) -> None:
    refusal(data)


def test_another_peers_signature_is_forged() -> None:
    data = encode(RECORD, lambda message: sign_as(STRANGER, message))
    assert refusal(data) == "forged"


def test_a_signature_without_the_domain_is_forged() -> None:
    data = encode(RECORD, lambda message: sign_as(PEER, message.removeprefix(b"tapestry presence v1\0")))
    assert refusal(data) == "forged"


def test_a_record_of_another_run_is_foreign() -> None:
    assert refusal(signed(RECORD), run_id="ef" * 32) == "foreign"


def test_a_record_cannot_be_moved_to_another_run() -> None:
    assert refusal(with_field(1, bytes.fromhex("ef" * 32)), run_id="ef" * 32) == "forged"


def test_a_record_larger_than_the_limit_is_oversized() -> None:
    assert refusal(b"\x9a" + bytes(RECORD_BYTES_MAX)) == "oversized"


def test_the_clock_of_the_peer_may_be_off_by_the_tolerance() -> None:
    for now in (NOW - 10.0, NOW + 60.0 + 9.9):
        assert decode(signed(RECORD), verify, run_id=RUN, now=now, clock_skew_s=10.0) == RECORD


def test_an_expired_record_is_stale() -> None:
    with pytest.raises(PresenceError) as caught:
        decode(signed(RECORD), verify, run_id=RUN, now=NOW + 70.0, clock_skew_s=10.0)
    assert caught.value.reason == "stale"


def test_a_record_from_tomorrow_is_future() -> None:
    assert refusal(signed(RECORD), now=NOW - 86400.0) == "future"


MALFORMED_FIELDS: list[tuple[int, Any]] = [
    (0, 2),
    (0, True),
    (0, "1"),
    (1, b"\0" * 31),
    (1, RUN),
    (2, PEER[:-1]),
    (2, PEER[:-1] + "0"),
    (2, PEER.encode()),
    (3, -1),
    (3, EPOCH_MAX + 1),
    (3, 2**64 - 1),
    (3, 7.0),
    (3, True),
    (3, None),
    (4, b""),
    (4, HEAD),
    (5, "sleeping"),
    (5, ["training"]),
    (5, None),
    (6, "/ip4/1.2.3.4/tcp/1"),
    (6, [b"/ip4/1.2.3.4/tcp/1"]),
    (6, ["ip4/1.2.3.4/tcp/1"]),
    (6, ["/ip4/1.2.3.4 /tcp/1"]),
    (6, ["/ip4/é"]),
    (6, ["/ip4/1.2.3.4/tcp/1\n"]),
    (6, {"/x": 1}),
    (7, int(NOW)),
    (7, math.nan),
    (7, -math.inf),
    (8, math.inf),
    (8, math.nan),
    (8, 1e300),
    (8, NOW),
    (8, NOW - 1.0),
    (8, NOW + LIFETIME_S_MAX + 1.0),
    (9, b"\0" * 63),
    (9, b"\0" * 65),
    (9, "x" * 64),
    (9, None),
]


@pytest.mark.parametrize(("index", "value"), MALFORMED_FIELDS)
def test_a_field_of_a_wrong_type_or_out_of_bounds_is_malformed(index: int, value: Any) -> None:
    assert refusal(with_field(index, value)) == "malformed"


@pytest.mark.parametrize("addresses", [["/a"] * (ADDRESSES_MAX + 1), ["/" + "a" * ADDRESS_BYTES_MAX]])
def test_too_many_or_too_long_addresses_are_oversized(addresses: list[str]) -> None:
    assert refusal(with_field(6, addresses)) == "oversized"


def test_a_missing_or_an_extra_field_is_malformed() -> None:
    fields = msgpack.unpackb(signed(RECORD))
    assert refusal(msgpack.packb(fields[:-1])) == "malformed"
    assert refusal(msgpack.packb([*fields, None])) == "malformed"
    assert refusal(msgpack.packb({"record": fields})) == "malformed"
    assert refusal(msgpack.packb(msgpack.ExtType(5, b"x"))) == "malformed"


def test_a_second_encoding_of_the_same_values_is_malformed() -> None:
    data = signed(RECORD)
    fields = msgpack.unpackb(data)
    longer_array = b"\xdc\x00\x0a" + data[1:]
    longer_epoch = data.replace(PEER.encode() + b"\x07", PEER.encode() + b"\xcd\x00\x07")
    for variant in (longer_array, longer_epoch):
        assert variant != data and msgpack.unpackb(variant) == fields
        assert refusal(variant) == "malformed"


@pytest.mark.parametrize(
    "change",
    [{"epoch": -1}, {"phase": "asleep"}, {"head": HEAD.upper()}, {"addresses": ("x",)}, {"expires_at": NOW}],
)
def test_we_do_not_sign_what_others_would_refuse(change: dict[str, Any]) -> None:
    with pytest.raises(PresenceError):
        signed(dataclasses.replace(RECORD, **change))
