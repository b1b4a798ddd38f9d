"""Signatures checked ahead, by other processes: nothing holds that would not hold without them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tapestry.dht.identity import Identity
from tapestry.node.lineage import signatures
from tapestry.node.lineage.signatures import Ahead, Trusting

IDENTITY = Identity(Ed25519PrivateKey.from_private_bytes(b"tapestry ahead tests ed25519 key"))
COUNT = 40


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(signatures, "BATCH", 4)
    monkeypatch.setattr(signatures, "WORTH_IT", 8)
    yield


def _ask(ahead: Ahead, bad: int | None, count: int = COUNT) -> None:
    for number in range(count):
        message = b"%d" % number
        signature = IDENTITY.sign(b"another" if number == bad else message).hex()
        assert ahead.verify(IDENTITY.peer_id, signature, message)


@pytest.mark.parametrize("count", [0, 3, 7, COUNT, COUNT + 1])
def test_all_hold_where_all_hold(count: int) -> None:
    with Ahead(2) as ahead:
        _ask(ahead, None, count)
        assert (ahead.asked, ahead.held()) == (count, count)


@pytest.mark.parametrize("bad", [0, 3, 4, 9, 22, COUNT - 1])
@pytest.mark.parametrize("count", [5, COUNT, COUNT + 3])
def test_what_holds_ends_before_the_first_that_does_not(bad: int, count: int) -> None:
    with Ahead(2) as ahead:
        _ask(ahead, bad, count)
        assert ahead.held() == min(bad, count)


@pytest.mark.parametrize("bad", [0, 5, 30])
def test_one_that_does_not_hold_among_those_that_waited_for_the_processes_ends_it(
    bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More batches waited than may be on their way: what came after was taken for checked, or waited for."""
    monkeypatch.setattr(signatures, "WORTH_IT", 64)
    with Ahead(2) as ahead:
        _ask(ahead, bad, 100)
        assert ahead.held() == bad
    with Ahead(2) as ahead:
        _ask(ahead, bad, 63)
        assert ahead.held() == bad


def test_a_process_that_dies_proves_nothing() -> None:
    with Ahead(2) as ahead:
        _ask(ahead, None, 16)
        for worker in ahead._workers:
            os.kill(worker._process.pid, signal.SIGKILL)
            worker._process.wait()
        _ask(ahead, None, 16)
        assert ahead.held() < ahead.asked


def test_those_that_were_not_checked_are_checked_when_the_chain_is_read_again() -> None:
    crypto = Trusting(2)
    said = [crypto.verify(IDENTITY.peer_id, "ab" * 64, b"") for _ in range(4)]
    assert said == [True, True, False, False]
    assert crypto.verify(IDENTITY.peer_id, IDENTITY.sign(b"x").hex(), b"x")
