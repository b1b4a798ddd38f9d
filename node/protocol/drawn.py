"""What a record draws of its round, at this node: what to keep, what to look at.

Kept are the shards of our own contribution that are drawn, whether or not we had the whole result when the
record came: who is late is audited as well. And of the shards that we averaged ourselves, everybody's inputs:
an auditor whom a contributor does not answer asks the reducer. Both are checked by the names that the record
has (commitment.py), so that it does not matter who gives them.

Pure.
"""

from __future__ import annotations

from tapestry.node.protocol.audit import Input, SignedMean, draw, due_shards, inputs_digest
from tapestry.node.protocol.context import Context
from tapestry.node.protocol.events import Audit
from tapestry.node.protocol.exchange import Exchange
from tapestry.node.protocol.members import Roll
from tapestry.node.protocol.record import Record
from tapestry.node.protocol.rules import Rules
from tapestry.node.protocol.settings import number_of


def share_of(roll: Roll, rules: Rules) -> float:
    """The share of a record's shards that is audited. `roll`: of the state before it, as for its weights: by
    when a node has the record, a later one may hold, and contributors keep what auditors will ask for."""
    return number_of(roll.settings, "audit.share", rules.audit_share)


def audit_of(
    ctx: Context, roll: Roll, exchange: Exchange, record: Record, fetched: tuple[SignedMean, ...] = ()
) -> Audit | None:
    """None where nothing is drawn, or nothing of it concerns us. `roll`: of the state before the record.

    `fetched`: who made the record's result, where we got it from a member that had accepted it.
    """
    body, share = record.body, share_of(roll, ctx.rules)
    due = due_shards(record.draws, ctx.rules.shard_count, share, ctx.crypto) if share else ()
    if not due:
        return None
    kept = [*_own(ctx, exchange, record, due), *_averaged(ctx, exchange, record, due)]
    same = exchange.complete and exchange.result_digest() == body.result
    same = same and exchange.averaged == inputs_digest(body.members, ctx.crypto)
    means = exchange.means() if same else fetched
    if not means:
        return Audit(record, (), (), (), tuple(kept)) if kept else None
    drawn = draw(ctx.me, record, means, share, ctx.crypto)
    digests = tuple(mean.digest for mean in means)
    return Audit(record, digests, drawn.orders, drawn.seconds, tuple(kept))


def _own(ctx: Context, exchange: Exchange, record: Record, due: tuple[int, ...]) -> list[Input]:
    """Of the contribution of ours that the record names."""
    mine = exchange.mine
    named = next((m.contribution for m in record.body.members if m.peer == ctx.me and m.weight), "")
    if mine is None or mine.contribution != named:
        return []
    return [Input(shard, ctx.me, named, (), mine.blobs[shard]) for shard in due]


def _averaged(ctx: Context, exchange: Exchange, record: Record, due: tuple[int, ...]) -> list[Input]:
    """Of others' contributions, in the shards that we averaged."""
    return [
        Input(shard, member.peer, member.contribution, *exchange.inputs[member.peer].of(shard))
        for shard in due
        if exchange.averages(shard)
        for member in record.body.members
        if member.weight and member.peer != ctx.me and exchange.has(member, shard)
    ]
