"""A member that names itself alone whenever it leads, in some worlds.

It takes every promise for that of a voter which has nothing to give, and so its roster is one that any leader
might send: a quorum of the electors, one of them with a contribution, its own. The mean of one contribution
is that contribution, whatever the rule. No record may come of it, unless another leader of the round names
few as well, or nobody who voted for it heard a quorum of the electors: at the rim of a star the hub leads
whatever it says (protocol/narrow.py). Drawn apart, so that other worlds stay as they were.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from simulation.draws import choice

from tapestry.node.protocol.audit import names_few
from tapestry.node.protocol.messages import Accept, Message, Ready, Roster
from tapestry.node.protocol.record import Record

if TYPE_CHECKING:
    from simulation.shell import Node
    from simulation.world import World

SHARE = 0.1  # of the worlds have one


class Autocrats:
    """What concerns it in one world."""

    def __init__(self, world: World, drawn: bool, names: list[str]) -> None:
        self.world = world
        rng = random.Random(f"autocrat {world.seed}")
        drawn = drawn and len(names) > 2 and rng.random() < SHARE
        self.name = choice(rng, names) if drawn else ""
        self.named: set[tuple[str, int]] = set()  # head and ballot of its own rosters that name few
        self.few: dict[str, set[str]] = {}  # head -> who led a ballot that names few
        self.by_choice: set[tuple[str, int]] = set()  # head, ballot: a voter heard a quorum

    def hears(self, name: str, message: Message) -> Message:
        """What it makes of what others say."""
        if name != self.name or not isinstance(message, Ready) or message.accepted is not None:
            return message
        return replace(message, weight=0, contribution="")

    def says(self, node: Node, message: Message) -> None:
        """Remember who names few."""
        round_ = node.core.round if node.core is not None else None
        if not self.name or round_ is None:
            return
        if isinstance(message, Accept) and node.name != self.name:
            ctx, state = round_.ctx, round_.state
            if sum(ctx.heard(p, self.world.now) for p in state.voters) >= state.need:
                self.by_choice.add((message.head, message.ballot))
        if not isinstance(message, Roster) or message.forced:
            return
        counted = sum(m.weight > 0 for m in message.members)
        if names_few(message.members):
            self.few.setdefault(message.head, set()).add(node.name)
            if node.name == self.name and len(round_.state.before.intersection(round_.electorate)) > counted:
                self.named.add((message.head, message.ballot))

    def on_record(self, record: Record) -> None:
        body = record.body
        at = (body.prev, record.ballot)
        if at in self.named and at in self.by_choice and self.few[body.prev] == {self.name}:
            self.world.fail(self.name, f"record {body.epoch} is of its contribution alone, by its own word")
