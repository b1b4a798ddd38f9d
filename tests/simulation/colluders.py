"""Members, fewer than a majority, that fork the run together, in some worlds.

They take part like all others. Meanwhile they make forks from newer and older records (forks.py), keep some
back for a while, and tell them to some members and not to others: as records, as a decision, or by
saying that they stand at its end and answering who asks. Who was away, or begins anew, is told first. At
times one says nothing else to a member than its fork. No record that a majority of the last full electorate
signed may be left for any of it, and the run goes on. Drawn apart, so that other worlds stay as they were.
"""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

from simulation.draws import choice, hex_digits, randint
from simulation.forks import KINDS, Forgery, Fork
from simulation.shell import SimCrypto

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.canon import quorum
from tapestry.node.protocol.messages import (
    RECORDS_MAX,
    Commit,
    GetRecords,
    Message,
    Ready,
    Records,
    Stage,
    Status,
)
from tapestry.node.protocol.place import Place, waits

if TYPE_CHECKING:
    from simulation.shell import Node
    from simulation.world import World

SHARE = 0.14  # of the worlds of four and more, less those that have too many other liars: one in ten
FEWEST = 4  # nodes
EVERY_S = 0.8  # about how often they do something
FORKS_MAX = 6  # that they have at a time
LENGTHS = (1, 1, 2, 5, 20, 80)  # records of a fork
KEPT_BACK_S = (0.0, 0.0, 2.0, 20.0)
STORY_S = (1.0, 6.0)  # how long one says to a member that it stands at the fork's end
ACCOMPLICES = 4  # keys of theirs that belong to nobody


class Colluders:
    """What concerns them in one world."""

    def __init__(self, world: World, drawn: bool, names: list[str], liars: set[str]) -> None:
        self.world = world
        self.rng = random.Random(f"colluder {world.seed}")
        self.names: list[str] = []
        few = len(names) - quorum(len(names)) if len(names) >= FEWEST else 0
        others = sorted(liars.intersection(names))
        if drawn and few >= max(1, len(others)) and self.rng.random() < SHARE:
            self.names = self._draw(names, others, few)
        accomplices = [f"accomplice{i}" for i in range(ACCOMPLICES)]
        keys = {p: SimCrypto(p) for p in [*self.names, *accomplices]}
        self.lives = {p: hex_digits(self.rng, 32) for p in accomplices}
        self.forgery = Forgery(self.rng, keys, self.lives)
        self.forks: list[tuple[float, list[str], Fork]] = []  # from when on it is told, to whom
        self.stories: dict[
            tuple[str, str], tuple[float, bool, Fork]
        ] = {}  # who, to whom -> until, nothing else
        self.made: set[str] = set()  # heads of records that they alone have made
        self.told: dict[str, int] = {}

    def _draw(self, names: list[str], others: list[str], few: int) -> list[str]:
        """With those that lie otherwise they are a minority: as many as a majority can do without."""
        honest = [p for p in names if p not in others]
        count = randint(self.rng, 1, few)
        apart = self.rng.sample(honest, max(0, min(count, few - len(others))))
        return sorted([*apart, *others[: count - len(apart)]])

    def plan(self) -> None:
        if self.names:
            self.world.later(2.0, None, self._act)

    # --- what they hear and say ----------------------------------------------------------------

    def takes(self, sender: Node, to: str, message: Message) -> bool:
        """Whether the message ends here: a question about a fork, or what a member is not to hear."""
        if sender.name in self.names:
            return self.hides(sender.name, to)
        if to not in self.names:
            return False
        if isinstance(message, Ready) and message.seat:
            self.forgery.seats[sender.name, message.head] = (message.life, message.seat)
        if isinstance(message, GetRecords) and (to, sender.name) in self.stories:
            until, _, fork = self.stories[to, sender.name]
            if self.world.now <= until:
                self._answer(to, sender, fork, message)
                return True
        return False

    def hides(self, name: str, to: str) -> bool:
        """Whether it says nothing to this member now but its fork."""
        until, alone, _ = self.stories.get((name, to), (-1.0, False, None))
        return alone and self.world.now <= until

    def _answer(self, name: str, asks: Node, fork: Fork, message: GetRecords) -> None:
        chain = fork.chain
        for epoch, head in message.known:
            if 0 <= epoch <= len(chain) and head == (
                chain[epoch - 1].head if epoch else self.world.genesis.run_id
            ):
                self._say(name, asks, Records(epoch, tuple(chain[epoch : epoch + RECORDS_MAX])))
                return

    def _say(self, name: str, victim: Node, message: Message) -> None:
        if self.world.is_cut(self.world.nodes[name], victim):
            return
        kind = type(message).__name__
        self.told[kind] = self.told.get(kind, 0) + 1
        self.world.tell(name, message, victim.name)
        self.world.later(self.rng.uniform(0.002, 0.03), victim, ev.Received(name, message))

    # --- what they do --------------------------------------------------------------------------

    def _act(self) -> None:
        world, rng = self.world, self.rng
        world.later(EVERY_S * (0.5 + rng.random()), None, partial(self._act))
        nodes = [world.nodes[p] for p in self.names]
        nodes = [n for n in nodes if n.core is not None and not n.frozen]
        if not nodes:
            return
        node = choice(rng, nodes)
        ready = [(whom, fork) for at, whom, fork in self.forks if at <= world.now]
        if not ready or rng.random() < 0.3:
            self._make(node)
        elif rng.random() < 0.2:
            self._extend(choice(rng, ready)[1], node)
        else:
            self._tell(node, *choice(rng, ready))

    def is_minority(self, at: Place) -> bool:
        """Whether neither the last full electorate nor the present one can be had with their keys."""
        return all(
            sum(p in self.forgery.keys for p in electors) < quorum(len(electors))
            for electors in (at.standing.electorate, at.electorate)
        )

    def _make(self, node: Node) -> None:
        rng, core = self.rng, node.core
        assert core is not None
        chain, records = core.chain, node.disk.records
        back = randint(rng, 0, 3) if rng.random() < 0.6 else randint(rng, 0, chain.epoch)
        common = max(0, chain.epoch - back)
        here = common == chain.epoch and core.sync.at_head
        state = core.sync.state_digest if here else chain.state_digest_at(common)
        at = chain.place_at(common)
        written = common <= len(records) and chain.head_at(common) == (
            records[common - 1].head if common else at.head
        )
        mine = [p for p in self.names if p in at.roll.members]
        if state is None or not written or not mine or not self.is_minority(at):
            return
        base = records[:common]
        last = base[-1] if base else None
        # Where nobody waits for a quorum, who hears none may take an island of theirs. If nobody has what
        # that is made of, it stands still for good: docs/trust.md.
        gives = rng.random() < 0.5 or not waits(at, self.world.rules.on_quorum_loss)
        fork = Fork(choice(rng, KINDS), base, at, state, gives, last, [])
        for _ in range(choice(rng, LENGTHS)):
            self._extend(fork, node)
        whom = [p for p in self.world.nodes if p not in self.names and rng.random() < 0.6]
        self.forks.append((self.world.now + choice(rng, KEPT_BACK_S), whom, fork))
        del self.forks[:-FORKS_MAX]

    def _extend(self, fork: Fork, node: Node) -> None:
        core = node.core
        if core is None or len(fork.records) >= max(LENGTHS):
            return
        world = self.world
        disks = [world.nodes[p] for p in self.names]
        self.lives.update({n.name: n.core.own.life for n in disks if n.core is not None})
        rules = core.ctx.rules
        record = self.forgery.extend(fork, rules.max_influence, rules.shard_count, disks)
        self.made.add(record.head)

    def _tell(self, node: Node, whom: list[str], fork: Fork) -> None:
        world, rng = self.world, self.rng
        nodes = [
            n
            for n in world.nodes.values()
            if n.core is not None and not n.frozen and n.name not in self.names
        ]
        furthest = world.epoch()
        behind = [n for n in nodes if n.core is not None and n.core.chain.epoch < furthest - 2]
        told = [n for n in nodes if n.name in whom]
        if behind and rng.random() < 0.6:
            told = behind
        if not told:
            return
        victim = choice(rng, told)
        core = victim.core
        assert core is not None
        chain = fork.chain
        common = min(core.chain.epoch, len(chain))
        while common and core.chain.head_at(common) != chain[common - 1].head:
            common -= 1
        news = tuple(chain[common : common + RECORDS_MAX])
        if not news:
            return
        kind = randint(rng, 0, 3)
        if kind == 0:
            self._say(node.name, victim, Commit(news[0]))
            return
        if kind == 1:
            self._say(node.name, victim, Records(common, news))
            return
        alone = rng.random() < 0.4 and self.is_minority(core.chain.place)
        self.stories[node.name, victim.name] = (world.now + rng.uniform(*STORY_S), alone, fork)
        end, head = len(chain), chain[-1].head
        self._say(node.name, victim, Status(end, head, end, "training", Stage.TRAINING, 0, 0, ()))
