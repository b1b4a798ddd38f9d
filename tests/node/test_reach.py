"""Who is asked to dial this node, who carries it, and what its peers are told of that."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from tapestry.dht.addresses import CIRCUIT, circuit_address, is_usable, relay_of
from tapestry.dht.p2pd import SwarmError
from tapestry.dht.reachability import AUTONAT, DENIED, PLACE_REFUSED, TOO_MANY, hop_answer
from tapestry.node.net import reach as reach_module
from tapestry.node.net.reach import (
    ASKED_KEPT,
    LOOK_S,
    MISSED_S,
    PATIENCE_S,
    REFUSED_S,
    RELAYS_MAX,
    RENEW_S,
    SAID_S,
    SURE_S,
    UNSURE_S,
    Reach,
    Relays,
    Verdicts,
    candidates,
    judges_of,
    routes_of,
)

ID = "12D3KooWFAQWzWY2n8KUGGaXykyzafrNgSCsfTmabDmNUZkDoTn5"


def at(ip: str, peer: str, port: int = 4001) -> str:
    return f"/ip4/{ip}/tcp/{port}/p2p/{peer}"


class Peers:
    def __init__(self, told: dict[str, tuple[str, ...]], *given: str) -> None:
        self.linked, self.addresses = list(told), told
        self.given: dict[str, tuple[str, ...]] = dict.fromkeys(given, ())


def test_the_newest_three_say_whether_we_can_be_dialled_and_no_answer_lasts():
    verdicts = Verdicts()
    assert verdicts.reachable(0.0) is None
    verdicts.says("a", True, 0.0)
    assert verdicts.reachable(0.0) is True, "the only one who answered"
    verdicts.says("b", False, 1.0)
    assert verdicts.reachable(1.0) is False, "one who says yes may lie"
    verdicts.says("c", None, 2.0)
    verdicts.says("d", True, 3.0)
    assert verdicts.reachable(3.0) is True
    verdicts.says("e", False, 4.0)
    assert verdicts.reachable(4.0) is False
    assert verdicts.reachable(SAID_S + 3.5) is False and verdicts.reachable(SAID_S + 4.0) is None


def verdicts_among(peers: list[str], liars: list[str], hours: int = 4) -> tuple[Counter[str], float]:
    """How often each was asked by a node that nobody can dial, and for how long it took itself for one that
    others can, by the word of the liars. A link that flaps is a new one."""
    verdicts, asked, misled_s = Verdicts(), Counter[str](), 0.0
    for tick in range(hours * 1800):
        now = tick * LOOK_S
        linked = peers if tick % 100 else peers[1:]
        if peer := verdicts.next_to_ask(linked, False, now):
            asked[peer] += 1
            verdicts.says(peer, peer in liars, now)
        misled_s += LOOK_S * bool(verdicts.reachable(now))
    return asked, misled_s


def test_one_false_yes_takes_no_relay_from_a_node_that_nobody_can_dial():
    """It was asked again and again, every other time, and its word counted for as long as it was linked."""
    eight = [f"p{n}" for n in range(8)]
    asked, misled_s = verdicts_among(eight, liars=["p0"])
    assert len(asked) == 8 and max(asked.values()) - min(asked.values()) <= 1
    assert misled_s <= UNSURE_S, "until a second one was asked"
    assert verdicts_among(["p0", "p1"], liars=["p0"])[1] <= UNSURE_S


@pytest.mark.parametrize(
    ("members", "judges"),
    [
        ("34567", ["3", "4", "5", "6", "7"]),
        ("234", ["2", "3", "4"]),
        ("5", ["5", "1", "2"]),
        ("", ["1", "2", "3"]),
    ],
)
def test_whether_we_can_be_dialled_is_asked_of_members_and_of_others_where_they_are_few(
    members: str, judges: list[str]
):
    """In an open run anybody may be linked, under many names; and where one member is, it alone may lie."""
    told = {ID[:-1] + name: (at("5.6.7.8", ID[:-1] + name),) for name in "1234567"}
    asked: list[str] = []

    async def open_stream(peer: str, protocol: str, timeout_s: float) -> None:
        asked.extend([peer[-1]] if protocol == AUTONAT else [])
        raise SwarmError("it is gone")

    async def main(monkeypatch: pytest.MonkeyPatch) -> None:
        swarm: Any = SimpleNamespace(peer_id=ID, open_stream=open_stream)
        own, now = (at("192.168.1.9", ID),), 0.0
        monkeypatch.setattr(reach_module, "_now", lambda: now)
        reach = Reach(swarm, Peers(told), lambda: own, False, lambda: None, lambda peer: peer[-1] in members)
        reach._connections = told
        for _ in range(2 * len(judges)):
            async with asyncio.TaskGroup() as tasks:
                reach._look(tasks)
            now += SURE_S

    with pytest.MonkeyPatch.context() as monkeypatch:
        asyncio.run(main(monkeypatch))
    assert asked == 2 * judges


@pytest.mark.parametrize("liars", [["m"], ["a", "b"]])
def test_neither_a_lone_member_nor_those_that_anybody_can_be_take_the_relays_of_a_node(liars: list[str]):
    """A lone member was the only one asked; and beside it two free keys would be the majority."""
    direct, verdicts, misled_s = ["a", "b", "c", "m"], Verdicts(), 0.0
    for tick in range(1800):
        now = tick * LOOK_S
        if peer := verdicts.next_to_ask(*judges_of(direct, lambda one: one == "m"), now):
            verdicts.says(peer, peer in liars, now)
        misled_s += LOOK_S * bool(verdicts.reachable(now))
    assert misled_s <= UNSURE_S, "until a second one was asked"


def test_whose_turn_it_is_is_remembered_of_so_many_and_no_more():
    verdicts = Verdicts()
    for n in range(2 * ASKED_KEPT):
        assert verdicts.next_to_ask([f"p{n}"], False, n * SURE_S)
    assert len(verdicts._asked_at) == ASKED_KEPT


def test_a_relay_is_needed_once_nobody_could_dial_us_or_nobody_said_for_a_while():
    verdicts = Verdicts()
    assert not verdicts.needs_relay(1000.0), "nobody could be asked yet"
    verdicts.next_to_ask(["a"], False, 1000.0)
    assert not verdicts.needs_relay(1000.0 + PATIENCE_S - 1)
    assert verdicts.needs_relay(1000.0 + PATIENCE_S)
    verdicts.says("a", True, 1001.0)
    assert not verdicts.needs_relay(1000.0 + PATIENCE_S)
    verdicts.says("a", False, 1002.0)
    assert verdicts.needs_relay(1002.0)
    verdicts.forget()  # the node has moved
    assert not verdicts.needs_relay(1003.0)


def test_peers_are_asked_in_turn_soon_until_one_answers_and_seldom_after():
    verdicts, asked = Verdicts(), []
    for second in range(int(UNSURE_S) * 3):
        if peer := verdicts.next_to_ask(["a", "b"], False, float(second)):
            asked.append((second, peer))
    assert asked == [(0, "a"), (30, "b"), (60, "a")]
    verdicts.says("a", False, 75.0)
    assert verdicts.next_to_ask(["a", "b"], False, 60.0 + SURE_S - 1) is None
    assert verdicts.next_to_ask(["a", "b"], False, 60.0 + SURE_S) == "b"
    verdicts.forget()  # the node has moved
    assert verdicts.reachable(360.0) is None and verdicts.next_to_ask(["a"], False, 360.0) == "a"


def test_only_peers_that_others_can_dial_as_we_did_may_carry_us_and_the_public_come_first():
    public, lan, caller, guest, named, stranger = (ID[:-1] + letter for letter in "123456")
    told = {
        public: (at("5.6.7.8", public),),
        lan: (at("192.168.1.9", lan),),
        caller: (at("9.9.9.9", caller),),
        guest: (circuit_address(at("5.6.7.8", public), guest),),
        named: (),
    }
    connections = {
        public: (at("5.6.7.8", public),),
        lan: (at("192.168.1.9", lan),),
        caller: (at("9.9.9.9", caller, 50123),),
        guest: told[guest],
        named: (at("7.7.7.7", named), "/strange/address"),
        stranger: (at("8.8.8.8", stranger),),
    }
    peers = Peers(told, named)
    assert list(candidates(connections, peers, None)) == [public, named]
    assert list(candidates(connections, peers, False)) == [public, caller, named]  # we dialled them all
    assert candidates(connections, Peers({lan: told[lan]}), None) == {lan: at("192.168.1.9", lan)}


def test_a_place_is_renewed_and_one_lost_or_refused_is_made_good_by_another():
    relays, four = Relays(), {p: at("5.6.7.8", p) for p in "abcd"}
    due = relays.due(four, True, 0.0)
    assert list(due) == ["a", "b"] and len(due) == RELAYS_MAX
    relays.granted("a", four["a"], 3600.0, 0.0)
    relays.refused("b", 0.0)
    assert list(relays.due(four, True, 1.0)) == ["c"]
    relays.granted("c", four["c"], 3600.0, 1.0)
    assert relays.due(four, True, 2.0) == {} and relays.peers == ("a", "c")
    assert list(relays.due(four, True, RENEW_S)) == ["a"]
    del four["a"]  # its connection is gone
    assert list(relays.due(four, True, 3.0)) == ["d"] and relays.peers == ("c",)
    assert list(relays.due({"b": "/x"}, True, REFUSED_S)) == ["b"]


def test_who_gives_no_answer_keeps_its_place_for_its_time_and_is_asked_again_soon():
    """One slow answer cost a place, and its peer was not asked for five minutes."""
    relays, one = Relays(), {"a": at("5.6.7.8", "a")}
    relays.missed("a", 0.0)
    assert relays.due(one, True, MISSED_S - 1) == {} and list(relays.due(one, True, MISSED_S)) == ["a"]
    relays.granted("a", one["a"], 2 * RENEW_S, 10.0)
    now = 10.0 + RENEW_S
    while list(relays.due(one, True, now)) == ["a"] and relays.peers:
        relays.missed("a", now)
        assert relays.addresses(ID) and relays.due(one, True, now + MISSED_S - 1) == {}
        now += MISSED_S
    assert now == 10.0 + 2 * RENEW_S and relays.addresses(ID) == (), "nobody answered for its whole time"


class Stream:
    """What a peer answers on it, if anything; and what is written to it is lost."""

    def __init__(self, answer: bytes) -> None:
        self.reader = asyncio.StreamReader()
        self.reader.feed_data(bytes([len(answer)]) + answer if answer else b"")
        self.reader.feed_eof()

    def write(self, data: bytes) -> None: ...
    async def drain(self) -> None: ...
    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("answer", "is_asked_again"),
    [
        (b"", True),
        (hop_answer(DENIED), True),
        (hop_answer(PLACE_REFUSED), False),
        (hop_answer(TOO_MANY), False),
    ],
)
def test_only_who_refuses_is_left_in_peace(answer: bytes, is_asked_again: bool):
    """At a new link the relay's own streams may come up after ours: then it says that it does not know us."""

    async def open_stream(*_: object) -> tuple[asyncio.StreamReader, Stream]:
        stream = Stream(answer)
        return stream.reader, stream

    async def main() -> None:
        swarm: Any = SimpleNamespace(peer_id=ID, open_stream=open_stream)
        reach = Reach(swarm, Peers({}), tuple, False, lambda: None, lambda peer: True)
        await reach._reserve("a", at("5.6.7.8", "a"))
        later = asyncio.get_running_loop().time() + MISSED_S + 1
        assert bool(reach._relays.due({"a": at("5.6.7.8", "a")}, True, later)) == is_asked_again

    asyncio.run(main())


def test_who_can_be_dialled_gives_its_places_back():
    relays = Relays()
    relays.granted("a", at("5.6.7.8", "a"), 3600.0, 0.0)
    assert relays.due({"a": at("5.6.7.8", "a")}, False, 1.0) == {} and relays.addresses(ID) == ()


def test_where_a_relay_carries_us_is_an_address_that_peers_take():
    relays, relay = Relays(), ID[:-1] + "6"
    relays.granted(relay, at("5.6.7.8", relay), 3600.0, 0.0)
    (address,) = relays.addresses(ID)
    assert address == circuit_address(at("5.6.7.8", relay), ID)
    assert is_usable(address, ID) and relay_of(address) == relay and relay_of(at("5.6.7.8", ID)) == ""


def test_a_peer_is_relayed_where_all_its_connections_are():
    relayed, direct = at("5.6.7.8", "r") + CIRCUIT + "/p2p/a", at("9.9.9.9", "a")
    assert routes_of({"a": (relayed,), "b": (relayed, direct), "c": ()}) == {"a": "relayed", "b": "direct"}
