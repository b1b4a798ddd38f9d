"""PresenceValidator: what hivemind may store under our key, and what may leave it. No network here."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.utils import MSGPackSerializer

from tapestry.dht import directory
from tapestry.dht.directory import PresenceValidator, presence_key
from tapestry.dht.identity import Identity
from tapestry.dht.presence import CLOCK_SKEW_S, RECORD_BYTES_MAX, Presence, encode

RUN, NOW = "ab" * 32, 1_800_000_000.0


class Bench:
    """A validator with its clock and counter, and a peer with its genuine record."""

    def __init__(self, folder: Path) -> None:
        self.now = NOW
        self.refused: Counter[str] = Counter()
        self.validator = PresenceValidator(RUN, self._count, clock=lambda: self.now)
        self.peer = Identity.load_or_create(folder / "peer")
        self.stranger = Identity.load_or_create(folder / "stranger")
        self.presence = Presence(RUN, self.peer.peer_id, 1, "cd" * 32, "training", (), NOW, NOW + 60.0)

    def _count(self, reason: str) -> None:
        self.refused[reason] += 1

    def record(self, **change: Any) -> DHTRecord:
        """What hivemind hands over when a peer stores `presence`, with fields replaced."""
        return dataclasses.replace(
            DHTRecord(
                key=DHTID.generate(source=presence_key(RUN)).to_bytes(),
                subkey=MSGPackSerializer.dumps(self.peer.peer_id),
                value=MSGPackSerializer.dumps(encode(self.presence, self.peer.sign)),
                expiration_time=self.presence.expires_at,
            ),
            **change,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_genuine_record_is_let_in_and_nothing_is_counted(bench: Bench) -> None:
    assert bench.validator.validate(bench.record())
    assert not bench.refused


def test_a_plain_value_under_the_key_is_refused(bench: Bench) -> None:
    assert not bench.validator.validate(bench.record(subkey=DHTProtocol.IS_REGULAR_VALUE))
    assert not bench.validator.validate(
        bench.record(subkey=DHTProtocol.IS_REGULAR_VALUE, value=MSGPackSerializer.dumps("wiped"))
    )
    assert bench.refused == {"forged": 1, "malformed": 1}


def test_a_record_under_another_peers_name_is_forged(bench: Bench) -> None:
    subkey = MSGPackSerializer.dumps(bench.stranger.peer_id)
    assert not bench.validator.validate(bench.record(subkey=subkey))
    assert bench.refused == {"forged": 1}


def test_a_record_signed_by_another_is_forged(bench: Bench) -> None:
    value = MSGPackSerializer.dumps(encode(bench.presence, bench.stranger.sign))
    assert not bench.validator.validate(bench.record(value=value))
    assert bench.refused == {"forged": 1}


@pytest.mark.parametrize("shift_s", [-1.0, 1e-3, 3600.0])
def test_a_record_with_another_expiry_than_its_signed_one_is_forged(bench: Bench, shift_s: float) -> None:
    assert not bench.validator.validate(bench.record(expiration_time=NOW + 60.0 + shift_s))
    assert bench.refused == {"forged": 1}


def test_a_record_under_any_other_key_is_foreign(bench: Bench) -> None:
    for name in (presence_key("ef" * 32), "expert.0.1", "tapestry"):
        assert not bench.validator.validate(bench.record(key=DHTID.generate(source=name).to_bytes()))
    assert bench.refused == {"foreign": 3}


def test_a_record_of_another_run_under_our_key_is_foreign(bench: Bench) -> None:
    bench.presence = dataclasses.replace(bench.presence, run_id="ef" * 32)
    assert not bench.validator.validate(bench.record())
    assert bench.refused == {"foreign": 1}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "malformed"),
        (b"\xc1", "malformed"),
        (msgpack.packb("text"), "malformed"),
        (msgpack.packb(b"") + b"\0", "malformed"),
        (msgpack.packb(DictionaryDHTValue().packb()), "malformed"),
        (msgpack.packb(bytes(RECORD_BYTES_MAX + 1)), "oversized"),
        (bytes(1 << 20), "oversized"),
    ],
)
def test_a_value_that_is_no_record_is_refused(bench: Bench, value: bytes, reason: str) -> None:
    assert not bench.validator.validate(bench.record(value=value))
    assert bench.refused == {reason: 1}


def test_a_record_wrapped_at_more_length_than_needed_is_malformed(bench: Bench) -> None:
    inner = encode(bench.presence, bench.peer.sign)
    assert not bench.validator.validate(bench.record(value=b"\xc6" + len(inner).to_bytes(4, "big") + inner))
    assert bench.refused == {"malformed": 1}


def test_times_are_judged_with_twice_the_tolerance(bench: Bench) -> None:
    for now in (NOW - 2 * CLOCK_SKEW_S, NOW + 60.0 + 2 * CLOCK_SKEW_S - 1.0):
        bench.now = now
        assert bench.validator.validate(bench.record())
    bench.now = NOW - 2 * CLOCK_SKEW_S - 1.0
    assert not bench.validator.validate(bench.record())
    bench.now = NOW + 60.0 + 2 * CLOCK_SKEW_S
    assert not bench.validator.validate(bench.record())
    assert bench.refused == {"future": 1, "stale": 1}


def test_clocks_that_differ_are_said_once_in_a_while(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    for now in (NOW - 500.0, NOW - 499.0, NOW + 500.0):  # behind by so much, still, and ahead
        bench.now = now
        assert not bench.validator.validate(bench.record())
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "clock=differs" in warning and "500 s in the future" in warning


def test_the_number_of_peers_is_bounded_until_records_expire(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "PEERS_MAX", 1)
    first = bench.record()
    assert bench.validator.validate(first)
    monkeypatch.setattr(directory, "STORING", SimpleNamespace(get=lambda: True))
    bench.peer = bench.stranger
    bench.presence = dataclasses.replace(
        bench.presence, peer_id=bench.stranger.peer_id, expires_at=NOW + 90.0
    )
    assert not bench.validator.validate(bench.record())
    assert bench.validator.validate(first)
    bench.now = NOW + 61.0
    assert bench.validator.validate(bench.record())
    assert bench.refused == {"oversized": 1}


def test_strangers_take_no_members_place_and_spoil_no_answer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(directory, "STRANGERS_MAX", 2)
    monkeypatch.setattr(directory, "PEERS_MAX", 4)
    member = bench.peer
    bench.validator = PresenceValidator(RUN, bench._count, lambda: NOW, lambda peer: peer == member.peer_id)

    def of(one: Identity) -> DHTRecord:
        bench.peer, bench.presence = one, dataclasses.replace(bench.presence, peer_id=one.peer_id)
        return bench.record()

    strangers = [of(Identity.load_or_create(tmp_path / f"stranger-{number}")) for number in range(9)]
    storing = monkeypatch.context
    with storing() as while_storing:
        while_storing.setattr(directory, "STORING", SimpleNamespace(get=lambda: True))
        assert [bench.validator.validate(one) for one in strangers] == [True, True] + 7 * [False]
        assert bench.validator.validate(of(member)), "a member's is stored all the same"
    assert all(bench.validator.validate(one) for one in [*strangers, of(member)]), (
        "an answer with all of them"
    )
    assert len(bench.validator._strangers) == 4


def test_the_validator_stands_where_hivemind_asks_it() -> None:
    """A guard against another hivemind: it validates by these names, and the key is SHA-1 of the text."""
    assert hasattr(DHTProtocol, "_validate_record") and hasattr(DHTProtocol, "_validate_dictionary")
    assert "record_validator" in DHTNode.create.__annotations__
    assert len(DHTID.generate(source="key").to_bytes()) == 20
