"""The protocol of one node: `Core.handle(input, now) -> outputs`.

An IO-less state machine. It owns the chain, the peers as last heard, the round that is under way and the way
to the head. The shell (daemon/runtime.py, or the simulator) brings it inputs with the time, executes the
outputs in order, and calls again with Tick at `wakeup_at`. Nothing in it sleeps, draws lots or does I/O.

The shell acts on outputs alone. Whoever wants to look at the core asks for `snapshot(now)` or `membership()`;
its attributes are for the protocol and its tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from tapestry.node.protocol.canon import Crypto, InvalidRecord
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.context import Context, PeerView
from tapestry.node.protocol.drawn import audit_of
from tapestry.node.protocol.events import (
    Applied,
    BulkProgress,
    ChangeAsked,
    Contributed,
    EndRound,
    FetchFailed,
    Input,
    Judged,
    Moved,
    Note,
    Output,
    PeerDown,
    PeerRefused,
    PeerUp,
    PersistVote,
    Received,
    Reduced,
    Stopping,
    Tick,
    Train,
    TrainerState,
    UpdateFetched,
    Vote,
)
from tapestry.node.protocol.handover import ELECTORS, leave_message
from tapestry.node.protocol.likeness import likeness_in
from tapestry.node.protocol.members import CHANGES_MAX, Change, change_message
from tapestry.node.protocol.messages import (
    Accept,
    Call,
    Changes,
    Closing,
    Commit,
    GetRecords,
    Leave,
    Message,
    Need,
    Propose,
    Ready,
    Records,
    Refuse,
    Result,
    Roster,
    Seat,
    Shard,
    Stage,
    Status,
)
from tapestry.node.protocol.own_vote import OwnVote
from tapestry.node.protocol.place import behind_of, false_draws, next_place
from tapestry.node.protocol.proposals import Proposals
from tapestry.node.protocol.record import Record
from tapestry.node.protocol.round import Outcome, Round
from tapestry.node.protocol.rules import Rules
from tapestry.node.protocol.snapshot import Membership, PeerSnapshot, Snapshot
from tapestry.node.protocol.sync import Sync
from tapestry.node.protocol.waits import USUAL_S, Wait

DELIVERED_RECORDS = 8  # whose contributors are known to deliver, after a restart
CHANGES_AGAIN = 5  # heartbeats after which what is pending is told again, for it may have been lost
NOTHING: Final[tuple[Output, ...]] = ()


@dataclass(frozen=True, slots=True)
class Restored:
    """What the disk gave back at the start."""

    chain: Chain
    state_epoch: int  # -1: no state yet
    state_digest: str
    vote: Vote | None
    updates: tuple[str, ...]  # heads whose update is in the update log
    life: str = ""  # a name for the disk if there is no vote on it
    alone: bool = False  # set back to a backup, and none of the electors of its newest record was found


class Core:
    """Deterministic: the same inputs at the same times give the same outputs."""

    def __init__(self, me: str, rules: Rules, crypto: Crypto, restored: Restored, now: float) -> None:
        updates = dict.fromkeys(restored.updates)
        self.ctx = Context(me, rules, crypto, restored.chain.roll, Proposals(), updates=updates)
        for record in restored.chain.records[-DELIVERED_RECORDS:]:
            self.ctx.delivered.update(dict.fromkeys(m.peer for m in record.body.members if m.weight))
        self.sync = Sync(self.ctx, restored.chain, restored.state_epoch, restored.state_digest)
        self.own = OwnVote(self.ctx, restored.chain, restored.vote, restored.life, restored.alone)
        self.round: Round | None = None
        self.trainer_up = True
        self.trainer_reason = self.trainer_ends = ""
        self.trainer_up_at = 0.0
        self.trainer_down_at: float | None = None  # since when no contribution came for its sake
        self.stood_by_at: float | None = None  # since when we are at the head and take no part
        self.stopping = False
        self.told: tuple[object, ...] = ()  # the news that was sent last
        self.shown: Moved | None = None  # what people were shown last
        self.heartbeat_at = now
        self.changes_at = now

    # --- questions -----------------------------------------------------------------------------

    @property
    def chain(self) -> Chain:
        return self.sync.chain

    def phase(self) -> str:
        """As in /status."""
        if self.stopping:
            return "stopping"
        if self.round is None:
            return "averaging" if self.sync.taking_the_step and not self._is_removed else "joining"
        if self.round.quorum_lost_at is not None or not self.trainer_up:
            return "degraded"
        return "training" if self.round.stage == Stage.TRAINING else "averaging"

    def wait(self, now: float) -> Wait | None:
        """What this node waits for; None where it works, or stops."""
        if self.stopping:
            return None
        if self.round is None:
            behind = self.sync.wait(now)
            # Nobody gives the state of the record that removed us, so that to wait for it would never end.
            standing = self.own.stands_by() if behind is None or self._is_removed else None
            if standing is None:
                return behind
            for_s = _since(self.stood_by_at, now) if behind is None else behind.for_s
            return replace(standing, for_s=for_s)
        if not self.trainer_up:
            what = f"not contributing: {self.trainer_reason}"
            return Wait("trainer", what, self.trainer_ends, _since(self.trainer_down_at, now))
        return self.round.wait(now)

    def snapshot(self, now: float) -> Snapshot:
        """All that is shown of the core, as plain values."""
        chain, sync, round_ = self.chain, self.sync, self.round
        on_chain = 0 <= sync.state_epoch <= chain.epoch
        return Snapshot(
            peer_id=self.ctx.me,
            run_id=self.ctx.rules.run_id,
            phase=self.phase(),
            wait=self.wait(now),
            at_head=sync.at_head,
            chain_epoch=chain.epoch,
            chain_head=chain.head,
            state_epoch=sync.state_epoch,
            state_head=chain.head_at(sync.state_epoch) if on_chain else "",
            state_digest=sync.state_digest,
            params=chain.genesis.params,
            round=round_.snapshot(now) if round_ is not None else None,
            peers=tuple(
                self._peer_snapshot(peer, view, now)
                for peer, view in sorted(self.ctx.peers.items(), key=lambda entry: entry[0])
                if view.up
            ),
            agreement=chain.records[-1].body.agreement if chain.records else None,
            roll=chain.roll,
            pending=tuple(self.ctx.proposals.pending.values()),
        )

    def membership(self) -> Membership:
        """The part of `snapshot` that is asked most often."""
        return Membership(self.chain.epoch, self.chain.roll, tuple(self.ctx.proposals.pending.values()))

    def _peer_snapshot(self, peer: str, view: PeerView, now: float) -> PeerSnapshot:
        status, heard_s = view.status, now - view.heard_at
        if status is None:
            return PeerSnapshot(peer, "", None, "", False, False, heard_s)
        same_head = (status.head, status.state_epoch) == (self.chain.head, status.epoch)
        taking_part = status.stage != Stage.AWAY
        return PeerSnapshot(peer, status.phase, status.epoch, status.head, same_head, taking_part, heard_s)

    def wakeup_at(self, now: float) -> float:
        """When the core has something to do if nothing happens before: the shell then sends Tick."""
        if self.round is None:
            return self.heartbeat_at
        return min(self.heartbeat_at, self.round.wakeup_at(now))

    # --- the one entry -------------------------------------------------------------------------

    def handle(self, inp: Input, now: float) -> Sequence[Output]:
        """`NOTHING` says more than that there is no output: `wakeup_at` and all answers are as they were."""
        if self.stopping or (type(inp) is Received and self._is_mere_heartbeat(inp, now)):
            return NOTHING
        self.ctx.out = []
        handler = _HANDLERS[type(inp)]
        handler(self, inp, now)
        self._after(now)
        self._show()
        return self.ctx.out

    def _show(self) -> None:
        """Say so when what people are shown has changed."""
        round_ = self.round
        stage = round_.stage if round_ is not None else Stage.AWAY
        shown = Moved(self.sync.state_epoch, self.phase(), stage)
        if shown != self.shown:
            self.shown = shown
            self.ctx.emit(shown)

    def _after(self, now: float) -> None:
        """What may follow from any input: a decision, the next job, the next round, the news."""
        round_ = self.round
        if round_ is not None and round_.state.decided is not None:
            self._decided(round_.state.decided, now)
        if self.round is None:  # in a round we are at the head
            self.sync.pump(now)
            self.sync.leave_hollow(self.own.tip, now)
            if self.sync.at_head and not self.stopping:
                self._begin_round(now)
        news = self._news()
        if news != self.told or now >= self.heartbeat_at:
            self.told = news
            self.heartbeat_at = now + self.ctx.rules.heartbeat_s
            self.ctx.broadcast(self._status())
            if self.round is None and self.sync.at_head:
                self.own.ask_for_seat()
            if self.ctx.proposals.pending and now >= self.changes_at:
                self.changes_at = now + CHANGES_AGAIN * self.ctx.rules.heartbeat_s
                self._tell_changes(list(self.ctx.proposals.pending.values()))

    # --- rounds --------------------------------------------------------------------------------

    def _begin_round(self, now: float) -> None:
        if self.own.stands_by() is not None:
            self.stood_by_at = now if self.stood_by_at is None else self.stood_by_at
            return
        self.stood_by_at = None
        chain, at, vote = self.chain, self.chain.place, self.own.here()
        epoch, head = at.epoch, at.head
        last = chain.records[-1] if epoch else None
        behind = behind_of(at, last)
        before = frozenset(at.electorate if last is None else [m.peer for m in last.body.members if m.weight])
        self.ctx.pace.round_began(epoch, now)
        self.round = Round(self.ctx, at, behind, self.sync.state_digest, before, vote, now)
        self.round.state.trainer_up = self.trainer_up
        if self.trainer_up:
            self._train(self.round)
        self.round.advance(now)
        # Peers may have told us of this round before we were in it.
        for peer, view in self.ctx.peers.items():
            if view.status is not None and (view.status.epoch, view.status.head) == (epoch, head):
                self.round.on_ballot_seen(peer, view.status.ballot, now)

    def _train(self, round_: Round) -> None:
        before = self.chain.head_at(round_.epoch - 1)
        if round_.epoch in self.chain.rolled:
            before = ""  # nothing that was made of it counts
        self.ctx.emit(Train(round_.epoch, round_.head, before))

    def _decided(self, record: Record, now: float) -> None:
        self.ctx.broadcast(Commit(record))
        self._append(record, now)

    def _append(self, record: Record, now: float) -> None:
        self.sync.append(record)
        self._end_round(record, now)

    def _end_round(self, record: Record | None, now: float) -> None:
        """The head moved: by `record`, or by leaving a fork."""
        round_ = self.round
        if round_ is None:
            return
        outcome = Outcome.ABORTED
        if record is not None:
            contributed = any(m.peer == self.ctx.me and m.weight for m in record.body.members)
            outcome = Outcome.COMMITTED if contributed else Outcome.MISSED
            if record.body.forced:
                outcome = Outcome.FORCED
        self.own.newest = round_.state.vote
        ballot = record.ballot if record is not None else None
        leader = round_.state.leader_of(ballot) if ballot is not None else ""
        self.ctx.movers.end_round(ballot, leader, self.ctx.peers)
        if record is not None:
            contributors = {m.peer for m in record.body.members if m.weight}
            round_.count_deliveries(contributors, now)
            named = {m.peer for m in record.body.members}
            late = round_.lead.late.keys() | (round_.state.shut_out.keys() - named)
            self.ctx.count_missed(round_.epoch, round_.head, contributors, late)
            fetched = round_.acceptor.fetched.get(record.head, ())
            drawn = self.sync.with_true_draws(record)
            audit = audit_of(self.ctx, round_.state.at.roll, round_.exchange, drawn, fetched)
            if audit is not None:
                self.ctx.emit(audit)
        likeness = likeness_in(round_.exchange, record.body.result) if record is not None else ()
        self.ctx.emit(EndRound(round_.epoch, outcome.value, self._counted(round_.epoch), likeness))
        self.round = None

    def _counted(self, epoch: int) -> str:
        """The contribution of ours that the record after `epoch` names; "" if there is none, or if the record
        rolls the run back, so that nothing is made of it."""
        if epoch + 1 in self.chain.rolled:
            return ""
        after = self.chain.after(epoch, 1)
        members = after[0].body.members if after else ()
        return next((m.contribution for m in members if m.peer == self.ctx.me and m.weight), "")

    @property
    def _is_removed(self) -> bool:
        """Whether the members removed us, by our newest record."""
        return self.ctx.me in self.ctx.roll.removed

    # --- local causes --------------------------------------------------------------------------

    def handle_peer_up(self, inp: PeerUp, now: float) -> None:
        view = self.ctx.peers.get(inp.peer)
        if view is None:
            if len(self.ctx.peers) >= 4 * self.ctx.rules.peers_max and not self._forget_one_down():
                return  # the shell connects to fewer
            view = self.ctx.peers[inp.peer] = PeerView()
        view.up = True
        view.heard_at = now
        if self.own.meet(inp.peer):
            self._end_round(None, now)
        self.sync.asked_at.pop(inp.peer, None)  # what was asked over the link before is lost
        if self.told and self.ctx.roll.may_contribute(inp.peer):  # else all are about to hear
            self.ctx.send(inp.peer, self._status())
            if self.ctx.proposals.pending:
                self.changes_at = now  # with the next heartbeat

    def _forget_one_down(self) -> bool:
        for peer, view in self.ctx.peers.items():
            if not view.up:
                del self.ctx.peers[peer]
                self.ctx.missed.pop(peer, None)
                self.sync.forget(peer)
                if self.round is not None:
                    self.round.forget_stranger(peer)
                return True
        return False

    def handle_peer_down(self, inp: PeerDown, now: float) -> None:
        view = self.ctx.peers.get(inp.peer)
        if view is None:
            return
        view.up = False
        view.status = None
        if self.round is not None:
            self.round.handle_peer_down(inp.peer, now)

    def handle_bulk_progress(self, inp: BulkProgress, now: float) -> None:
        view = self.ctx.peers.get(inp.peer)
        if view is not None:
            view.heard_at = now
        if self.round is not None and self.round.exchange.lacks_of(inp.peer):
            self.round.exchange.progress += 1  # bytes that we do not need hide no stall

    def handle_peer_refused(self, inp: PeerRefused, now: float) -> None:
        self.ctx.refuse(inp.peer, inp.reason, "its data cannot be used")
        if self.round is not None:
            self.round.handle_refused(inp.peer, inp.reason, now)

    def handle_tick(self, inp: Tick, now: float) -> None:
        if self.round is not None:
            self.round.advance(now)
        elif now >= self.heartbeat_at:
            for peer, view in self.ctx.peers.items():
                if view.status is not None and view.up:
                    self.sync.on_status(peer, view.status, now)

    def handle_contributed(self, inp: Contributed, now: float) -> None:
        """Of the same epoch, but made from another base, it is of a fork that was left."""
        self.trainer_down_at = None
        round_ = self.round
        if round_ is not None and (inp.epoch, inp.base) == (round_.epoch, round_.head):
            round_.handle_contribution(inp, now)

    def handle_trainer_state(self, inp: TrainerState, now: float) -> None:
        was_up, self.trainer_up, self.trainer_reason = self.trainer_up, inp.up, inp.reason
        if was_up and now - self.trainer_up_at >= USUAL_S:
            self.trainer_down_at = None  # it worked meanwhile
        if inp.up and not was_up:
            self.trainer_up_at = now
        self.trainer_ends = inp.ends or "ends when the trainer works again"
        if not inp.up and self.trainer_down_at is None:
            self.trainer_down_at = now
        if self.round is not None:
            self.round.handle_trainer(inp.up, now)
            if inp.up and not was_up and self.round.exchange.mine is None:
                self._train(self.round)

    def handle_reduced(self, inp: Reduced, now: float) -> None:
        if self.round is not None and (inp.epoch, inp.head) == (self.round.epoch, self.round.head):
            self.round.exchange.on_reduced(inp)
            self.round.advance(now)

    def handle_judged(self, inp: Judged, now: float) -> None:
        if self.round is not None and (inp.epoch, inp.head) == (self.round.epoch, self.round.head):
            self.round.handle_judged(inp.body_head, inp.worse, now)

    def handle_applied(self, inp: Applied, now: float) -> None:
        self.sync.on_applied(inp.epoch, inp.state_digest)

    def handle_update_fetched(self, inp: UpdateFetched, now: float) -> None:
        self.sync.on_update_fetched(inp.head)
        if self.round is not None:
            self.round.handle_update_fetched(inp, now)

    def handle_fetch_failed(self, inp: FetchFailed, now: float) -> None:
        if self.round is not None:
            self.round.handle_fetch_failed(inp, now)
        self.sync.on_fetch_failed(inp, now)

    def _hand_over(self) -> None:
        """Of two electors, who stops leaves the round to the other: handover.py."""
        at, ctx = self.chain.place, self.ctx
        if len(at.electorate) != ELECTORS or ctx.me not in at.electorate or self.own.stands_by():
            return
        self.own.left = at.head
        vote = self.own.here() if self.round is None else self.round.state.vote
        ctx.emit(PersistVote(replace(vote, left=at.head)))
        ctx.broadcast(Leave(at.epoch, at.head, ctx.crypto.sign(leave_message(at.head))))

    def handle_stopping(self, inp: Stopping, now: float) -> None:
        self._hand_over()
        if self.round is not None:
            self._end_round(None, now)
        self.stopping = True

    def handle_change_asked(self, inp: ChangeAsked, now: float) -> None:
        """A change that our operator asks for, or that an applicant brings."""
        ctx, change = self.ctx, inp.change
        if inp.sign:
            message = change_message(ctx.roll.run_id, change)
            change = change.signed(ctx.me, ctx.crypto.sign(message))
        fault = ctx.proposals.add(ctx.roll, self.chain.epoch + 1, change, ctx.crypto)
        if fault is not None:
            ctx.emit(Note(f"change={change.kind} peer={change.peer} refused={fault}"))
        else:
            self._tell_changes([ctx.proposals.known(ctx.roll, change)])

    def _tell_changes(self, pending: Sequence[Change]) -> None:
        for at in range(0, len(pending), CHANGES_MAX):
            self.ctx.broadcast(Changes(tuple(pending[at : at + CHANGES_MAX])))

    # --- the network ---------------------------------------------------------------------------

    def handle_received(self, inp: Received, now: float) -> None:
        view = self.ctx.peers.get(inp.peer)
        if view is None or not view.up:
            return
        view.heard_at = now
        refused = self._on_message(inp.peer, view, inp.message, now)
        if refused is not None:
            self.ctx.refuse(inp.peer, refused, type(inp.message).__name__)

    def _is_mere_heartbeat(self, inp: Received, now: float) -> bool:
        """A STATUS of a peer that we hear and that is in our round, which tells only that it is still there.
        Most of what is received is this. What time brings comes with Tick."""
        status, round_ = inp.message, self.round
        if type(status) is not Status or round_ is None:
            return False
        view = self.ctx.peers.get(inp.peer)
        known = view.status if view is not None else None
        if view is None or known is None or not self.ctx.heard(inp.peer, now):
            return False
        state = round_.state
        if (status.head, status.epoch) != (state.head, state.epoch) or status.ballot > state.ballot:
            return False
        if (known.head, known.progress, known.waiting_on) != (
            status.head,
            status.progress,
            status.waiting_on,
        ):
            return False
        if not (known.stage and status.stage) or state.quorum_missed_at is not None:
            return False
        view.heard_at, view.status = now, status
        return True

    def _on_message(self, peer: str, view: PeerView, message: Message, now: float) -> str | None:
        """Returns why the message was refused, in a word; None if it was heard or is merely old."""
        if isinstance(message, Status):
            return self.on_status(peer, view, message, now)
        if not self.ctx.roll.may_contribute(peer):
            return self._on_strangers(peer, message, now)
        if isinstance(message, Commit):
            return self.on_commit(peer, message.record, now)
        if isinstance(message, GetRecords):
            self.sync.on_get_records(peer, message)
            return None
        if isinstance(message, Records):
            return self.on_records(peer, message, now)
        if isinstance(message, Changes):
            return self.on_changes(message)
        if isinstance(message, Leave):
            return self.on_leave(peer, message, now)
        round_ = self.round
        if round_ is None or message.epoch != round_.epoch:
            return None
        if isinstance(message, Shard):  # it names the contribution
            return self._on_data(peer, round_, message, now)
        if message.head != round_.head:
            return None
        if isinstance(message, (Need, Result)):
            return self._on_data(peer, round_, message, now)
        if isinstance(message, Accept):
            return round_.on_accept(peer, message, now)
        if isinstance(message, Refuse):
            return round_.on_refuse(peer, message, now)
        if isinstance(message, Ready):
            refused = round_.on_ready(peer, message, now)
            if refused is None and (view.status is None or view.status.head != message.head):
                # READY is news too: it may overtake the STATUS that says the same.
                epoch, head, ballot = message.epoch, message.head, message.ballot
                view.status = Status(epoch, head, epoch, "averaging", Stage.READY, ballot, 0, ())
            return refused
        if isinstance(message, Roster):
            return round_.on_roster(peer, message, now)
        if isinstance(message, Propose):
            return round_.on_propose(peer, message, now)
        if isinstance(message, Call):
            return round_.on_call(peer, message, now)
        if isinstance(message, Seat):
            return round_.lead.on_seat(peer, message)
        assert isinstance(message, Closing)
        return round_.on_closing(peer, message, now)

    def _on_strangers(self, peer: str, message: Message, now: float) -> str | None:
        """Who is no member says nothing that counts. Records prove themselves, and it may have become one
        since our newest: what we asked it for is heard."""
        if isinstance(message, Records) and peer in self.sync.asked_at:
            return self.on_records(peer, message, now)
        return "not_member"

    def on_changes(self, message: Changes) -> str | None:
        """What members know of changes; passed on when there is news in it."""
        ctx, epoch = self.ctx, self.chain.epoch + 1
        news: list[Change] = []
        fault = None
        for change in message.changes:
            if ctx.proposals.knows(ctx.roll, change):
                continue
            before = ctx.proposals.signers(ctx.roll, change)
            why = ctx.proposals.add(ctx.roll, epoch, change, ctx.crypto)
            # On another side of a fork other signatures count: two nodes that took each other's for news
            # would tell each other for good.
            if why is None and ctx.proposals.signers(ctx.roll, change) != before:
                news.append(ctx.proposals.known(ctx.roll, change))
            if why not in (None, "done", "void", "member", "no_member", "rollback"):  # else it is merely late
                fault = why
        self._tell_changes(news)
        return fault

    def _on_data(self, peer: str, round_: Round, message: Need | Shard | Result, now: float) -> str | None:
        if isinstance(message, Need):
            round_.exchange.on_need(peer, message)
            return None
        if isinstance(message, Shard):
            refused = round_.exchange.on_shard(peer, message)
        else:
            refused = round_.exchange.on_result(peer, message)
        round_.advance(now)
        return refused

    def on_status(self, peer: str, view: PeerView, status: Status, now: float) -> str | None:
        view.status = status
        round_ = self.round
        if round_ is not None and status.stage == Stage.AWAY:
            round_.watch.somebody_changed()
        if round_ is not None and status.epoch == round_.epoch and status.head == round_.head:
            if status.ballot > round_.ballot:
                round_.on_ballot_seen(peer, status.ballot, now)
            round_.advance(now)
        else:
            self.sync.on_status(peer, status, now)
        return None

    def on_leave(self, peer: str, leave: Leave, now: float) -> str | None:
        """Also of a round that we are not in yet: it is told once."""
        ctx, round_ = self.ctx, self.round
        if peer not in ctx.roll.members:
            return "not_member"
        if not ctx.crypto.verify(peer, leave.signature, leave_message(leave.head)):
            return "signature"
        ctx.leaves = {p: known for p, known in ctx.leaves.items() if p in ctx.roll.members} | {peer: leave}
        if round_ is not None and peer in round_.electorate and round_.state.handover is not None:
            ctx.emit(Note(f"epoch={leave.epoch} handed_over_by={peer}"))
            round_.watch.somebody_changed()
            round_.advance(now)
        return None

    def on_commit(self, peer: str, record: Record, now: float) -> str | None:
        body = record.body
        if body.epoch != self.chain.epoch + 1 or body.prev != self.chain.head:
            known = body.epoch <= self.chain.epoch and self.chain.head_at(body.epoch) == record.head
            if not known:
                self.sync.look_for_two(record)
                self.sync.ask(peer, now)
            return None
        try:
            self.sync.check_next(record)
        except InvalidRecord as e:
            return e.reason
        if false_draws(record, self.ctx.crypto):
            return "draw"
        if body.forced and self.sync.holds_back(
            (record,), next_place(self.chain.place, record), now, votes=not self.own.stands_by()
        ):
            return None
        self._append(record, now)
        return None

    def on_records(self, peer: str, message: Records, now: float) -> str | None:
        head = self.chain.head
        in_round, votes = self.round is not None, not self.own.stands_by()
        added = self.sync.on_records(peer, message, now, votes, in_round)
        if self.chain.head != head and added:
            extends = added[0].body.prev == head
            self._end_round(added[0] if extends else None, now)
        return None

    def _news(self) -> tuple[object, ...]:
        """What others act upon, and so hear at once when it changes. The rest, stage and progress, only keeps
        who watches us from losing patience, which is longer than a heartbeat."""
        round_ = self.round
        if round_ is not None and not self.stopping:
            state = round_.state
            return (state.epoch, state.head, state.ballot)
        if self.sync.taking_the_step and not self.stopping:
            return self.told  # in a moment we are in the next round
        return (self.chain.epoch, self.chain.head, self.sync.held_epoch, Stage.AWAY)

    def _status(self) -> Status:
        phase, round_, held = self.phase(), self.round, self.sync.held_epoch
        if self.stopping or (round_ is None and not self.sync.taking_the_step):
            return Status(self.chain.epoch, self.chain.head, held, phase, Stage.AWAY, 0, 0, ())
        if round_ is None:  # it has not gone away: in a moment it is in the next round
            return Status(held, self.chain.head_at(held), held, phase, Stage.ACCEPTED, 0, 0, ())
        waiting = round_.exchange.waiting_on() if round_.stage == Stage.EXCHANGING else ()
        epoch, head, progress = round_.epoch, round_.head, round_.exchange.progress
        return Status(epoch, head, epoch, phase, round_.stage, round_.ballot, progress, waiting)


def _since(at: float | None, now: float) -> float:
    """Seconds."""
    return 0.0 if at is None else now - at


def founding_vote(run_id: str, life: str) -> Vote:
    """Nothing is promised yet in the first round. It is on the founder's disk before the genesis is, since
    no record names that disk: one without it is another.
    """
    return Vote(0, run_id, -1, -1, None, life)


_HANDLERS: Final[dict[type, Callable[[Core, Any, float], None]]] = {
    PeerUp: Core.handle_peer_up,
    PeerDown: Core.handle_peer_down,
    Received: Core.handle_received,
    BulkProgress: Core.handle_bulk_progress,
    PeerRefused: Core.handle_peer_refused,
    Tick: Core.handle_tick,
    Contributed: Core.handle_contributed,
    TrainerState: Core.handle_trainer_state,
    Reduced: Core.handle_reduced,
    Judged: Core.handle_judged,
    Applied: Core.handle_applied,
    UpdateFetched: Core.handle_update_fetched,
    FetchFailed: Core.handle_fetch_failed,
    ChangeAsked: Core.handle_change_asked,
    Stopping: Core.handle_stopping,
}
