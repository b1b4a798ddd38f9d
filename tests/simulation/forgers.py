"""A member that names others without their word, in some worlds.

Whenever it leads, its roster says that electors vote on disks which they never had, or that members vote who
are not there: who is believed to have lost its disk stands by, who is not there never votes, and with a few
of either no quorum is left for the next record. Or it says READY without a word that holds, so that whoever
names it makes a roster that nobody follows. No record may come of any of it. Drawn apart, so that other
worlds stay as they were.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from simulation.draws import choice, hex_digits

from tapestry.node.protocol.canon import quorum
from tapestry.node.protocol.messages import Message, Ready, Roster
from tapestry.node.protocol.record import Member

if TYPE_CHECKING:
    from simulation.shell import Node
    from simulation.world import World

SHARE = 1 / 12  # of the worlds have one
FEWEST = 3  # electors, so that the others are a quorum without it
KINDS = ("lives", "lives", "absent", "absent", "ready")


class Forgers:
    """What concerns it in one world."""

    def __init__(self, world: World, drawn: bool, names: list[str]) -> None:
        self.world = world
        rng = random.Random(f"forger {world.seed}")
        drawn = drawn and len(names) > 2 and rng.random() < SHARE
        self.name = choice(rng, names) if drawn else ""
        self.kind = choice(rng, KINDS)
        self.life, self.word = hex_digits(rng, 32), hex_digits(rng, 64)
        self.lied = 0  # rosters and READYs

    def hears(self, sender: str, to: str, message: Message) -> Message:
        """Who is to be named on another disk contributes nothing to its rosters: none of its shards come."""
        if to != self.name or self.kind != "lives" or not isinstance(message, Ready):
            return message
        if message.forced or message.accepted is not None or sender not in self._victims():
            return message
        return replace(message, weight=0, contribution="")

    def says(self, node: Node, message: Message) -> Message:
        """What it says in the place of its message; as the leader it goes by that itself."""
        if node.name != self.name or not isinstance(message, Ready | Roster) or message.forced:
            return message
        if isinstance(message, Ready):
            if self.kind != "ready":
                return message
            self.lied += 1
            return replace(message, seat=self.word)
        round_ = node.core.round if node.core is not None else None
        if round_ is None or self.kind == "ready" or len(round_.electorate) < FEWEST:
            return message
        forged = self._forged(message, sorted(round_.state.at.roll.members))
        if forged != message:
            self.lied += 1
        if round_.exchange.roster == message:
            round_.exchange.roster = forged
        return forged

    def _forged(self, roster: Roster, roll: list[str]) -> Roster:
        """Of one that is forged already, the same."""
        named = {m.peer: m for m in roster.members}
        if self.kind == "absent":
            absent = [Member(p, 0, "", self.life, seat=self.word) for p in roll if p not in named]
            lines = sorted([*roster.members, *absent], key=lambda m: m.peer)
        else:
            victims = [p for p in self._victims() if p in named and not named[p].weight]
            forged = {p: Member(p, 0, "", self.life, seat=self.word) for p in victims}
            lines = [forged.get(m.peer, m) for m in roster.members]
        index = {m.peer: at for at, m in enumerate(lines)}
        reducers = tuple([index[roster.members[at].peer] for at in roster.reducers])
        return replace(roster, members=tuple(lines), reducers=reducers)

    def _victims(self) -> list[str]:
        """As many electors as a quorum can do without."""
        core = self.world.nodes[self.name].core
        electorate = core.round.electorate if core is not None and core.round is not None else ()
        if len(electorate) < FEWEST:
            return []
        others = [p for p in electorate if p != self.name]
        return others[quorum(len(electorate)) - 1 :]
