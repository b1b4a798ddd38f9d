"""Worlds whose members roll the run back: because of a lie that was found, or because somebody asks for it.

A node signs if its own disk leads to the state, as the members' desk does. Some ask for what nobody can have:
a state of another side, one that is undone already, one of no epoch. Every record that rolls back is checked
by invariants.py. Drawn apart, so that other worlds stay as they were.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

from simulation.draws import choice, randint

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.members import Change, read_rollback, rollback_value
from tapestry.node.protocol.record import Record

if TYPE_CHECKING:
    from simulation.shell import Node
    from simulation.world import World

SHARE = 0.12  # of the worlds roll back by hand
LIES_SHARE = 0.6  # of those with a liar do by rule
CHECKPOINTS_KEPT = 3
SEEN_S = 0.5  # until everybody has an accusation


class Rollbacks:
    """What concerns them in one world."""

    def __init__(self, world: World, drawn: bool) -> None:
        self.world = world
        self.rng = random.Random(f"rollback {world.seed}")
        self.by_hand = drawn and self.rng.random() < SHARE
        self.by_rule = drawn and bool(world.liar) and self.rng.random() < LIES_SHARE
        self.asked = self.done = 0
        self.proven: set[str] = set()  # heads of records with a lie that was found

    def plan(self) -> None:
        if self.by_hand:
            self.world.later(4.0 + 6.0 * self.rng.random(), None, self._ask)

    # --- who asks ------------------------------------------------------------------------------

    def _ask(self) -> None:
        """For some state of late, or for one that cannot be."""
        world, rng = self.world, self.rng
        if world.healed:
            return
        world.later(world.stretch * (3.0 + 8.0 * rng.random()), None, self._ask)
        cores = [n.core for n in world.nodes.values() if n.core is not None and not n.frozen]
        if not cores:
            return
        chain = choice(rng, cores).chain
        to = max(0, chain.epoch - randint(rng, 1, 6))
        head = chain.head_at(to)
        lot = rng.random()
        if lot < 0.1:
            head = chain.head_at(max(0, to - 1))
        elif lot < 0.2:
            to = choice(rng, [chain.epoch, chain.epoch + 1, max(0, to - 1)])
        self._all_ask(to, head, "")

    def on_lie(self, record: Record) -> None:
        """A lie in this record is proven: by rule, everybody asks for the state before it."""
        if self.by_rule and record.head not in self.proven:
            self.proven.add(record.head)
            to, head = record.body.epoch - 1, record.body.prev
            self.world.later(SEEN_S * self.rng.random(), None, lambda: self._all_ask(to, head, "a lie"))

    def _all_ask(self, to: int, head: str, why: str) -> None:
        world = self.world
        nonce = hashlib.blake2b(f"{to} {head} {why}".encode(), digest_size=16).hexdigest()
        if not why:
            nonce = f"{self.rng.getrandbits(128):032x}"
        change = Change("rollback", "", rollback_value(to, head, why), to + 1000, nonce)
        self.asked += 1
        world.tell("world", f"ASKS for a rollback to {to} {head[:8]}")
        for node in list(world.nodes.values()):
            if node.core is not None and not node.frozen and self.leads_to(node, node.core.chain, to):
                node.feed(ev.ChangeAsked(change))

    # --- what a disk holds ---------------------------------------------------------------------

    def is_back(self, node: Node, epoch: int) -> bool:
        """Whether the record that makes `epoch` on the node's disk rolls the run back."""
        assert node.core is not None
        return epoch in node.core.chain.rolled

    def _checkpoints(self, node: Node, chain: Chain, epoch: int) -> list[int]:
        """Newest first: of the path to `epoch`, those that the limits keep, as disk/checkpoints.py has it."""
        back_to = self._pinned(node)
        found: list[int] = []
        for at in range(min(chain.epoch, len(node.disk.records)), -1, -1):
            if not self.gives(node, at) or not chain.leads(at, epoch):
                continue
            if chain.head_at(at) in node.disk.states:
                found.append(at)
                if len(found) >= CHECKPOINTS_KEPT and (back_to is None or at <= back_to):
                    break
        return found

    def _pinned(self, node: Node) -> int | None:
        assert node.core is not None
        pending = node.core.ctx.proposals.pending.values()
        return min((read_rollback(c.value)[0] for c in pending if c.kind == "rollback"), default=None)

    def gives(self, node: Node, epoch: int) -> bool:
        """Whether there is a checkpoint of this epoch that a joiner, `node`, has a use for."""
        assert node.core is not None
        chain = node.core.chain
        if epoch % self.world.checkpoint_every and epoch not in chain.rolled:
            return False
        return not chain.rolled or chain.leads(epoch)

    def leads_to(self, node: Node, chain: Chain, epoch: int) -> bool:
        """As checkpoints.leads_to."""
        if not 0 <= epoch <= chain.epoch:
            return False
        return self._walk(node, chain, epoch) == epoch

    def _walk(self, node: Node, chain: Chain, epoch: int) -> int:
        """The furthest epoch on the path to `epoch` that the disk leads to; -1 if none."""
        begun = [at for at in self._checkpoints(node, chain, epoch) if at <= epoch]
        if not begun:
            return -1
        at = begun[0]
        while at < epoch:
            step = chain.step_from(at, epoch)
            if step not in chain.rolled and chain.head_at(step) not in node.disk.updates:
                break
            at = step
        return at

    def made_of_disk(self, node: Node, epoch: int) -> tuple[int, str, str] | None:
        """The state of `epoch`, or the nearest on the path to it: epoch, head, and state."""
        from simulation.shell import digest, digest_of

        assert node.core is not None
        chain = node.core.chain
        begun = [at for at in self._checkpoints(node, chain, epoch) if at <= epoch]
        to, at = self._walk(node, chain, epoch), begun[0] if begun else -1
        if at < 0:
            return None
        state = node.disk.states[chain.head_at(at)][1]
        while at < to:
            at = chain.step_from(at, epoch)
            if at not in chain.rolled:
                shards = node.disk.updates[chain.head_at(at)][1]
                state = digest("".join([state, *[digest_of(s) for s in shards]]).encode())
        self.done += at == epoch
        return at, chain.head_at(at), state

    def base_of(self, node: Node, epoch: int) -> int:
        """Up to which epoch updates may be forgotten: those after `epoch` stay, and what a rollback needs."""
        if node.core is None or not (self.by_hand or self.by_rule):
            return epoch
        back_to, chain = self._pinned(node), node.core.chain
        on_path = [at for at in self._checkpoints(node, chain, chain.epoch) if at < max(1, chain.epoch)]
        if back_to is not None:
            on_path = [at for at in on_path if at <= back_to] or on_path[-1:]
        return min([epoch, *on_path[:1]])

    # --- what must hold ------------------------------------------------------------------------

    def on_residual(self, node: Node) -> None:
        """What rounding took from a contribution goes on into the next: of one that is undone it must not."""
        ground = self.world.invariants.at.get(node.base)
        if ground is not None and node.residual in ground.undone:
            self.world.fail(node.name, f"rollback: the residual of {node.residual[:8]}, which is undone")
