"""One round at one node: it makes state e + 1 out of state e, or leaves no trace (G2).

Single-decree consensus (Lamport, "Paxos Made Simple", 2001) whose value is a roster together with the mean
it determines:

    phase 1a  CALL      the leader of ballot b asks               (ballot 0 needs none: all start in it)
    phase 1b  READY     a promise, a contribution, the highest accepted value
    phase 2a  ROSTER    a new value: who is averaged, and who averages what;
              PROPOSE   or the accepted value of the highest ballot that a READY told of
    phase 2b  ACCEPT    after result and vote are on disk; or REFUSE, if the run has a gate
    learn     COMMIT    the record with the signatures of a quorum

Modification from the paper: a ROSTER's value is not known when it is sent, only determined (the mean is a
function of the roster), so acceptors vote for the digest that they computed, and only equal votes count.

A round is driven by its leader. The others watch the leader, and the leader of the next ballot takes over
when it says nothing for stall_s. Everything is repeated every resend_s until its effect is seen.

`Round` is the entry: it hears messages, checks whose they are and which ballot they name, and lets the parts
act: acceptor.py (promises and votes), leader.py (rosters, exclusion, commit), watch.py (what is overdue),
gate.py (whether a result is good enough), exchange.py (the shards). They share round_state.py.
"""

from __future__ import annotations

from tapestry.node.protocol.acceptor import Acceptor
from tapestry.node.protocol.audit import UNPROVEN
from tapestry.node.protocol.context import Context
from tapestry.node.protocol.equivocation import Equivocation, fault_of
from tapestry.node.protocol.events import (
    CloseTraining,
    Contributed,
    Equivocated,
    FetchFailed,
    Note,
    UpdateFetched,
    Vote,
)
from tapestry.node.protocol.exchange import Exchange
from tapestry.node.protocol.gate import Gate
from tapestry.node.protocol.leader import EXCUSED, Leader, named
from tapestry.node.protocol.messages import (
    Accept,
    Call,
    Closing,
    Propose,
    Ready,
    Receipt,
    Refuse,
    Roster,
    Stage,
)
from tapestry.node.protocol.narrow import is_followed, leaves_accepted, note_own
from tapestry.node.protocol.place import Place
from tapestry.node.protocol.receipts import TwoRosters, fault_of_rosters, receipt_of
from tapestry.node.protocol.record import Behind, Record, accept_message, draw_message
from tapestry.node.protocol.round_state import Outcome, RoundState
from tapestry.node.protocol.snapshot import RoundSnapshot
from tapestry.node.protocol.validity import ready_fault, roster_fault, signed_fault, value_fault
from tapestry.node.protocol.waits import Wait, span
from tapestry.node.protocol.watch import Watch

__all__ = ["Outcome", "Round"]

NARROW = "narrow"  # why a roster is not followed: narrow.py
UNHEEDED = "unheeded"  # why not either: its leader was told of an accepted value, and has not proposed it
PEERS = "`tapestry peers` has who is heard"
BALLOT_STEP_MAX = 2**16  # Guess: no honest swarm opens as many in a resend_s; a liar needs ages to BALLOT_MAX


class Round:
    """Mutable; owned by Core. Methods append outputs to the context and never raise on a peer's message.

    on_<message> returns why the message was refused, in a word; None if it was heard or is merely old.
    """

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
        self.epoch = at.epoch
        self.head = at.head
        self.electorate = at.electorate
        self.state = RoundState(ctx, at, behind, state_digest, before, vote, now)
        self.acceptor = Acceptor(self.state)
        self.lead = Leader(self.state, self.acceptor)
        self.gate = Gate(self.state, self.acceptor)
        self.watch = Watch(self.state)
        self.exchange: Exchange = self.state.exchange
        self.reach = self.state.ballot + BALLOT_STEP_MAX  # highest ballot that others may take us to
        self.reach_until = now + ctx.rules.resend_s

    # --- questions -----------------------------------------------------------------------------

    @property
    def stage(self) -> Stage:
        return self.state.stage

    @property
    def ballot(self) -> int:
        return self.state.ballot

    @property
    def forced(self) -> bool:
        return self.state.forced

    @property
    def leader(self) -> str:
        return self.state.leader

    @property
    def decided(self) -> Record | None:
        return self.state.decided

    @property
    def quorum_lost_at(self) -> float | None:
        """Since when a majority of the electorate is gone, once it has been for stall_s."""
        return self.state.quorum_missed_at if self.state.quorum_lost else None

    def wait(self, now: float) -> Wait | None:
        """What this node waits for; None while it trains."""
        state = self.state
        if state.quorum_lost:
            return self._quorum_wait(now)
        if state.stage == Stage.READY:
            return self.lead.gather_gap(now) if state.leading else self._roster_wait(now)
        if state.stage == Stage.EXCHANGING:
            return self.gate.wait(now) or self._results_wait(now)
        return None if state.stage == Stage.TRAINING else self._votes_wait(now)

    def _quorum_wait(self, now: float) -> Wait:
        """Who is missing, since when, and what ends it."""
        state, count = self.state, len(self.state.voters)
        what = f"{self.watch.alive(now)} of {count} of the electorate alive, need {state.need}"
        gone = [f"…{p[-6:]}" for p in self.watch.missing(now)]
        if gone:
            what += f"; not there: {named(gone)}"
        left_s = self.watch.force_in_s(now)
        ends = f"ends when {max(1, state.need - self.watch.alive(now))} more are back"
        ends += f": start them, or see what parts us from them; {PEERS}"
        if left_s is not None:
            ends += f"; goes on alone in {span(left_s)}"
        missed_at = now if state.quorum_missed_at is None else state.quorum_missed_at
        return Wait("quorum", what, ends, now - missed_at)

    def _roster_wait(self, now: float) -> Wait:
        """Of a follower that is ready."""
        state, ctx = self.state, self.ctx
        count, least = self.watch.ready_count(now), ctx.contributors_min()
        if count < least:
            live = ctx.live_at(self.epoch, self.head, now)
            coming = [p for p in live if ctx.stage_at(p, self.epoch, self.head) < Stage.READY]
            what = f"{count} are ready, the run asks for {least}"
            return self.lead.too_few(now, what, least - count, coming)
        ends = "ends when it names who is averaged; if it is silent, the next one leads"
        return state.waits(now, f"waiting for {state.leader}", ends)

    def _results_wait(self, now: float) -> Wait:
        state, roster, waiting_on = self.state, self.exchange.roster, self.exchange.waiting_on()
        for_s, limit_s = now - state.stage_at, self.ctx.pace.exchange_max_s()
        if roster is None or state.proposal is not None:
            what = "the result that others accepted"
        else:
            what = f"{len(self.exchange.results)} of {len(roster.reducers)} result shards"
        whose = f" from {named(waiting_on)}" if waiting_on else ""
        ends = f"ends when the rest comes{whose}; in {span(limit_s - for_s)} at the latest others are asked"
        return Wait("round", what, ends, for_s, limit_s)

    def _votes_wait(self, now: float) -> Wait:
        ends = "ends when a majority has voted; if the leader is silent, the next one asks"
        usual_s = self.ctx.pace.result_max_s()
        return Wait("round", "waiting for the commit", ends, now - self.state.stage_at, usual_s)

    def snapshot(self, now: float) -> RoundSnapshot:
        """What is shown of the round."""
        state, roster = self.state, self.exchange.roster
        return RoundSnapshot(
            epoch=self.epoch,
            ballot=state.ballot,
            leader=state.leader,
            stage=state.stage,
            forced=state.forced,
            electorate=len(self.electorate),
            members=len(roster.members) if roster is not None and state.stage > Stage.READY else 0,
            waiting_on=self._waiting_on(now),
        )

    def _waiting_on(self, now: float) -> tuple[str, ...]:
        """Who holds this node up at its stage; () if nobody but itself does."""
        state = self.state
        if state.stage == Stage.READY:
            return self.lead.waited_for(now) if state.leading else (state.leader,)
        return self.exchange.waiting_on() if state.stage == Stage.EXCHANGING else ()

    def wakeup_at(self, now: float) -> float:
        """When `advance` has something to do if nothing happens before: later than `now`."""
        state = self.state
        wakeup_at = max(state.resend_at, now)
        if state.leading and state.stage <= Stage.READY and self.lead.close_at is not None:
            for due_at in (self.lead.close_at, self.lead.gather_until()):
                if now < due_at < wakeup_at:
                    wakeup_at = due_at
        if state.accepted_at is not None:
            due_at = state.accepted_at + self.ctx.rules.commit_grace_s
            if now < due_at < wakeup_at:
                wakeup_at = due_at
        return wakeup_at

    def count_deliveries(self, contributors: set[str], now: float) -> None:
        """The round was decided: remember who was named and gave nothing, and not who was gone or gated."""
        gated = self.state.furthest.values()
        excused = {p for p, why in self.lead.excluded.items() if why in EXCUSED}.union(gated)
        self.ctx.count_deliveries(self.epoch, self.state.named, contributors, excused, now)

    # --- local causes --------------------------------------------------------------------------

    def handle_contribution(self, contributed: Contributed, now: float) -> None:
        self.exchange.contribute(contributed)
        if self.state.stage <= Stage.READY:
            self.acceptor.send_ready(now)
        self.advance(now)

    def handle_trainer(self, up: bool, now: float) -> None:
        """Without a trainer this node still votes: it is ready, with nothing."""
        self.state.trainer_up = up
        if not up and self.state.stage == Stage.TRAINING:
            self.acceptor.send_ready(now)
        self.advance(now)

    def handle_peer_down(self, peer: str, now: float) -> None:
        self.exchange.forget_peer(peer)
        self.watch.somebody_changed()
        self.advance(now)

    def handle_refused(self, peer: str, reason: str, now: float) -> None:
        self.exchange.unusable[peer] = reason
        self.advance(now)

    def forget_stranger(self, peer: str) -> None:
        """`peer` has left the table of peers, for good as it seems."""
        self.exchange.forget_stranger(peer)
        if peer not in self.electorate:
            self.lead.forget_stranger(peer)

    def handle_update_fetched(self, inp: UpdateFetched, now: float) -> None:
        self._voted(self.acceptor.on_update_fetched(inp.head, inp.means), now)
        self.advance(now)

    def handle_judged(self, body_head: str, worse: float | None, now: float) -> None:
        self.gate.on_judged(body_head, worse)
        self.advance(now)

    def handle_fetch_failed(self, failed: FetchFailed, now: float) -> None:
        self.acceptor.on_fetch_failed(failed.head)
        if failed.reason == UNPROVEN and self.state.leading:
            self.lead.on_unproven(failed.donor, failed.head, now)

    # --- the network ---------------------------------------------------------------------------

    def on_ballot_seen(self, peer: str, ballot: int, now: float) -> None:
        """An elector is in a higher ballot of our round: follow it, if that has its ordinary leader."""
        state, me = self.state, self.ctx.me
        if ballot <= state.ballot or peer not in self.electorate:
            return
        if self._out_of_reach(ballot, now):
            ballot = self.reach if state.leader_of(self.reach) != me else self.reach - 1
            if ballot <= state.ballot:
                return
        if state.forced:
            if state.forced_leader == me and state.stage <= Stage.READY:
                self.lead.open(ballot + 1, now, forced=True)
        elif state.leader_of(ballot) != me and self._goes_along(peer, ballot, now):
            self._enter_as_follower(ballot, now)

    def _out_of_reach(self, ballot: int, now: float) -> bool:
        """Whether others may not take us to `ballot` yet: they can by one step in every resend_s."""
        if now >= self.reach_until:
            self.reach = self.state.ballot + BALLOT_STEP_MAX
            self.reach_until = now + self.ctx.rules.resend_s
        return ballot > self.reach

    def _goes_along(self, peer: str, ballot: int, now: float) -> bool:
        """Whether the word of `peer` takes us to this higher ballot, or we stay in ours: movers.py."""
        state, movers = self.state, self.ctx.movers
        if state.forced or not self.ctx.heard(state.leader, now) or not self._quorum_with_us(peer, now):
            return True
        if not movers.is_heeded(peer):
            return False
        own = peer == state.leader == state.leader_of(ballot)
        if own and movers.may_go_on(peer, state.roster_ballot == state.ballot, len(self.electorate)):
            return True
        movers.count(peer, ballot, self.watch.has_time_left(now))
        return not own

    def _quorum_with_us(self, without: str, now: float) -> bool:
        """Whether a quorum may be in our ballot: heard, at our head, and not known to be in a higher one."""
        state, ctx = self.state, self.ctx
        others = [p for p in state.voters if p not in (ctx.me, without) and ctx.heard(p, now)]
        with_us = sum(ctx.is_within(p, self.epoch, self.head, state.ballot) for p in others)
        with_us += ctx.me in state.voters
        return with_us >= state.need

    def on_call(self, peer: str, call: Call, now: float) -> str | None:
        if call.ballot <= self.state.ballot or self._out_of_reach(call.ballot, now):
            return None
        if call.forced:
            if peer not in self.electorate:
                return "not_elector"
            if not self.watch.accepts_force(now):
                return None
        elif self.state.leader_of(call.ballot) != peer:
            return "not_leader"
        elif not self._goes_along(peer, call.ballot, now):
            return None
        self.acceptor.enter(call.ballot, now, forced=call.forced, leader=peer)
        if self.state.speaks:
            self.acceptor.send_ready(now)
        return None

    def on_ready(self, peer: str, ready: Ready, now: float) -> str | None:
        state = self.state
        if ready.forced != state.forced and ready.ballot <= state.ballot:
            return None
        if not ready.forced and state.leader_of(ready.ballot) != self.ctx.me:
            return "not_leader"
        fault = ready_fault(state, peer, ready) or self.lead.seat_fault(peer, ready.life, ready.seat)
        if fault is not None:
            return fault
        fault = self._look_at(peer, ready.receipts)
        if fault is not None:
            return fault
        if ready.ballot < max(state.ballot, state.lead_from):
            if state.leading:
                self.ctx.send(peer, Call(self.epoch, self.head, state.ballot, state.forced))
            elif ready.ballot >= state.ballot:  # ours to lead once, before a restart: lead our next one
                self.lead.open_next(now)
            return None
        if ready.ballot > state.ballot:
            if ready.forced or peer not in self.electorate or self._out_of_reach(ready.ballot, now):
                return None
            if not self._goes_along(peer, ready.ballot, now):
                return None
            self.lead.open(ready.ballot, now)
        self.lead.add_ready(peer, ready, now)
        self.advance(now)
        return None

    def on_closing(self, peer: str, closing: Closing, now: float) -> str | None:
        state = self.state
        if closing.ballot < state.ballot:
            return None
        if peer != (state.forced_leader if state.forced else state.leader_of(closing.ballot)):
            return "not_leader"
        if not state.forced and not self._quorum_is_ready(peer, now):
            return None  # it asks again
        if state.stage == Stage.TRAINING:
            self.ctx.emit(CloseTraining(self.epoch))
        return None

    def _quorum_is_ready(self, leader: str, now: float) -> bool:
        """Whether it may be so, of those that we hear: no leader may end the others' training before."""
        others = [p for p in self.state.voters if p not in (leader, self.ctx.me) and self.ctx.heard(p, now)]
        training = sum(self.ctx.stage_at(p, self.epoch, self.head) < Stage.READY for p in others)
        training += self.state.stage < Stage.READY and self.ctx.me in self.state.voters
        return len(self.state.voters) - training >= self.state.need

    def on_roster(self, peer: str, roster: Roster, now: float) -> str | None:
        """Follow a leader's roster, if it is the highest ballot's and says of us what we said."""
        state = self.state
        if roster.ballot < state.ballot or self._out_of_reach(roster.ballot, now):
            return None
        if roster.forced:
            if not (state.forced and roster.ballot == state.ballot and peer == state.forced_leader):
                return None  # we were not asked, or have given up
        elif state.leader_of(roster.ballot) != peer:
            return "not_leader"
        elif state.forced and roster.ballot == state.ballot:
            return None  # a ballot's number is of one kind for us, so what is named by it is of one roster
        here = roster.ballot == state.ballot
        has_one = here and state.stage >= Stage.EXCHANGING
        if has_one and state.proposal is None and self.exchange.roster == roster:
            return None
        receipt = receipt_of(peer, roster, self.ctx.crypto)
        if has_one:
            if signed_fault(state, receipt) is None:
                self._keep(receipt)
            return "equivocation"
        if here:
            state.roster_ballot = roster.ballot
        fault = roster_fault(state, roster) or signed_fault(state, receipt)
        if fault is not None:
            return fault
        if here:
            self._keep(receipt)
        mine = next((m for m in roster.members if m.peer == self.ctx.me), None)
        if mine is None:
            return None  # left out of this one; the commit will find us
        own = self.exchange.mine
        changed = mine.weight and (own is None or mine.contribution != own.contribution)
        if changed or mine.life != state.vote.life:
            if state.speaks:
                self.acceptor.send_ready(now)  # we restarted: say what we have now
            return None
        if mine.weight and own is not None and mine.tokens != own.weight:
            return "weight"
        if roster.ballot > state.ballot:
            if not self._goes_along(peer, roster.ballot, now):
                return None
            self.acceptor.enter(roster.ballot, now)
            state.roster_ballot = roster.ballot
            self._keep(receipt)
        if not is_followed(state, peer, roster, now):
            self._next_ballot(now, NARROW)
            return "narrow"
        if leaves_accepted(state, peer, roster, now):
            self._next_ballot(now, UNHEEDED)
            return "unheeded"
        self.acceptor.promise()
        self._follow(roster, now)
        return None

    def _keep(self, receipt: Receipt) -> None:
        """Of a roster of our ballot, well signed."""
        two = self.ctx.receipts.hear(receipt)
        if two is not None:
            self._accuse(two)

    def _look_at(self, peer: str, receipts: tuple[Receipt, ...]) -> str | None:
        """What `peer` was told by leaders, beside what we and others were."""
        proofs, fault = self.ctx.receipts.shown(peer, receipts, self.ctx.rules.run_id, self.ctx.crypto)
        for two in proofs:
            self._accuse(two)
        return fault

    def _accuse(self, two: TwoRosters) -> None:
        """Of our own rosters we know that there is one of each ballot."""
        ctx = self.ctx
        if two.peer == ctx.me or two.peer not in ctx.roll.members:
            return
        if fault_of_rosters(two, ctx.rules.run_id, ctx.crypto) is None:
            ctx.emit(Equivocated(two))

    def on_propose(self, peer: str, propose: Propose, now: float) -> str | None:
        state = self.state
        if propose.ballot < state.ballot or state.forced or self._out_of_reach(propose.ballot, now):
            return None
        if state.leader_of(propose.ballot) != peer:
            return "not_leader"
        fault = value_fault(state, propose.body)
        if fault is not None:
            return fault
        named = next((m for m in propose.body.members if m.peer == self.ctx.me), None)
        if named is not None and named.life != state.vote.life:
            return None  # it is of a disk that we lost: what that has signed we do not know
        if propose.ballot == state.ballot and state.stage >= Stage.EXCHANGING:
            same = state.proposal is not None and state.proposal.body == propose.body
            return None if same else "equivocation"
        if propose.ballot > state.ballot:
            if not self._goes_along(peer, propose.ballot, now):
                return None
            self.acceptor.enter(propose.ballot, now)
        if propose.body == state.vote.accepted:
            state.proposed.setdefault(peer, now)
        self.acceptor.promise()
        self._follow(propose, now)
        return None

    def on_accept(self, peer: str, accept: Accept, now: float) -> str | None:
        state = self.state
        if accept.ballot != state.ballot or not state.leading:
            return None
        signed = accept_message(accept.body_head, accept.ballot)
        if not self.ctx.crypto.verify(peer, accept.signature, signed):
            return "signature"
        known = state.accepts.get(peer)
        if known is not None and known.body_head != accept.body_head:
            self._accuse_of_two(peer, known, accept)
            return "equivocation"
        if known is None:
            if not self.ctx.crypto.verify(peer, accept.draw, draw_message(accept.body_head)):
                return "draw"
            state.accepts[peer] = accept
            state.refusals.pop(peer, None)
            self.exchange.progress += 1
        self.advance(now)
        return None

    def _accuse_of_two(self, peer: str, first: Accept, second: Accept) -> None:
        """It has voted twice in our ballot; where we know both values, that is a proof."""
        bodies = [self.lead.named_by(vote.body_head, {peer: vote}) for vote in (first, second)]
        if bodies[0] is None or bodies[1] is None:
            return
        pair, signatures = (bodies[0], bodies[1]), (first.signature, second.signature)
        proof = Equivocation(peer, self.ballot, pair, signatures)
        if fault_of(proof, self.ctx.crypto) is None:
            self.ctx.emit(Equivocated(proof))

    def on_refuse(self, peer: str, refuse: Refuse, now: float) -> str | None:
        """A member's own data speak against this ballot's result; only a leader counts that."""
        state = self.state
        if refuse.ballot != state.ballot or not state.leading or state.proposal is not None:
            return None
        if state.in_roster(peer) is None:
            return "roster"
        if peer not in state.accepts and peer not in state.refusals:
            state.refusals[peer] = refuse.worse
            self.exchange.progress += 1
        self.advance(now)
        return None

    # --- time ----------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Do whatever has become possible or due. Called after every input that concerns the round."""
        state = self.state
        if self.decided is not None:
            return
        self._watch_quorum(now)
        if state.stage >= Stage.EXCHANGING:
            self.watch.progress(now)
        has_all = state.stage == Stage.EXCHANGING and state.proposal is None and self.exchange.complete
        if has_all and self.gate.passes(now):
            self._voted(self.gate.accept(), now)
        if state.leading and state.stage >= Stage.EXCHANGING:
            self.lead.try_commit(now)
            if state.decided is None and not self.lead.heed_refusals(now):
                self.lead.watch_members(now)
        elif not state.leading and state.stage >= Stage.READY:
            self._watch_leader(now)
        if state.leading and state.stage <= Stage.READY:  # perhaps only now
            self._try_roster(now)
        state.note_stage(now)
        if state.decided is None and now >= state.resend_at:
            state.resend_at = now + self.ctx.rules.resend_s
            self._resend(now)

    def _try_roster(self, now: float) -> None:
        value = self.lead.try_roster(now)
        if value is not None:
            self._follow(value, now)

    def _follow(self, value: Roster | Propose, now: float) -> None:
        """Take part in phase 2 of this ballot."""
        if isinstance(value, Roster):
            self._note_named(value)
            if self.state.leading:
                note_own(self.state, value, now)
            self.acceptor.follow(value, now)
        else:
            self._voted(self.acceptor.follow_proposal(value, now), now)
        self.advance(now)

    def _note_named(self, roster: Roster) -> None:
        """Of peers that we know: a leader may invent names."""
        state, ctx = self.state, self.ctx
        known = [m.peer for m in roster.members if m.weight and (m.peer in ctx.peers or m.peer == ctx.me)]
        state.named.update(dict.fromkeys(known, state.leader))

    def _voted(self, fault: str | None, now: float) -> None:
        """We accepted a value, or found that the leader has had our vote for another."""
        state = self.state
        if fault is not None:
            self.ctx.refuse(state.leader, fault, f"two values in ballot {state.ballot}")
            self._next_ballot(now, fault)
        elif state.leading and state.stage == Stage.ACCEPTED:
            self.lead.try_commit(now)

    def _watch_quorum(self, now: float) -> None:
        """Notice that a majority of the electorate is gone, or back; go on alone if the policy says so."""
        state = self.state
        if self.watch.quorum_there(now):
            if state.quorum_missed_at is not None:
                state.quorum_missed_at = None
                if state.quorum_lost:
                    self.ctx.emit(Note(f"epoch={self.epoch} quorum=back"))
                state.quorum_lost = False
                if state.forced:
                    self._next_ballot(now, "quorum_back")
            return
        if state.quorum_missed_at is None:
            state.quorum_missed_at = now
        if not state.quorum_lost and now - state.quorum_missed_at >= self.ctx.rules.stall_s:
            state.quorum_lost = True
            self.ctx.emit(Note(f"epoch={self.epoch} quorum=lost {self._quorum_wait(now).text}"))
        if self.watch.force_due(now):
            self.ctx.emit(Note(f"epoch={self.epoch} forcing=true {self._quorum_wait(now).text}"))
            self.lead.excluded.clear()
            self.lead.open(max(state.ballot + 1, state.lead_from), now, forced=True)

    def _watch_leader(self, now: float) -> None:
        if self.state.leader == self.ctx.me:  # ours before a restart: open the next one of ours
            self.lead.open_next(now)
            return
        fault = self.watch.leader_fault(now)
        if fault is not None:
            self._next_ballot(now, fault)

    def _next_ballot(self, now: float, why: str) -> None:
        """Give up on this ballot's leader: go to the next ballot whose leader seems to live."""
        state, ctx = self.state, self.ctx
        ballot = state.ballot + 1
        for candidate in range(ballot, ballot + len(state.order)):
            leader = state.leader_of(candidate)
            here = ctx.heard(leader, now) and ctx.stage_at(leader, self.epoch, self.head) != Stage.AWAY
            if leader == ctx.me or here:
                ballot = candidate
                break
        ctx.emit(Note(f"ballot={state.ballot} given_up={why} next={ballot} epoch={self.epoch}"))
        if state.leader_of(ballot) == ctx.me:
            state.set_ballot(ballot - 1)  # open_next looks from the one after
            self.lead.open_next(now)
        else:
            self._enter_as_follower(ballot, now)

    def _enter_as_follower(self, ballot: int, now: float) -> None:
        self.acceptor.enter(ballot, now)
        if self.state.stage == Stage.READY:
            self.acceptor.send_ready(now)

    def _resend(self, now: float) -> None:
        state = self.state
        stalled = now - state.progress_at >= self.ctx.rules.resend_s
        if state.stage == Stage.TRAINING:
            if state.speaks:
                self.acceptor.send_ready(now)
        elif state.stage == Stage.READY:
            self.acceptor.send_ready(now)
        elif state.stage == Stage.EXCHANGING:
            if state.proposal is not None:
                self.acceptor.fetch_proposal()
            elif self.exchange.complete:
                self.gate.keep_patience(now)
                if not state.leading:
                    self.gate.tell()
            elif stalled:
                self.exchange.pull()
        else:
            self.acceptor.resend_accept()
        if state.leading and state.stage >= Stage.EXCHANGING:
            self.lead.resend_phase_2()
        elif state.leading:
            self.lead.close_again(now)
