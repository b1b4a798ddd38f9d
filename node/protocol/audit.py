"""Who looks over a reducer's shoulder: what it signs, and which shards are computed again after a commit.

A reducer could send everybody the same wrong mean, and all would hold the same wrong bits. So:

    committed   a contribution's name is the root of a tree over its shards (commitment.py): who has the name
                can check any one shard of it, and nobody can show another shard under that name
    signed      a reducer signs the digest of the mean it made, with the head and the inputs it made it of
    drawn       the head of a record, which nobody can choose, says which shards are looked at, and by whom
    audited     the auditor asks the contributors for their shards of those, averages them again, and
                compares; of whom it gets nothing it asks the reducer, and then another auditor tries
    carried     a result that a member accepted and others lack comes with its signatures (`means_fault`): so
                nobody can say of numbers that nobody made that it had accepted them

A mean that differs from the signed one is a lie that anyone can check, with the inputs and the signature in
hand (lineage/accusation.py). An honest reducer cannot be accused: it averaged inputs of just these names, of
which there is one each, and the mean is a function of them, to the bit.

What is not found: a lie in a shard that was not drawn, and one of which neither a contributor nor the reducer
gives an input. That somebody does not answer is no proof of anything: it is counted and named, no more.

Pure; standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tapestry.node.protocol.canon import Crypto, canonical
from tapestry.node.protocol.chain import Body, Member
from tapestry.node.protocol.messages import Blob

UNPROVEN = "unproven"  # why a fetch failed: what the donor says was accepted has not the signatures
SHARE_UNIT = 1 << 32  # what `share` is counted in, of a digest's first 32 bits


class SignedMean(NamedTuple):
    """What a reducer made of one shard, and stands for."""

    reducer: str
    digest: str  # of the encoded mean
    signature: str  # of the reducer: mean_message


@dataclass(frozen=True, slots=True)
class Order:
    """One shard that this node is to average again."""

    shard: int
    reducer: str
    digest: str  # of the mean that the record's result holds
    signature: str  # of the reducer: mean_message


@dataclass(frozen=True, slots=True)
class Draw:
    """What the head of a record draws, as one member sees it."""

    due: tuple[int, ...]  # shards that somebody looks at
    orders: tuple[Order, ...]  # those that this node looks at
    seconds: tuple[Order, ...] = ()  # and those that it looks at if it is asked to, by who cannot


def inputs_digest(members: Iterable[Member], crypto: Crypto) -> str:
    """Names what is averaged: contributions and their weights, in the roster's order."""
    return crypto.digest(canonical([[m.contribution, m.weight] for m in members if m.weight]))


def mean_message(head: str, shard: int, digest: str, inputs: str) -> bytes:
    """What the reducer of a shard signs. `head`: of the state that the round starts from."""
    return b"tapestry mean v1\0%s\0%d\0%s\0%s" % (head.encode(), shard, digest.encode(), inputs.encode())


def result_digest(digests: Iterable[str], crypto: Crypto) -> str:
    """Of the whole encoded mean: of its shards' digests in order."""
    return crypto.digest("".join(digests).encode())


def means_fault(body: Body, means: Sequence[SignedMean], shard_count: int, crypto: Crypto) -> str | None:
    """Why these are not the shards of the result of `body`, each signed by a member of it as the mean of
    what `body` averages; None if they are. Who signed a wrong one has left a proof."""
    if len(means) != shard_count:
        return f"{len(means)} means, the run has {shard_count} shards"
    if result_digest((one.digest for one in means), crypto) != body.result:
        return "the means of another result"
    peers, inputs = {m.peer for m in body.members}, inputs_digest(body.members, crypto)
    for shard, one in enumerate(means):
        if one.reducer not in peers:
            return f"shard {shard} is signed by {one.reducer[:64]}, who is not in the round"
        message = mean_message(body.prev, shard, one.digest, inputs)
        if not crypto.verify(one.reducer, one.signature, message):
            return f"the signature of shard {shard} is not that of {one.reducer}"
    return None


def due_shards(head: str, shard_count: int, share: float, crypto: Crypto) -> tuple[int, ...]:
    """The shards of the record with this head that are averaged again: about `share` of them."""
    limit = int(share * SHARE_UNIT)
    if not limit:
        return ()
    lots = (crypto.digest(f"audit|{head}|{shard}".encode()) for shard in range(shard_count))
    return tuple(shard for shard, lot in enumerate(lots) if int(lot[:8], 16) < limit)


def auditors_of(
    head: str, shard: int, reducer: str, members: Sequence[str], crypto: Crypto
) -> tuple[str, ...]:
    """Who looks at a shard, and who does if that one cannot: members but its reducer, by lot."""
    others = [peer for peer in members if peer != reducer]
    order = sorted(others, key=lambda peer: crypto.digest(f"{head}|{shard}|{peer}".encode()))
    return tuple(order[:2])


def draw(
    me: str,
    head: str,
    members: Sequence[str],
    means: Sequence[SignedMean],  # of every shard
    share: float,
    crypto: Crypto,
) -> Draw:
    """What `me` keeps for the auditors of this record, and what it looks at itself."""
    due = due_shards(head, len(means), share, crypto)
    turns: list[list[Order]] = [[], []]
    for shard in due:
        auditors = auditors_of(head, shard, means[shard][0], members, crypto)
        if me in auditors:
            turns[auditors.index(me)].append(Order(shard, *means[shard]))
    return Draw(due, tuple(turns[0]), tuple(turns[1]))


@dataclass(frozen=True, slots=True)
class Input:
    """A shard of a contribution, that auditors may ask for."""

    shard: int
    peer: str  # whose it is
    contribution: str
    path: tuple[str, ...]  # that proves it; of our own the shell has it
    blob: Blob  # its encoded bytes
