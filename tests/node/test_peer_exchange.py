"""Who is told where, whom a node then dials, and what a liar can make of that."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgpack
import pytest

from tapestry.dht.control import Unreachable
from tapestry.dht.p2pd import SwarmError
from tapestry.dht.presence import ADDRESS_BYTES_MAX, ADDRESSES_MAX
from tapestry.node.net import peer_exchange
from tapestry.node.net.dials import Dials
from tapestry.node.net.known_peers import KNOWN_MAX, RECENT, KnownPeers
from tapestry.node.net.peer_exchange import (
    ANSWERS_MAX,
    ASK_EVERY_S,
    DIAL_AGAIN_S,
    DIALS_MAX,
    NAMED_MAX,
    PEERS_MAX,
    STRANGERS_MAX,
    Named,
    PeerExchange,
    Turns,
)
from tapestry.node.net.throttle import Throttles
from tapestry.node.net.wire import FRAME, frame_parts

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
        self.given: dict[str, tuple[str, ...]] = {}  # by `want`
        self.wanted: list[str] = []
        self.full = False
        self.dials = Dials()

    def want(self, peer: str, addresses: Sequence[str] = ()) -> None:
        self.given[peer] = tuple(addresses)


class FakeSwarm:
    """Peers answer with what a test says, and every question is counted."""

    peer_id = ME

    def __init__(self, answers: dict[str, bytes | Exception]) -> None:
        self.answers = answers
        self.dialled: list[tuple[str, tuple[str, ...]]] = []
        self.asked: Counter[str] = Counter()
        self.writers: list[FakeWriter] = []

    def blame(self, peer: str, reason: str) -> None: ...

    async def connect_any(self, peer: str, addresses: Sequence[str], timeout_s: float) -> None:
        self.dialled.append((peer, tuple(addresses)))

    async def open_stream(self, peer: str, protocol: str, timeout_s: float) -> tuple[Any, Any]:
        self.asked[peer] += 1
        answer = self.answers.get(peer, Unreachable("unsupported", "it does not serve this protocol"))
        if isinstance(answer, Exception):
            raise answer
        reader = asyncio.StreamReader()
        reader.feed_data(answer)
        self.writers.append(FakeWriter())
        return reader, self.writers[-1]


class FakeWriter:
    def __init__(self, closing: bool = False) -> None:
        self.written = b""
        self.closed = closing

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written += data

    async def drain(self) -> None: ...
    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


class FakeKnown(KnownPeers):
    """Without a file."""

    def __init__(self, addresses: dict[str, tuple[str, ...]]) -> None:
        self.addresses = addresses


class Heard:
    """Only what the exchange tells a listener."""

    def __init__(self) -> None:
        self.refused: list[tuple[str, str]] = []

    def admits(self, peer: str) -> bool:
        return True

    def is_member(self, peer: str) -> bool:
        return True

    def on_refused(self, peer: str, reason: str, text: str) -> None:
        self.refused.append((peer, reason))

    def on_bytes(self, direction: str, kind: str, count: int, peer: str) -> None: ...


def answer(*addresses: Any) -> bytes:
    return framed(msgpack.packb(addresses))


def framed(header: bytes) -> bytes:
    return bytes(frame_parts(header)[0])


class Bench:
    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        links: FakeLinks,
        answers: dict[str, bytes | Exception] | None = None,
        known: dict[str, tuple[str, ...]] | None = None,
    ) -> None:
        monkeypatch.setattr(peer_exchange, "LOOK_S", 0.001)
        self.links, self.swarm, self.heard = links, FakeSwarm(answers or {}), Heard()
        self.exchange = PeerExchange(
            self.swarm,  # type: ignore[arg-type]
            links,  # type: ignore[arg-type]
            "ab" * 32,
            lambda: (at(ME),),
            FakeKnown(known or {}),
            self.heard,  # type: ignore[arg-type]
            Throttles(),
        )

    def ask(self, until: Callable[[], bool] = lambda: False) -> None:
        """Run until every linked peer was asked, and then until this or for some looks more."""

        async def main() -> None:
            task = asyncio.create_task(self.exchange.run())
            async with asyncio.timeout(5):
                while not set(self.links.linked) <= set(self.swarm.asked):  # noqa: ASYNC110
                    await asyncio.sleep(0)
            for _ in range(20):
                if until():
                    break
                await asyncio.sleep(0.001)
            assert not task.done()  # whatever it was told
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        assert all(writer.closed for writer in self.swarm.writers)

    def told(self, peer: str, closing: bool = False) -> bytes:
        writer = FakeWriter(closing)
        run(self.exchange.serve(peer, asyncio.StreamReader, writer))  # type: ignore[arg-type]
        return writer.written


def run(awaitable: Awaitable[None]) -> None:
    async def main() -> None:
        await awaitable

    asyncio.run(main())


# --- what is told ------------------------------------------------------------------------------------


def test_an_answer_names_ourselves_and_the_linked_but_not_who_asks(monkeypatch):
    bench = Bench(monkeypatch, FakeLinks(A, B, C))
    bench.links.addresses = {A: (at(A),), B: (at(B),)}  # C dialled us and has not said where it listens
    assert bench.told(A) == answer(at(ME), at(B))


def test_the_longest_answer_is_one_that_is_accepted(monkeypatch):
    many = [peer_id(i) for i in range(3 * PEERS_MAX)]
    serving = Bench(monkeypatch, FakeLinks(*many))
    serving.links.addresses = {
        p: tuple(at(p, 100 * (n + 10) + i) for i in range(2 * ADDRESSES_MAX)) for n, p in enumerate(many)
    }
    asking = Bench(monkeypatch, FakeLinks(ME), {ME: serving.told(A)})
    asking.swarm.peer_id = A
    asking.ask()
    assert not asking.heard.refused and asking.links.given[ME] == (at(ME),)
    assert len(asking.swarm.dialled) == DIALS_MAX
    assert all(len(addresses) == ADDRESSES_MAX for _, addresses in asking.swarm.dialled)


def test_who_asks_all_the_time_is_told_no_more_and_others_are(monkeypatch):
    bench = Bench(monkeypatch, FakeLinks(A, B))
    assert [bool(bench.told(A)) for _ in range(ANSWERS_MAX + 2)] == [True] * ANSWERS_MAX + [False] * 2
    assert bench.heard.refused == [(A, "streams")] * 2
    assert bench.told(B) and bench.told(C)
    for _ in range(2 * STRANGERS_MAX):  # one stranger is not all of them
        bench.told(C)
    assert bench.told(peer_id(9))
    monkeypatch.setattr(peer_exchange, "ASK_EVERY_S", 0.0)
    assert bench.told(A)


def test_strangers_without_number_get_no_answers_without_number(monkeypatch):
    bench = Bench(monkeypatch, FakeLinks(A))
    told = [bench.told(peer_id(i)) for i in range(10, 10 + STRANGERS_MAX + 9)]
    assert sum(map(bool, told)) == STRANGERS_MAX == len(told) - len(bench.heard.refused)
    assert bench.told(A)


def test_nothing_is_written_to_who_has_gone(monkeypatch):
    assert not Bench(monkeypatch, FakeLinks(A)).told(A, closing=True)


# --- whom to ask -------------------------------------------------------------------------------------


def test_the_new_are_asked_at_once_and_then_one_at_a_time_in_turn():
    turns = Turns()
    assert turns.due([A, B, C], 0.0) == [A, B, C]
    assert turns.due([A, B, C], ASK_EVERY_S - 0.1) == []
    asked = [turns.due([A, B, C], ASK_EVERY_S * (1 + i)) for i in range(6)]
    assert all(len(one) == 1 for one in asked) and [p for (p,) in asked] == [A, B, C, A, B, C]


def test_newcomers_take_nobodys_turn():
    turns = Turns()
    turns.due([A], 0.0)
    peers = [A]
    for i in range(1, 21):
        peers = [A, peer_id(10 + i)]
        asked = turns.due(peers, i * 1.0)
        assert peers[1] in asked and (A in asked) == (i % ASK_EVERY_S == 0)


def test_who_comes_and_goes_or_does_not_answer_is_asked_no_more_often():
    turns = Turns()
    assert turns.due([A, B], 0.0) == [A, B]
    for i in range(1, int(ASK_EVERY_S)):
        turns.failed(B)
        assert turns.due([B] if i % 2 else [A, B], float(i)) == []
    assert sorted(turns.due([A, B], ASK_EVERY_S)) == [A, B]
    assert turns.due([], 2 * ASK_EVERY_S) == [] and not turns._asked_at and not turns._soon


def test_who_did_not_answer_is_asked_again_before_its_turn():
    turns, many = Turns(), [peer_id(i) for i in range(20)]
    turns.due(many, 0.0)
    turns.failed(many[-1])
    assert turns.due(many, ASK_EVERY_S) == [many[-1], many[0]]


# --- whom to dial ------------------------------------------------------------------------------------


def anybody(peer: str) -> bool:
    return True


def test_an_address_is_tried_once_in_a_while_and_another_one_at_once():
    named = Named()
    named.add({B: (at(B, 1),)}, anybody)
    assert named.take(anybody, 0.0) == {B: (at(B, 1),)}
    named.add({B: (at(B, 1),)}, anybody)
    assert named.take(anybody, 1.0) == {}
    named.add({B: (at(B, 1), at(B, 2))}, anybody)
    assert named.take(anybody, 2.0) == {B: (at(B, 2),)}
    named.take(anybody, DIAL_AGAIN_S + 2)
    named.add({B: (at(B, 1),)}, anybody)
    assert named.take(anybody, DIAL_AGAIN_S + 3) == {B: (at(B, 1),)}


def test_what_several_say_of_one_is_tried_together():
    named = Named()
    named.add({B: (at(B, 1),)}, anybody)
    named.add({B: (at(B, 2), at(B, 1))}, anybody)
    assert {p: sorted(a) for p, a in named.take(anybody, 0.0).items()} == {B: [at(B, 1), at(B, 2)]}


def test_who_was_linked_meanwhile_is_not_dialled():
    named = Named()
    named.add({B: (at(B),), C: (at(C),)}, anybody)
    assert named.take(lambda peer: peer == C, 0.0) == {C: (at(C),)} and not named.take(anybody, 1.0)


def test_however_many_are_named_few_are_dialled_and_not_all_are_kept():
    named = Named()
    for i in range(20):
        named.add({peer_id(p): (at(peer_id(p)),) for p in range(i * 100, i * 100 + 50)}, anybody)
    assert len(named._addresses) == 20 * DIALS_MAX  # of one answer so many
    for i in range(20, 60):
        named.add({peer_id(p): (at(peer_id(p)),) for p in range(i * 50, i * 50 + 50)}, anybody)
    assert len(named._addresses) == NAMED_MAX
    assert len(named.take(anybody, 0.0)) == DIALS_MAX


# --- both together -----------------------------------------------------------------------------------


def test_a_stranger_gets_a_link_when_it_has_answered_itself_and_by_its_own_word(monkeypatch):
    links = FakeLinks(A)
    bench = Bench(monkeypatch, links, {A: answer(at(A), at(B, 1), at(C, 1)), B: answer(at(B, 2))})
    bench.ask(until=lambda: len(links.given) == 2)
    assert links.given == {A: (at(A),), B: (at(B, 2),)}
    assert sorted(bench.swarm.dialled) == sorted([(B, (at(B, 1),)), (C, (at(C, 1),))])


def test_the_linked_and_ourselves_are_not_dialled(monkeypatch):
    bench = Bench(monkeypatch, FakeLinks(A, B), {A: answer(at(A), at(B, 9), at(ME, 9)), B: answer(at(B))})
    bench.ask()
    assert not bench.swarm.dialled and bench.links.given == {A: (at(A),), B: (at(B),)}


def test_who_was_linked_before_is_found_again_though_nobody_names_it(monkeypatch):
    """A partition took longer than links and presence last."""
    links = FakeLinks(A)
    known = {A: (at(A),), B: (at(B),)}
    bench = Bench(monkeypatch, links, {A: answer(at(A)), B: answer(at(B, 2))}, known)
    bench.ask(until=lambda: B in links.given)
    assert bench.swarm.dialled == [(B, (at(B),))]
    assert links.given == {A: (at(A),), B: (at(B, 2),)}


def test_who_is_alone_dials_those_it_knows(monkeypatch):
    bench = Bench(monkeypatch, FakeLinks(), {B: answer(at(B))}, {B: (at(B),)})
    bench.ask(until=lambda: B in bench.links.given)
    assert bench.links.given == {B: (at(B),)}


def test_of_many_that_are_lost_few_are_dialled_at_a_time(monkeypatch):
    many = {peer_id(i): (at(peer_id(i)),) for i in range(10, 100)}
    bench = Bench(monkeypatch, FakeLinks(A), {A: answer(at(A))}, many)
    bench.ask()
    assert 1 <= len(bench.swarm.dialled) <= 2


def test_the_linked_are_remembered_first_and_over_a_restart(tmp_path):
    known = KnownPeers(tmp_path / "peers.json")
    known.remember({A: (at(A),), B: (at(B),)})
    known.remember({C: (at(C),), B: (at(B, 2),)})
    again = KnownPeers(tmp_path / "peers.json")
    assert list(again.addresses.items()) == [(C, (at(C),)), (B, (at(B, 2),)), (A, (at(A),))]
    assert again.lost([C, A]) == {B: (at(B, 2),)} and again.lost([A, B, C]) == {}
    again.remember({A: (at(A),)})
    again.remember({B: (at(B, 2),), A: (at(A),)})  # the same ones, in another order
    assert list(KnownPeers(tmp_path / "peers.json").addresses) == list(again.addresses) == [B, A, C]
    again.remember({peer_id(i): (at(peer_id(i)),) for i in range(100, 100 + KNOWN_MAX)})
    assert len(again.addresses) == KNOWN_MAX and C not in again.addresses
    (tmp_path / "peers.json").write_text('{"x": ["no address"]}')
    assert KnownPeers(tmp_path / "peers.json").addresses == {}


def test_of_the_lost_one_is_of_those_linked_last():
    """Else a run of years, with hundreds that left for good, would dial those that are there once an hour."""
    many = {peer_id(i): (at(peer_id(i)),) for i in range(10, 10 + KNOWN_MAX)}
    known = FakeKnown(many)
    late = list(many)[1 : RECENT + 1]
    draws = [known.lost([peer_id(10)]) for _ in range(200)]
    assert all(any(peer in late for peer in drawn) for drawn in draws)
    assert {peer for drawn in draws for peer in drawn} > set(late)
    assert all(1 <= len(drawn) <= 2 for drawn in draws)


def test_who_has_room_for_no_link_more_dials_only_whom_it_wants_already(monkeypatch):
    links = FakeLinks(A)
    links.full, links.wanted = True, [A, C]
    bench = Bench(monkeypatch, links, {A: answer(at(A), at(B), at(C))})
    bench.ask()
    assert bench.swarm.dialled == [(C, (at(C),))]


def test_an_address_that_another_made_up_does_not_spoil_the_answer_that_passes_it_on(monkeypatch):
    bad = (f"/ip4/999.0.0.1/tcp/1/p2p/{B}", f"/dns4/{'a' * ADDRESS_BYTES_MAX}/tcp/1/p2p/{B}")
    bench = Bench(monkeypatch, FakeLinks(A), {A: answer(at(A), *bad, at(C))})
    bench.ask()
    assert not bench.heard.refused and bench.links.given == {A: (at(A),)}
    assert bench.swarm.dialled == [(C, (at(C),))]


@pytest.mark.parametrize(
    "bad",
    [
        answer(at(A), "/ip4/127.0.0.1/tcp/1000"),
        answer(at(A), 7),
        answer(at(A), f"/ip4/127.0.0.1/tcp/1/p2p/{B}\n"),
        answer(f"/ip4/127.0.0.1/tcp/0/p2p/{A}", at(B)),
        answer(*[at(B)] * ((PEERS_MAX + 1) * ADDRESSES_MAX + 1)),
        framed(b"\x91" * 1022 + b"\xc0"),
        framed(b"\x91" * 5000 + b"\xc0"),
        framed(msgpack.packb({"peers": at(B)})),
        framed(b"\xc1"),
        FRAME.pack(1 << 30, 0),
        FRAME.pack(8, 8),
    ],
    ids=[
        "no-peer",
        "no-text",
        "line",
        "port-0",
        "long",
        "nested",
        "deep",
        "map",
        "no-msgpack",
        "huge",
        "payload",
    ],
)
def test_a_bad_answer_is_refused_whole(monkeypatch, bad):
    bench = Bench(monkeypatch, FakeLinks(A), {A: bad})
    bench.ask()
    assert bench.heard.refused in ([(A, "malformed")], [(A, "oversized")])
    assert not bench.links.given and not bench.swarm.dialled


@pytest.mark.parametrize(
    ("fault", "refused"),
    [
        (SwarmError("p2pd is being restarted"), []),
        (ConnectionResetError("gone"), []),
        (RecursionError("deep"), [(A, "other")]),
    ],
)
def test_whatever_goes_wrong_with_one_the_others_are_asked(monkeypatch, fault, refused):
    bench = Bench(monkeypatch, FakeLinks(A, B), {A: fault, B: answer(at(B))})
    bench.ask()
    assert bench.links.given == {B: (at(B),)} and bench.heard.refused == refused


@pytest.mark.parametrize("part", [b"", answer(at(A))[:-3]], ids=["silent", "drips"])
def test_who_does_not_answer_holds_nobody_up(monkeypatch, part):
    """Not even while we wait for it."""
    bench = Bench(monkeypatch, FakeLinks(A, B), {A: part, B: answer(at(B), at(C)), C: answer(at(C))})
    bench.ask(until=lambda: C in bench.links.given)
    assert bench.links.given == {B: (at(B),), C: (at(C),)} and not bench.heard.refused


def test_who_did_not_answer_in_time_is_asked_again(monkeypatch):
    monkeypatch.setattr(peer_exchange, "ASK_S", 0.002)
    monkeypatch.setattr(peer_exchange, "ASK_EVERY_S", 0.004)
    bench = Bench(monkeypatch, FakeLinks(A), {A: b""})
    bench.ask(until=lambda: bench.swarm.asked[A] > 1)
    assert bench.swarm.asked[A] > 1 and not bench.links.given
