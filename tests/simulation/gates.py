"""Worlds with a gate: one member poisons its contributions at times, and the others' data speak against it.

Every node measures for itself: most see the poison, some see what is not there, some have nothing to measure
with, and some never answer. One member refuses whatever comes. Drawn apart, so that other worlds stay as they
were.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from simulation.draws import choice

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.gate import REFUSALS_MAX, WORSE_MAX
from tapestry.node.protocol.messages import Accept, Message, Refuse, Stage
from tapestry.node.protocol.rules import Rules

if TYPE_CHECKING:
    from simulation.shell import Node
    from simulation.world import World

GATE_SHARE = 0.2  # of the worlds have a gate
DRAW = "gated 211"  # which: not those whose seeds catch other bugs
MARGIN = 0.1
MEASURE_MAX_S = 2.0
POISON = "face"  # how the name of a poisoned contribution ends
POISONED_OF_16 = 8  # rounds of 16 in which the poisoner poisons


def is_poison(contribution: str) -> bool:
    return contribution.endswith(POISON)


class GateWorld:
    """What concerns the gate in one world; without a gate it does nothing."""

    def __init__(self, world: World, drawn: bool, names: list[str]) -> None:
        self.world = world
        self.rng = random.Random(f"gate {world.seed}")
        self.rng.random()
        gated = random.Random(f"{DRAW} {world.seed}").random() < GATE_SHARE
        self.on = drawn and len(names) > 2 and gated
        self.poisoner = self.grudger = ""
        self.blind: list[str] = []
        self.false_alarm_of_16 = 0
        self.deaf_of_16 = 0
        self.poisoned_of_16 = POISONED_OF_16
        self.outcomes: dict[str, int] = {}  # of Gated
        self.left_out: dict[str, int] = {}  # peer -> rounds
        self.refused: dict[tuple[str, int], set[tuple[int, str]]] = {}  # life -> (ballot, body) refused
        self.in_round: dict[tuple[str, int, str], set[int]] = {}  # life, head -> ballots refused
        if self.on:
            self.poisoner = names[-1]
            self.grudger = choice(self.rng, ["", "", names[0]])
            self.blind = [n for n in names if self.rng.random() < 0.15]
            self.false_alarm_of_16 = choice(self.rng, [0, 1, 4])
            self.deaf_of_16 = choice(self.rng, [0, 0, 1])

    def rules(self, rules: Rules) -> Rules:
        return replace(rules, gate_margin=MARGIN, gate_max_s=MEASURE_MAX_S) if self.on else rules

    def plan(self) -> None:
        if self.on and self.grudger:
            self._grudge()

    # --- what nodes do -------------------------------------------------------------------------

    def named(self, name: str, base: str, contribution: str) -> str:
        """What the contribution that `name` made from `base` is called."""
        if name == self.poisoner and self._lot(f"poison {base}") < self.poisoned_of_16:
            return contribution[: -len(POISON)] + POISON
        return contribution

    def judge(self, node: Node, out: ev.Judge) -> None:
        lot = self._lot(f"{node.name} {out.head} {self.world.seed}")
        if lot < self.deaf_of_16:
            return
        poisoned = any(is_poison(m.contribution) for m in out.body.members if m.weight)
        worse: float | None = 1.0 if poisoned else -0.1
        if not poisoned and lot >= 16 - self.false_alarm_of_16:
            worse = 0.2
        if node.name in self.blind:
            worse = None
        judged = ev.Judged(out.body.epoch - 1, out.body.prev, out.head, worse)
        self.world.later(self.world.draw(0.01, 0.4), node, judged)

    def _lot(self, text: str) -> int:
        from simulation.shell import digest

        return int(digest(text.encode())[0], 16)

    def gated(self, out: ev.Gated) -> None:
        self.outcomes[out.outcome] = self.outcomes.get(out.outcome, 0) + 1
        if out.outcome == "again":
            self.left_out[out.peer] = self.left_out.get(out.peer, 0) + 1

    def _grudge(self) -> None:
        """One member says again and again, to whoever leads, that it refuses."""
        world = self.world
        world.later(0.3 + self.rng.random(), None, self._grudge)
        for node in world.nodes.values():
            core = node.core
            round_ = core.round if core is not None else None
            if round_ is None or node.name == self.grudger or round_.stage < Stage.EXCHANGING:
                continue
            if round_.state.leading:
                said = Refuse(round_.epoch, round_.head, round_.ballot, "0" * 64, WORSE_MAX)
                node.feed(ev.Received(self.grudger, said))

    # --- what must hold ------------------------------------------------------------------------

    def on_send(self, node: Node, message: Message) -> None:
        """What was refused in a ballot is not accepted in it, and nobody refuses for ever."""
        life = (node.name, node.life)
        if type(message) is Refuse:
            self.refused.setdefault(life, set()).add((message.ballot, message.body_head))
            ballots = self.in_round.setdefault((*life, message.head), set())
            ballots.add(message.ballot)
            if len(ballots) > REFUSALS_MAX:
                self.world.fail(node.name, f"gate: refused in {len(ballots)} ballots of one round")
        elif type(message) is Accept and (message.ballot, message.body_head) in self.refused.get(life, ()):
            self.world.fail(node.name, f"gate: accepted what it refused in ballot {message.ballot}")
