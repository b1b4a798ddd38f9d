"""What this node's disk has said in rounds, and whether it may say more.

An acceptor must never forget a vote within a round. The newest vote is on the disk; a disk that was lost,
set back or damaged does not know all that it has said. Then the node stands by: it gives what it has, and
votes again when a record shows that what it may have forgotten counts no more. docs/decisions/003, 007 and
023.
"""

from __future__ import annotations

from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.context import Context
from tapestry.node.protocol.events import Vote
from tapestry.node.protocol.messages import Seat
from tapestry.node.protocol.place import Tip
from tapestry.node.protocol.record import seat_message
from tapestry.node.protocol.waits import Wait


class OwnVote:
    """Mutable; owned by Core. `chain` is the one that sync moves."""

    def __init__(self, ctx: Context, chain: Chain, vote: Vote | None, life: str, alone: bool) -> None:
        self.ctx = ctx
        self.chain = chain
        self.newest = vote  # on the disk, or of the last round, in which we had none to give
        # Any READY leaves a vote on the disk: a disk without one has never promised anything.
        self.life = vote.life if vote is not None else life
        self.left = vote.left if vote is not None else ""
        self.founded_here = vote is not None and vote.head == chain.genesis.run_id
        # The head that a disk which was set back goes on from, as long as no other elector of it is met.
        self.alone_at = chain.head if alone else ""

    def here(self) -> Vote:
        """What we promised or accepted in the round from our head."""
        at, vote = self.chain.place, self.newest
        if vote is not None and vote.head == at.head:
            return vote
        tip = at.tip
        left = self.left if self.left.startswith(at.heads) else ""
        return Vote(at.epoch, at.head, -1, -1, None, self.life, (tip.full, tip.voice, tip.since), left)

    @property
    def tip(self) -> Tip | None:
        """The head of the newest vote's round."""
        return None if self.newest is None else Tip(*self.newest.standing, self.newest.head)

    def stands_by(self) -> Wait | None:
        """Why we may have voted in this head's round without knowing how; None if we have not, or know.

        The others decide that round, and our vote counts again in a later one.
        """
        if not self.ctx.roll.may_contribute(self.ctx.me):
            why = self.ctx.roll.removed.get(self.ctx.me)
            what = (
                "not a member of this run"
                if why is None
                else f"removed from this run: {why or 'no reason given'}"
            )
            return Wait("admission", what, f"ends when who admits runs: tapestry admit {self.ctx.me}")
        if self.tip is not None and self.tip.beats(self.chain.tip):
            # We only move to a tip that beats our own, or back to one that we voted at: so this one is from
            # before the one we voted at.
            return Wait(
                "vote",
                "our disk lost records: no vote before we have them again",
                "ends when a member that has them is heard: start one, or give its address with --peer",
            )
        if self.is_forgotten():
            return Wait(
                "vote",
                "our disk was lost: no vote before the next record",
                "ends when the others have made it: start them, if `tapestry peers` shows too few",
            )
        return None

    def is_forgotten(self) -> bool:
        """Whether the electorate has us from before our disk was lost: we may have voted after its record.

        A disk that was set back, alone, goes on all the same: nobody is there whom a second vote could reach,
        and its records name it as the disk that it is now.
        """
        chain = self.chain
        if chain.head == self.alone_at:
            return False
        if chain.epoch == 0:
            return self.ctx.me == chain.genesis.founder and not self.founded_here
        return any(peer == self.ctx.me and life != self.life for peer, life in chain.place.seats)

    def meet(self, peer: str) -> bool:
        """Another elector may have had our vote in this round, from before our disk was set back. Whether we
        stand by from now on."""
        place = self.chain.place
        if not self.alone_at or place.head != self.alone_at or peer not in place.electorate:
            return False
        self.alone_at = ""
        return self.stands_by() is not None

    def ask_for_seat(self) -> None:
        """An electorate of three keeps an elector that no record names: a record that does without us may
        never come. Only at the head, and in no round."""
        ctx, place = self.ctx, self.chain.place
        if ctx.me in place.electorate and self.is_forgotten():
            signature = ctx.crypto.sign(seat_message(place.head, self.life))
            ctx.broadcast(Seat(place.epoch, place.head, self.life, signature))
