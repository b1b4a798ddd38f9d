"""Who is told where, whom a node then dials, and what a liar can make of that."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Sequence
from typing import Any

import msgpack
import pytest

from tapestry.dht.presence import ADDRESSES_MAX
from tapestry.dht.swarm import Unreachable
from tapestry.node import peer_exchange
from tapestry.node.peer_exchange import DIALS_MAX, PEERS_MAX, PeerExchange
from tapestry.node.throttle import Throttles
from tapestry.node.wire import FRAME, frame_parts

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
ME = "12D3KooWFAQWzWY2n8KUGGaXykyzafrNgSCsfTmabDmNUZkDoTn5"


def peer_id(number: int) -> str:
    """Another of the same form: its last two characters count."""
    return ME[:-2] + _BASE58[number // 58] + _BASE58[number % 58]


A, B, C = peer_id(1), peer_id(2), peer_id(3)


def at(peer: str, port: int = 1000) -> str:
    return f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}"


class FakeLinks:
    def __init__(self, *linked: str) -> None:
        self.linked = list(linked)
        self.addresses: dict[str, tuple[str, ...]] = {}
        self.wanted: dict[str, tuple[str, ...]] = {}

    def want(self, peer: str, addresses: Sequence[str] = ()) -> None:
        self.wanted[peer] = tuple(addresses)


class FakeSwarm:
    """Peers answer with what a test says, and every question is counted."""

    peer_id = ME

    def __init__(self, answers: dict[str, bytes]) -> None:
        self.answers = answers
        self.dialled: list[tuple[str, tuple[str, ...]]] = []
        self.asked: Counter[str] = Counter()

    async def connect_any(self, peer: str, addresses: Sequence[str], timeout_s: float) -> None:
        self.dialled.append((peer, tuple(addresses)))

    async def open_stream(self, peer: str, protocol: str, timeout_s: float) -> tuple[Any, Any]:
        self.asked[peer] += 1
        if peer not in self.answers:
            raise Unreachable("unsupported", "the peer does not serve this protocol")
        reader = asyncio.StreamReader()
        reader.feed_data(self.answers[peer])
        return reader, FakeWriter()


class FakeWriter:
    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    async def drain(self) -> None: ...
    def close(self) -> None: ...


class Heard:
    """Only what the exchange tells a listener."""

    def __init__(self) -> None:
        self.refused: list[tuple[str, str]] = []

    def on_refused(self, peer: str, reason: str, text: str) -> None:
        self.refused.append((peer, reason))

    def on_bytes(self, direction: str, kind: str, count: int) -> None: ...


def answer(*addresses: Any) -> bytes:
    (frame,) = frame_parts(msgpack.packb(addresses))
    return bytes(frame)


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, links: FakeLinks, answers: dict[str, bytes]) -> None:
        monkeypatch.setattr(peer_exchange, "LOOK_S", 0.001)
        self.links, self.swarm, self.heard = links, FakeSwarm(answers), Heard()
        self.exchange = PeerExchange(
            self.swarm,  # type: ignore[arg-type]
            links,  # type: ignore[arg-type]
            "ab" * 32,
            (at(ME),),
            self.heard,  # type: ignore[arg-type]
            Throttles(),
        )

    def ask(self) -> None:
        """Run until every linked peer was asked, and some looks more."""

        async def main() -> None:
            task = asyncio.create_task(self.exchange.run())
            async with asyncio.timeout(5):
                while not set(self.links.linked) <= set(self.swarm.asked):  # noqa: ASYNC110
                    await asyncio.sleep(0)
            await asyncio.sleep(0.02)
            task.cancel()

        asyncio.run(main())


def run(awaitable: Awaitable[None]) -> None:
    async def main() -> None:
        await awaitable

    asyncio.run(main())


def test_an_answer_names_ourselves_and_the_linked_but_not_who_asks(monkeypatch):
    bench = Bench(monkeypatch, FakeLinks(A, B, C), {})
    bench.links.addresses = {A: (at(A),), B: (at(B),)}  # C dialled us and has not said where it listens
    writer = FakeWriter()
    run(bench.exchange.serve(A, asyncio.StreamReader, writer))  # type: ignore[arg-type]
    assert writer.written == answer(at(ME), at(B))


def test_the_longest_answer_is_one_that_is_accepted(monkeypatch):
    many = [peer_id(i) for i in range(3 * PEERS_MAX)]
    serving = Bench(monkeypatch, FakeLinks(*many), {})
    serving.links.addresses = {p: tuple(at(p, 1000 + i) for i in range(2 * ADDRESSES_MAX)) for p in many}
    writer = FakeWriter()
    run(serving.exchange.serve(A, asyncio.StreamReader, writer))  # type: ignore[arg-type]
    asking = Bench(monkeypatch, FakeLinks(ME), {ME: writer.written})
    asking.swarm.peer_id = A
    asking.ask()
    assert not asking.heard.refused and asking.links.wanted[ME] == (at(ME),)
    assert len(asking.swarm.dialled) == DIALS_MAX
    assert all(len(addresses) == ADDRESSES_MAX for _, addresses in asking.swarm.dialled)


def test_a_stranger_gets_a_link_when_it_has_answered_itself_and_by_its_own_word(monkeypatch):
    links = FakeLinks(A)
    bench = Bench(monkeypatch, links, {A: answer(at(A), at(B, 1), at(C, 1)), B: answer(at(B, 2))})
    bench.ask()
    assert links.wanted == {A: (at(A),), B: (at(B, 2),)}
    assert sorted(bench.swarm.dialled) == sorted([(B, (at(B, 1),)), (C, (at(C, 1),))])


def test_who_could_not_be_reached_is_not_dialled_again_at_once(monkeypatch):
    monkeypatch.setattr(peer_exchange, "ASK_EVERY_S", 0.0)
    bench = Bench(monkeypatch, FakeLinks(A), {A: answer(at(A), at(C))})
    bench.ask()
    assert bench.swarm.asked[A] > 2 and len(bench.swarm.dialled) == 1


def test_the_linked_and_ourselves_are_not_dialled(monkeypatch):
    bench = Bench(monkeypatch, FakeLinks(A, B), {A: answer(at(A), at(B, 9), at(ME, 9)), B: answer(at(B))})
    bench.ask()
    assert not bench.swarm.dialled and bench.links.wanted == {A: (at(A),), B: (at(B),)}


def test_all_are_asked_at_once_and_then_one_at_a_time(monkeypatch):
    monkeypatch.setattr(peer_exchange, "ASK_EVERY_S", 1000.0)
    bench = Bench(monkeypatch, FakeLinks(A, B), {})
    bench.ask()
    assert bench.swarm.asked == {A: 1, B: 1}


@pytest.mark.parametrize(
    "bad",
    [
        answer(at(A), "/ip4/127.0.0.1/tcp/1000"),
        answer(at(A), 7),
        answer(at(A), f"/ip4/999.0.0.1/tcp/1/p2p/{B}"),
        answer(f"/ip4/127.0.0.1/tcp/0/p2p/{A}", at(B)),
        answer(*[at(B)] * ((PEERS_MAX + 1) * ADDRESSES_MAX + 1)),
        bytes(frame_parts(msgpack.packb({"peers": at(B)}))[0]),
        bytes(frame_parts(b"\xc1")[0]),
        FRAME.pack(1 << 30, 0),
        FRAME.pack(8, 8),
    ],
    ids=["no-peer", "no-text", "no-ip", "port-0", "long", "map", "no-msgpack", "huge", "payload"],
)
def test_a_bad_answer_is_refused_whole(monkeypatch, bad):
    bench = Bench(monkeypatch, FakeLinks(A), {A: bad})
    bench.ask()
    assert [peer for peer, _ in bench.heard.refused] == [A]
    assert not bench.links.wanted and not bench.swarm.dialled


def test_a_peer_that_does_not_answer_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(peer_exchange, "ASK_S", 0.01)
    bench = Bench(monkeypatch, FakeLinks(A, B), {A: b"", B: answer(at(B))})
    bench.ask()
    assert bench.links.wanted == {B: (at(B),)} and not bench.heard.refused
