"""Two nodes with one key: proven where the other can be asked, noticed where it cannot."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Any

import pytest

from tapestry.dht.addresses import PeerAddress
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.net import twins
from tapestry.node.net.twins import TwinWatch, refuse_twin

US = "12D3KooWCaHaT7xh4yGquL286pZyfWAMnEyMke3Rwi5DGsRxQz4W"


@dataclass(frozen=True)
class Record:
    """Of presence.Presence what counts here."""

    addresses: tuple[str, ...]
    peer_id: str = US
    phase: str = "training"
    issued_at: float = 0.0


async def nobody() -> tuple[str, ...]:
    return ()


def check(*records: Record, ours: tuple[str, ...] = (), proves: bool = True) -> list[PeerAddress]:
    asked = []

    async def prove(address: PeerAddress, connected: Any) -> bool:
        asked.append(address)
        return proves

    asyncio.run(refuse_twin(US, records, ours, nobody, prove))  # type: ignore[arg-type]
    return asked


def test_whoever_proves_our_key_at_another_address_is_named_and_we_are_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        there = f"/ip4/127.0.0.1/tcp/{listening.getsockname()[1]}/p2p/{US}"
        with pytest.raises(UserError, match=r"runs already, at /ip4/127.0.0.1/tcp/") as caught:
            check(Record((there,)))
        assert caught.value.exit_code == ExitCode.REFUSED
        assert check(Record((there,)), proves=False) == [
            PeerAddress(there, US)
        ]  # somebody else, at that port
        assert check(Record((there,)), ours=(there,)) == []
        assert check(Record((there,), phase="stopping")) == []
        assert check(Record((there,), peer_id="another")) == []
    assert check(Record((there,))) == []  # nobody listens: what we were before a crash
    assert check(Record(("/ip4/1.2.3.4/udp/1/quic-v1",))) == []


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_router_that_leads_our_own_address_back_to_us_makes_no_twin(
    monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    """After kill -9 the record of before named the mapped public address, and the restart refused itself."""
    here: list[str] = []

    class Probe:
        peer_id = "the probe"

        @classmethod
        async def start(cls, config: Any) -> Probe:
            return cls()

        async def connect(self, address: PeerAddress, timeout_s: float) -> None:
            if comes_back:
                asyncio.get_running_loop().call_later(
                    0.01, here.append, self.peer_id
                )  # it arrives a little later

        async def close(self) -> None:
            await asyncio.sleep(60)  # a busy machine: that is no answer

    async def connected() -> list[str]:
        return ["another", *here]

    monkeypatch.setattr(twins, "Swarm", Probe)
    monkeypatch.setattr(twins, "ARRIVALS_S", (0.0, 0.05))
    monkeypatch.setattr(twins, "PROVE_S", 0.5)
    there = PeerAddress(f"/ip4/203.0.113.1/tcp/1/p2p/{US}", US)
    assert asyncio.run(twins._prove(there, connected)) is not comes_back


def test_a_newer_record_that_we_did_not_write_is_another_node() -> None:
    watch = TwinWatch(started_at=100.0)
    before, theirs = (
        Record(("/ip4/10.0.0.1/tcp/1",), issued_at=90.0),
        Record(("/ip4/10.0.0.2/tcp/1",), issued_at=120.0),
    )
    assert watch.look(US, [theirs]) == ""  # type: ignore[list-item]  # we have said nothing yet
    watch.publishes(110.0)
    assert watch.look(US, [before]) == ""  # type: ignore[list-item]  # of an earlier life
    assert watch.look(US, [Record((), issued_at=110.0)]) == ""  # type: ignore[list-item]
    assert watch.look(US, [theirs]) == "/ip4/10.0.0.2/tcp/1"  # type: ignore[list-item]
