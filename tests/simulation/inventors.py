"""A member that says it had accepted a result which nobody made, in some worlds.

It tells so in READY to another leader, and as a leader it proposes such a value in the place of a roster.
Whoever asks gets numbers of that value from it. In half of these worlds it makes up the reducers' signatures,
and no record may come of it; in the others it signs wrong means of all shards itself, as their reducer, which
is taken, and is what audits find. Drawn apart, so that other worlds stay as they were.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from simulation.draws import choice, hex_digits

from tapestry.node.protocol.acceptor import body_of
from tapestry.node.protocol.agreement import agreement
from tapestry.node.protocol.audit import SignedMean, inputs_digest, mean_message, result_digest
from tapestry.node.protocol.messages import Message, Propose, Ready, Roster
from tapestry.node.protocol.record import Body, head_of

if TYPE_CHECKING:
    from simulation.shell import Mean, Node
    from simulation.world import World

SHARE = 0.1  # of the worlds have one
OFTEN = 0.3  # of the rosters that it sends, and of what it says when it knows one


class Inventors:
    """What concerns them in one world."""

    def __init__(self, world: World, drawn: bool, names: list[str]) -> None:
        self.world = world
        self.rng = random.Random(f"inventor {world.seed}")
        self.name = choice(self.rng, names) if drawn and len(names) > 2 and self.rng.random() < SHARE else ""
        self.signs = self.rng.random() < 0.5
        self.invented: dict[str, Body] = {}  # head of the round and its members -> what it says of it
        self.heads: set[str] = set()  # of these
        self.said = 0

    def is_false(self, head: str) -> bool:
        """Whether this is the head of a value that nobody has made or signed."""
        return not self.signs and head in self.heads

    def says(self, node: Node, message: Message) -> Message:
        """What it says in the place of its message."""
        core = node.core
        if node.name != self.name or core is None or core.round is None or self.world.healed:
            return message
        state = core.round.state
        if isinstance(message, Roster) and not message.forced:
            body = self._of(node, message)
            return message if body is None else self._proposal(message, body)
        roster = state.exchange.roster
        if isinstance(message, Ready) and roster is not None and not message.forced and not roster.forced:
            body = self._of(node, roster)
            if body is not None and message.accepted is None and message.ballot > roster.ballot:
                self.said += 1
                return replace(message, accepted_ballot=roster.ballot, accepted=body)
        return message

    def _proposal(self, roster: Roster, body: Body) -> Propose:
        self.said += 1
        return Propose(roster.epoch, roster.head, roster.ballot, body, (self.name,))

    def _of(self, node: Node, roster: Roster) -> Body | None:
        """The value that it makes up of a roster; None if it tells the truth about this one."""
        key = f"{roster.head} {roster.members}"
        if int(node.crypto.digest(f"invent {key}".encode())[:4], 16) >= OFTEN * 0x10000:
            return None
        if key not in self.invented:
            self.invented[key] = self._make(node, roster)
        return self.invented[key]

    def _make(self, node: Node, roster: Roster) -> Body:
        """On its disk it lies as if it had been accepted."""
        from simulation.shell import Mean, Part  # that module asks this one

        core, crypto = node.core, node.crypto
        assert core is not None and core.round is not None
        members = [m for m in roster.members if m.weight]
        weights = tuple(m.weight for m in members)
        shards: list[Mean] = []
        for shard in range(self.world.rules.shard_count):
            parts = tuple(Part(m.peer, m.contribution, shard) for m in members)
            shards.append(Mean(shard, parts, weights, lie=True))
        digests = [mean.digest for mean in shards]
        result = result_digest(digests, crypto)
        figures = agreement([mean.sums for mean in shards], list(weights))
        body = body_of(core.round.state, roster, result, figures)
        head, inputs = head_of(body, crypto), inputs_digest(roster.members, crypto)
        self.heads.add(head)
        means = []
        for shard, digest in enumerate(digests):
            if self.signs:
                reducer, signature = self.name, crypto.sign(mean_message(roster.head, shard, digest, inputs))
            else:
                reducer, signature = roster.members[roster.reducers[shard]].peer, hex_digits(self.rng, 64)
            means.append(SignedMean(reducer, digest, signature))
        node.disk.updates[head] = (body.epoch, tuple(shards))
        node.disk.means[head] = tuple(means)
        if self.signs:
            self.world.lied.update(digests)
        return body
