"""What a node does when p2pd, its addresses or its clock change under it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tapestry.dht.p2pd import SwarmConfig, SwarmError
from tapestry.dht.presence import LIFETIME_S_MAX, Presence, encode
from tapestry.dht.swarm import Swarm
from tapestry.node.net import known_peers, network
from tapestry.node.net.circuits import Kind
from tapestry.node.net.network import (
    PRESENCE_TTL_S,
    PROBES_MISSED_MAX,
    Network,
    caller_kind,
    next_expiry,
    with_ports,
)

ID = "12D3KooWFAQWzWY2n8KUGGaXykyzafrNgSCsfTmabDmNUZkDoTn5"
LOOPBACK, PUBLIC = f"/ip4/127.0.0.1/tcp/4001/p2p/{ID}", f"/ip4/203.0.113.7/tcp/4001/p2p/{ID}"

RESIDENT: Any = SimpleNamespace(on_record_refused=lambda reason: None)


def bare() -> Network:
    """Only what is tested here."""
    node = Network(None, None)  # type: ignore[arg-type]
    node.addresses = (LOOPBACK,)
    return node


@pytest.mark.parametrize("step_s", [0.0, 0.0001, 1.0, 30.0, -1.0, -500.0, -600.0, -3600.0, -1e8, 1e8])
def test_a_presence_record_can_be_made_whatever_the_clock_does(step_s):
    now = 1_700_000_000.0
    before = now + PRESENCE_TTL_S
    expires_at = next_expiry(now + step_s, before)
    assert expires_at > before or step_s <= PRESENCE_TTL_S - LIFETIME_S_MAX  # else the DHT keeps the old one
    record = Presence("ab" * 32, ID, 1, "cd" * 32, "training", (), now + step_s, expires_at)
    assert encode(record, lambda message: bytes(64))


def test_the_clock_set_back_is_made_good_by_later_records():
    now, expires_at = 1_700_000_000.0, 0.0
    for step_s in (0.0, 1.0, 2.0, -500.0, -499.0, -5000.0, -4999.0):
        expires_at, before = next_expiry(now + step_s, expires_at), expires_at
        assert expires_at > before or step_s == -5000.0
        assert 0 < expires_at - now - step_s <= LIFETIME_S_MAX


def test_a_p2pd_that_cannot_be_started_at_once_is_tried_again(monkeypatch):
    monkeypatch.setattr(network, "RESTART_PAUSE_MAX_S", 0.001)
    slept: list[float] = []
    tries: list[SwarmConfig] = []
    pause = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await pause(0)

    async def start(config: SwarmConfig, **_: Any) -> Any:
        tries.append(config)
        if len(tries) < 3:
            raise (SwarmError("the port is taken"), OSError(12, "Cannot allocate memory"))[len(tries) - 1]
        return "a swarm"

    monkeypatch.setattr(Swarm, "start", start)
    monkeypatch.setattr(network.asyncio, "sleep", sleep)
    assert asyncio.run(bare()._restart(SwarmConfig("nowhere"), RESIDENT)) == "a swarm"
    assert len(tries) == 3 and slept == [1.0, 0.001]


class Answers:
    """A p2pd that says where it listens, or nothing."""

    peer_id = ID

    def __init__(self, *answers: tuple[str, ...] | None) -> None:
        self.answers = list(answers)

    async def addresses(self) -> tuple[str, ...]:
        answer = self.answers.pop(0) if self.answers else None
        if answer is None:
            raise SwarmError("p2pd does not answer")
        return answer


def probed(monkeypatch: pytest.MonkeyPatch, swarm: Answers) -> Network:
    monkeypatch.setattr(network, "PROBE_S", 0.0)
    node = bare()
    with pytest.raises(network._P2pdDied, match=f"{PROBES_MISSED_MAX} times in a row"):
        asyncio.run(node._probe(swarm))  # type: ignore[arg-type]
    return node


def test_a_network_that_comes_up_after_us_is_told_of_the_farthest_first(monkeypatch):
    node = probed(monkeypatch, Answers((LOOPBACK,), (LOOPBACK, PUBLIC, "/strange/address")))
    assert node.addresses == (PUBLIC, LOOPBACK) and node._moved.is_set()


def test_addresses_that_stay_are_no_news(monkeypatch):
    assert not probed(monkeypatch, Answers((LOOPBACK,), (LOOPBACK,)))._moved.is_set()


def test_a_p2pd_is_replaced_when_it_is_silent_and_not_for_one_silence(monkeypatch):
    swarm = Answers(None, (LOOPBACK,), None, None, (LOOPBACK,))
    probed(monkeypatch, swarm)
    assert not swarm.answers


def test_the_given_are_dialled_first():
    calls: list[tuple[str, str]] = []
    links = SimpleNamespace(
        keep=lambda peer, address: calls.append(("keep", peer)),
        want=lambda peer, addresses, hint: calls.append(("want", peer)),
    )
    node = bare()
    node._config = SimpleNamespace(peers=(SimpleNamespace(peer_id="given", maddr="/given"),))  # type: ignore[assignment]
    node._known = SimpleNamespace(addresses={f"p{i}": () for i in range(100)})  # type: ignore[assignment]
    node._want_known(links)  # type: ignore[arg-type]
    assert calls[0] == ("keep", "given") and len(calls) == 1 + network.KNOWN_AT_START


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ("/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/tcp/4555"),  # every interface, not those of then
        ("/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/tcp/4555"),
        ("/ip4/0.0.0.0/tcp/4001", "/ip4/0.0.0.0/tcp/4001"),
        ("/ip6/::/tcp/0", "/ip6/::/tcp/4666"),
        ("/ip4/0.0.0.0/udp/0/quic-v1", "/ip4/0.0.0.0/udp/4777/quic-v1"),
        ("/ip4/0.0.0.0/tcp/0/ws", "/ip4/0.0.0.0/tcp/0/ws"),
    ],
)
def test_only_the_ports_of_the_last_time_are_taken_again(asked, taken):
    bound = (
        "/ip4/127.0.0.1/tcp/4555",
        "/ip4/10.0.0.7/tcp/4555",
        "/ip6/::1/tcp/4666",
        "/ip4/127.0.0.1/udp/4777/quic-v1",
    )
    assert with_ports((asked,), bound) == (taken,)


def test_two_networks_of_one_machine_keep_a_port_each():
    asked = ("/ip4/10.0.0.7/tcp/0", "/ip4/10.1.0.7/tcp/0")
    bound = ("/ip4/10.0.0.7/tcp/4555", "/ip4/10.1.0.7/tcp/4556")
    assert with_ports(asked, bound) == bound


def test_what_relays_tell_is_told_on_with_our_own_addresses():
    node = bare()
    guest = f"/ip4/5.6.7.8/tcp/4001/p2p/{ID[:-1]}6/p2p-circuit/p2p/{ID}"
    node._direct = (LOOPBACK,)
    node._reach = SimpleNamespace(relayed_addresses=(guest,))  # type: ignore[assignment]
    node._place()
    assert node.addresses == (guest, LOOPBACK) and node._moved.is_set()


def test_a_full_disk_costs_only_the_file_of_known_peers(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(known_peers, "atomic_write", full)
    known = known_peers.KnownPeers(tmp_path / "peers.json")
    known.remember({ID: (LOOPBACK,)})
    assert known.addresses == {ID: (LOOPBACK,)}


def test_the_relay_knows_newcomers_of_an_open_run_from_members():
    """It took whoever the node admits for a member: in an open run all the world."""
    node: Any = SimpleNamespace(
        is_member=lambda peer: peer == "member", admits=lambda peer: peer != "stranger"
    )
    kinds = [caller_kind(node, peer) for peer in ("member", "newcomer", "stranger")]
    assert kinds == [Kind.MEMBER, Kind.NEWCOMER, Kind.STRANGER]
