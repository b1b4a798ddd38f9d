"""Worlds with invitations: some that are used too often, taken back, or shown by who was removed.

Those who may ask for invitations; whoever has one comes with it again and again, for itself or for another,
with its key's signature alone. Where all must be asked for a change, guests that never come would be missed:
then only who has a node is brought. Every admission is checked by invariants.py. Drawn apart, so that other
worlds stay as they were.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from simulation.draws import choice, hex_digits, randint
from simulation.shell import SimCrypto

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.members import Change, change_message

if TYPE_CHECKING:
    from simulation.world import World

SHARE = 0.12  # of the worlds have invitations
USES_MAX = 2
TAKEN_BACK = 0.15  # of the times that one is asked for, another is taken back
LIFETIME_EPOCHS = 1000


class Guests:
    """What concerns them in one world."""

    def __init__(self, world: World, drawn: bool) -> None:
        self.world = world
        self.rng = random.Random(f"guests {world.seed}")
        self.on = drawn and self.rng.random() < SHARE
        self.keys: list[str] = []  # of all invitations that were asked for, and one that nobody gave
        self.brought = 0

    def plan(self) -> None:
        if self.on:
            self.keys.append("line0")
            self.world.later(3.0 * self.rng.random(), None, self._invite)
            self.world.later(3.0 + 3.0 * self.rng.random(), None, self._come)

    def _invite(self) -> None:
        world, rng = self.world, self.rng
        if world.healed:
            return
        world.later(world.stretch * (2.0 + 4.0 * rng.random()), None, self._invite)
        until = world.epoch() + LIFETIME_EPOCHS
        if rng.random() < TAKEN_BACK:
            change = Change("remove", choice(rng, self.keys), "taken back", until, hex_digits(rng, 32))
        else:
            key = f"line{len(self.keys)}"
            self.keys.append(key)
            value = f"{randint(rng, 1, USES_MAX)} 0 {choice(rng, ['', 'lab'])}"
            change = Change("invite", key, value, until, hex_digits(rng, 32))
        world.consortium.ask(change)

    def _come(self) -> None:
        """With a line, to whoever is there: two at the same time at times."""
        world, rng = self.world, self.rng
        if world.healed:
            return
        world.later(world.stretch * (0.5 + 1.5 * rng.random()), None, self._come)
        nodes = [n for n in world.nodes.values() if n.core is not None and not n.frozen]
        if not nodes:
            return
        key = choice(rng, self.keys)
        for _ in range(randint(rng, 1, 2)):
            self.brought += 1
            names = list(world.nodes)
            if not world.consortium.asks_all:
                names += [f"brought{self.brought}"]
            change = Change(
                "admit", choice(rng, names), "", world.epoch() + LIFETIME_EPOCHS, hex_digits(rng, 32)
            )
            message = change_message(world.genesis.run_id, change)
            signed = change.signed(key, SimCrypto(key).sign(message))
            choice(rng, nodes).feed(ev.ChangeAsked(signed, sign=False))
