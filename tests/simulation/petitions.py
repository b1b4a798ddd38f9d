"""A change that everybody asks for when all is calm, in a third of the worlds: it must be made, and soon.

Once every node knows it with all its signatures, the next leader carries it (docs/decisions/010). The round
at hand may have its roster already, or a value that was accepted before: so it is in one of the next two
records. Drawn apart, and asked for at the very end, so that other worlds stay as they were.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from simulation.draws import choice, hex_digits

from tapestry.node.protocol.members import Change, change_id

if TYPE_CHECKING:
    from simulation.shell import Node
    from simulation.world import World

RECORDS = 2  # after that of the head at which all know of it
KNOWN_S = 5.0  # until all do, and have signed it, with no faults
ASKED_S = 4.0  # within which it is asked for
ASKED = ("open_share", "set", "invite", "voice", "remove")


class Petitions:
    """What concerns it in one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = random.Random(f"petition {world.seed}")

    @property
    def leaders_lie(self) -> bool:
        """Whether somebody leads that may leave a change out of its rosters, for good."""
        # Not asked of these worlds yet (decision 021): a leader that calls all to its own ballots, and leaves
        # out a change that they know of, keeps it out for as long as it likes.
        world = self.world
        return bool(
            world.usurpers.names or world.autocrats.name or world.splitters.name or world.inventors.name
        )

    def wait_for_one(self, settle_s: float) -> None:
        """All are at one head, and the network is whole."""
        world = self.world
        if self.leaders_lie:
            return
        ask_at = world.now + ASKED_S * world.stretch * self.rng.random()  # at any moment of a round
        while world.now < ask_at:
            world.step()
        change = self._draw()
        world.consortium.ask(change)
        until = world.now + KNOWN_S * world.stretch
        while not all(self._knows(node, change) for node in self._members()):
            if world.now > until:
                world.fail("world", f"liveness: not all know of the {change.kind} of {change.peer}")
            world.step()
        epoch, until = world.epoch(), world.now + settle_s * world.stretch
        while not any(self._has(node, change) for node in world.nodes.values()):
            if world.epoch() >= epoch + RECORDS or world.now > until:
                text = f"known to all at {epoch}, and in no record up to {world.epoch()}: {world.where()}"
                world.fail("world", f"liveness: the {change.kind} of {change.peer}, {text}")
            world.step()

    def _members(self) -> list[Node]:
        """Who is none hears of no change: it may wait for the next record, or for who could sign for it."""
        members = self.world.best().roll.members
        return [node for node in self.world.nodes.values() if node.name in members]

    def _draw(self) -> Change:
        world, rng = self.world, self.rng
        roll = world.best().roll
        peers = [name for name in list(world.nodes)[1:] if name in roll.members]
        kind = choice(rng, ASKED if len(peers) > 1 else ASKED[:3])
        value = {
            "open_share": "open_share 300000",
            "set": "audit.share 0.5",
            "invite": "1 0 lab",
            "voice": "7",
        }
        peer = {"invite": "petition"}.get(kind, "") if kind in ASKED[:3] else choice(rng, peers)
        kind, text = {"open_share": "charter"}.get(kind, kind), value.get(kind, "calm")
        return Change(kind, peer, text, world.epoch() + 1000, hex_digits(rng, 32))

    def _knows(self, node: Node, change: Change) -> bool:
        """With all the signatures that it needs, by the checker's arithmetic; or it is made."""
        if node.core is None or self._has(node, change):
            return node.core is not None
        known = node.core.ctx.proposals.pending.get(change_id(self.world.genesis.run_id, change))
        ground = self.world.invariants.at[node.core.chain.head]
        return known is not None and ground.allows(known, ground)

    def _has(self, node: Node, change: Change) -> bool:
        return any(c.nonce == change.nonce for r in node.disk.records[-2 * RECORDS :] for c in r.body.changes)
