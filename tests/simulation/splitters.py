"""A member that tells half of the others another roster whenever it leads, in some worlds.

Other reducers in odd epochs, a contribution less in even ones: who has which roster waits for shards that
the rest owe somebody else, and what one asks of another may be sent again and again. No record needs to come
of it; but each of its ballots has to be given up by the clock of stalls, and so has its going on to the next.
Bytes are told of as they are in a real run: when a frame begins, whatever it turns out to be. Drawn apart, so
that other worlds stay as they were.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from simulation.draws import choice

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.chain import Member
from tapestry.node.protocol.messages import Message, Roster

if TYPE_CHECKING:
    from simulation.shell import Node
    from simulation.world import World

SHARE = 0.1  # of the worlds have one
TOLD_EVERY_S = 1.0  # as PROGRESS_EVERY_S of net/links.py


class Splitters:
    """What concerns it in one world."""

    def __init__(self, world: World, drawn: bool, names: list[str]) -> None:
        self.world = world
        rng = random.Random(f"splitter {world.seed}")
        drawn = drawn and len(names) > 2 and rng.random() < SHARE
        self.name = choice(rng, names) if drawn else ""
        self.told_at: dict[tuple[str, str], float] = {}

    def says(self, sender: Node, to: str, message: Message) -> Message:
        if sender.name != self.name or not isinstance(message, Roster) or message.forced:
            return message
        others = [m.peer for m in message.members if m.peer != self.name]
        round_ = sender.core.round if sender.core is not None else None
        seats = {p: r.seat for p, r in round_.state.ready.items()} if round_ is not None else {}
        return another(message, to, seats) if to in others[::2] else message

    def begins(self, sender: Node, receiver: Node, way_s: float) -> None:
        """A frame of bulk is on its way: its receiver sees that bytes come."""
        pair, now = (sender.name, receiver.name), self.world.now
        if self.name and now - self.told_at.get(pair, -TOLD_EVERY_S) >= TOLD_EVERY_S:
            self.told_at[pair] = now
            self.world.later(way_s, receiver, ev.BulkProgress(sender.name))


def another(roster: Roster, to: str, seats: dict[str, str]) -> Roster:
    """One that `to` may follow as well. `seats`: what the others have signed."""
    if roster.epoch % 2:
        count = len(roster.members)
        return replace(roster, reducers=tuple((index + 1) % count for index in roster.reducers))
    dropped = next((m for m in roster.members if m.weight and m.peer != to), None)
    members = tuple(
        Member(m.peer, 0, "", m.life, seat=seats.get(m.peer, "")) if m is dropped else m
        for m in roster.members
    )
    return replace(roster, members=members)
