"""Where one node stands in one round: what its acceptor, its leader and its watch all read.

Data and questions only. The acceptor moves ballot, stage, vote and proposal; the leader keeps the tables of
READY and ACCEPT; the watch keeps the clocks. `round.py` puts them together.
"""

from __future__ import annotations

from enum import Enum

from tapestry.node.protocol.canon import quorum
from tapestry.node.protocol.context import Context
from tapestry.node.protocol.events import Vote
from tapestry.node.protocol.exchange import Exchange
from tapestry.node.protocol.handover import ELECTORS, Handover
from tapestry.node.protocol.messages import Accept, Propose, Ready, Seat, Stage
from tapestry.node.protocol.place import Place, leader_order
from tapestry.node.protocol.record import Behind, Body, Member, Record
from tapestry.node.protocol.waits import Wait


class Outcome(Enum):
    """How a round ended for this node."""

    COMMITTED = "committed"
    FORCED = "forced"
    MISSED = "missed"  # the others committed it without our contribution
    ABORTED = "aborted"  # left behind by a fork or by stopping


class RoundState:
    """Mutable; one per round."""

    def __init__(
        self,
        ctx: Context,
        at: Place,
        behind: Behind | None,
        state_digest: str,
        before: frozenset[str],
        vote: Vote,
        now: float,
    ) -> None:
        self.ctx = ctx
        self.at = at
        self.before = before  # who contributed to the record that our round starts from
        self.behind = behind  # what our record has to tell of the one before
        self.epoch = epoch = at.epoch
        self.head = head = at.head
        self.state_digest = state_digest
        self.electorate = electorate = at.electorate
        self.order = leader_order(electorate, head, ctx.crypto)
        self.exchange = Exchange(ctx, epoch, head, len(electorate))
        self.vote = vote
        # After a restart we may have led the promised ballot already: never lead the same one twice.
        self.lead_from = self.vote.promised + 1
        self.set_ballot(max(self.vote.promised, 0))
        self.stage = Stage.TRAINING
        self.trainer_up = True
        self.proposal: Propose | None = None
        self.accepted_body: Body | None = None  # in this ballot
        self.accepted_head = ""  # of accepted_body
        self.decided: Record | None = None
        # the leader's tables, of this ballot
        self.ready: dict[str, Ready] = {}
        self.standing_by: dict[str, Seat] = {}  # electors that take no part, and ask to be named
        self.accepts: dict[str, Accept] = {}
        self.refusals: dict[str, float] = {}  # who refused the result, and by how much it is too bad to them
        self.accepted_at: float | None = None  # when a quorum had accepted
        self.roster_ballot = -1  # the last in which its leader sent us a roster, fit to be followed or not
        self.named: dict[str, str] = {}  # contributor of a roster of this round -> who led
        self.narrowed: dict[str, None] = {}  # leaders that named few where more contributed before
        self.leave_out: dict[str, None] = {}  # leaders that left out electors whom we hear
        self.shut_out: dict[str, None] = {}  # whom they left out: narrow.py
        self.pretenders: dict[str, None] = {}  # leaders that said they exchange, and nobody else did
        self.proposed: dict[str, float] = {}  # leaders that proposed what we had accepted, and when first
        self.unheeding: dict[str, None] = {}  # leaders that named others anew where we had accepted a value
        # the gate, of this round
        self.refused = ""  # head of the body that we refused last
        self.furthest: dict[str, str] = {}  # head of a result -> whose contribution differs most in it
        # clocks
        self.entered_at = now  # this ballot
        self.progress_at = now
        self.quorum_ready_at: float | None = None
        self.leader_claims_at: float | None = None  # since when the leader says that its phase 2 is under way
        self.ready_at: float | None = None  # since when we are, in this round, in whichever ballot
        self.stage_at = now  # since when we are at this stage
        self.stage_seen = Stage.TRAINING
        self.quorum_missed_at: float | None = None  # since when no quorum is heard
        self.quorum_lost = False  # and that for stall_s: nobody has just started or changed its link
        self.resend_at = now + ctx.rules.resend_s

    def note_stage(self, now: float) -> None:
        """For those who ask since when we wait."""
        if self.stage != self.stage_seen:
            self.stage_seen, self.stage_at = self.stage, now
            if self.ready_at is None:
                self.ready_at = now

    def waits(self, now: float, what: str, ends: str, kind: str = "round", usual_s: float = 0.0) -> Wait:
        """To be ready together, since we are. `usual_s` 0: as long as others may well train."""
        usual_s = usual_s or self.ctx.pace.training_usual_s()
        return Wait(kind, what, ends, now - (now if self.ready_at is None else self.ready_at), usual_s)

    def set_ballot(self, ballot: int, forced: bool = False, forced_leader: str = "") -> None:
        self.ballot = ballot
        self.forced = forced
        self.forced_leader = forced_leader if forced else ""
        self.leader = self.forced_leader if forced else self.leader_of(ballot)
        self.leading = self.leader == self.ctx.me and ballot >= self.lead_from

    def leader_of(self, ballot: int) -> str:
        return self.order[ballot % len(self.order)]

    @property
    def handover(self) -> Handover | None:
        """The leave of the other one of two electors, if we may count on it."""
        if len(self.electorate) != ELECTORS or self.vote.left:
            return None
        leaves = {p: self.ctx.leaves.get(p) for p in self.electorate if p != self.ctx.me}
        fitting = [
            Handover(peer, leave.head, leave.signature)
            for peer, leave in leaves.items()
            if leave is not None and leave.head.startswith(self.at.heads)
        ]
        return fitting[0] if len(fitting) == 1 else None  # of both: neither counts on the other's

    @property
    def voters(self) -> tuple[str, ...]:
        """The electors whose quorum decides: without one that has left, though it may be back by now."""
        handover = self.handover
        if handover is None:
            return self.electorate
        return tuple([p for p in self.electorate if p != handover.peer])

    @property
    def need(self) -> int:
        """A quorum of the voters."""
        return quorum(len(self.voters))

    @property
    def speaks(self) -> bool:
        """A contribution, an accepted value, or the news that no contribution will come."""
        return self.exchange.mine is not None or self.vote.accepted is not None or not self.trainer_up

    def addressees(self) -> list[str]:
        """The other peers that this ballot's phase 2 concerns."""
        if self.proposal is not None:
            return [p for p in self.ready if p != self.ctx.me]
        roster = self.exchange.roster
        out = {self.ctx.me, *(self.standing_by.keys() - self.ready.keys())}
        return [] if roster is None else [m.peer for m in roster.members if m.peer not in out]

    def accusations(self) -> dict[str, tuple[str, ...]]:
        """Who waits for whom in this ballot's exchange, as each says itself."""
        waiting_on = {self.ctx.me: self.exchange.waiting_on()}
        for peer in self.addressees():
            view = self.ctx.peers.get(peer)
            if view is not None and view.status is not None and view.status.ballot == self.ballot:
                waiting_on[peer] = view.status.waiting_on
        return waiting_on

    def in_roster(self, peer: str) -> Member | None:
        """What this ballot's roster says of `peer`."""
        roster = self.exchange.roster
        if roster is None or roster.ballot != self.ballot or self.proposal is not None:
            return None
        return next((m for m in roster.members if m.peer == peer), None)
