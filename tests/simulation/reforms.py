"""Worlds that change the rules of their charter: who is admitted and by whom, and what a voice is.

By whoever may, under the rules of the moment. Every record is checked by invariants.py under those that hold
before it. Drawn apart, so that other worlds stay as they were.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from simulation.draws import choice, hex_digits, randint

from tapestry.node.protocol.members import Change

if TYPE_CHECKING:
    from simulation.world import World

SHARE = 0.12  # of the worlds change them
RULES = {
    "admission": ["open", "open", "members"],
    "voice": ["equal", "tokens", "fixed"],
    "open_share": ["50000", "400000"],
    "open_votes_after": ["0", "2", "5"],
}


class Reforms:
    """What concerns them in one world."""

    def __init__(self, world: World, drawn: bool) -> None:
        self.world = world
        self.rng = random.Random(f"reforms {world.seed}")
        self.on = drawn and self.rng.random() < SHARE

    def plan(self) -> None:
        if self.on:
            self.world.later(3.0 * self.rng.random(), None, self._reform)

    def _reform(self) -> None:
        world, rng = self.world, self.rng
        if world.healed:
            return
        world.later(world.stretch * (1.0 + 4.0 * rng.random()), None, self._reform)
        cores = [n.core for n in world.nodes.values() if n.core is not None and not n.frozen]
        if not cores:
            return
        founders = len(choice(rng, cores).chain.roll.council)
        rules = RULES | {
            "admit_by": ["founder", "majority", f"council {randint(rng, 1, founders)}/{founders}"]
        }
        rule = choice(rng, list(rules))
        value = f"{rule} {choice(rng, rules[rule])}"
        world.consortium.ask(Change("charter", "", value, world.epoch() + 1000, hex_digits(rng, 32)))
