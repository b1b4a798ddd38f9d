"""The acceptor's half of a round: promises and votes, written down before they are told (Paxos 1b and 2b).

It follows the ballot it is told to follow; whose ballot that may be, `round.py` decides. It sees to it that
what it promised or accepted is on disk before anybody hears of it, and that no ballot gets two votes of it.
"""

from __future__ import annotations

from dataclasses import replace

from tapestry.node.protocol.agreement import Agreement
from tapestry.node.protocol.audit import SignedMean
from tapestry.node.protocol.events import ExchangeBegan, FetchUpdate, PersistResult, PersistVote
from tapestry.node.protocol.messages import Accept, Propose, Ready, Roster, Stage
from tapestry.node.protocol.record import Body, accept_message, draw_message, head_of, seat_message
from tapestry.node.protocol.round_state import RoundState


class Acceptor:
    """Mutable; owned by Round, which shares its state."""

    def __init__(self, state: RoundState) -> None:
        self.state = state
        self.ctx = state.ctx
        self.seat = ""  # our signature of this round's seat, made when it is first told
        self.holder_index = 0
        self.fetching = ""  # head of the update that was asked for; "" if none is out
        self.fetched: dict[str, tuple[SignedMean, ...]] = {}  # head of the value fetched last -> who made it

    # --- ballots -------------------------------------------------------------------------------

    def enter(self, ballot: int, now: float, forced: bool = False, leader: str = "") -> None:
        """Leave the current ballot for a higher one. Nothing is promised by this alone."""
        state = self.state
        state.set_ballot(ballot, forced, leader)
        state.ready.clear()
        state.accepts.clear()
        state.refusals.clear()
        state.accepted_at = None
        state.accepted_body = None
        state.proposal = None
        state.entered_at = state.progress_at = now
        state.quorum_ready_at = None
        state.leader_claims_at = None
        if state.stage > Stage.READY:
            state.stage = Stage.READY if state.speaks else Stage.TRAINING

    def promise(self) -> None:
        """Write down that nothing of a lower ballot will be accepted, before anybody is told."""
        state, vote = self.state, self.state.vote
        if state.ballot > vote.promised:
            self._write(state.ballot, vote.accepted_ballot, vote.accepted)

    def _write(self, promised: int, accepted_ballot: int, accepted: Body | None) -> None:
        state, vote = self.state, self.state.vote
        state.vote = replace(vote, promised=promised, accepted_ballot=accepted_ballot, accepted=accepted)
        self.ctx.emit(PersistVote(state.vote))

    def send_ready(self, now: float) -> None:
        self.promise()
        state = self.state
        mine = state.exchange.mine
        if state.stage < Stage.READY:
            state.stage = Stage.READY
        if not self.seat:
            self.seat = self.ctx.crypto.sign(seat_message(state.head, state.vote.life))
        ready = Ready(
            state.epoch,
            state.head,
            state.ballot,
            state.forced,
            state.state_digest,
            mine.contribution if mine is not None else "",
            mine.weight if mine is not None else 0,
            mine.norm if mine is not None else 0.0,
            state.vote.accepted_ballot,
            state.vote.accepted,
            state.vote.life,
            self.ctx.unheard(state.electorate, now),
            state.refused,
            self.seat,
            self.ctx.receipts.newest,
        )
        if state.leading:
            state.ready[self.ctx.me] = ready
        elif state.leader != self.ctx.me:
            self.ctx.send(state.leader, ready)

    # --- phase 2 -------------------------------------------------------------------------------

    def follow(self, roster: Roster, now: float) -> None:
        self._begin_phase_2(None, now)
        self.state.resend_at = now + self.ctx.rules.resend_s
        self.state.exchange.start(roster)

    def follow_proposal(self, propose: Propose, now: float) -> str | None:
        """Vote for a value that was accepted before, once we have it. Returns as `accept`."""
        self._begin_phase_2(propose, now)
        self.holder_index = 0
        if self.state.vote.accepted == propose.body:
            return self.accept(propose.body, head_of(propose.body, self.ctx.crypto))
        self.fetch_proposal()
        return None

    def _begin_phase_2(self, proposal: Propose | None, now: float) -> None:
        state = self.state
        state.stage = Stage.EXCHANGING
        state.proposal = proposal
        state.progress_at = now
        self.ctx.pace.exchange_began(state.epoch, now)
        self.ctx.emit(ExchangeBegan(state.epoch))

    def fetch_proposal(self) -> None:
        propose = self.state.proposal
        assert propose is not None
        holders = [p for p in propose.holders if p in self.ctx.peers]
        head = head_of(propose.body, self.ctx.crypto)
        if holders and self.fetching != head:
            donor = holders[self.holder_index % len(holders)]
            self.fetching = head
            body = propose.body
            self.ctx.emit(FetchUpdate(body.epoch, head, body.result, donor, accepted=body))

    def on_update_fetched(self, head: str, means: tuple[SignedMean, ...]) -> str | None:
        """Returns as `accept`. Without `means` it was fetched for a record, and proves nothing here."""
        if not means:
            return None
        if self.fetching == head:
            self.fetching = ""
        self.fetched = {head: means}
        proposal = self.state.proposal
        if proposal is None or self.state.accepted_body is not None:
            return None
        if head_of(proposal.body, self.ctx.crypto) != head:
            return None
        return self.accept(proposal.body, head)

    def on_fetch_failed(self, head: str) -> None:
        if self.fetching == head:
            self.fetching = ""
        proposal = self.state.proposal
        if proposal is not None and head_of(proposal.body, self.ctx.crypto) == head:
            self.holder_index += 1  # the next one is asked at the next resend

    def hold_result(self) -> tuple[Body, str]:
        """All shards are here: they and the roster are the value (body and head). Written down; no vote."""
        exchange = self.state.exchange
        assert exchange.roster is not None
        body = body_of(self.state, exchange.roster, exchange.result_digest(), exchange.agreement())
        head = head_of(body, self.ctx.crypto)
        self.ctx.keep_update(head)
        self.ctx.emit(PersistResult(body.epoch, head, exchange.result_blobs(), exchange.means()))
        return body, head

    def accept(self, body: Body, head: str) -> str | None:
        """Vote for `body` in this ballot. Returns why not, if its leader has had our vote for another."""
        state = self.state
        if state.vote.accepted_ballot == state.ballot and state.vote.accepted != body and not body.forced:
            return "equivocation"  # before a restart we accepted the other
        state.stage = Stage.ACCEPTED
        state.accepted_body, state.accepted_head = body, head
        if state.refused == head:
            state.refused = ""
        if body.forced:
            # Not in the vote: it must not displace an ordinary value, which a quorum may have chosen.
            self.promise()
        else:
            self._write(state.ballot, state.ballot, body)
        state.exchange.progress += 1
        vote = self._vote_for(body, head)
        if state.leading:
            state.accepts[self.ctx.me] = vote
        else:
            self.ctx.send(state.leader, vote)
        return None

    def resend_accept(self) -> None:
        body = self.state.accepted_body
        if body is not None and not self.state.leading:
            self.ctx.send(self.state.leader, self._vote_for(body, self.state.accepted_head))

    def _vote_for(self, body: Body, head: str) -> Accept:
        state, sign = self.state, self.ctx.crypto.sign
        vote, draw = sign(accept_message(head, state.ballot)), sign(draw_message(head))
        return Accept(state.epoch, state.head, state.ballot, head, body.result, body.agreement, vote, draw)


def body_of(state: RoundState, roster: Roster, result: str, agreement: Agreement) -> Body:
    """The value that `roster` and the mean it determines are."""
    return Body(
        run_id=state.ctx.rules.run_id,
        epoch=state.epoch + 1,
        prev=state.head,
        state_digest=state.state_digest,
        members=roster.members,
        result=result,
        forced=roster.forced,
        agreement=agreement,
        changes=roster.changes,
        behind=roster.behind,
    )
