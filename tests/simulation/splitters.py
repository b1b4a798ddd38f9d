"""A member that tells half of the others another roster whenever it leads, in some worlds.

In most of them it signs both, or nobody would follow the second: members that followed different ones have
the proof together, and it is made once an honest one of them leads. Nobody else is ever proven to have told
two. In the others it leaves the signature of the first on the second, and nobody follows that.

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
from tapestry.node.protocol.messages import Message, Roster
from tapestry.node.protocol.receipts import TwoRosters, is_signed, receipt_of, signed
from tapestry.node.protocol.record import Member
from tapestry.node.protocol.round_state import RoundState

if TYPE_CHECKING:
    from simulation.shell import Node
    from simulation.world import World

SHARE = 0.1  # of the worlds have one
UNSIGNED = 0.3  # of these worlds
PROVEN_WITHIN = 4  # rounds in which members followed different rosters: some have forgotten it by a crash
TOLD_EVERY_S = 1.0  # as PROGRESS_EVERY_S of net/links.py


class Splitters:
    """What concerns it in one world."""

    def __init__(self, world: World, drawn: bool, names: list[str]) -> None:
        self.world = world
        rng = random.Random(f"splitter {world.seed}")
        drawn = drawn and len(names) > 2 and rng.random() < SHARE
        self.name = choice(rng, names) if drawn else ""
        self.unsigned = rng.random() < UNSIGNED
        self.proven = 0
        self.followed: dict[
            tuple[str, int], set[str]
        ] = {}  # head and ballot -> signatures of what is followed
        self.split_heads: set[str] = set()  # in whose round members followed different rosters of it
        self.told_at: dict[tuple[str, str], float] = {}

    def says(self, sender: Node, to: str, message: Message) -> Message:
        if sender.name != self.name or not isinstance(message, Roster) or message.forced:
            return message
        others = [m.peer for m in message.members if m.peer != self.name]
        round_ = sender.core.round if sender.core is not None else None
        seats = {p: r.seat for p, r in round_.state.ready.items()} if round_ is not None else {}
        return another(message, to, seats) if to in others[::2] else message

    def signs(self, sender: Node, message: Message) -> Message:
        """Whoever tells another roster than its node has named signs that as well."""
        if not isinstance(message, Roster) or (sender.name == self.name and self.unsigned):
            return message
        run_id, crypto = self.world.rules.run_id, sender.crypto
        if is_signed(receipt_of(sender.name, message, crypto), run_id, crypto):
            return message
        return signed(message, run_id, sender.name, crypto)

    def on_proof(self, node: Node, two: TwoRosters) -> None:
        """It is who was proven to, and by the checker's own look at it."""
        one, other = two.first, two.second
        may_lie = {self.name}.union(self.world.chaos.split)
        same = (one.leader, one.epoch, one.head, one.ballot, one.life) == (
            *(other.leader, other.epoch, other.head, other.ballot, other.life),
        )
        run_id = self.world.rules.run_id
        are_signed = all(is_signed(receipt, run_id, node.crypto) for receipt in (one, other))
        if one.leader not in may_lie or not same or one.digest == other.digest or not are_signed:
            self.world.fail(node.name, f"rosters: {one.leader} is accused, and did not tell two")
        self.proven += 1

    def after_event(self, node: Node, state: RoundState) -> None:
        """Nobody follows what it has not signed, and what it has is proven before long."""
        roster = state.exchange.roster
        if node.name == self.name or roster is None or roster.forced:
            return
        if state.leader_of(roster.ballot) != self.name or roster.head != state.head:
            return
        told = self.followed.setdefault((roster.head, roster.ballot), set())
        if roster.signature not in told:
            receipt = receipt_of(self.name, roster, node.crypto)
            if not is_signed(receipt, self.world.rules.run_id, node.crypto):
                self.world.fail(node.name, f"rosters: it follows one that {self.name} has not signed")
            told.add(roster.signature)
        if len(told) > 1:
            self.split_heads.add(roster.head)
        if len(self.split_heads) > PROVEN_WITHIN and not self.proven:
            text = f"rosters: {self.name} told different ones in {len(self.split_heads)} rounds, not proven"
            self.world.fail(node.name, text)

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
