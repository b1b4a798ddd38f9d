"""The leader's half of a round: gather promises, name a roster or an accepted value, count votes.

Every node has one; it acts in the ballots that are this node's. What is cleared with a ballot lies in the
round's state, what lasts for the round here: who is left out of the next rosters, and why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tapestry.node.protocol.acceptor import Acceptor, body_of
from tapestry.node.protocol.audit import UNPROVEN
from tapestry.node.protocol.blame import culprit, debts, silent
from tapestry.node.protocol.canon import quorum
from tapestry.node.protocol.events import CloseTraining, Gated, Note
from tapestry.node.protocol.exchange import assign_reducers
from tapestry.node.protocol.messages import (
    WAITING_MAX,
    Accept,
    Call,
    Closing,
    Propose,
    Ready,
    Roster,
    Seat,
    Stage,
)
from tapestry.node.protocol.place import seat_of
from tapestry.node.protocol.reach import at_odds, choose_reducers, seat
from tapestry.node.protocol.receipts import signed
from tapestry.node.protocol.record import Body, Member, Record, head_of, seat_message
from tapestry.node.protocol.round_state import RoundState
from tapestry.node.protocol.validity import roster_fault
from tapestry.node.protocol.voice import voice_weights
from tapestry.node.protocol.waits import USUAL_S, Wait, span

GATE = "gate"  # why one's contribution is left out, and not its vote
GONE = "gone"
EXCUSED = (GATE, GONE)  # left out for nothing that it failed to deliver
STALLED = "stalled"  # why who holds a round up is left out
SPLIT = "split"  # why the next ballot is opened: the votes of this one are for different values
WAITING_NAMED = 3  # peers named in a reason
FEWER = "tapestry propose set round.min_members N"
NOBODY_TRAINS = "see `trainer_trouble` in the status of each of them"


def named(peers: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(peers) - WAITING_NAMED} more" if len(peers) > WAITING_NAMED else ""
    return ", ".join(peers[:WAITING_NAMED]) + more


class Leader:
    """Mutable; owned by Round, which shares its state and calls `advance` after every input."""

    def __init__(self, state: RoundState, acceptor: Acceptor) -> None:
        self.state = state
        self.ctx = state.ctx
        self.acceptor = acceptor
        self.excluded: dict[str, str] = {}  # left out of this round's next rosters, and why
        self.spared: dict[str, None] = {}  # accused in this round, and not left out for it
        self.averaged: dict[str, None] = {}  # reducers of this round's ballots that stalled
        # contributor -> those of them that waited for its shards
        self.unpaid: dict[str, dict[str, None]] = {}
        self.doubted: dict[str, None] = {}  # left out because blame ended at them
        self.renewed: dict[str, None] = {}  # changed their contribution after a roster had named it
        self.seats: dict[str, tuple[str, str]] = {}  # peer -> life and seat that it said, verified
        self.unserved: dict[str, None] = {}  # told of an accepted value that nobody could get from them
        self.close_at: float | None = None  # when stragglers are told; None until a quorum is ready
        self.closing_sent = False
        self.made_again: dict[str, None] = {}  # heads of results that a majority refused
        self.worse = math.nan  # the median of what those who refused said last
        self.impossible = -1, ""  # in which ballot no roster could be made, and why, as it was told last
        self.was_split = False  # a ballot of ours, by votes for different values
        self.late: dict[str, None] = {}  # waited for in vain, when a roster was sent

    # --- ballots of ours -----------------------------------------------------------------------

    def open(self, ballot: int, now: float, forced: bool = False) -> None:
        state = self.state
        self.acceptor.enter(ballot, now, forced=forced, leader=self.ctx.me)
        self.acceptor.promise()
        for peer in self.ctx.live_at(state.epoch, state.head, now):
            self.ctx.send(peer, Call(state.epoch, state.head, ballot, forced))
        if state.speaks:
            self.acceptor.send_ready(now)

    def open_next(self, now: float) -> None:
        """Open the next ballot that is ours."""
        state = self.state
        ballot = max(state.ballot + 1, state.lead_from)
        if not state.forced and self.ctx.me in state.order:
            while state.leader_of(ballot) != self.ctx.me:
                ballot += 1
        self.open(ballot, now, forced=state.forced)

    def exclude(self, peers: list[str], why: str, now: float) -> None:
        """Open our next ballot without `peers`."""
        state = self.state
        for peer in peers:
            self.excluded[peer] = why
        self.ctx.emit(
            Note(f"epoch={state.epoch} ballot={state.ballot} failed={why} without={','.join(peers)}")
        )
        self.open_next(now)

    def seat_fault(self, peer: str, life: str, seat: str) -> str | None:
        """Without its sender's word for its disk no roster can name it. Verified once."""
        if self.seats.get(peer) == (life, seat):
            return None
        if not self.ctx.crypto.verify(peer, seat, seat_message(self.state.head, life)):
            return "seat"
        self.seats[peer] = life, seat
        return None

    def on_seat(self, peer: str, seat: Seat) -> str | None:
        """An elector on a new disk asks to be named as a voter."""
        if peer not in self.state.electorate:
            return None
        fault = self.seat_fault(peer, seat.life, seat.signature)
        if fault is None:
            self.state.standing_by[peer] = seat
        return fault

    def add_ready(self, peer: str, ready: Ready, now: float) -> None:
        """A checked READY of our ballot."""
        known = self.state.ready.get(peer)
        self.state.ready[peer] = ready
        if known is not None and known.contribution != ready.contribution:
            self._renew(peer, now)

    def _renew(self, peer: str, now: float) -> None:
        """It restarted and lost what the roster may name: once in a round we start over for its sake."""
        member = self.state.in_roster(peer)
        if member is None or not member.weight:
            return
        if peer in self.renewed:
            self.exclude([peer], "renewed", now)
        else:
            self.renewed[peer] = None
            self.open_next(now)

    def forget_stranger(self, peer: str) -> None:
        for table in (self.state.ready, self.state.accepts, self.renewed, self.unserved, self.seats):
            table.pop(peer, None)

    # --- phase 1: who is in --------------------------------------------------------------------

    def try_roster(self, now: float) -> Roster | Propose | None:
        """ROSTER or PROPOSE as soon as the promises allow it: sent to the others, for us to follow too."""
        state = self.state
        if not state.forced:
            if self._promises(now) < state.need:
                return None
            if self._may_yet_refuse(now):
                return None
            accepted = self._accepted()
            if accepted is not None:
                return self._propose(accepted)
            self._leave_out_furthest()
        if self.close_at is None:
            self.ctx.pace.quorum_ready(now)
            self.close_at = now + self.ctx.pace.straggler_wait_s()
        if now >= self.close_at and not self.closing_sent:
            self._close(now)
        self._pardon(now)
        return self._send_roster(now) if self.gather_gap(now) is None else None

    def gather_gap(self, now: float) -> Wait | None:
        """Why the roster cannot be sent yet; None if it can."""
        state = self.state
        promises, need = self._promises(now), state.need
        if not state.forced and promises < need:
            what = f"{promises} of {len(state.voters)} ready, need {need}"
            late = [p for p in state.voters if p not in state.ready]
            return state.waits(now, what, f"ends when {need - promises} more are: {named(late)}")
        contributors = self._contributors(now)
        if not contributors:
            coming = self._not_ready(now)
            ends = f"ends when one has: {named(coming) or NOBODY_TRAINS}"
            return state.waits(now, "nobody ready has a contribution", ends)
        count, least = len(self._weighing(contributors)), self.ctx.contributors_min()
        if count < least:
            light = len(contributors) - count
            besides = f", {light} that weigh nothing" if light else ""
            what = f"{count} contribution{'s' * (count != 1)}{besides}, the run asks for {least}"
            return self.too_few(now, what, least - count, self._not_ready(now))
        if late := self._awaited(now):
            return state.waits(now, f"{len(late)} still training: {named(late)}", self._patience(now))
        if late := self._may_yet_vote(now):
            what = f"{len(late)} left out, that may vote: {named(late)}"
            return state.waits(now, what, f"ends within {span(self.ctx.rules.resend_s)}")
        return None

    def too_few(self, now: float, what: str, missing: int, coming: Sequence[str]) -> Wait:
        """The run asks for `missing` contributions more than there are; `coming`: who may make one yet."""
        if len(coming) >= missing:
            return self.state.waits(now, what, f"ends when {missing} more are ready: {named(coming)}")
        more = "one more member contributes" if missing == 1 else f"{missing} more members contribute"
        ends = f"ends when {more}: `tapestry invite` brings one, `{FEWER}` has the run do with fewer"
        return self.state.waits(now, what, ends, "members", USUAL_S)

    def _patience(self, now: float) -> str:
        """What ends that we wait for who still trains."""
        left_s = self.gather_until() - now
        within = "" if math.isinf(left_s) else f"; in {span(left_s)} the round goes on without them"
        return f"ends when they are ready{within}"

    def _may_yet_vote(self, now: float) -> list[str]:
        """Electors whose contribution is left out, and who have a moment to say that they vote in this
        ballot: who is not named is no elector of the next round."""
        state, ctx = self.state, self.ctx
        if state.forced or now >= state.entered_at + ctx.rules.resend_s:
            return []
        out = [p for p in state.electorate if p in self.excluded and p not in state.ready]
        return [p for p in out if ctx.heard(p, now) and not self._has_gone_on(p)]

    def waited_for(self, now: float) -> tuple[str, ...]:
        """Who is not ready yet, of those that the roster waits for: for people."""
        return tuple(sorted(self._not_ready(now))[:WAITING_MAX])

    def gather_until(self) -> float:
        """Until when we wait for the live ones that are not ready."""
        if self.close_at is None:
            return math.inf
        after_close = self.close_at + self.ctx.pace.closing_grace_s()
        return max(after_close, self.state.entered_at + self.ctx.rules.resend_s)

    def _promises(self, now: float) -> int:
        """Of electors that can still vote: who has promised and died since cannot."""
        return sum(p in self.state.ready and self.ctx.heard(p, now) for p in self.state.voters)

    def _trusted(self) -> list[Ready]:
        """The electors' promises to go by. Any quorum of them will do: if there is one, one without those who
        told of a value that could not be got from them, so that a lie costs one ballot and not the round."""
        ready = self.state.ready
        told = [p for p in self.state.voters if p in ready]
        served = [p for p in told if p not in self.unserved]
        return [ready[p] for p in (served if len(served) >= self.state.need else told)]

    def _accepted(self) -> Body | None:
        """The value of the highest ballot that electors tell of: what others accepted decides nothing.

        None as well where a majority refused it and a quorum has accepted nothing: any quorum of promises
        will do (`_trusted`), and by that one it was not decided, nor was anything else.
        """
        told = [r for r in self._trusted() if r.accepted is not None]
        if not told:
            return None
        body = max(told, key=lambda r: (r.accepted_ballot, r.contribution)).accepted
        assert body is not None
        ready = self.state.ready
        free = sum(p in ready and ready[p].accepted is None for p in self.state.voters)
        refused = self._refused() == head_of(body, self.ctx.crypto)
        return None if refused and free >= self.state.need else body

    # --- phase 1: what a majority refused ------------------------------------------------------

    def _refused(self) -> str:
        """Head of the body that a majority of the electorate says it refused last; "" if there is none."""
        ready = self.state.ready
        said = [ready[p].refused for p in self.state.voters if p in ready and ready[p].refused]
        counts = {head: said.count(head) for head in said}
        return next((h for h, count in counts.items() if count >= self.state.need), "")

    def _may_yet_refuse(self, now: float) -> bool:
        """Some refused what others accepted: whether who is not ready yet may make them a majority. Not for
        long: what a quorum does not speak against is proposed again."""
        state = self.state
        said = [r for p, r in state.ready.items() if p in state.electorate]
        if not any(r.refused for r in said) or all(r.accepted is None for r in said):
            return False
        late = any(p not in state.ready and self.ctx.heard(p, now) for p in state.electorate)
        return late and now < state.entered_at + self.ctx.rules.stall_s

    def _leave_out_furthest(self) -> None:
        """A majority refused a result of this round: the next is without what differed most in that."""
        state, head = self.state, self._refused()
        peer = state.furthest.get(head)
        if peer is None or head in self.made_again:
            return
        self.made_again[head] = None
        self.excluded[peer] = GATE
        self.ctx.emit(Gated(state.epoch, "again", self.worse, peer))
        self.ctx.emit(Note(f"epoch={state.epoch} ballot={state.ballot} failed=gate without={peer}"))

    def _contributors(self, now: float) -> list[str]:
        """Those that deliver, or all if these are too few. Nobody, where none of them is a member: newcomers
        of an open run weigh nothing alone."""
        ready, ctx, members = self.state.ready, self.ctx, self.state.at.roll.members
        able = sorted(
            p for p, r in ready.items() if r.weight and p not in self.excluded and ctx.heard(p, now)
        )
        sure = [p for p in able if not ctx.undelivered(p, self.state.epoch)]
        if len(self._weighing(sure)) >= ctx.contributors_min() and any(p in members for p in sure):
            able = sure
        return able if any(p in members for p in able) else []

    def _pardon(self, now: float) -> None:
        """Where too many were left out to make a round, and nobody else may yet be ready, start over with all
        of them; if that is enough, without those whose contribution a majority refused."""
        if not self.excluded or self._awaited(now):
            return
        ready = self.state.ready
        count, need = len(self._weighing(self._contributors(now))), self.ctx.contributors_min()
        able = [p for p in self.excluded if p in ready and ready[p].weight > 0 and self.ctx.heard(p, now)]
        light = sum(self.excluded[p] != GATE for p in able)
        if count < need <= count + light:
            self.excluded = {p: why for p, why in self.excluded.items() if why == GATE}
        elif count < need <= count + len(able):
            self.excluded.clear()

    def _awaited(self, now: float) -> list[str]:
        """Whom the roster waits for; nobody, once the time for it is over. Who was left out in an earlier
        ballot, and is said to be there, has a moment to get ready."""
        state = self.state
        late = self._not_ready(now) if now < self.gather_until() else []
        in_time = now < state.entered_at + self.ctx.rules.resend_s
        return [p for p in late if in_time or p not in state.shut_out]

    def _not_ready(self, now: float) -> list[str]:
        return [p for p in self._expected(now) if p not in self.state.ready]

    def _expected(self, now: float) -> list[str]:
        """Who may yet be ready: all at our head, the electors that were in the round before just now, and who
        was too late for many rounds by little."""
        state, ctx = self.state, self.ctx
        live = ctx.live_at(state.epoch, state.head, now)
        live += [p for p in state.electorate if ctx.on_the_way(p, state.epoch, now)]
        live = [p for p in live if ctx.deserves(p)]
        live += [p for p in ctx.awaited(state.epoch, now) if p not in live]
        if state.stage < Stage.READY:
            live.append(ctx.me)
        # An elector is waited for all the same: it votes, whether its contribution comes or not.
        wanted = [p for p in live if p in state.electorate or not ctx.undelivered(p, state.epoch)]
        out = self.excluded.keys() | state.pretenders.keys()
        return [p for p in wanted if p not in out and not self._has_gone_on(p)]

    def _has_gone_on(self, peer: str) -> bool:
        """To a higher ballot of this round: for ours it cannot get ready any more."""
        state, ctx = self.state, self.ctx
        view = ctx.peers.get(peer)
        here = view is not None and view.stage_at(state.epoch, state.head) != Stage.AWAY
        return here and not ctx.is_within(peer, state.epoch, state.head, state.ballot)

    def _close(self, now: float) -> None:
        """Also again: who has not yet heard that a quorum is ready trains on."""
        state = self.state
        self.closing_sent = True
        for peer in self._expected(now):
            if peer in state.ready:
                continue
            if peer == self.ctx.me:
                self.ctx.emit(CloseTraining(state.epoch))
            else:
                self.ctx.send(peer, Closing(state.epoch, state.head, state.ballot))

    # --- phase 2: the value --------------------------------------------------------------------

    def _send_roster(self, now: float) -> Roster | None:
        """Who contributes, and the other electors as voters."""
        state, ctx = self.state, self.ctx
        self.acceptor.send_ready(now)  # again: whom we hear has changed since
        self.late.update(dict.fromkeys(self._not_ready(now)))
        electors = {p for p in state.electorate if p in state.ready and ctx.heard(p, now)}
        seated, able = self._seat(electors, now)
        voters = electors.union(
            p for p, why in self.excluded.items() if why == GATE and self._may_vote(p, now)
        )
        named = [self._member(p, w) for p, w in self._weights(voters, seated) if w or p in voters]
        named += [Member(p, 0, "", s.life, seat=s.signature) for p, s in self._standing_by(now)]
        members = tuple(sorted(named, key=lambda m: m.peer))
        reducers = assign_reducers(members, ctx.rules.shard_count, state.exchange.roster, able)
        roster = Roster(
            state.epoch,
            state.head,
            state.ballot,
            state.forced,
            state.state_digest,
            members,
            reducers,
            ctx.proposals.ready(ctx.roll, state.epoch + 1, [m.peer for m in members], ctx.crypto),
            state.behind,
        )
        why = roster_fault(state, roster)
        if why is not None:
            self.excluded.clear()  # too many left out to decide anything: start over with all of them
            if self.impossible != (state.ballot, why):
                self.impossible = state.ballot, why
                ctx.emit(Note(f"epoch={state.epoch} roster_impossible={why!r}"))
            return None
        self.acceptor.promise()
        roster = signed(roster, ctx.rules.run_id, ctx.me, ctx.crypto)
        for member in members:
            if member.peer != ctx.me:
                ctx.send(member.peer, roster)
        return roster

    def _standing_by(self, now: float) -> list[tuple[str, Seat]]:
        """Who takes no part and is to vote in the next round; of a forced record all members sign."""
        state = self.state
        if state.forced:
            return []
        asking = [(p, seat) for p, seat in state.standing_by.items() if p not in state.ready]
        return [(p, seat) for p, seat in asking if self.ctx.heard(p, now)]

    def _may_vote(self, peer: str, now: float) -> bool:
        """Whether who does not contribute can be named all the same, and so votes in the next round."""
        return peer in self.state.ready and self.ctx.heard(peer, now) and peer in self.state.at.roll.members

    def _weights(self, voters: set[str], seated: list[str]) -> list[tuple[str, int]]:
        """What everybody's contribution weighs, sorted by peer; 0 for those that only vote."""
        weight_of = self._weighing(seated)
        return [(p, weight_of.get(p, 0)) for p in sorted(voters.union(seated))]

    def _weighing(self, seated: list[str]) -> dict[str, int]:
        """Those of them whose contribution weighs something, and what.

        Whose part comes to nothing is left out, and the rest computed anew: everybody goes by who is named.
        """
        state, ctx = self.state, self.ctx
        named = sorted(seated)
        while True:
            contributors = [(p, state.ready[p].weight) for p in named]
            weights = voice_weights(state.at.roll, contributors, ctx.rules.max_influence)
            weight_of = {p: w for p, w in zip(named, weights, strict=True) if w}
            if len(weight_of) in (0, len(named)):
                return weight_of
            named = list(weight_of)

    def _member(self, peer: str, weight: int) -> Member:
        state, ready = self.state, self.state.ready[peer]
        member = Member(peer, 0, "", ready.life)
        if weight:
            member = Member(peer, weight, ready.contribution, ready.life, ready.weight)
        return replace(member, seat=seat_of(state.at, member, state.forced, ready.seat))

    def _seat(self, electors: set[str], now: float) -> tuple[list[str], list[str]]:
        """Who contributes and who averages: all, if those at odds are needed for min_members."""
        state, ctx, shard_count = self.state, self.ctx, self.ctx.rules.shard_count
        peers = self._contributors(now)
        odds = at_odds({p: state.ready[p].unheard for p in sorted(electors.union(peers))})
        lots = {p: ctx.crypto.digest(f"{state.head}|{p}|seat".encode()) for p in peers}
        seated, able = seat(peers, odds, lots, shard_count)
        if len(self._weighing(seated)) < ctx.contributors_min():
            seated, able = peers, [p for p in peers if odds[p].isdisjoint(peers)] or peers
        mute = [p for p, r in state.ready.items() if r.weight and ctx.undelivered(p, state.epoch)]
        if mute and not set(mute).intersection(peers):
            ctx.emit(Note(f"epoch={state.epoch} ballot={state.ballot} undelivered={','.join(sorted(mute))}"))
        if len(seated) < len(peers):
            out = ",".join(p for p in peers if p not in seated)
            ctx.emit(Note(f"epoch={state.epoch} ballot={state.ballot} unheard_by_many={out}"))
        need = len(electors) if state.forced else state.need
        able = choose_reducers(able, len(seated), electors, need, odds, shard_count)
        # By lot, another in every round: where shards are few, the same ones would always average them.
        return seated, sorted(able, key=lambda p: ctx.crypto.digest(f"{state.head}|{p}|reduce".encode()))

    def _propose(self, body: Body) -> Propose:
        state = self.state
        holders = tuple(p for p, r in state.ready.items() if r.accepted == body)
        propose = Propose(state.epoch, state.head, state.ballot, body, holders)
        self.acceptor.promise()
        for peer in state.ready:
            if peer != self.ctx.me:
                self.ctx.send(peer, propose)
        return propose

    def close_again(self, now: float) -> None:
        if self.closing_sent and now < self.gather_until():
            self._close(now)

    def resend_phase_2(self) -> None:
        state = self.state
        message = state.proposal or state.exchange.roster
        if message is None:
            return
        for peer in state.addressees():
            if self.ctx.stage_at(peer, state.epoch, state.head) <= Stage.READY:
                self.ctx.send(peer, message)

    # --- phase 2: who holds it up --------------------------------------------------------------

    def on_unproven(self, holder: str, head: str, now: float) -> None:
        """A member said that it had accepted this value, and nobody has made it: a lie costs one ballot."""
        state, proposal = self.state, self.state.proposal
        if proposal is None or state.accepted_at is not None:
            return
        if head_of(proposal.body, self.ctx.crypto) != head:
            return
        self.unserved[holder] = None
        # Without a quorum of others the next ballot would be this one again: the clock of stalls opens it.
        left = sum(p in state.ready and p not in self.unserved for p in state.voters)
        nobody = all(p in self.unserved for p in proposal.holders if p != self.ctx.me)
        if nobody and left >= state.need:
            self.exclude([], UNPROVEN, now)

    def watch_members(self, now: float) -> None:
        """Leave out who is gone, or who holds the others up."""
        state, rules = self.state, self.ctx.rules
        gone = [p for p in state.addressees() if self._gone(p, now)]
        if gone and state.proposal is None:
            if state.accepted_at is None:  # else the quorum has it: commit goes on without them
                self.exclude(gone, GONE, now)
            return
        spoilt = state.exchange.spoilt() if state.proposal is None else []
        if spoilt:
            self.exclude(spoilt, "unusable", now)
        elif not self.was_split and self._is_split(now):
            self.was_split = True
            self.exclude([], SPLIT, now)
        elif now - state.progress_at >= rules.stall_s:
            if state.proposal is not None:
                self.unserved.update(dict.fromkeys(p for p in state.proposal.holders if p != self.ctx.me))
                self.exclude([], STALLED, now)
                return
            self.exclude(self._who_holds_up(), STALLED, now)

    def _is_split(self, now: float) -> bool:
        """Whether no value of this ballot can have a quorum any more: a reducer has told members different
        sums. The next leader proposes one of the values."""
        state, accepts = self.state, self.state.accepts
        if state.accepted_at is not None or state.forced:
            return False
        heads = [accepts[p].body_head for p in state.voters if p in accepts]
        most = max((heads.count(head) for head in dict.fromkeys(heads)), default=0)
        open_ = sum(p not in accepts and self.ctx.heard(p, now) for p in state.voters)
        return most + open_ < min(state.need, len(heads) + open_)

    def _who_holds_up(self) -> list[str]:
        """All contributors that most reducers wait for, now or earlier in the round; else the one that blame
        ends at. Nobody who is out already."""
        exchange, waiting_on = self.state.exchange, self.state.accusations()
        reducers, me = exchange.reducers(), self.ctx.me
        self.averaged.update(dict.fromkeys(reducers))
        unpaid = {}
        for peer, by in debts(waiting_on, reducers, exchange.owing()).items():
            member = self.state.in_roster(peer)
            if member is not None and member.weight:
                unpaid[peer] = by
                self.unpaid.setdefault(peer, {}).update(dict.fromkeys(by))
        found = dict.fromkeys([*silent(unpaid, reducers, me), *silent(self.unpaid, self.averaged, me)])
        mute = [p for p in found if p not in self.excluded]
        if mute:
            for peer in self.doubted:  # perhaps it was on their account
                self.excluded.pop(peer, None)
            self.doubted.clear()
            return mute
        left = {p: tuple([q for q in named if q not in self.excluded]) for p, named in waiting_on.items()}
        who = culprit(left, self.spared)
        self.spared.update(dict.fromkeys(p for named in left.values() for p in named))
        if who is None:
            return []
        self.doubted[who] = None
        return [who]

    def heed_refusals(self, now: float) -> bool:
        """Open the next ballot where too many refuse for this one to be decided: whether that was done.

        Of a majority, READY says so in that ballot, and the result is made again. Where a minority and the
        silence of others hold it up, who accepted tells of the value, which is proposed again, and then who
        refused accepts it too.
        """
        state = self.state
        against = sum(p in state.refusals for p in state.voters)
        if not against or state.accepted_at is not None:
            return False
        answered = state.accepts.keys() | state.refusals.keys()
        open_ = any(p not in answered and self.ctx.heard(p, now) for p in state.electorate)
        if open_ and against < state.need:
            return False
        self.worse = sorted(state.refusals.values())[len(state.refusals) // 2]
        self.open_next(now)
        return True

    def _gone(self, peer: str, now: float) -> bool:
        state = self.state
        if self.ctx.heard(peer, now) and not self._has_gone_on(peer):
            return peer not in state.accepts and self.ctx.leaving(peer)
        # A reducer may have voted and died before the others had its results.
        return peer not in state.accepts or state.exchange.reduces(peer)

    # --- commit --------------------------------------------------------------------------------

    def try_commit(self, now: float) -> None:
        """A record, as soon as a quorum's votes are equal; the late get a short grace.

        Whoever votes has the result on disk. Where the electorate is smaller than the round, its quorum may
        be one disk, and the others, who are to go on from this record, would be stuck if that one died now:
        so the grace is as long as for a stall, till a majority of the record's own members has voted.
        """
        state, accepts = self.state, self.state.accepts
        for head in dict.fromkeys(vote.body_head for vote in accepts.values()):
            votes = {p: vote for p, vote in accepts.items() if vote.body_head == head}
            body = self.named_by(head, votes)
            if body is None or commit_gap(body, votes, state.voters) is not None:
                continue
            if state.accepted_at is None:
                state.accepted_at = now
            members = [m.peer for m in body.members]
            safe = sum(p in votes for p in members) >= quorum(len(members))
            # Whom we have not told of a value that we had accepted before we restarted will ask for it.
            asked = state.addressees() if safe else [*state.addressees(), *members]
            late = any(p not in votes and p not in state.refusals and self.ctx.heard(p, now) for p in asked)
            grace_s = self.ctx.rules.commit_grace_s if safe else self.ctx.rules.stall_s
            if late and now < state.accepted_at + grace_s:
                return
            named = {m.peer for m in body.members} | set(state.electorate)
            signatures = tuple((p, votes[p].signature) for p in sorted(votes) if p in named)
            draws = tuple((p, votes[p].draw) for p, _ in signatures)
            left = state.handover if commit_gap(body, votes, state.electorate) is not None else None
            state.decided = Record(body, head, state.ballot, signatures, left, draws)
            return

    def named_by(self, head: str, votes: dict[str, Accept]) -> Body | None:
        """The body that these votes are for: ours, or the one our own roster makes with their result."""
        state, crypto = self.state, self.ctx.crypto
        if state.accepted_body is not None and state.accepted_head == head:
            return state.accepted_body
        if state.proposal is not None:
            body = state.proposal.body
            return body if head_of(body, crypto) == head else None
        roster = state.exchange.roster
        if roster is None or roster.ballot != state.ballot:
            return None
        vote = next(iter(votes.values()))
        body = body_of(state, roster, vote.result, vote.agreement)
        return body if head_of(body, crypto) == head else None


def commit_gap(body: Body, votes: dict[str, Accept], voters: tuple[str, ...]) -> str | None:
    """Why `body` is not decided by these votes for it in one ballot; None if it is."""
    if body.forced:
        missing = [m.peer for m in body.members if m.peer not in votes]
        return f"{len(missing)} of the forced record's members have not accepted" if missing else None
    count, need = sum(p in votes for p in voters), quorum(len(voters))
    return f"{count} accepted, need {need}" if count < need else None
