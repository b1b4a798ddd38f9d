"""What must hold after every event, by the numbers of the guarantees.

G1 one result: a head has one state digest, everywhere.
G2 all or nothing: every shard of an update averages exactly the members of its record, with their weights;
   a contribution is in at most one record of a chain.
G3 no silent fallback: a state advances only by the update that its record names.
G4/consensus: without forced records there is one record for an epoch after a head; a vote never goes back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tapestry.node.protocol.chain import Record, quorum
from tapestry.node.protocol.events import Vote

if TYPE_CHECKING:
    from simulation.world import Node, World


class Invariants:
    def __init__(self, world: World) -> None:
        self.world = world
        self.state_of: dict[str, str] = {}  # head -> state digest
        self.next_of: dict[str, str] = {}  # head -> head of the ordinary record after it

    def fail(self, node: Node, text: str) -> None:
        raise AssertionError(f"seed {self.world.seed} t={self.world.now:.3f} {node.name}: {text}")

    def on_state(self, node: Node, head: str, state: str) -> None:
        if self.state_of.setdefault(head, state) != state:
            self.fail(node, f"G1: two states under head {head[:8]}")

    def on_record(self, node: Node, record: Record) -> None:
        body = record.body
        if not body.forced:
            known = self.next_of.setdefault(body.prev, record.head)
            if known != record.head:
                self.fail(node, f"consensus: two decisions after {body.prev[:8]}: epoch {body.epoch}")
        records = node.disk.records
        electorate = (
            [m.peer for m in records[-2].body.members] if len(records) > 1 else [self.world.genesis.founder]
        )
        if not body.forced:
            signed = {peer for peer, _ in record.signatures}
            if sum(p in signed for p in electorate) < quorum(len(electorate)):
                self.fail(node, "consensus: a record without a quorum's signatures")
        mine = {m.contribution for m in body.members if m.weight}
        for earlier in records[-12:-1]:
            if mine & {m.contribution for m in earlier.body.members}:
                self.fail(node, f"G2: a contribution in records {earlier.body.epoch} and {body.epoch}")
        weights = [m.weight for m in body.members if m.weight]
        influence = self.world.rules.max_influence
        if influence * len(weights) > 1 and max(weights) > influence * sum(weights) + 1:
            self.fail(node, f"weight cap: {weights}")

    def on_apply(self, node: Node, record: Record, shards: tuple[object, ...]) -> None:
        expected = [(m.peer, m.contribution, m.weight) for m in record.body.members if m.weight]
        if len(shards) != self.world.rules.shard_count:
            self.fail(node, f"G2: {len(shards)} shards applied")
        for index, blob in enumerate(shards):
            shard, inputs = blob  # type: ignore[misc]
            got = [(peer, contribution, weight) for (peer, contribution, s), weight in inputs if s == index]
            if shard != index or got != expected:
                self.fail(node, f"G2: shard {index} averages {got}, the record says {expected}")
        prev = node.disk.state_head
        if prev != record.body.prev:
            self.fail(node, f"G3: record {record.body.epoch} applied to another state")

    def on_vote(self, node: Node, before: Vote | None, after: Vote) -> None:
        if before is None or (before.epoch, before.head) != (after.epoch, after.head):
            return
        if after.promised < before.promised or after.accepted_ballot < before.accepted_ballot:
            self.fail(node, f"a vote went back: {before} -> {after}")
        if after.accepted_ballot == before.accepted_ballot and after.accepted != before.accepted:
            self.fail(node, f"two values accepted in ballot {after.accepted_ballot}")

    def after_event(self, node: Node) -> None:
        core = node.core
        if core is None:
            return
        limit = 4 * core.ctx.rules.peers_max
        if len(core.ctx.peers) > limit or len(core.sync.asked_at) > limit:
            self.fail(node, "G7: a table outgrew its limit")
        round_ = core.round
        if round_ is not None:
            if (
                len(round_.exchange.inputs) > limit
                or len(round_.state.accepts) > limit
                or len(round_.state.ready) > limit
            ):
                self.fail(node, "G7: a round's table outgrew its limit")
            if round_.epoch != core.chain.epoch or round_.head != core.chain.head:
                self.fail(node, "a round that does not start from the head")
