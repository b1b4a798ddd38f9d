"""How audits go in the simulator: who keeps what, who is asked, and what comes of it.

As the auditor's desk does it (node/daemon/audit_desk.py): the contributors, then the reducer in the place of
who gives nothing, then another auditor. What is kept is lost in a crash. In some worlds one member hides: it
gives no auditor anything of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from simulation.draws import choice

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.audit import Order, due_shards, second_auditor
from tapestry.node.protocol.record import Record

if TYPE_CHECKING:
    import random

    from simulation.shell import Node
    from simulation.world import World

HIDER_SHARE = 0.3  # of the worlds have a member that hides
AGAIN_S = 2.0
KEPT_RECORDS = 64

Compare = Callable[["Node", Record, Order, dict[str, object]], None]


class Audits:
    """What concerns audits in one world."""

    def __init__(self, world: World, own: random.Random, names: list[str]) -> None:
        self.world = world
        self.hider = choice(own, names) if len(names) > 1 and own.random() < HIDER_SHARE else ""
        self.kept: dict[tuple[str, int], dict[str, dict[tuple[str, int], object]]] = {}  # life -> head ->
        self.seconds: dict[
            tuple[str, int], dict[tuple[str, str, int], Order]
        ] = {}  # life -> (head, first, shard)
        self.whole = self.incomplete = self.by_reducer = self.by_second = 0

    def drawn(self, node: Node, out: ev.Audit, compare: Compare) -> None:
        life, head = (node.name, node.life), out.record.head
        kept = self.kept.setdefault(life, {})
        kept[head] = {(one.peer, one.shard): one.blob for one in out.kept}
        while len(kept) > KEPT_RECORDS:
            del kept[next(iter(kept))]
        seconds = {(head, order.first, order.shard): order for order in out.seconds}
        self.seconds.setdefault(life, {}).update(seconds)
        for order in out.orders:
            self._look(node, out.record, order, compare, first=True)

    def _look(self, node: Node, record: Record, order: Order, compare: Compare, first: bool) -> None:
        def again() -> None:
            given = self._gather(record, order, node, ask_reducer=True)
            if given is not None:
                self.whole += 1
                self.by_second += not first
                compare(node, record, order, given)
            elif first:
                self._ask_second(node, record, order, compare)
            else:
                self.incomplete += 1

        given = self._gather(record, order, node, ask_reducer=False)
        if given is None:
            self.world.later(AGAIN_S, node, again)
        else:
            self.whole += 1
            compare(node, record, order, given)

    def _ask_second(self, node: Node, record: Record, order: Order, compare: Compare) -> None:
        peers = [m.peer for m in record.body.members]
        name = second_auditor(record.head, order.shard, order.reducer, node.name, peers, node.crypto)
        second = self.world.nodes.get(name) if name is not None else None
        known = self.seconds.get((second.name, second.life), {}) if second is not None else {}
        found = known.pop((record.head, node.name, order.shard), None)
        if second is None or second.core is None or found is None:
            self.incomplete += 1
        else:
            self._look(second, record, found, compare, first=False)

    def _gather(
        self, record: Record, order: Order, node: Node, ask_reducer: bool
    ) -> dict[str, object] | None:
        given: dict[str, object] = {}
        for member in record.body.members:
            if not member.weight:
                continue
            key = (member.peer, order.shard)
            found = self._of(member.peer, record.head, key, node)
            if found is None and ask_reducer:
                found = self._of(order.reducer, record.head, key, node)
                self.by_reducer += found is not None
            if found is None:
                return None
            given[member.peer] = found
        return given

    def _of(self, source: str, head: str, key: tuple[str, int], node: Node) -> object | None:
        giver = self.world.nodes.get(source)
        if giver is None or giver.core is None or (source == self.hider == key[0] and giver is not node):
            return None
        return self.kept.get((source, giver.life), {}).get(head, {}).get(key)

    def on_end(self, node: Node, out: ev.EndRound) -> None:
        """Whoever contributed to a record keeps what it draws, also if it heard late."""
        records = node.disk.records
        if not out.counted or out.counted != node.contributed or len(records) <= out.epoch:
            return
        record, rules = records[out.epoch], self.world.rules
        kept = self.kept.get((node.name, node.life), {}).get(record.head, {})
        share = self.world.invariants.audit_share(record)
        for shard in due_shards(record.draws, rules.shard_count, share, node.crypto):
            if (node.name, shard) not in kept:
                self.world.fail(
                    node.name, f"audit: it keeps nothing of shard {shard} of record {out.epoch + 1}"
                )
