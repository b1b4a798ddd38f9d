"""A member that signs two different values in one ballot after one head: with both signatures, a proof.

A signature of a vote covers the head of a body, and the ballot. Two bodies that follow the same head, and a
signature of one peer for each in the same ballot, are all that anybody needs, years later and without a
network. Whoever leads a ballot sees such votes, and whoever meets a fork sees those of its first records.

**An honest member is never accused.** What it accepted in a ballot is on its disk before its vote is sent,
and it votes for nothing else in that ballot (acceptor.py, `accept`). If it loses that disk it may vote again,
and for another value, since nobody is sure that it was ever asked: but then under another life
(docs/decisions/003), which the leader put into the body, and which is a part of what is signed. It signs no
body that names it with a life that it does not have (round.py). So two bodies that name the peer with
different lives, or not at all, prove nothing. Nor do forced ones, which are not written into the vote.

Two rosters that one leader signed for one ballot are receipts.py's.

Pure; standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from tapestry.node.protocol.canon import Crypto
from tapestry.node.protocol.record import Body, Record, accept_message, head_of


@dataclass(frozen=True, slots=True)
class Equivocation:
    """Two votes of one peer. `faults` says whether it proves anything."""

    peer: str
    ballot: int
    bodies: tuple[Body, Body]
    signatures: tuple[str, str]


def fault_of(one: Equivocation, crypto: Crypto) -> str | None:
    """Why it proves nothing, in a few words; None if it is proven. Anybody can ask."""
    first, second = one.bodies
    if (first.run_id, first.epoch, first.prev) != (second.run_id, second.epoch, second.prev):
        return "the two values are not of one round"
    if first.forced or second.forced:
        return "a forced value is no vote that is kept"
    heads = [head_of(body, crypto) for body in one.bodies]
    if heads[0] == heads[1]:
        return "the two values are one"
    lives = [_life_in(body, one.peer) for body in one.bodies]
    if not lives[0] or lives[0] != lives[1]:
        return "they do not name the signer with one disk"
    for head, signature in zip(heads, one.signatures, strict=True):
        if not crypto.verify(one.peer, signature, accept_message(head, one.ballot)):
            return "it did not sign both"
    return None


def found_in(ours: Record, theirs: Record, crypto: Crypto) -> tuple[Equivocation, ...]:
    """Who signed both of two records that follow one head, in one ballot; checked here."""
    if ours.ballot != theirs.ballot or ours.head == theirs.head or ours.body.prev != theirs.body.prev:
        return ()
    other = dict(theirs.signatures)
    both = [
        Equivocation(peer, ours.ballot, (ours.body, theirs.body), (signature, other[peer]))
        for peer, signature in ours.signatures
        if peer in other
    ]
    return tuple([one for one in both if fault_of(one, crypto) is None])


def _life_in(body: Body, peer: str) -> str:
    return next((m.life for m in body.members if m.peer == peer), "")
