"""Members that open ballot after ballot and name no roster, in some worlds.

Whenever others exchange shards at its head, such a member goes to its own next ballot and asks all to
follow, or goes on to the next ballot of another and tells so. It is honest in all else: what it promised it
keeps. They are so few that the others are a majority without them, and the run must go on. Drawn apart, so
that other worlds stay as they were.
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

from tapestry.node.protocol.canon import quorum
from tapestry.node.protocol.events import Output
from tapestry.node.protocol.messages import Message, Propose, Roster, Stage

if TYPE_CHECKING:
    from simulation.shell import Node
    from simulation.world import World

SHARE = 0.1  # of the worlds have some
LEARNT = (
    3.0  # times as long as elsewhere it may take: each has some moves with every member before it is known
)
UNDISTURBED = 3  # epochs in twice the usual time, once it is: of some they are the first to lead
EVERY_S = 0.3  # how often one looks whether there is something to disturb


class Usurpers:
    """What concerns them in one world."""

    def __init__(self, world: World, drawn: bool, names: list[str]) -> None:
        self.world = world
        self.names: list[str] = []
        self.rng = random.Random(f"usurper {world.seed}")
        few = len(names) - quorum(len(names))
        if drawn and few and self.rng.random() < SHARE:
            self.names = self.rng.sample(names[1:], self.rng.randint(1, few))
            self.own = self.rng.random() < 0.7  # its own ballots, or those of others

    def plan(self) -> None:
        for name in self.names:
            self.world.later(self.rng.random(), None, partial(self._look, name))

    def settle_s(self, usual_s: float) -> float:
        return LEARNT * usual_s if self.names else usual_s

    def wait_for_the_end(self, settle_s: float) -> None:
        """The network is whole, and who they are is known: they hold up hardly any round."""
        world = self.world
        end, until = world.epoch() + UNDISTURBED, world.now + 2 * settle_s / LEARNT
        while self.names and world.epoch() < end:
            if world.now > until:
                world.fail("world", f"usurpers {self.names}: epoch {end} not reached: {world.where()}")
            world.step()

    def keeps_back(self, node: Node, message: Message) -> bool:
        """Whether it does not send this: as a leader it names nothing."""
        return isinstance(message, Roster | Propose) and self._disturbs(node)

    def _disturbs(self, node: Node) -> bool:
        """Whether it is one, and those of the electors that are there can do without all of them."""
        round_ = node.core.round if node.core is not None else None
        if (
            node.name not in self.names
            or round_ is None
            or round_.forced
            or node.name not in round_.electorate
        ):
            return False
        world = self.world
        lie = {
            world.autocrats.name,
            world.splitters.name,
            world.forgers.name,
            world.shrinkers.name,
            *self.names,
        }
        nodes = [world.nodes[p] for p in round_.electorate if p not in lie]
        others = [n.core for n in nodes if n.astray != round_.head]  # whose state is wrong has no say here
        there = [c for c in others if c is not None and c.round is not None and c.round.head == round_.head]
        return len(there) >= quorum(len(round_.electorate))

    def _look(self, name: str) -> None:
        self.world.later(EVERY_S, None, partial(self._look, name))
        node = self.world.nodes[name]
        core = node.core
        if core is None or core.round is None or node.frozen or core.round.decided is not None:
            return
        round_, now = core.round, self.world.now + node.skew_s
        stages = [core.ctx.stage_at(p, round_.epoch, round_.head) for p in core.ctx.peers]
        if not self._disturbs(node) or not any(s >= Stage.EXCHANGING for s in stages):
            return
        outputs: list[Output] = []
        core.ctx.out = outputs
        if self.own:
            round_.lead.open_next(now)
        else:
            round_._next_ballot(now, "usurped")
        node.carry_out(core, outputs)
