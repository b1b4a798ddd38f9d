"""What a node sees without being told: no progress, no quorum, no leader. Questions and clocks only.

`Watch` says what is due; `round.py` does it. Times without progress count, not broken links: a link may
break and come back, and a frozen peer's stands.
"""

from __future__ import annotations

import math

from tapestry.node.protocol.blame import debts, silent
from tapestry.node.protocol.messages import Stage
from tapestry.node.protocol.place import waits
from tapestry.node.protocol.round_state import RoundState


class Watch:
    """Mutable; owned by Round, which shares its state."""

    def __init__(self, state: RoundState) -> None:
        self.state = state
        self.ctx = state.ctx
        self.progress_seen = 0  # of our own
        self.claims: dict[str, int] = {}  # peer -> what it said last of its progress
        self.quorum_until = -math.inf  # the quorum last counted will have been heard for so long
        self.elsewhere_since: dict[str, float] = {}  # elector -> since when it is at another head than ours

    # --- progress ------------------------------------------------------------------------------

    def progress(self, now: float) -> None:
        """In phase 2, progress in this ballot counts, ours and what others say of theirs: a slow link is no
        stall. But the word of who owes others its shards counts for nothing (`_believed`)."""
        own, said = self.state.exchange.progress > self.progress_seen, self._gained()
        self.progress_seen = self.state.exchange.progress
        if not self.ctx.pace.exchange_overdue(now) and (own or (said and self._believed(said))):
            self.state.progress_at = now

    def _gained(self) -> list[str]:
        """Who says that it got on in our ballot since we looked last."""
        state, peers, gained = self.state, self.ctx.peers, []
        for peer in state.addressees() if state.leading else peers:
            status = peers[peer].status if peer in peers else None
            if status is not None and status.epoch == state.epoch and status.head == state.head:
                if status.ballot == state.ballot and status.progress > self.claims.get(peer, 0):
                    gained.append(peer)
                self.claims[peer] = status.progress
        return gained

    def _believed(self, said: list[str]) -> bool:
        """Whether one of these owes no reducer its own shards: what is on its way of them is seen by who gets
        it. While most reducers wait for somebody's, only reducers can get on."""
        state, exchange = self.state, self.state.exchange
        if state.proposal is not None:
            return True
        reducers = exchange.reducers()
        owed = debts(state.accusations(), reducers, exchange.owing())
        mute = silent(owed, reducers, self.ctx.me)
        return any(p not in owed and (not mute or p in reducers) for p in said)

    # --- the quorum ----------------------------------------------------------------------------

    def alive(self, now: float) -> int:
        return sum(self._votes(p, now) for p in self.state.voters)

    def _votes(self, peer: str, now: float) -> bool:
        """Heard, and not standing by at our head: who has lost its disk takes no part in this round. Nor does
        who stays at another head: it has as long as a result may take to be on its way to ours."""
        if not self.ctx.heard(peer, now):
            return False
        view = self.ctx.peers.get(peer)
        status = view.status if view is not None else None
        if peer != self.ctx.me and (status is None or status.head != self.state.head):
            return now - self.elsewhere_since.setdefault(peer, now) < self.ctx.pace.result_max_s()
        self.elsewhere_since.pop(peer, None)
        if status is None or status.stage != Stage.AWAY:
            return True
        return status.state_epoch < status.epoch  # it still has to get the state, and then votes

    def quorum_there(self, now: float) -> bool:
        """Asked after every input, and so answered from `quorum_until` while nobody can have been lost."""
        if now < self.quorum_until:
            return True
        ctx, need = self.ctx, self.state.need
        heard_at = [
            now if p == ctx.me else ctx.peers[p].heard_at for p in self.state.voters if self._votes(p, now)
        ]
        if len(heard_at) < need:
            return False
        self.quorum_until = sorted(heard_at, reverse=True)[need - 1] + ctx.rules.stall_s
        return True

    def somebody_changed(self) -> None:
        """A peer's link ended, or it said that it takes no part: who is the quorum must be asked anew."""
        self.quorum_until = -math.inf

    def missing(self, now: float) -> list[str]:
        """The electors that do not vote now."""
        return [p for p in self.state.voters if not self._votes(p, now)]

    def force_due(self, now: float) -> bool:
        """Whether it is on us to go on without a quorum."""
        left_s = self.force_in_s(now)
        return left_s is not None and left_s <= 0.0

    def force_in_s(self, now: float) -> float | None:
        """Until we go on without a quorum; None if we never do."""
        state, rules = self.state, self.ctx.rules
        if waits(state.at, rules.on_quorum_loss) or state.forced or state.quorum_missed_at is None:
            return None
        if self.ctx.me not in state.electorate:
            return None
        rank = self._island_order(now).index(self.ctx.me)
        return state.quorum_missed_at + self.ctx.pace.quorum_loss_s() + rank * rules.stall_s - now

    def _island_order(self, now: float) -> tuple[str, ...]:
        """Who may force a record first: the electors that we hear at our head, in its order."""
        state = self.state
        live = [*self.ctx.live_at(state.epoch, state.head, now), self.ctx.me]
        return tuple(p for p in state.order if p in live)

    def accepts_force(self, now: float) -> bool:
        """We follow a forced ballot only if we too have missed the quorum for a good while."""
        rules, lost_at = self.ctx.rules, self.state.quorum_missed_at
        return (
            not waits(self.state.at, rules.on_quorum_loss)
            and lost_at is not None
            and now - lost_at >= self.ctx.pace.quorum_loss_s() / 2
        )

    # --- the leader ----------------------------------------------------------------------------

    def leader_fault(self, now: float) -> str | None:
        """A follower with something to say: why this ballot's leader is to be given up."""
        state, rules = self.state, self.ctx.rules
        if self.ctx.me not in state.electorate and not state.forced:
            return None  # no say in who leads: the electors' ballots will be seen
        if state.forced and state.quorum_missed_at is None:
            return None
        leader = state.leader
        view = self.ctx.peers.get(leader)
        gone = not self.ctx.heard(leader, now) or self.ctx.leaving(leader)
        at_head = view is not None and view.stage_at(state.epoch, state.head) != Stage.AWAY
        if not at_head and not state.forced and state.handover is not None and state.handover.peer == leader:
            return "leader_left"
        heard_at = view.heard_at if view is not None and at_head else -1e9
        if gone and now - state.entered_at >= min(rules.resend_s, rules.stall_s) / 4:
            return "leader_gone"
        if now - max(heard_at, state.entered_at) >= rules.stall_s:
            return "leader_silent"
        if state.stage == Stage.READY and self._roster_overdue(leader, now):
            return "roster_overdue"
        if state.stage >= Stage.EXCHANGING and now - state.progress_at >= 2 * rules.stall_s:
            return "no_progress"
        return None

    def has_time_left(self, now: float) -> bool:
        """Whether this ballot's leader is well within the time that it has, as far as we know."""
        state, ctx = self.state, self.ctx
        if state.stage >= Stage.EXCHANGING:
            return now - state.progress_at < ctx.rules.stall_s / 2
        since = state.quorum_ready_at
        return since is None or now - since < ctx.pace.leaders_wait_s() / 2

    def _roster_overdue(self, leader: str, now: float) -> bool:
        """A quorum has been ready for all to see, for longer than any leader may wait."""
        state, ctx = self.state, self.ctx
        if self._exchanges(leader, now):
            state.quorum_ready_at = None  # it has sent one; that we are not in it is no fault
            assert state.leader_claims_at is not None
            return now - state.leader_claims_at >= ctx.pace.exchange_max_s() + ctx.pace.leaders_wait_s()
        ready = sum(
            p == ctx.me or ctx.stage_at(p, state.epoch, state.head) >= Stage.READY for p in state.voters
        )
        if ready < state.need or self.ready_count(now) < ctx.contributors_min():
            state.quorum_ready_at = None
            return False
        if state.quorum_ready_at is None:
            state.quorum_ready_at = now
            ctx.pace.quorum_ready(now)
        return now - state.quorum_ready_at >= ctx.pace.leaders_wait_s()

    def _exchanges(self, leader: str, now: float) -> bool:
        """Whether the leader is past its roster: it says so, and as many electors as a roster names beside it
        say the same, which they have stall_s to do. Else it is a leader that has sent none."""
        state, ctx = self.state, self.ctx
        if ctx.stage_at(leader, state.epoch, state.head) <= Stage.READY:
            return False
        if state.leader_claims_at is None:
            state.leader_claims_at = now
        others = [p for p in state.voters if p not in (leader, ctx.me)]
        borne_out = sum(ctx.stage_at(p, state.epoch, state.head) > Stage.READY for p in others)
        if borne_out >= state.need - 1 or now - state.leader_claims_at < ctx.rules.stall_s:
            return True
        state.pretenders[leader] = None
        return False

    def ready_count(self, now: float) -> int:
        """Those who could be averaged: we, and who of the others is ready."""
        ctx, epoch, head = self.ctx, self.state.epoch, self.state.head
        return 1 + sum(ctx.stage_at(p, epoch, head) >= Stage.READY for p in ctx.live_at(epoch, head, now))
