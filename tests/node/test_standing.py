"""Who was removed while it was off: whom it asks, and of whom it believes it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tapestry.dht.p2pd import SwarmError
from tapestry.node.daemon import standing
from tapestry.node.daemon.standing import Standing
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.net.admission import Answer
from tapestry.node.protocol.members import Charter, first_roll
from tapestry.node.protocol.snapshot import PeerSnapshot

RUN = "ab" * 32
ME, FOUNDER, LIAR, OTHER = "me", "the founder", "a liar", "an other"
REMOVED = Answer("removed", why="sent noise")


class Run:
    """What the node's own records say, whom it is linked with, and what others answer."""

    def __init__(self, charter: Charter | None = None, council: Sequence[str] = (FOUNDER,)) -> None:
        roll = first_roll(RUN, charter or Charter(), [ME, FOUNDER, LIAR, OTHER])
        self.roll = replace(roll, council=tuple(council))
        self.linked: list[PeerSnapshot] = []
        self.answers: dict[str, Answer] = {}  # who is not here cannot be reached
        self.asked: list[str] = []
        self.standing = Standing(self, ME, self.ask)  # type: ignore[arg-type]

    def snapshot(self) -> Any:
        return SimpleNamespace(roll=self.roll, peers=tuple(self.linked))

    def membership(self) -> Any:
        return SimpleNamespace(roll=self.roll)

    async def ask(self, peer: str) -> Answer:
        self.asked.append(peer)
        if peer not in self.answers:
            raise SwarmError("nobody there")
        return self.answers[peer]

    def look(self, times: int = 1) -> UserError | None:
        """The last result of so many looks, or the first that ends the node."""

        async def main() -> UserError | None:
            for _ in range(times):
                if (ends := await self.standing.look()) is not None:
                    return ends
            return None

        return asyncio.run(main())

    def link(self, peer: str, epoch: int | None = 3) -> None:
        """It is up; without an epoch it has said nothing yet."""
        self.linked = [PeerSnapshot(peer, "training", epoch, "", True, True, 0.1)]


def test_who_was_removed_while_it_was_off_learns_it_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "ASK_EVERY_S", 0.0)
    run = Run()
    run.link(FOUNDER, epoch=None)  # its links open, and end at once
    run.answers[FOUNDER] = REMOVED
    ends = asyncio.run(asyncio.wait_for(run.standing.watch(), 5.0))
    assert ends.line == "this node was removed from the run: sent noise"
    assert ends.exit_code == ExitCode.REFUSED


def test_it_asks_one_member_at_a_time_those_first_who_decide_and_begins_again() -> None:
    run = Run()
    assert run.look(2 * 3) is None
    assert run.asked == [FOUNDER, LIAR, OTHER] * 2


def test_who_decides_nothing_ends_no_members_node(caplog: pytest.LogCaptureFixture) -> None:
    """All that a liar gains is one line, however often it is asked; nor do two."""
    run = Run()
    run.answers = {LIAR: REMOVED, OTHER: REMOVED}
    with caplog.at_level("WARNING"):
        assert run.look(12) is None
    assert [r.getMessage().split(" ")[0] for r in caplog.records] == ["removed=said"] * 2


def test_where_several_decide_one_of_them_is_not_believed_and_as_many_as_a_removal_needs_are() -> None:
    for charter, council in (
        (Charter(admit_by="majority"), ()),
        (Charter(admit_by="council 2/3"), (ME, FOUNDER, LIAR)),
    ):
        run = Run(charter, council)
        run.answers = {LIAR: REMOVED}
        assert run.look(12) is None
        run.answers = dict.fromkeys((LIAR, FOUNDER, OTHER), REMOVED)
        assert run.look(12) is not None


def test_who_says_later_that_we_are_a_member_takes_its_word_back() -> None:
    run = Run(Charter(admit_by="council 2/3"), (ME, FOUNDER, LIAR))
    for answers in ({FOUNDER: REMOVED}, {FOUNDER: Answer("member")}, {LIAR: REMOVED}):
        run.answers = answers
        assert run.look(3) is None  # once round
    run.answers = {FOUNDER: REMOVED}
    assert run.look(3) is not None


def test_while_a_member_that_is_linked_talks_with_us_nobody_is_asked_or_believed() -> None:
    run = Run()
    run.link(OTHER)
    run.answers[FOUNDER] = REMOVED
    assert run.look(12) is None and run.asked == []
    run.link("a stranger")  # that can be anybody, in an open run
    assert run.look(1) is not None

    late = Run()
    late.answers[FOUNDER] = REMOVED
    ask = late.standing._ask

    async def meanwhile(peer: str) -> Answer:
        late.link(OTHER)
        return await ask(peer)

    late.standing._ask = meanwhile
    assert late.look(1) is None and late.asked == [FOUNDER]


def test_who_is_no_member_by_its_own_records_has_nothing_to_ask() -> None:
    run = Run()
    run.roll = replace(run.roll, members={p: s for p, s in run.roll.members.items() if p != ME})
    run.answers[FOUNDER] = REMOVED
    assert run.look(3) is None and run.asked == []
