"""The relay: whom it carries, what it refuses, and that two p2pd meet through it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from tapestry.dht.addresses import circuit_address, parse_peer
from tapestry.dht.control import Unreachable
from tapestry.dht.identity import Identity
from tapestry.dht.p2pd import SwarmConfig, SwarmError
from tapestry.dht.reachability import (
    DENIED,
    HOP,
    MALFORMED,
    NO_PLACE,
    NOT_REACHED,
    PLACE_REFUSED,
    RESERVE,
    STOP,
    TOO_MANY,
    NotCarried,
    hop_answer,
    hop_request,
    reservation,
    reserve,
    stop_request,
    stop_status,
)
from tapestry.dht.swarm import Swarm
from tapestry.node.net import circuits as circuits_module
from tapestry.node.net import relay as relay_module
from tapestry.node.net.circuits import KIND_CIRCUITS_MAX, PAIR_CIRCUITS_MAX, Kind
from tapestry.node.net.relay import Relay
from tapestry.node.net.throttle import Throttle, Throttles

GUEST, CALLER = (f"12D3KooWFAQWzWY2n8KUGGaXykyzafrNgSCsfTmabDmNUZkDoTn{n}" for n in "56")
CONNECT = b"\x08\x01" + stop_request(GUEST)[2:]
LETTERS = "abcdefghijkmnpqr"  # of base58
STOP_OK = b"\x08\x01\x20\x64"


class End:
    """What the relay reads from and writes to on one stream."""

    def __init__(self, data: bytes = b"") -> None:
        self.reader, self.written, self.closed = asyncio.StreamReader(), bytearray(), False
        self.reader.feed_data(data)

    def write(self, data: Any) -> None:
        self.written += data

    async def drain(self) -> None:
        await asyncio.sleep(0)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    @property
    def status(self) -> int:
        """Of the one answer."""
        try:
            reservation(bytes(self.written[1:]))
        except NotCarried as refused:
            return int(str(refused).rsplit(" ", 1)[-1])
        return 100


def framed(message: bytes) -> bytes:
    return bytes([len(message)]) + message


class Bench:
    def __init__(self, enabled: bool = True, throttles: Throttles | None = None) -> None:
        self.linked, self.inner, self.asked = [GUEST], End(framed(STOP_OK)), ""
        self.members = {GUEST, CALLER, "another"}
        self.relay = Relay(
            self.open, self.end, lambda: self.linked, self.kind_of, throttles or Throttles(), enabled
        )

    def end(self, peer: str, end: Any) -> None:
        end.close()

    def kind_of(self, peer: str) -> Kind:
        return Kind.MEMBER if peer in self.members else Kind.STRANGER

    async def holds(self, peer: str) -> asyncio.Task[None]:
        """A circuit of this peer to the guest that is carried, and silent."""
        self.inner = End(framed(STOP_OK))
        end = End(framed(CONNECT))
        task = asyncio.create_task(self.relay.serve(peer, end.reader, end))  # type: ignore[arg-type]
        while not end.written:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert end.status == 100
        return task

    async def open(self, peer: str, protocol: str, timeout_s: float) -> Any:
        self.asked = f"{peer} {protocol}"
        if self.inner is None:
            raise Unreachable("timeout", "it is gone")
        return self.inner.reader, self.inner

    async def ask(self, peer: str, message: bytes) -> int:
        end = End(framed(message))
        await self.relay.serve(peer, end.reader, end)  # type: ignore[arg-type]
        return end.status


def run(main: Coroutine[Any, Any, None]) -> None:
    async def within_time() -> None:
        async with asyncio.timeout(30):
            await main

    asyncio.run(within_time())


def test_a_bug_while_it_carries_is_no_secret(monkeypatch):
    async def main() -> None:
        bench, end = Bench(), End(framed(CONNECT))
        assert await bench.ask(GUEST, RESERVE) == 100
        bench.inner.reader.feed_data(b"more")

        def spend(size_bytes: int) -> None:
            raise KeyError("a bug of ours")

        monkeypatch.setattr(bench.relay._throttles.download, "spend", spend)
        with pytest.raises(KeyError):
            await bench.relay.serve(CALLER, end.reader, end)  # type: ignore[arg-type]

    run(main())


def test_only_a_linked_peer_gets_a_place_and_only_guests_are_called(monkeypatch):
    async def main() -> None:
        bench = Bench()
        assert await bench.ask(CALLER, CONNECT) == NO_PLACE
        assert await bench.ask(CALLER, RESERVE) == DENIED and bench.relay.guests == ()
        assert await bench.ask(GUEST, RESERVE) == 100 and bench.relay.guests == (GUEST,)
        for bad in (b"", b"\x08\x07", b"\xff\xff", b"\x12\x02\x0a\x7f"):
            assert await bench.ask(CALLER, bad) in (MALFORMED, DENIED)
        monkeypatch.setattr(relay_module, "PLACES_MAX", 1)
        bench.linked.append(CALLER)
        assert await bench.ask(CALLER, RESERVE) == TOO_MANY and await bench.ask(GUEST, RESERVE) == 100
        bench.linked.remove(GUEST)  # its place is lost with its link
        assert await bench.ask(CALLER, CONNECT) == NO_PLACE and bench.asked == ""
        assert await Bench(enabled=False).ask(GUEST, RESERVE) == PLACE_REFUSED

    run(main())


def test_bytes_pass_both_ways_until_one_side_ends_and_are_counted_for_the_caps():
    async def main() -> None:
        upload, download = Throttle(), Throttle()
        taken: list[int] = []

        async def take(count: int) -> int:
            taken.append(min(count, 1000))
            return taken[-1]

        upload.take = take  # type: ignore[method-assign]
        bench = Bench(throttles=Throttles(upload, download))
        await bench.ask(GUEST, RESERVE)
        caller = End(framed(CONNECT))
        task = asyncio.create_task(bench.relay.serve(CALLER, caller.reader, caller))  # type: ignore[arg-type]
        there, back = os.urandom(5000), os.urandom(7000)
        caller.reader.feed_data(there)
        bench.inner.reader.feed_data(back)
        while len(caller.written) < 7000 + 5:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert bytes(bench.inner.written) == framed(stop_request(CALLER)) + there
        assert bytes(caller.written) == framed(hop_answer(100)) + back
        assert sum(taken) == 12000 and bench.asked == f"{GUEST} {STOP}"
        bench.inner.reader.feed_eof()
        await task
        assert bench.inner.closed and not bench.relay._circuits

    run(main())


def test_strangers_have_one_circuit_each_and_few_together_and_who_holds_one_longest_makes_room(monkeypatch):
    """Sixteen keys with silent circuits kept every applicant away from who is behind a relay."""
    monkeypatch.setattr(circuits_module, "FIRST_S", 0.0)

    async def main() -> None:
        bench = Bench()
        await bench.ask(GUEST, RESERVE)
        strangers = KIND_CIRCUITS_MAX[Kind.STRANGER]
        held = [await bench.holds(f"stranger{LETTERS[number]}") for number in range(strangers)]
        assert await bench.ask("strangera", CONNECT) == TOO_MANY
        bench.inner = None  # type: ignore[assignment]
        assert await bench.ask(CALLER, CONNECT) == NOT_REACHED, "a member is tried"
        assert await bench.ask("onemore", CONNECT) == NOT_REACHED, "and so is one more"
        await asyncio.wait(held[:1])
        assert held[0].cancelled() and not any(task.done() for task in held[1:])
        assert len(bench.relay._circuits) == strangers - 1
        for task in held:
            task.cancel()
        await asyncio.wait(held)
        assert not len(bench.relay._circuits)

    run(main())


def test_a_circuit_on_which_the_guest_speaks_is_not_cut_for_one_more_stranger(monkeypatch):
    monkeypatch.setattr(circuits_module, "FIRST_S", 0.0)

    async def main() -> None:
        bench = Bench()
        await bench.ask(GUEST, RESERVE)
        held, inner = [], []
        for number in range(KIND_CIRCUITS_MAX[Kind.STRANGER]):
            held.append(await bench.holds(f"stranger{LETTERS[number]}"))
            inner.append(bench.inner)
        inner[0].reader.feed_data(b"hello")
        for _ in range(20):
            await asyncio.sleep(0)
        bench.inner = None  # type: ignore[assignment]
        assert await bench.ask("onemore", CONNECT) == NOT_REACHED
        await asyncio.wait(held[1:2])
        assert held[1].cancelled() and not held[0].done()
        for task in held:
            task.cancel()
        await asyncio.wait(held)

    run(main())


def test_one_pair_has_so_many_circuits_and_its_own_oldest_makes_room():
    async def main() -> None:
        bench = Bench()
        await bench.ask(GUEST, RESERVE)
        held = [await bench.holds(CALLER) for _ in range(PAIR_CIRCUITS_MAX + 1)]
        await asyncio.wait(held[:1])
        assert held[0].cancelled() and not any(task.done() for task in held[1:])
        for task in held:
            task.cancel()
        await asyncio.wait(held)
        assert not len(bench.relay._circuits)

    run(main())


@pytest.mark.parametrize("message", [b"\x08", b"\x12\x7f", b"\x12\x50\x0a\x4e" + bytes(78)])
def test_a_torn_question_is_an_error(message: bytes):
    with pytest.raises(SwarmError):
        hop_request(message)
    assert stop_status(STOP_OK) == 100 and hop_request(CONNECT) == (1, GUEST)


@pytest.mark.e2e
# hivemind finds its p2pd by an old function of importlib.resources.
@pytest.mark.filterwarnings("ignore:path is deprecated. Use files:DeprecationWarning")
def test_two_p2pd_meet_through_the_relay_and_it_carries_more_than_p2pds_own_128_kib(tmp_path: Path):
    async def started(name: str) -> Swarm:
        Identity.load_or_create(tmp_path / name)
        return await Swarm.start(
            SwarmConfig(identity_path=tmp_path / name, listen=("/ip4/127.0.0.1/tcp/0",), nat_port_map=False)
        )

    async def echo(peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(peer.encode() + await reader.readexactly(3 << 20))
        await writer.drain()

    async def main() -> None:
        swarms = [await started(name) for name in ("relay", "guest", "caller")]
        try:
            carrier, guest, caller = swarms
            linked: list[str] = []
            streams = (carrier.open_stream, carrier.end_stream)
            relay = Relay(*streams, lambda: linked, lambda peer: Kind.STRANGER, Throttles(), True)
            await carrier.serve(HOP, relay.serve)
            await guest.serve("/tapestry/test/1", echo)
            at_relay = (await carrier.addresses())[0]
            await guest.connect(parse_peer(at_relay), 5.0)
            with pytest.raises(NotCarried, match=f"status {DENIED}"):
                await reserve(guest.open_stream, carrier.peer_id, 5.0)
            linked.append(guest.peer_id)
            assert (await reserve(guest.open_stream, carrier.peer_id, 5.0)).bytes_max == 0
            address = circuit_address(at_relay, guest.peer_id)
            await caller.connect(parse_peer(address), 5.0)
            assert await caller.known_addresses(guest.peer_id) == (address,)
            reader, writer = await caller.open_stream(guest.peer_id, "/tapestry/test/1", 5.0)
            payload = os.urandom(3 << 20)
            writer.write(payload)
            assert await reader.read(-1) == caller.peer_id.encode() + payload
            writer.close()
        finally:
            for swarm in swarms:
                await swarm.close()

    run(main())
