"""What members say of their data reaches every member, in their own words and nobody else's."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from state.kit import Stream, stream_pair

from tapestry.dht.identity import Identity
from tapestry.node.daemon.descriptions_desk import DescriptionsDesk
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import NodeCrypto, ReaderCrypto
from tapestry.node.net import descriptions as d
from tapestry.node.net.throttle import Throttles
from tapestry.node.net.wire import RemoteProtocolError
from tapestry.node.protocol.members import Charter, first_roll
from tapestry.node.protocol.strict import Malformed

RUN = "ab" * 32
OWN = [Identity(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in range(1, 4)]
PEERS = [one.peer_id for one in OWN]
ROLL = first_roll(RUN, Charter(), PEERS)
DATA = """
[[source]]
path = "/texts"
owner = "the library"
licence = "CC-BY-4.0"
mode = "{mode}"
purposes = ["base"]
description = "{description}"
"""


def known(folder: Path, n: int) -> d.Descriptions:
    return d.Descriptions(folder / "descriptions.json", RUN, NodeCrypto(OWN[n]))


class Member:
    """A desk, and what it was told to refuse."""

    def __init__(self, folder: Path, n: int, description: str = "", mode: str = "open") -> None:
        self.home, self.peer = Home(folder), PEERS[n]
        folder.mkdir()
        if description:
            (folder / "data.toml").write_text(DATA.format(description=description, mode=mode))
        loop: Any = SimpleNamespace(snapshot=lambda: SimpleNamespace(roll=ROLL))
        self.desk = DescriptionsDesk(loop, self.home, RUN, self.peer, NodeCrypto(OWN[n]), Throttles())
        self.desk.say()
        self.refused: list[tuple[str, str]] = []

    async def asks(self, other: Member) -> None:
        async with stream_pair() as (mine, theirs):

            async def opened() -> Stream:
                return mine

            def count(direction: str, size: int) -> None: ...

            def refused(peer: str, reason: str, text: str) -> None:
                self.refused.append((peer, reason))

            serving = asyncio.create_task(other.desk.serve(self.peer, *theirs, count))
            await self.desk.ask(other.peer, opened, count, refused)
            with contextlib.suppress(RemoteProtocolError):
                await serving

    def heard(self) -> dict[str, tuple[str, ...]]:
        """As an export finds it on the disk."""
        found = d.Descriptions(self.home.descriptions, RUN, ReaderCrypto()).all
        return {one.peer: one.texts for one in found}


def test_words_reach_who_never_met_their_member_and_private_data_is_never_named(tmp_path: Path) -> None:
    a = Member(tmp_path / "a", 0, "old newspapers")
    b = Member(tmp_path / "b", 1, "a secret", mode="participant-private")
    c = Member(tmp_path / "c", 2, "letters")

    async def main() -> None:
        await b.asks(a)
        await c.asks(b)

    asyncio.run(main())
    said = {a.peer: ("old newspapers (of the library, CC-BY-4.0)",)}
    assert b.heard() == said
    assert c.heard() == said | {c.peer: ("letters (of the library, CC-BY-4.0)",)}
    assert "secret" not in "".join(p.read_text() for p in tmp_path.glob("*/descriptions.json"))
    assert not (a.refused or b.refused or c.refused)


def test_every_member_is_asked_once_and_then_one_at_a_time(tmp_path: Path) -> None:
    desk = Member(tmp_path / "a", 0).desk
    asked: list[tuple[float, str]] = []
    for tick in range(200):
        now = tick * 5.0
        peer = desk.next_of(("c", "b") if tick else (), now)
        if peer is not None:
            desk._asked_at[peer] = now
            asked.append((now, peer))
    assert asked == [(5.0, "b"), (10.0, "c"), (310.0, "b"), (610.0, "c"), (910.0, "b")]
    assert desk.next_of(("b", "c", "d"), 1000.0) == "d", "who is met is asked at once"


def test_what_is_taken_back_is_taken_back_everywhere(tmp_path: Path) -> None:
    a, b = Member(tmp_path / "a", 0, "letters"), Member(tmp_path / "b", 1)
    asyncio.run(b.asks(a))
    (tmp_path / "a" / "data.toml").unlink()
    a.desk.say()
    asyncio.run(b.asks(a))
    assert b.heard() == {a.peer: ()} == a.heard()


def test_who_changes_a_members_words_is_refused_and_the_words_stay(tmp_path: Path) -> None:
    a, b, c = Member(tmp_path / "a", 0, "letters"), Member(tmp_path / "b", 1), Member(tmp_path / "c", 2)
    asyncio.run(b.asks(a))
    asyncio.run(c.asks(a))
    (one,) = b.desk._known.all
    b.desk._known._by_peer[a.peer] = replace(one, at=one.at + 1, texts=("stolen letters",))
    asyncio.run(c.asks(b))
    assert c.refused == [(b.peer, "signature")] and c.heard() == a.heard()


def test_an_older_word_a_stranger_and_a_clock_far_ahead_are_not_heard(tmp_path: Path) -> None:
    mine = known(tmp_path, 0)
    mine.say(PEERS[0], ("first",), 100)
    (old,) = mine.all
    assert not mine.say(PEERS[0], ("first",), 200), "the same words are no news"
    mine.say(PEERS[0], ("second",), 50)
    (new,) = mine.all
    assert new.at == 101, "a clock that was set back makes no word older"
    roll = first_roll(RUN, Charter(), PEERS[:1])
    other = d.Descriptions(tmp_path / "other.json", RUN, NodeCrypto(OWN[1]))
    assert other.take([new], roll, 100) == [PEERS[0]] and other.take([old], roll, 100) == []
    elsewhere = d.Descriptions(tmp_path / "third.json", RUN, NodeCrypto(OWN[1]))
    elsewhere.say(PEERS[1], ("a stranger",), 100)
    assert other.take(elsewhere.all, roll, 100) == []
    mine.say(PEERS[0], ("from the future",), 100 + d.AHEAD_S + 1)
    assert other.take(mine.all, roll, 100) == [] and [one.texts for one in other.all] == [("second",)]


def test_what_was_said_under_a_clock_far_ahead_is_said_anew_when_the_clock_is_right(tmp_path: Path) -> None:
    """It was not heard until that time had come, and nothing told its member."""
    mine, theirs = known(tmp_path, 0), d.Descriptions(tmp_path / "o.json", RUN, NodeCrypto(OWN[1]))
    ahead = 2_000_000_000
    mine.say(PEERS[0], ("words",), ahead)
    assert theirs.take(mine.all, ROLL, ahead) == [PEERS[0]], "its clock was as wrong"
    assert mine.say(PEERS[0], ("words",), 100) and [one.at for one in mine.all] == [100]
    assert theirs.take(mine.all, ROLL, 100) == [PEERS[0]] and theirs.all == mine.all
    mine.say(PEERS[0], ("others",), ahead)
    assert mine.say(PEERS[0], ("newer",), 200) and [one.at for one in mine.all] == [200]
    mine.say(PEERS[0], ("taken back later",), ahead)
    assert mine.say(PEERS[0], (), 300) and [(one.at, one.texts) for one in mine.all] == [(300, ())]


def test_who_is_removed_is_forgotten(tmp_path: Path) -> None:
    mine, theirs = known(tmp_path, 0), d.Descriptions(tmp_path / "o.json", RUN, NodeCrypto(OWN[1]))
    theirs.say(PEERS[1], ("words",), 100)
    assert mine.take(theirs.all, ROLL, 100) == [PEERS[1]]
    assert mine.take([], first_roll(RUN, Charter(), PEERS[:1]), 100) == [] and mine.all == ()
    assert known(tmp_path, 0).all == ()


def test_a_newcomer_of_an_open_run_is_heard_once_it_has_contributed(tmp_path: Path) -> None:
    theirs = d.Descriptions(tmp_path / "o.json", RUN, NodeCrypto(OWN[1]))
    theirs.say(PEERS[1], ("words",), 100)
    roll = first_roll(RUN, Charter(admission="open"), PEERS[:1])
    mine = known(tmp_path, 0)
    assert mine.take(theirs.all, roll, 100) == []
    assert mine.take(theirs.all, replace(roll, counted={PEERS[1]: 1}), 100) == [PEERS[1]]
    theirs.take(mine.all, roll, 100)
    assert [one.peer for one in theirs.all] == [PEERS[1]], "it does not forget its own words meanwhile"


def test_words_of_another_run_are_not_this_ones(tmp_path: Path) -> None:
    theirs = d.Descriptions(tmp_path / "o.json", "cd" * 32, NodeCrypto(OWN[1]))
    theirs.say(PEERS[1], ("words",), 100)
    with pytest.raises(Malformed, match="did not sign"):
        known(tmp_path, 0).take(theirs.all, ROLL, 100)


def test_a_damaged_file_is_dropped_and_an_answer_has_a_limit(tmp_path: Path) -> None:
    mine = known(tmp_path, 0)
    mine.say(PEERS[0], ("words",), 100)
    path = tmp_path / "descriptions.json"
    path.write_bytes(path.read_bytes().replace(b"words", b"wards"))
    assert known(tmp_path, 0).all == ()
    many = [d.Description(f"{n:052}", n, ("x" * 1000,) * 10, "00" * 64) for n in range(200)]
    packed = d.unpack(d.pack(many))
    assert len(d.pack(many)) <= d.BYTES_MAX and [one.at for one in packed][:2] == [199, 198]
    for bad in (b"{}", b"[[]]", b"nonsense", b'[["p",1,["' + b"x" * 2000 + b'"],"00"]]'):
        with pytest.raises(Malformed):
            d.unpack(bad)
