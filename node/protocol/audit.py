"""Who looks over a reducer's shoulder: what it signs, and which shards are computed again after a commit.

A reducer could send everybody the same wrong mean, and all would hold the same wrong bits. So:

    committed   a contribution's name is the root of a tree over its shards (commitment.py): who has the name
                can check any one shard of it, and nobody can show another shard under that name
    signed      a reducer signs the digest of the mean it made, with the head and the inputs it made it of
    drawn       what each voter looks at follows from its own signature of the record's head (draw_message),
                which nobody else knows before it has voted: a reducer that sends its mean last knows the
                head, and could choose among many, but not what is drawn (RFC 8032: one message has one
                signature). Votes have a ballot in them, which a leader chooses, and draw nothing
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

from tapestry.node.protocol.canon import Crypto, canonical, quorum
from tapestry.node.protocol.messages import Blob
from tapestry.node.protocol.record import Body, Member, Record

UNPROVEN = "unproven"  # why a fetch failed: what the donor says was accepted has not the signatures
FEW = 3  # contributions: from so many on a mean's rule can tell the odd one


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
    first: str = ""  # who looks at it by its own draw, where this node is the second


@dataclass(frozen=True, slots=True)
class Draw:
    """What a record draws, as one member sees it."""

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


def names_few(members: Sequence[Member]) -> bool:
    """Whether so few of those that are named contribute that their mean is bounded by nothing."""
    counted = sum(m.weight > 0 for m in members)
    return counted < min(quorum(len(members)), FEW)


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


def looks_at(
    auditor: str, draws: Sequence[tuple[str, str]], shard_count: int, share: float, crypto: Crypto
) -> tuple[int, ...]:
    """The shards that one of those who signed a record averages again, by its own draw. `draws`: Record's.

    All of them together look at about `share` of the shards. Sorted; nothing if it did not sign, or alone, or
    if its draw was false ("").
    """
    own, others = dict(draws).get(auditor), len(draws) - 1
    if not own or not others:
        return ()
    expected = min(share / others, 1.0) * shard_count
    lots = [
        int(crypto.digest(f"audit|{own}|{index}".encode())[:16], 16) for index in range(int(expected) + 1)
    ]
    count = int(expected) + (lots[-1] < (expected - int(expected)) * 2**64)
    return tuple(sorted({lot % shard_count for lot in lots[:count]}))


def due_shards(
    draws: Sequence[tuple[str, str]], shard_count: int, share: float, crypto: Crypto
) -> tuple[int, ...]:
    """What somebody looks at: these are kept."""
    found = (looks_at(peer, draws, shard_count, share, crypto) for peer, _ in draws)
    return tuple(sorted(set().union(*found)))


def second_auditor(
    head: str, shard: int, reducer: str, first: str, members: Sequence[str], crypto: Crypto
) -> str | None:
    """Who looks at a shard if `first` cannot: a member, by lot, that did not average it."""
    others = [peer for peer in members if peer not in (reducer, first)]
    return min(others, key=lambda peer: crypto.digest(f"{head}|{shard}|{peer}".encode()), default=None)


def draw(me: str, record: Record, means: Sequence[SignedMean], share: float, crypto: Crypto) -> Draw:
    """What `me` looks at of this record, and what it looks at if it is asked to. `means`: of every shard."""
    draws, count = record.draws, len(means)
    peers = [m.peer for m in record.body.members]
    orders, seconds = [], []
    for auditor, _ in draws:
        for shard in looks_at(auditor, draws, count, share, crypto):
            reducer = means[shard].reducer
            if auditor == me != reducer:
                orders.append(Order(shard, *means[shard]))
            elif me != auditor != reducer and me == second_auditor(
                record.head, shard, reducer, auditor, peers, crypto
            ):
                seconds.append(Order(shard, *means[shard], first=auditor))
    return Draw(tuple(orders), tuple(seconds))


@dataclass(frozen=True, slots=True)
class Input:
    """A shard of a contribution, that auditors may ask for."""

    shard: int
    peer: str  # whose it is
    contribution: str
    path: tuple[str, ...]  # that proves it; of our own the shell has it
    blob: Blob  # its encoded bytes
