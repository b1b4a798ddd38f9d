"""An orderly stop: of two electors, who leaves hands the round that is under way to the other.

A quorum of two is both, so that one of them alone would have to wait `quorum_loss_s`, or for good. Who stops
in good order signs that it has left the round that starts from its head, and the one after (LEAVE): the other
may have decided the first without its knowledge. With that signature the other's vote alone decides such a
round, and the record bears it in the place of the second vote.

Why there is one decision still. The quorums of such a round are both, or the one that stayed. Two sets
without a common member are only the one and the other, each by the other's leave. Who has left writes that
down before it says so (`Vote.left`), and from then on, restarted or not, counts on nobody's leave in those
rounds. So whichever of the two counted on the other's leave had not left by then; of two that did, each would
have left before the other. Of three and more electors a quorum is there when one leaves, and nothing is
handed over. docs/decisions/022-handover.md
"""

from __future__ import annotations

from typing import NamedTuple

from tapestry.node.protocol.canon import Crypto, quorum

ELECTORS = 2  # of an electorate in which a leave counts


class Handover(NamedTuple):
    """In a record: what stands for the vote of one that had left."""

    peer: str
    head: str  # where it left: what the record follows, or the one before
    signature: str


def leave_message(head: str) -> bytes:
    """What a LEAVE signs: in the round from `head`, and in the next, its sender decides nothing alone."""
    return b"tapestry leave v1\0" + head.encode()


def seats_needed(electorate_count: int) -> int:
    """How many of the electorate a body must name: a quorum, but one of two may have left."""
    return 1 if electorate_count == ELECTORS else quorum(electorate_count)


def handover_fault(
    handover: Handover,
    heads: tuple[str, ...],  # of the record that is followed, and of the one before: as much as is known
    electorate: tuple[str, ...],
    signers: set[str],
    crypto: Crypto,
) -> str | None:
    """Why this leave stands for no vote in a round; None if it does."""
    peer, head, signature = handover
    if len(electorate) != ELECTORS or peer not in electorate or peer in signers or not head.startswith(heads):
        return "handover"
    return None if crypto.verify(peer, signature, leave_message(head)) else "signature"
