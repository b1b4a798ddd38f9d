"""A member that names a bare quorum whenever it leads, and leads whenever it can, in some worlds.

It hears no promise of those that it wants to do without, others in every round, and takes all to a ballot of
its own as soon as a round begins. So would somebody who wants to be the electorate alone, or needed by all.
The run goes on as with any other member, and its electorate stays what it may be. Drawn apart, so that other
worlds stay as they were.
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

from simulation.draws import choice
from simulation.shell import SimCrypto

from tapestry.node.protocol.canon import quorum
from tapestry.node.protocol.events import Output
from tapestry.node.protocol.messages import Message, Ready

if TYPE_CHECKING:
    from simulation.shell import Node
    from simulation.world import World

SHARE = 0.1  # of the worlds have one
EVERY_S = 0.2  # how often it looks whether there is a round to lead


class Shrinkers:
    """What concerns it in one world."""

    def __init__(self, world: World, drawn: bool, names: list[str]) -> None:
        self.world = world
        rng = random.Random(f"shrinker {world.seed}")
        drawn = drawn and len(names) > 3 and rng.random() < SHARE
        self.name = choice(rng, names[1:]) if drawn else ""
        self.crypto = SimCrypto(self.name)
        self.led: set[str] = set()  # heads of the rounds that it took to itself

    def plan(self) -> None:
        if self.name:
            self.world.later(EVERY_S, None, self._look)

    def ignores(self, sender: Node, to: str, message: Message) -> bool:
        """Whether it does not hear this promise, so that its roster is without the sender."""
        if to != self.name or not isinstance(message, Ready) or message.forced:
            return False
        core = self.world.nodes[to].core
        round_ = core.round if core is not None else None
        if round_ is None or message.head != round_.head or to not in round_.electorate:
            return False
        lots = {self.crypto.digest(f"{p}{message.head}".encode()): p for p in round_.electorate if p != to}
        heard = [lots[lot] for lot in sorted(lots)][: quorum(len(round_.electorate)) - 1]
        return sender.name not in heard

    def _look(self) -> None:
        self.world.later(EVERY_S, None, partial(self._look))
        node = self.world.nodes[self.name]
        core = node.core
        round_ = core.round if core is not None else None
        if core is None or round_ is None or node.frozen or round_.decided is not None or round_.forced:
            return
        if round_.head in self.led or self.name not in round_.electorate or round_.leader == self.name:
            return
        self.led.add(round_.head)
        outputs: list[Output] = []
        core.ctx.out = outputs
        round_.lead.open_next(self.world.now + node.skew_s)
        node.carry_out(core, outputs)
