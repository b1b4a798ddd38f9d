"""One round at one node: it makes state e + 1 out of state e, or leaves no trace (G2).

Single-decree consensus (Lamport, "Paxos Made Simple", 2001) whose value is a roster together with the mean
it determines:

    phase 1a  CALL      the leader of ballot b asks               (ballot 0 needs none: all start in it)
    phase 1b  READY     a promise, a contribution, the highest accepted value
    phase 2a  ROSTER    a new value: who is averaged, and who averages what;
              PROPOSE   or the accepted value of the highest ballot that a READY told of
    phase 2b  ACCEPT    after result and vote are on disk
    learn     COMMIT    the record with the signatures of a quorum

Modification from the paper: a ROSTER's value is not known when it is sent, only determined (the mean is a
function of the roster), so acceptors vote for the digest that they computed, and only equal votes count.

A round is driven by its leader. The others watch the leader, and the leader of the next ballot takes over
when it says nothing for stall_s. Everything is repeated every resend_s until its effect is seen.
"""

from __future__ import annotations

import math
from enum import Enum

from tapestry.node.protocol.blame import culprit
from tapestry.node.protocol.chain import (
    Body,
    InvalidRecord,
    Member,
    Record,
    accept_message,
    capped_weights,
    head_of,
    leader_order,
    member_from,
    quorum,
)
from tapestry.node.protocol.context import Context
from tapestry.node.protocol.events import (
    CloseTraining,
    Contributed,
    FetchUpdate,
    Note,
    PersistResult,
    PersistVote,
    Vote,
)
from tapestry.node.protocol.exchange import Exchange, assign_reducers, check_roster
from tapestry.node.protocol.messages import (
    Accept,
    Call,
    Closing,
    Propose,
    Ready,
    Roster,
    Stage,
)

WAITING_NAMED = 3  # peers named in a reason
BALLOT_STEP_MAX = 2**16  # Guess: no honest swarm opens as many in a resend_s; a liar needs ages to BALLOT_MAX


class Outcome(Enum):
    """How a round ended for this node."""

    COMMITTED = "committed"
    FORCED = "forced"
    MISSED = "missed"  # the others committed it without our contribution
    ABORTED = "aborted"  # left behind by a fork or by stopping


class Round:
    """Mutable; owned by Core. Methods append outputs to the context and never raise on a peer's message."""

    def __init__(
        self,
        ctx: Context,
        epoch: int,
        head: str,
        state_digest: str,
        electorate: tuple[str, ...],
        vote: Vote | None,
        now: float,
    ) -> None:
        self.ctx = ctx
        self.epoch = epoch
        self.head = head
        self.state_digest = state_digest
        self.electorate = electorate
        self.order = leader_order(electorate, head, ctx.crypto)
        self.exchange = Exchange(ctx, epoch, head)
        self.vote = vote or Vote(epoch, head, -1, -1, None)
        # After a restart we may have led the promised ballot already: never lead the same one twice.
        self.lead_from = self.vote.promised + 1
        self.ballot = max(self.vote.promised, 0)
        self.forced = False
        self.forced_leader = ""
        self.stage = Stage.TRAINING
        self.trainer_up = True
        self.decided: Record | None = None
        self.accepted_body: Body | None = None  # in this ballot
        self.proposal: Propose | None = None
        self.holder_index = 0
        self.fetching = ""  # head of the update that was asked for; "" if none is out
        # the leader's half
        self.ready: dict[str, Ready] = {}
        self.accepts: dict[str, Accept] = {}  # peer -> its vote in this ballot
        self.excluded: dict[str, str] = {}  # left out of this round's next rosters, and why
        self.spared: dict[str, None] = {}  # accused in this round, and not left out for it
        self.renewed: dict[str, None] = {}  # changed their contribution after a roster had named it
        self.unserved: dict[str, None] = {}  # told of an accepted value that nobody could get from them
        self.close_at: float | None = None  # when stragglers are told; None until a quorum is ready
        self.closing_sent = False
        self.accepted_at: float | None = None  # when a quorum had accepted
        # clocks
        self.entered_at = now  # this ballot
        self.exchange_at = now  # its phase 2
        self.leader_claims_at: float | None = None  # since when the leader says that its phase 2 is under way
        self.progress_at = now
        self.progress_seen = 0
        self.quorum_ready_at: float | None = None
        self.quorum_lost_at: float | None = None
        self.resend_at = now + ctx.rules.resend_s
        self.reach = self.ballot + BALLOT_STEP_MAX  # highest ballot that others may take us to
        self.reach_until = now + ctx.rules.resend_s

    # --- questions -----------------------------------------------------------------------------

    @property
    def leader(self) -> str:
        return self.forced_leader if self.forced else self.leader_of(self.ballot)

    def leader_of(self, ballot: int) -> str:
        return self.order[ballot % len(self.order)]

    @property
    def leading(self) -> bool:
        return self.leader == self.ctx.me and self.ballot >= self.lead_from

    def reason(self, now: float) -> str:
        """What this node waits for, in words."""
        roster = self.exchange.roster
        if self.stage == Stage.TRAINING:
            return "training"
        if self.quorum_lost_at is not None:
            alive = sum(self.ctx.heard(p, now) for p in self.electorate)
            need = quorum(len(self.electorate))
            return f"{alive} of {len(self.electorate)} of the electorate alive, need {need}"
        if self.stage == Stage.READY:
            return self._gather_gap(now) or "roster due" if self.leading else f"waiting for {self.leader}"
        if self.stage == Stage.EXCHANGING and roster is not None:
            return f"{len(self.exchange.results)} of {len(roster.reducers)} result shards"
        return "waiting for the commit"

    def wakeup_at(self, now: float) -> float:
        """When `advance` has something to do if nothing happens before: later than `now`."""
        times = [max(self.resend_at, now)]
        rules = self.ctx.rules
        if self.leading and self.stage <= Stage.READY and self.close_at is not None:
            times += [self.close_at, self._gather_until()]
        if self.accepted_at is not None:
            times.append(self.accepted_at + rules.commit_grace_s)
        return min(t for t in times if t > now or t == times[0])

    # --- local causes --------------------------------------------------------------------------

    def handle_contribution(self, contributed: Contributed, now: float) -> None:
        self.exchange.contribute(contributed)
        if self.stage <= Stage.READY:
            self._send_ready(now)
        self.advance(now)

    def handle_trainer(self, up: bool, now: float) -> None:
        """Without a trainer this node still votes: it is ready, with nothing."""
        self.trainer_up = up
        if not up and self.stage == Stage.TRAINING:
            self._send_ready(now)
        self.advance(now)

    def handle_peer_down(self, peer: str, now: float) -> None:
        self.exchange.forget_peer(peer)
        self.advance(now)

    def handle_refused(self, peer: str, reason: str, now: float) -> None:
        self.exchange.unusable[peer] = reason
        self.advance(now)

    def forget_stranger(self, peer: str) -> None:
        """`peer` has left the table of peers, for good as it seems."""
        self.exchange.forget_stranger(peer)
        if peer not in self.electorate:
            for table in (self.ready, self.accepts, self.renewed, self.unserved):
                table.pop(peer, None)

    def handle_update_fetched(self, head: str, now: float) -> None:
        if self.fetching == head:
            self.fetching = ""
        proposal = self.proposal
        wanted = proposal is not None and self.accepted_body is None
        if proposal is not None and wanted and head_of(proposal.body, self.ctx.crypto) == head:
            self._accept(proposal.body, head, now)
        self.advance(now)

    def handle_fetch_failed(self, head: str) -> None:
        if self.fetching == head:
            self.fetching = ""
        if self.proposal is not None and head_of(self.proposal.body, self.ctx.crypto) == head:
            self.holder_index += 1  # the next one is asked at the next resend

    # --- the network ---------------------------------------------------------------------------

    def on_ballot_seen(self, peer: str, ballot: int, now: float) -> None:
        """An elector is in a higher ballot of our round: follow it, if that has its ordinary leader."""
        if ballot <= self.ballot or peer not in self.electorate:
            return
        if self._out_of_reach(ballot, now):
            ballot = self.reach if self.leader_of(self.reach) != self.ctx.me else self.reach - 1
            if ballot <= self.ballot:
                return
        if self.forced:
            if self.forced_leader == self.ctx.me and self.stage <= Stage.READY:
                self._lead(ballot + 1, now, forced=True)
        elif self.leader_of(ballot) != self.ctx.me:
            self._enter(ballot, now)
            if self.stage == Stage.READY:
                self._send_ready(now)

    def _out_of_reach(self, ballot: int, now: float) -> bool:
        """Whether others may not take us to `ballot` yet: they can by one step in every resend_s."""
        if now >= self.reach_until:
            self.reach = self.ballot + BALLOT_STEP_MAX
            self.reach_until = now + self.ctx.rules.resend_s
        return ballot > self.reach

    def on_call(self, peer: str, call: Call, now: float) -> str | None:
        if call.ballot <= self.ballot or self._out_of_reach(call.ballot, now):
            return None
        if call.forced:
            if peer not in self.electorate:
                return "not_elector"
            if not self._accepts_force(now):
                return None
        elif self.leader_of(call.ballot) != peer:
            return "not_leader"
        self._enter(call.ballot, now, forced=call.forced, leader=peer)
        if self._has_something_to_say():
            self._send_ready(now)
        return None

    def on_ready(self, peer: str, ready: Ready, now: float) -> str | None:
        if ready.forced != self.forced and ready.ballot <= self.ballot:
            return None
        if not ready.forced and self.leader_of(ready.ballot) != self.ctx.me:
            return "not_leader"
        fault = self._ready_fault(peer, ready)
        if fault is not None:
            return fault
        if ready.ballot < max(self.ballot, self.lead_from):
            if self.leading:
                self.ctx.send(peer, Call(self.epoch, self.head, self.ballot, self.forced))
            elif ready.ballot >= self.ballot:  # ours to lead once, before a restart: lead our next one
                self._lead_next(now)
            return None
        if ready.ballot > self.ballot:
            if ready.forced or peer not in self.electorate or self._out_of_reach(ready.ballot, now):
                return None
            self._lead(ready.ballot, now)
        known = self.ready.get(peer)
        self.ready[peer] = ready
        if known is not None and known.contribution != ready.contribution:
            self._renew(peer, now)
        self.advance(now)
        return None

    def _ready_fault(self, peer: str, ready: Ready) -> str | None:
        if ready.state_digest != self.state_digest:
            return "state_digest"
        if (ready.accepted is None) != (ready.accepted_ballot < 0) or ready.accepted_ballot > ready.ballot:
            return "malformed"
        try:
            member_from((peer, ready.weight, ready.contribution))
        except InvalidRecord as e:
            return e.reason
        return self._value_fault(ready.accepted) if ready.accepted is not None else None

    def _value_fault(self, body: Body) -> str | None:
        """Why `body` cannot have been accepted in this round."""
        if body.run_id != self.ctx.rules.run_id or body.epoch != self.epoch + 1 or body.prev != self.head:
            return "unlinked"
        if body.forced:
            return "forced"
        if body.state_digest != self.state_digest:
            return "state_digest"
        peers = {m.peer for m in body.members}
        if sum(p in peers for p in self.electorate) < quorum(len(self.electorate)):
            return "electorate"
        return None

    def _renew(self, peer: str, now: float) -> None:
        """It restarted and lost what the roster may name: once in a round we start over for its sake."""
        member = self._in_roster(peer)
        if member is None or not member.weight:
            return
        if peer in self.renewed:
            self._exclude([peer], "renewed", now)
        else:
            self.renewed[peer] = None
            self._lead_next(now)

    def on_closing(self, peer: str, closing: Closing) -> str | None:
        if closing.ballot < self.ballot:
            return None
        if peer != (self.forced_leader if self.forced else self.leader_of(closing.ballot)):
            return "not_leader"
        if self.stage == Stage.TRAINING:
            self.ctx.emit(CloseTraining(self.epoch))
        return None

    def on_roster(self, peer: str, roster: Roster, now: float) -> str | None:
        """Follow a leader's roster, if it is the highest ballot's and says of us what we said."""
        if roster.ballot < self.ballot or self._out_of_reach(roster.ballot, now):
            return None
        if roster.forced:
            if not (self.forced and roster.ballot == self.ballot and peer == self.forced_leader):
                return None  # we were not asked, or have given up
        elif self.leader_of(roster.ballot) != peer:
            return "not_leader"
        elif self.forced and roster.ballot == self.ballot:
            return (
                None  # a ballot's number is of one kind for us, so that what is named by it is of one roster
            )
        if self.stage >= Stage.EXCHANGING and roster.ballot == self.ballot:
            same = self.proposal is None and self.exchange.roster == roster
            return None if same else "equivocation"
        why = check_roster(roster, self.electorate, self.ctx.rules.shard_count)
        if why is not None:
            return "roster"
        if roster.state_digest != self.state_digest:
            return "state_digest"
        mine = next((m for m in roster.members if m.peer == self.ctx.me), None)
        if mine is None:
            return None  # left out of this one; the commit will find us
        own = self.exchange.mine
        if mine.weight and (own is None or mine.contribution != own.contribution):
            if self._has_something_to_say():
                self._send_ready(now)  # we restarted: say what we have now
            return None
        if own is not None and mine.weight > own.weight:
            return "weight"
        if roster.ballot > self.ballot:
            self._enter(roster.ballot, now)
        self._promise()
        self._follow(roster, now)
        return None

    def on_propose(self, peer: str, propose: Propose, now: float) -> str | None:
        if propose.ballot < self.ballot or self.forced or self._out_of_reach(propose.ballot, now):
            return None
        if self.leader_of(propose.ballot) != peer:
            return "not_leader"
        body = propose.body
        fault = self._value_fault(body)
        if fault is not None:
            return fault
        if propose.ballot == self.ballot and self.stage >= Stage.EXCHANGING:
            same = self.proposal is not None and self.proposal.body == body
            return None if same else "equivocation"
        if propose.ballot > self.ballot:
            self._enter(propose.ballot, now)
        self._promise()
        self._follow_proposal(propose, now)
        return None

    def on_accept(self, peer: str, accept: Accept, now: float) -> str | None:
        if accept.ballot != self.ballot or not self.leading:
            return None
        if not self.ctx.crypto.verify(peer, accept.signature, accept_message(accept.head, accept.ballot)):
            return "signature"
        known = self.accepts.get(peer)
        if known is not None and known.head != accept.head:
            return "equivocation"
        if known is None:
            self.accepts[peer] = accept
            self.exchange.progress += 1
        self.advance(now)
        return None

    # --- time ----------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Do whatever has become possible or due. Called after every input that concerns the round."""
        if self.decided is not None:
            return
        self._watch_quorum(now)
        self._watch_progress(now)
        if self.stage == Stage.EXCHANGING and self.proposal is None and self.exchange.complete:
            self._accept_result(now)
        if self.leading and self.stage >= Stage.EXCHANGING:
            self._try_commit(now)
            if self.decided is None:
                self._watch_members(now)
        elif not self.leading and self.stage >= Stage.READY:
            self._watch_leader(now)
        if self.leading and self.stage <= Stage.READY:  # perhaps only now
            self._try_roster(now)
        if self.decided is None and now >= self.resend_at:
            self.resend_at = now + self.ctx.rules.resend_s
            self._resend(now)

    def _resend(self, now: float) -> None:
        stalled = now - self.progress_at >= self.ctx.rules.resend_s
        if self.stage == Stage.TRAINING:
            if self._has_something_to_say():
                self._send_ready(now)
        elif self.stage == Stage.READY:
            self._send_ready(now)
        elif self.stage == Stage.EXCHANGING:
            if self.proposal is not None:
                self._fetch_proposal()
            elif stalled:
                self.exchange.pull()
        elif self.accepted_body is not None and not self.leading:
            self.ctx.send(self.leader, self._accept_of(self.accepted_body))
        if self.leading and self.stage >= Stage.EXCHANGING:
            self._resend_phase_2()

    def _resend_phase_2(self) -> None:
        message = self.proposal or self.exchange.roster
        if message is None:
            return
        for peer in self._addressees():
            if self.ctx.stage_at(peer, self.epoch, self.head) <= Stage.READY:
                self.ctx.send(peer, message)

    # --- ballots -------------------------------------------------------------------------------

    def _enter(self, ballot: int, now: float, forced: bool = False, leader: str = "") -> None:
        """Leave the current ballot for a higher one. Nothing is promised by this alone."""
        self.ballot = ballot
        self.forced = forced
        self.forced_leader = leader if forced else ""
        self.ready.clear()
        self.accepts.clear()
        self.accepted_at = None
        self.accepted_body = None
        self.proposal = None
        self.entered_at = self.progress_at = now
        self.quorum_ready_at = None
        self.leader_claims_at = None
        if self.stage > Stage.READY:
            self.stage = Stage.READY if self._has_something_to_say() else Stage.TRAINING

    def _lead(self, ballot: int, now: float, forced: bool = False) -> None:
        self._enter(ballot, now, forced=forced, leader=self.ctx.me)
        self._promise()
        for peer in self.ctx.live_at(self.epoch, self.head, now):
            self.ctx.send(peer, Call(self.epoch, self.head, ballot, forced))
        if self._has_something_to_say():
            self._send_ready(now)

    def _lead_next(self, now: float) -> None:
        """Open the next ballot that is ours."""
        if self.forced or self.ctx.me not in self.order:
            self._lead(max(self.ballot + 1, self.lead_from), now, forced=self.forced)
            return
        ballot = max(self.ballot + 1, self.lead_from)
        while self.leader_of(ballot) != self.ctx.me:
            ballot += 1
        self._lead(ballot, now)

    def _next_ballot(self, now: float, why: str) -> None:
        """Give up on this ballot's leader: go to the next ballot whose leader seems to live."""
        ballot = self.ballot + 1
        for candidate in range(ballot, ballot + len(self.order)):
            leader = self.leader_of(candidate)
            if leader == self.ctx.me or (
                self.ctx.heard(leader, now) and self.ctx.stage_at(leader, self.epoch, self.head) != Stage.AWAY
            ):
                ballot = candidate
                break
        self.ctx.emit(Note(f"ballot={self.ballot} given_up={why} next={ballot} epoch={self.epoch}"))
        if self.leader_of(ballot) == self.ctx.me:
            self.ballot = ballot - 1  # _lead_next looks from the one after
            self.forced = False
            self._lead_next(now)
        else:
            self._enter(ballot, now)
            if self.stage == Stage.READY:
                self._send_ready(now)

    def _promise(self) -> None:
        """Write down that nothing of a lower ballot will be accepted, before anybody is told."""
        if self.ballot > self.vote.promised:
            self.vote = Vote(
                self.epoch, self.head, self.ballot, self.vote.accepted_ballot, self.vote.accepted
            )
            self.ctx.emit(PersistVote(self.vote))

    # --- ready ---------------------------------------------------------------------------------

    def _has_something_to_say(self) -> bool:
        """A contribution, an accepted value, or the news that no contribution will come."""
        return self.exchange.mine is not None or self.vote.accepted is not None or not self.trainer_up

    def _send_ready(self, now: float) -> None:
        self._promise()
        mine = self.exchange.mine
        if self.stage < Stage.READY:
            self.stage = Stage.READY
        ready = Ready(
            self.epoch,
            self.head,
            self.ballot,
            self.forced,
            self.state_digest,
            mine.contribution if mine is not None else "",
            mine.weight if mine is not None else 0,
            mine.norm if mine is not None else 0.0,
            self.vote.accepted_ballot,
            self.vote.accepted,
        )
        if self.leading:
            self.ready[self.ctx.me] = ready
        elif self.leader != self.ctx.me:
            self.ctx.send(self.leader, ready)

    # --- the leader: roster --------------------------------------------------------------------

    def _try_roster(self, now: float) -> None:
        """ROSTER or PROPOSE as soon as the promises allow it."""
        if not self.forced:
            if self._promises() < quorum(len(self.electorate)):
                return
            highest = max(self._trusted(), key=lambda r: (r.accepted_ballot, r.contribution))
            if highest.accepted is not None:
                self._propose(highest.accepted, now)
                return
        if self.close_at is None:
            self.close_at = now + self.ctx.rules.straggler_wait_s
        if now >= self.close_at and not self.closing_sent:
            self._close(now)
        self._pardon()
        if self._gather_gap(now) is None:
            self._send_roster(now)

    def _pardon(self) -> None:
        """Where too many were left out to make a round, start over with all of them."""
        need = max(1, self.ctx.rules.min_members)
        if self.excluded and len(self._contributors()) < need:
            out = [p for p in self.excluded if p in self.ready and self.ready[p].weight]
            if len(self._contributors()) + len(out) >= need:
                self.excluded.clear()

    def _contributors(self) -> list[str]:
        return [p for p, r in self.ready.items() if r.weight and p not in self.excluded]

    def _promises(self) -> int:
        return sum(peer in self.ready for peer in self.electorate)

    def _trusted(self) -> list[Ready]:
        """The promises to go by. Any quorum of them will do: if there is one, one without those who told of a
        value that could not be got from them, so that a lie costs one ballot and not the round."""
        served = [p for p in self.ready if p not in self.unserved]
        if sum(p in served for p in self.electorate) < quorum(len(self.electorate)):
            served = list(self.ready)
        return [self.ready[p] for p in served]

    def _gather_gap(self, now: float) -> str | None:
        """Why the roster cannot be sent yet; None if it can."""
        need = quorum(len(self.electorate))
        if not self.forced and self._promises() < need:
            return f"{self._promises()} of {len(self.electorate)} ready, need {need}"
        contributors = self._contributors()
        if not contributors:
            return "nobody ready has a contribution"
        if len(contributors) < self.ctx.rules.min_members:
            return f"{len(contributors)} contributions, the run asks for {self.ctx.rules.min_members}"
        if self.close_at is None or now < self._gather_until():
            late = [p for p in self._expected(now) if p not in self.ready]
            if late:
                return f"{len(late)} still training: {', '.join(late[:WAITING_NAMED])}"
        return None

    def _gather_until(self) -> float:
        """Until when the leader waits for the live ones that are not ready."""
        if self.close_at is None:
            return math.inf
        after_close = self.close_at + self.ctx.rules.closing_grace_s
        return max(after_close, self.entered_at + self.ctx.rules.resend_s)

    def _expected(self, now: float) -> list[str]:
        live = [p for p in self.ctx.live_at(self.epoch, self.head, now) if p not in self.excluded]
        return live if self.stage >= Stage.READY else [*live, self.ctx.me]

    def _close(self, now: float) -> None:
        self.closing_sent = True
        for peer in self._expected(now):
            if peer in self.ready:
                continue
            if peer == self.ctx.me:
                self.ctx.emit(CloseTraining(self.epoch))
            else:
                self.ctx.send(peer, Closing(self.epoch, self.head, self.ballot))

    def _send_roster(self, now: float) -> None:
        """Everyone who is ready, the excluded as voters only; self as a voter if nothing came of it."""
        if self.ctx.me not in self.ready:
            self._send_ready(now)
        peers = sorted(self.ready)
        wanted = [0 if p in self.excluded else self.ready[p].weight for p in peers]
        weights = capped_weights(wanted, self.ctx.rules.max_influence)
        members = tuple(
            Member(p, w, self.ready[p].contribution if w else "")
            for p, w in zip(peers, weights, strict=True)
            if p not in self.excluded or (p in self.electorate and self.ctx.heard(p, now))
        )
        able = [p for p in peers if p not in self.excluded]
        reducers = assign_reducers(members, self.ctx.rules.shard_count, self.exchange.roster, able)
        roster = Roster(self.epoch, self.head, self.ballot, self.forced, self.state_digest, members, reducers)
        why = check_roster(roster, self.electorate, self.ctx.rules.shard_count)
        if why is not None:
            self.excluded.clear()  # too many left out to decide anything: start over with all of them
            self.ctx.emit(Note(f"epoch={self.epoch} roster_impossible={why!r}"))
            return
        self._promise()
        for member in members:
            if member.peer != self.ctx.me:
                self.ctx.send(member.peer, roster)
        self._follow(roster, now)

    def _propose(self, body: Body, now: float) -> None:
        holders = tuple(p for p, r in self.ready.items() if r.accepted == body)
        propose = Propose(self.epoch, self.head, self.ballot, body, holders)
        self._promise()
        for peer in self.ready:
            if peer != self.ctx.me:
                self.ctx.send(peer, propose)
        self._follow_proposal(propose, now)

    # --- phase 2 at every member ---------------------------------------------------------------

    def _follow(self, roster: Roster, now: float) -> None:
        self.stage = Stage.EXCHANGING
        self.proposal = None
        self.exchange_at = self.progress_at = now
        self.resend_at = now + self.ctx.rules.resend_s
        self.exchange.start(roster)
        self.advance(now)

    def _follow_proposal(self, propose: Propose, now: float) -> None:
        self.stage = Stage.EXCHANGING
        self.proposal = propose
        self.holder_index = 0
        self.exchange_at = self.progress_at = now
        head = head_of(propose.body, self.ctx.crypto)
        if self.vote.accepted == propose.body:
            self._accept(propose.body, head, now)
        else:
            self._fetch_proposal()
        self.advance(now)

    def _fetch_proposal(self) -> None:
        propose = self.proposal
        assert propose is not None
        holders = [p for p in propose.holders if p in self.ctx.peers]
        head = head_of(propose.body, self.ctx.crypto)
        if holders and self.fetching != head:
            donor = holders[self.holder_index % len(holders)]
            self.fetching = head
            self.ctx.emit(FetchUpdate(propose.body.epoch, head, propose.body.result, donor))

    def _accept_result(self, now: float) -> None:
        """All shards are here: they and the roster are the value. Write it down, then vote."""
        roster = self.exchange.roster
        assert roster is not None
        body = self._body(roster, self.exchange.result_digest())
        head = head_of(body, self.ctx.crypto)
        self.ctx.keep_update(head)
        self.ctx.emit(PersistResult(body.epoch, head, self.exchange.result_blobs()))
        self._accept(body, head, now)

    def _body(self, roster: Roster, result: str) -> Body:
        run_id = self.ctx.rules.run_id
        return Body(
            run_id, self.epoch + 1, self.head, self.state_digest, roster.members, result, roster.forced
        )

    def _accept(self, body: Body, head: str, now: float) -> None:
        if self.vote.accepted_ballot == self.ballot and self.vote.accepted != body and not body.forced:
            self.ctx.refuse(self.leader, "equivocation", f"two values in ballot {self.ballot}")
            self._next_ballot(now, "equivocation")  # before a restart we accepted the other
            return
        self.stage = Stage.ACCEPTED
        self.accepted_body = body
        if body.forced:
            # Not in the vote: it must not displace an ordinary value, which a quorum may have chosen.
            self._promise()
        else:
            self.vote = Vote(self.epoch, self.head, self.ballot, self.ballot, body)
            self.ctx.emit(PersistVote(self.vote))
        self.exchange.progress += 1
        accept = self._accept_of(body)
        if self.leading:
            self.accepts[self.ctx.me] = accept
            self._try_commit(now)
        else:
            self.ctx.send(self.leader, accept)

    def _accept_of(self, body: Body) -> Accept:
        head = head_of(body, self.ctx.crypto)
        signature = self.ctx.crypto.sign(accept_message(head, self.ballot))
        return Accept(self.epoch, self.ballot, head, body.result, signature)

    # --- the leader: commit --------------------------------------------------------------------

    def _try_commit(self, now: float) -> None:
        for head in dict.fromkeys(vote.head for vote in self.accepts.values()):
            votes = {p: vote for p, vote in self.accepts.items() if vote.head == head}
            body = self._named_by(head, votes)
            if body is None or self._commit_gap(body, votes) is not None:
                continue
            if self.accepted_at is None:
                self.accepted_at = now
            late = [p for p in self._addressees() if p not in votes and self.ctx.heard(p, now)]
            if late and now < self.accepted_at + self.ctx.rules.commit_grace_s:
                return
            named = {m.peer for m in body.members} | set(self.electorate)
            signatures = tuple((p, votes[p].signature) for p in sorted(votes) if p in named)
            self.decided = Record(body, head, self.ballot, signatures)
            return

    def _named_by(self, head: str, votes: dict[str, Accept]) -> Body | None:
        """The body that these votes are for: ours, or the one our own roster makes with their result."""
        if self.accepted_body is not None and head_of(self.accepted_body, self.ctx.crypto) == head:
            return self.accepted_body
        if self.proposal is not None:
            body = self.proposal.body
            return body if head_of(body, self.ctx.crypto) == head else None
        roster = self.exchange.roster
        if roster is None or roster.ballot != self.ballot:
            return None
        body = self._body(roster, next(iter(votes.values())).result)
        return body if head_of(body, self.ctx.crypto) == head else None

    def _commit_gap(self, body: Body, votes: dict[str, Accept]) -> str | None:
        if body.forced:
            missing = [m.peer for m in body.members if m.peer not in votes]
            return f"{len(missing)} of the forced record's members have not accepted" if missing else None
        count, need = sum(p in votes for p in self.electorate), quorum(len(self.electorate))
        return f"{count} accepted, need {need}" if count < need else None

    def _addressees(self) -> list[str]:
        """The other peers that this ballot's phase 2 concerns."""
        if self.proposal is not None:
            return [p for p in self.ready if p != self.ctx.me]
        roster = self.exchange.roster
        return [] if roster is None else [m.peer for m in roster.members if m.peer != self.ctx.me]

    def _in_roster(self, peer: str) -> Member | None:
        roster = self.exchange.roster
        if roster is None or roster.ballot != self.ballot or self.proposal is not None:
            return None
        return next((m for m in roster.members if m.peer == peer), None)

    # --- watching ------------------------------------------------------------------------------

    def _watch_progress(self, now: float) -> None:
        """Anybody's progress in this ballot counts: a slow link is not a stall."""
        seen = self.exchange.progress
        for peer in self._addressees() if self.leading else list(self.ctx.peers):
            status = self.ctx.peers[peer].status if peer in self.ctx.peers else None
            if status is not None and status.epoch == self.epoch and status.head == self.head:
                seen += status.progress
        overdue = now - self.exchange_at >= self.ctx.rules.exchange_max_s
        if seen > self.progress_seen and (not overdue or self.stage <= Stage.READY):
            self.progress_at = now
        self.progress_seen = seen

    def _watch_quorum(self, now: float) -> None:
        """Notice that a majority of the electorate is gone, or back; go on alone if the policy says so."""
        rules = self.ctx.rules
        alive = sum(self.ctx.heard(p, now) for p in self.electorate)
        if alive >= quorum(len(self.electorate)):
            if self.quorum_lost_at is not None:
                self.quorum_lost_at = None
                self.ctx.emit(Note(f"epoch={self.epoch} quorum=back"))
                if self.forced:
                    self._next_ballot(now, "quorum_back")
            return
        if self.quorum_lost_at is None:
            self.quorum_lost_at = now
            self.ctx.emit(Note(f"epoch={self.epoch} quorum=lost {self.reason(now)}"))
        if rules.on_quorum_loss != "continue" or self.forced:
            return
        if self.ctx.me not in self.electorate:
            return
        rank = self._island_order(now).index(self.ctx.me)
        if now >= self.quorum_lost_at + rules.quorum_loss_s + rank * rules.stall_s:
            self.ctx.emit(Note(f"epoch={self.epoch} forcing=true {self.reason(now)}"))
            self.excluded.clear()
            self._lead(max(self.ballot + 1, self.lead_from), now, forced=True)

    def _island_order(self, now: float) -> tuple[str, ...]:
        """Who may force a record first: the electors that we hear at our head, in its order."""
        live = [*self.ctx.live_at(self.epoch, self.head, now), self.ctx.me]
        return tuple(p for p in self.order if p in live)

    def _accepts_force(self, now: float) -> bool:
        """We follow a forced ballot only if we too have missed the quorum for a good while."""
        rules = self.ctx.rules
        lost_at = self.quorum_lost_at
        return (
            rules.on_quorum_loss == "continue"
            and lost_at is not None
            and now - lost_at >= rules.quorum_loss_s / 2
        )

    def _watch_members(self, now: float) -> None:
        """The leader, in phase 2: leave out who is gone, or who holds the others up."""
        rules = self.ctx.rules
        waiting = [p for p in self._addressees() if p not in self.accepts]
        gone = [p for p in waiting if not self.ctx.heard(p, now) or self.ctx.leaving(p)]
        if gone and self.proposal is None:
            if self.accepted_at is None:  # else the quorum has it: commit goes on without them
                self._exclude(gone, "gone", now)
            return
        spoilt = self.exchange.spoilt() if self.proposal is None else []
        if spoilt:
            self._exclude(spoilt, "unusable", now)
        elif now - self.progress_at >= rules.stall_s:
            if self.proposal is not None:
                self.unserved.update(dict.fromkeys(p for p in self.proposal.holders if p != self.ctx.me))
                self._exclude([], "stalled", now)
                return
            accusations = self._accusations()
            who = culprit(accusations, self.spared)
            self.spared.update(dict.fromkeys(p for named in accusations.values() for p in named))
            self._exclude([who] if who is not None else [], "stalled", now)

    def _accusations(self) -> dict[str, tuple[str, ...]]:
        accusations = {self.ctx.me: self.exchange.waiting_on()}
        for peer in self._addressees():
            view = self.ctx.peers.get(peer)
            if view is not None and view.status is not None and view.status.ballot == self.ballot:
                accusations[peer] = view.status.waiting_on
        return accusations

    def _exclude(self, peers: list[str], why: str, now: float) -> None:
        for peer in peers:
            self.excluded[peer] = why
        self.ctx.emit(Note(f"epoch={self.epoch} ballot={self.ballot} failed={why} without={','.join(peers)}"))
        self._lead_next(now)

    def _watch_leader(self, now: float) -> None:
        """A follower with something to say: is this ballot's leader getting anywhere?"""
        rules = self.ctx.rules
        leader = self.leader
        if leader == self.ctx.me:  # ours before a restart: open the next one of ours
            self._lead_next(now)
            return
        if self.ctx.me not in self.electorate and not self.forced:
            return  # no say in who leads: the electors' ballots will be seen
        if self.forced and self.quorum_lost_at is None:
            return
        patience = rules.straggler_wait_s + rules.closing_grace_s + rules.stall_s
        view = self.ctx.peers.get(leader)
        gone = not self.ctx.heard(leader, now)
        at_head = self.ctx.stage_at(leader, self.epoch, self.head) != Stage.AWAY
        heard_at = view.heard_at if view is not None and at_head else -1e9
        if gone and now - self.entered_at >= min(rules.resend_s, rules.stall_s) / 4:
            self._next_ballot(now, "leader_gone")
        elif now - max(heard_at, self.entered_at) >= rules.stall_s:
            self._next_ballot(now, "leader_silent")
        elif self.stage == Stage.READY and self._roster_overdue(leader, now, patience):
            self._next_ballot(now, "roster_overdue")
        elif self.stage >= Stage.EXCHANGING and now - self.progress_at >= 2 * rules.stall_s:
            self._next_ballot(now, "no_progress")

    def _roster_overdue(self, leader: str, now: float, patience_s: float) -> bool:
        """A quorum has been ready for all to see, for longer than any leader may wait."""
        if self.ctx.stage_at(leader, self.epoch, self.head) > Stage.READY:
            self.quorum_ready_at = None  # it has sent one; that we are not in it is no fault
            if self.leader_claims_at is None:
                self.leader_claims_at = now
            return now - self.leader_claims_at >= self.ctx.rules.exchange_max_s + patience_s
        ready = sum(
            p == self.ctx.me or self.ctx.stage_at(p, self.epoch, self.head) >= Stage.READY
            for p in self.electorate
        )
        others = self.ctx.live_at(self.epoch, self.head, now)
        count = 1 + sum(self.ctx.stage_at(p, self.epoch, self.head) >= Stage.READY for p in others)
        if ready < quorum(len(self.electorate)) or count < self.ctx.rules.min_members:
            self.quorum_ready_at = None
            return False
        if self.quorum_ready_at is None:
            self.quorum_ready_at = now
        return now - self.quorum_ready_at >= patience_s
