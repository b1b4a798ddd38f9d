"""What goes wrong: every fault is drawn from the seed of its world.

What has no meaning for the core is not drawn: it is given links, not addresses, so a stale, empty or lying
DHT is to it a peer that comes late, never, or as a stranger; and it only ever compares its own clock with
itself, so that skew (which is drawn all the same) must change nothing.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from simulation.draws import choice
from simulation.lies import STRANGER, draw_lie
from simulation.shell import Disk, Node, digest

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.messages import Message, Ready, Roster, Stage, Status

if TYPE_CHECKING:
    from simulation.world import World


@dataclass
class Faults:
    """Probabilities per message, and rates per second of virtual time and node, while faults are on."""

    loss: float = 0.0
    duplicate: float = 0.0
    tail: float = 0.0  # share of messages that take up to tail_s
    tail_s: float = 4.0
    crash_per_s: float = 0.0
    freeze_per_s: float = 0.0
    cut_per_s: float = 0.0  # one-way cuts
    link_drop_per_s: float = 0.0  # streams that break and come back
    trainer_down_per_s: float = 0.0
    island_per_s: float = 0.0  # the swarm falls into two parts
    blackout_per_s: float = 0.0  # a majority, or everybody, crashes at once
    crash_at_write: float = 0.0  # probability that a node dies of a write, which may be torn: it is not there
    crash_at_fork: float = 0.0  # probability that it dies of leaving a fork, before that is written or after
    chain_damaged: float = 0.0  # probability that the newest records are not read back after a crash
    lies_per_s: float = 0.0  # messages of random values in the name of a stranger or a member
    drip_per_s: float = 0.0  # a peer drips bytes, of which no shard ever comes
    corrupt: float = 0.0  # share of data frames that are damaged: the wire refuses them, and says of whom
    donor_lies: float = 0.0  # share of updates and states that are not what was asked for
    false_ready: float = 0.0  # share of READYs that lie about weight, state digest or who is heard
    split_roster: float = 0.0  # share of ROSTERs that tell one member something else than the others
    boaster: bool = False  # a stranger says all the time that it is far ahead, and gives nothing
    skew_s: float = 0.0  # clocks are up to this much apart
    disk_lost: bool = False  # one node comes back without its disk
    astray: bool = False  # one node's arithmetic goes wrong, once
    apart: float = 0.0  # share of the pairs of nodes between which nothing passes, as through a firewall

    @classmethod
    def draw(cls, rng: random.Random) -> Faults:
        def maybe(p: float, high: float) -> float:
            return rng.random() * high if rng.random() < p else 0.0

        return cls(
            loss=maybe(0.5, 0.15),
            duplicate=maybe(0.4, 0.2),
            tail=maybe(0.5, 0.1),
            crash_per_s=maybe(0.6, 0.06),
            freeze_per_s=maybe(0.3, 0.03),
            cut_per_s=maybe(0.4, 0.06),
            link_drop_per_s=maybe(0.3, 0.06),
            trainer_down_per_s=maybe(0.3, 0.04),
            island_per_s=maybe(0.4, rng.choice([0.01, 0.01, 0.06])),
            blackout_per_s=maybe(0.2, 0.01),
            crash_at_write=maybe(0.4, 0.06),
            crash_at_fork=maybe(0.3, 0.6),
            chain_damaged=maybe(0.2, 0.3),
            lies_per_s=maybe(0.3, 0.5),
            drip_per_s=maybe(0.2, 0.02),
            corrupt=maybe(0.2, 0.01),
            donor_lies=maybe(0.3, 0.3),
            false_ready=maybe(0.15, 0.1),
            split_roster=maybe(0.1, 0.2),
            boaster=rng.random() < 0.1,
            skew_s=maybe(0.3, 600.0),
            disk_lost=rng.random() < 0.3,
            astray=rng.random() < 0.1,
            apart=maybe(0.2, 0.6),
        )

    def rarer(self, share: float) -> Faults:
        """The same, that share as often: for worlds that last longer."""
        rates = {f.name: share * getattr(self, f.name) for f in fields(self) if f.name.endswith("_per_s")}
        return replace(self, **rates)


def electorate_of(node: Node) -> list[str]:
    """As its disk has it."""
    return list(node.world.invariants.electorate(node.disk.records))


class Chaos:
    """Makes a world's faults happen, until it is healed."""

    def __init__(self, world: World, faults: Faults) -> None:
        self.world = world
        self.faults = faults
        self.rng = world.rng
        self.disk_was_lost = False
        self.went_astray = False
        self.split: set[str] = set()  # who told members different rosters
        # when, ticket, what: the next one last
        self.planned: list[tuple[float, int, Callable[[], None]]] = []

    def plan(self, until_s: float) -> None:
        faults, world = self.faults, self.world
        for rate, fault in (
            (faults.crash_per_s, self._crash),
            (faults.freeze_per_s, self._freeze),
            (faults.cut_per_s, self._cut),
            (faults.link_drop_per_s, self._drop_link),
            (faults.trainer_down_per_s, self._trainer_down),
            (faults.island_per_s, self._island),
            (faults.blackout_per_s, self._blackout),
            (faults.lies_per_s, self._lie),
            (faults.drip_per_s, self._drip),
        ):
            at = 0.0
            while rate:
                at += self.rng.expovariate(rate * len(world.nodes))
                if at >= until_s:
                    break
                self.planned.append((at, world.ticket(), fault))

        for a, b in itertools.combinations(world.nodes, 2):
            if faults.apart and self.rng.random() < faults.apart:
                world.tell(a, f"APART from {b}")
                world.cut(a, b)
                world.cut(b, a)
                if self.rng.random() < 0.5:
                    world.unlink(a, b)
        self.planned.sort(key=lambda planned: planned[:2], reverse=True)
        self._await_next()
        if faults.boaster:
            self._boast()

    def _await_next(self) -> None:
        """One planned fault at a time is among the world's events: its heap stays small."""
        if self.planned:
            at, ticket, fault = self.planned.pop()

            def happen() -> None:
                self._await_next()
                if not self.world.healed:
                    fault()

            self.world.at(at, ticket, happen)

    def _pick(self) -> Node:
        return choice(self.rng, list(self.world.nodes.values()))

    def _crash(self) -> None:
        self.crash_for_a_while(self._pick())

    def crash_for_a_while(self, node: Node) -> None:
        if node.core is not None:
            self.world.tell(node.name, "CRASH")
            node.crash()
            self.world.later(self.rng.choice([0.02, 0.2, 0.5, 3.0, 20.0]), None, lambda: self.restart(node))

    def _blackout(self) -> None:
        nodes = list(self.world.nodes.values())
        for node in self.rng.sample(nodes, self.rng.randint(len(nodes) // 2 + 1, len(nodes))):
            self.crash_for_a_while(node)

    def _island(self) -> None:
        names = list(self.world.nodes)
        island = self.rng.sample(names, self.rng.randint(1, len(names)))
        for_s = self.rng.uniform(1.0, 40.0)
        self.world.tell("world", f"ISLAND {island}")
        for a in names:
            for b in names:
                if (a in island) != (b in island):
                    self.world.cut(a, b, for_s)

    def restart(self, node: Node) -> None:
        if node.core is None:
            lost = self._loses_disk(node)
            self.world.tell(node.name, "RESTART without its disk" if lost else "RESTART")
            if lost:
                self.disk_was_lost = True
                node.disk = Disk(life=self.world.token())
                self.world.invariants.on_disk_lost(node)
            elif self.world.backups.sets_back(node):
                self.disk_was_lost = True
            elif self.rng.random() < self.faults.chain_damaged:
                self._damage_chain(node)
            node.start()

    def _damage_chain(self, node: Node) -> None:
        """The store reads back the records before the damage. Another one must have all of them."""
        records = node.disk.records
        others = [n.disk.records for n in self.world.nodes.values() if n is not node]
        if records and any(len(r) >= len(records) and r[len(records) - 1] == records[-1] for r in others):
            count = self.rng.randint(1, min(3, len(records)))
            self.world.tell(node.name, f"its chain has lost {count} records")
            del records[-count:]

    def _loses_disk(self, node: Node) -> bool:
        return self.faults.disk_lost and self.can_lose(node)

    def can_lose(self, node: Node) -> bool:
        """One in a world, and only where the others can go on: as good as killed, and another one joins.

        They must know all that it knew, one of them must have the state it came to or the update that leads
        there, and none of their electorates may be this node alone. A run that waits for its quorum waits for
        good if the disk of one of two is lost: not drawn.
        """
        world = self.world
        if self.disk_was_lost or world.rules.on_quorum_loss == "wait":
            return False
        if node.name in world.colluders.names:  # nobody else may have what its forks are made of
            return False
        if node.name in self.split:  # it may have decided, alone, on a result that nobody else has
            return False
        others = [n for n in world.nodes.values() if n is not node and n.disk.state_head]
        if len(others) < 2 or any(electorate_of(n) == [node.name] for n in others):
            return False
        if all(len(n.disk.records) < len(node.disk.records) for n in others):
            return False
        head = node.disk.records[-1].head if node.disk.records else world.genesis.run_id
        return any(head in n.disk.states or head in n.disk.updates for n in others)

    def goes_astray(self, node: Node) -> bool:
        """Where a quorum of others would notice: a lone node's mistake is the truth for all who follow it."""
        if self.went_astray or not self.faults.astray or self.world.healed:
            return False
        if self.world.rules.on_quorum_loss != "wait" or len(electorate_of(node)) < 3:
            return False
        self.went_astray = self.rng.random() < 0.1
        return self.went_astray

    def donor_lies(self) -> bool:
        return (
            bool(self.faults.donor_lies)
            and not self.world.healed
            and self.rng.random() < self.faults.donor_lies
        )

    def falsify(self, sender: str, message: Message) -> Message:
        """What a lying sender makes of its own message."""
        faults, rng = self.faults, self.rng
        if isinstance(message, Ready) and faults.false_ready and rng.random() < faults.false_ready:
            return choice(
                rng,
                [
                    replace(message, weight=2 * message.weight),
                    replace(message, state_digest=digest(b"a lie")),
                    replace(message, unheard=tuple(p for p in self.world.nodes if p != sender)),
                ],
            )
        if isinstance(message, Roster) and faults.split_roster and rng.random() < faults.split_roster:
            self.split.add(sender)
            members = tuple(replace(m, weight=max(m.weight - 1, min(m.weight, 1))) for m in message.members)
            return replace(message, members=members)
        return message

    def _freeze(self) -> None:
        node = self._pick()
        if node.core is not None and not node.frozen:
            self.world.tell(node.name, "FREEZE")
            node.frozen = True
            life = node.life
            self.world.later(
                self.rng.uniform(1, 15), None, lambda: node.thaw() if node.life == life else None
            )

    def _cut(self) -> None:
        a, b = self._pick(), self._pick()
        self.world.tell(a.name, f"CUT -> {b.name}")
        for_s = self.rng.uniform(0.5, 20)
        self.world.cut(a.name, b.name, for_s)
        if self.rng.random() < 0.5:
            self.world.cut(b.name, a.name, for_s)

    def _drop_link(self) -> None:
        a, b = self._pick(), self._pick()
        if a is not b and a.core is not None and b.core is not None:
            for one, other in ((a, b), (b, a)):
                self.world.link_down(other.name, one)
            self.world.later(0.5, None, lambda: self.world.link_up(a, b) if a.core and b.core else None)

    def _trainer_down(self) -> None:
        node = self._pick()
        node.training += 1
        node.feed(ev.TrainerState(False, "killed"))
        life = node.life
        up = ev.TrainerState(True, "")
        after_s = self.rng.uniform(0.5, 8)
        self.world.later(after_s, None, lambda: node.feed(up) if node.life == life else None)

    def _lie(self) -> None:
        """One message of random values, in the name of a member or of somebody who is none."""
        victim, liar = self._pick(), choice(self.rng, [STRANGER, self._pick().name])
        if victim.core is None or liar == victim.name:
            return
        if liar == STRANGER:
            victim.feed(ev.PeerUp(liar))
        lie = draw_lie(self.rng, victim.core, member=liar != STRANGER)
        self.world.tell(liar, f"LIES to {victim.name}: {lie}")
        victim.feed(ev.Received(liar, lie))

    def _boast(self) -> None:
        """Again and again, after the network has healed too: who asks it for anything gets nothing."""
        status = Status(10**6, digest(b"no record of this run"), 10**6, "training", Stage.READY, 0, 0, ())
        for node in self.world.nodes.values():
            if node.core is not None:
                if STRANGER not in node.core.ctx.peers or not node.core.ctx.peers[STRANGER].up:
                    node.feed(ev.PeerUp(STRANGER))
                node.feed(ev.Received(STRANGER, status))
        self.world.later(1.0, None, self._boast)

    def _drip(self) -> None:
        victim, peer = self._pick(), self._pick().name
        self.world.tell(peer, f"DRIPS to {victim.name}")
        for i in range(40):
            self.world.later(1.0 * i, victim, ev.BulkProgress(peer))
