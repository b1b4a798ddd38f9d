"""Nodes that stop in good order and come back, in some worlds: of two electors, one hands over its round.

More often than others, one of an electorate of two is chosen, at any moment of its round. Drawn apart, so
that other worlds stay as they were.
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

from tapestry.node.protocol import events as ev

if TYPE_CHECKING:
    from simulation.shell import Node
    from simulation.world import World

SHARE = 0.2  # of the worlds have some
OF_TWO = 0.8  # how often one of two electors is chosen where there are two
CLOSES_S = 0.1  # a node's farewell is on its way before its links close; or not, if it is killed then


class Stops:
    """What concerns them in one world."""

    def __init__(self, world: World, drawn: bool) -> None:
        self.world = world
        self.rng = random.Random(f"stops {world.seed}")
        self.every_s = self.rng.uniform(0.5, 8.0) if drawn and self.rng.random() < SHARE else 0.0

    def plan(self) -> None:
        if self.every_s:
            self.world.later(self.rng.expovariate(1 / self.every_s), None, self._stop_one)

    def _stop_one(self) -> None:
        world = self.world
        if world.healed:
            return
        self.plan()
        nodes = [n for n in world.nodes.values() if n.core is not None and not n.frozen]
        of_two = [n for n in nodes if self._is_one_of_two(n)]
        if of_two and self.rng.random() < OF_TWO:
            nodes = of_two
        if nodes:
            self._stop(self.rng.choice(nodes))

    def _is_one_of_two(self, node: Node) -> bool:
        electorate = self.world.invariants.electorate(node.disk.records)
        return len(electorate) == 2 and node.name in electorate

    def _stop(self, node: Node) -> None:
        self.world.tell(node.name, "STOP")
        node.feed(ev.Stopping())
        self.world.later(self.rng.choice([0.0, CLOSES_S]), None, partial(self._close, node, node.life))

    def _close(self, node: Node, life: int) -> None:
        if node.life == life:  # else it died meanwhile
            node.crash()
            again_s = self.rng.choice([0.02, 0.2, 0.5, 3.0, 20.0])
            self.world.later(again_s, None, partial(self.world.chaos.restart, node))
