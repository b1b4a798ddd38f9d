"""A member whose disk is set back to a backup, in some worlds, by the rules of `restore` (restored.py).

It comes back where nobody can be reached for a while, and goes on by itself if the run lets it; then it meets
the others, who went on from records that its key signed. Drawn apart, so that other worlds stay as they were.
"""

from __future__ import annotations

import copy
import random
from typing import TYPE_CHECKING

from simulation.draws import choice

if TYPE_CHECKING:
    from simulation.shell import Disk, Node
    from simulation.world import World

SHARE = 0.1  # of the worlds have one
ALONE_S = 40.0  # at the most. An island forces its first record after quorum_loss_s


class Backups:
    """What concerns it in one world."""

    def __init__(self, world: World, drawn: bool, names: list[str]) -> None:
        self.world = world
        self.rng = random.Random(f"backup {world.seed}")
        self.name = choice(self.rng, names) if drawn and len(names) > 2 and self.rng.random() < SHARE else ""
        self.kept: Disk | None = None
        self.was_alone = 0  # how often it went on so

    def plan(self) -> None:
        """A backup early, and a crash some epochs after it."""
        if self.name:
            at = self.rng.uniform(5.0, 20.0)
            self.world.later(at, None, self._keep)
            self.world.later(at + self.rng.uniform(0.5, 15.0), None, self._crash)

    def _crash(self) -> None:
        if not self.world.healed:
            self.world.chaos.crash_for_a_while(self.world.nodes[self.name])

    def _keep(self) -> None:
        disk = self.world.nodes[self.name].disk
        if disk.state_head:
            self.kept = copy.copy(disk)
            self.kept.records, self.kept.updates = [*disk.records], dict(disk.updates)
            self.kept.means, self.kept.states = dict(disk.means), dict(disk.states)

    def sets_back(self, node: Node) -> bool:
        """Once, and where the others can go on without it: a lone elector may have decided since."""
        kept, world = self.kept, self.world
        if node.name != self.name or kept is None or not world.chaos.can_lose(node):
            return False
        if node.disk.records[: len(kept.records)] != kept.records:
            return False  # it has left a fork since: others may not know what it comes back to
        if world.invariants.electorate(kept.records) == (node.name,):
            return False
        self.kept = None
        world.tell(node.name, f"SET BACK to epoch {len(kept.records)} of {len(node.disk.records)}")
        node.disk = kept
        self.forget_vote(node)
        node.disk.restored = True
        world.invariants.on_disk_lost(node)
        self._isolate(node)
        return True

    def forget_vote(self, node: Node) -> None:
        """What `restore` does."""
        node.disk.vote, node.disk.life = None, self.world.token()

    def _isolate(self, node: Node) -> None:
        world = self.world
        others = [
            name for name in world.nodes if (node.name, name) not in world.unlinked and name != node.name
        ]
        for name in others:
            world.unlink(node.name, name)

        def join() -> None:
            for name in others:
                world.unlinked -= {(node.name, name), (name, node.name)}
                other = world.nodes[name]
                if other.core is not None and node.core is not None:
                    world.link_up(node, other)

        world.later(self.rng.uniform(0.0, ALONE_S), None, join)

    def goes_on_alone(self, node: Node) -> bool:
        """As `find_run` has it, for a node that starts."""
        disk = node.disk
        if not disk.restored:
            return False
        named = [m.life for r in disk.records[-1:] for m in r.body.members if m.peer == node.name]
        met = any(
            other.name in self.world.invariants.electorate(disk.records)
            or len(other.disk.records) > len(disk.records)
            for other in self.world.nodes.values()
            if other is not node and other.core is not None
            if (node.name, other.name) not in self.world.unlinked
        )
        if met or (disk.vote is not None and disk.vote.life in named):
            disk.restored = False
            return False
        self.was_alone += 1
        return True

    def is_unheard(self, node: Node) -> bool:
        """Whether what it says reaches no other elector, by its links."""
        core = node.core
        if core is None or node.name != self.name:
            return False
        electorate = self.world.invariants.electorate(node.disk.records)
        peers = core.ctx.peers
        return not any(p in peers and peers[p].up for p in electorate)
