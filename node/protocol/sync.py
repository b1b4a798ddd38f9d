"""Getting to the head, and choosing it: records from peers, then the state that they describe (G1, G6).

Two things advance separately. The *chain* grows by records, each checked against the one before; where two
chains meet, the one with more committed weight since the common record wins, and the other side goes back
to that record. The *state* follows the chain one update at a time: from our own update log if we took part,
from a donor if not; and from a donor's checkpoint if nobody keeps the updates we lack.

One job on the state is out at a time: apply; rollback, when a fork was left; return, where a record says
that the state is an earlier one again (path.py); or state. Updates are fetched beside it, several at a time,
so that who catches up gains on the run however far away the donors are. What a donor gives is compared with
what is signed, by the shell for an update (its digest is in the record) and here for a state; a donor that
gave something else is named and left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tapestry.node.protocol.canon import InvalidRecord
from tapestry.node.protocol.chain import Chain, tokens_of
from tapestry.node.protocol.context import Context
from tapestry.node.protocol.doubts import Doubts
from tapestry.node.protocol.equivocation import found_in
from tapestry.node.protocol.events import (
    AppendRecord,
    Apply,
    Equivocated,
    FetchFailed,
    FetchState,
    FetchUpdate,
    Note,
    Rollback,
    SwitchChain,
)
from tapestry.node.protocol.messages import RECORDS_MAX, GetRecords, Records, Status
from tapestry.node.protocol.place import Place, Tip, check_record, false_draws, is_majority, next_place
from tapestry.node.protocol.record import Record, record_bytes
from tapestry.node.protocol.waits import BY_ITSELF_S, Wait

# Of a fork that is being looked at (G7), or twice as many as we have made since: of two sides that were apart
# for long each has about as many.
BRANCH_RECORDS_MAX = 16_384
BRANCHES_MAX = 4  # forks that are looked at at a time, each of another peer
NO_STATE = -1
STATE_DONORS_MAX = 4  # that are asked for parts of one state at a time. Guess: net/download.py
FETCHES_MAX = 4  # updates that are fetched at a time; a donor serves one peer so many (STATE_STREAMS_MAX)


@dataclass(slots=True)
class Branch:
    """A fork that one peer tells of, page by page: checked, and not better than ours so far."""

    common: int  # epoch of the last record that is ours too
    records: list[Record]  # after it; none while all that came is ours as well
    place: Place | None  # after the last of them
    grown_at: float

    def holds(self, message: Records) -> bool:
        """Whether these records are in it already: the answer to a question that was asked twice."""
        at = message.epoch - self.common
        last = at + len(message.records) - 1
        return 0 <= last < len(self.records) and self.records[last].head == message.records[-1].head


@dataclass(frozen=True, slots=True)
class Fetch:
    """An update that is being fetched."""

    epoch: int
    donor: str
    guessed: bool  # the donor need not have it


class Sync:
    """Mutable; owned by Core."""

    def __init__(self, ctx: Context, chain: Chain, state_epoch: int, state_digest: str) -> None:
        self.ctx = ctx
        self.chain = chain
        self.state_epoch = state_epoch  # NO_STATE before a joiner has one
        self.state_digest = state_digest
        self.job = ""  # what is out: apply, rollback, return, state; "" if nothing
        self.state_donor = ""  # who was asked for a state last
        self.fetches: dict[str, Fetch] = {}  # by head: the updates that are being fetched
        self.rollback_to: int | None = None
        # What lies on our disk may be what a donor gave just before a crash, not compared yet.
        signed = chain.state_digest_at(state_epoch) if 0 <= state_epoch <= chain.epoch else None
        self.need_state = state_epoch == NO_STATE or (signed is not None and signed != state_digest)
        self.asked_at: dict[str, float] = {}
        self.failed_at: dict[str, float] = {}
        self.lacks: dict[str, int] = {}  # donor -> newest update epoch that it has not
        self.branches: dict[str, Branch] = {}
        self.stuck_since: float | None = None  # since when nobody has given what we lack
        self.behind_since: float | None = None  # since when we are not at the head
        self.ahead_since: dict[str, float] = {}  # who says that it is further, and has given nothing since
        # the record of our own round that was told with false draws, by its head, and since when
        self.misdrawn: tuple[str, float] = ("", 0.0)
        self.doubts = Doubts()

    @property
    def at_head(self) -> bool:
        return not self.job and not self.need_state and self.state_epoch == self.chain.epoch

    @property
    def held_epoch(self) -> int:
        """Of the state that we hold on our chain; NO_STATE if it is none, or not the signed one."""
        if self.need_state:
            return NO_STATE
        return self.state_epoch if self.rollback_to is None else min(self.state_epoch, self.rollback_to)

    @property
    def taking_the_step(self) -> bool:
        """Applying the newest update, or getting it: the end of a round, not a way to catch up."""
        goes_back = self.job == "return" and self.chain.epoch in self.chain.rolled
        getting_it = self.job == "apply" or goes_back or self.chain.head in self.fetches
        return getting_it and self.held_epoch == self.chain.epoch - 1

    def wait(self, now: float) -> Wait | None:
        """Until we are at the head."""
        if self.at_head:
            return None
        what = f"needs a state, chain at {self.chain.epoch}"
        if not self.need_state:
            what = f"state {self.state_epoch} of {self.chain.epoch}"
        if self.stuck_since is None or now - self.stuck_since < self.ctx.rules.stall_s:
            since = now if self.behind_since is None else self.behind_since
            return Wait("state", what, "ends by itself when it has caught up", now - since, BY_ITSELF_S)
        asked = self.state_donor if self.job == "state" else ""
        for fetch in self.fetches.values():
            if fetch.epoch == self.state_epoch + 1:
                asked = fetch.donor
        if asked:
            what += f"; nobody has given it yet, asking {asked[-6:]}"
            ends = "ends when it or another member gives it; `tapestry peers` has who is heard"
        else:
            what += "; no peer that we hear can give it"
            ends = "ends when a member that has it is heard: start one, or give its address with --peer"
        if self._on_hollow():
            left_s = max(0.0, self.stuck_since + self.ctx.pace.quorum_loss_s() - now)
            ends += f"; or in {left_s:.0f} s, by going back to record {self.state_epoch}"
        return Wait("state", what, ends, now - self.stuck_since)

    # --- records -------------------------------------------------------------------------------

    def on_status(self, peer: str, status: Status, now: float) -> None:
        """Ask a peer whose head we do not know for the way to it."""
        if status.epoch <= self.chain.epoch and self.chain.head_at(status.epoch) == status.head:
            self.branches.pop(peer, None)
            return
        self.ask(peer, now)

    def ask(self, peer: str, now: float) -> None:
        """Once, until it answers or has had stall_s to: a page of records takes its time on a slow link."""
        if now - self.asked_at.get(peer, -1e9) >= self.ctx.rules.stall_s:
            self.asked_at[peer] = now
            self.ctx.send(peer, GetRecords(self._locator(peer)))

    def forget(self, peer: str) -> None:
        for table in (self.asked_at, self.failed_at, self.lacks, self.ahead_since, self.branches):
            table.pop(peer, None)

    def check_next(self, record: Record) -> None:
        """Whether `record` may be appended. Raises InvalidRecord."""
        self._check((record,), self.chain.place)

    def holds_back(self, records: Sequence[Record], place: Place, now: float, votes: bool) -> bool:
        """Whether a side that is better only by what a smaller set made has to wait: `records`, which lead to
        `place`. Either we hear a quorum of our own full electorate, at our head or on the way to it, and it
        is about to decide; or nobody gave what those who forced some of them had made before.

        We count ourselves only where our vote counts (`votes`): a quorum that needs one which lost its disk
        decides nothing, and would keep everybody here for good.
        """
        ours = self.chain.place
        if place.standing.full > ours.standing.full:
            return False
        if self.doubts.hold_back(records, now):
            return True
        if ours.standing.since:
            return False
        me = self.ctx.me
        here = [p for p in ours.electorate if (votes if p == me else self._comes_along(p, now))]
        return is_majority(here, ours.electorate)

    def _comes_along(self, peer: str, now: float) -> bool:
        """Heard, and not on another side."""
        view = self.ctx.peers.get(peer)
        if view is None or not self.ctx.heard(peer, now):
            return False
        status = view.status
        return status is None or self.chain.head_at(status.epoch) == status.head

    def _holds_out(self, record: Record, now: float) -> bool:
        """Whether a record of our own round, given by RECORDS, has to wait for true draws: else a leader
        could tell contributors other draws than auditors, and they would keep what nobody looks at.

        Who gives it may have been given it so, and is not refused. Those who voted for it decide it again,
        with their draws, unless nobody but us is left at its head: so it is taken as it is after a time.
        """
        if not false_draws(record, self.ctx.crypto):
            return False
        if self.misdrawn[0] != record.head:
            self.misdrawn = record.head, now
            self.ctx.emit(Note(f"record={record.body.epoch} misdrawn={record.head}"))
        return now - self.misdrawn[1] < self.ctx.pace.quorum_loss_s()

    def with_true_draws(self, record: Record) -> Record:
        """A record that we have taken, without what is false of its draws: that draws nothing."""
        if self.misdrawn[0] != record.head:
            return record
        false = false_draws(record, self.ctx.crypto)
        return replace(record, draws=tuple([(p, "" if p in false else draw) for p, draw in record.draws]))

    def on_get_records(self, peer: str, message: GetRecords) -> None:
        for epoch, head in message.known:
            if 0 <= epoch <= self.chain.epoch and self.chain.head_at(epoch) == head:
                self.ctx.send(peer, Records(epoch, self._page(epoch)))
                return
        self.ctx.refuse(peer, "no_common_record", "it knows no record of ours, not even the genesis")

    def _page(self, epoch: int) -> tuple[Record, ...]:
        """What follows `epoch`, as much of it as a message may hold."""
        left, count = self.ctx.rules.records_bytes_max, 0
        records = self.chain.after(epoch, RECORDS_MAX)
        for record in records:
            left -= record_bytes(record)
            if left < 0 and count:
                break
            count += 1
        return records[:count]

    def _goes_on(self, peer: str, epoch: int) -> bool:
        """Whether `peer` has records after `epoch`, by what it said last: a message may hold only some."""
        view = self.ctx.peers.get(peer)
        return view is not None and view.status is not None and view.status.epoch > epoch

    def look_for_two(self, record: Record) -> None:
        """Of another side: who signed the record in the place of ours in the same ballot has signed twice."""
        epoch = record.body.epoch
        if not 0 < epoch <= self.chain.epoch or self.chain.head_at(epoch - 1) != record.body.prev:
            return
        ours = self.chain.after(epoch - 1, 1)
        for proof in found_in(ours[0], record, self.ctx.crypto) if ours else ():
            self.ctx.emit(Equivocated(proof))

    def on_records(
        self, peer: str, message: Records, now: float, votes: bool, in_round: bool
    ) -> list[Record] | None:
        """Check what came. Returns the records that became part of the chain; None if it was refused.

        `votes`: as `holds_back` has it. `in_round`: whether we are in one from our head. Raises nothing; the
        caller ends the round if the head moved.
        """
        branch = self.branches.get(peer)
        if branch is not None and message.records and self._had(branch, message):
            return []
        self.asked_at.pop(peer, None)
        if not message.records:
            self.branches.pop(peer, None)  # there is no more of it
            return []
        told_to = message.records[-1].body.epoch
        common, before = message.epoch, []
        if branch is not None and common == branch.common + len(branch.records):
            common, before = branch.common, branch.records
        if not 0 <= common <= self.chain.epoch:
            return []
        news = message.records if before else self._cut_ours(common, message.records)
        if not before:
            common += len(message.records) - len(news)
            if news:
                self.look_for_two(news[0])
                if news[0].body.prev != self.chain.head_at(common):
                    return []  # it goes on with a fork that we have dropped since we asked
        records = [*before, *news]
        limit = max(BRANCH_RECORDS_MAX, 2 * (self.chain.epoch - common))
        if len(records) > limit:
            self.ctx.refuse(peer, "branch", f"a fork of more than {limit} records, no better than ours")
            self.branches.pop(peer, None)
            return None
        place = branch.place if branch is not None and before else None
        try:
            if news:
                place = self._check(news, place if place is not None else self.chain.place_at(common))
        except InvalidRecord as e:
            self.ctx.refuse(peer, e.reason, str(e))
            self.branches.pop(peer, None)
            return None
        ours = len(records) - len(self._cut_ours(common, records))  # we may have gone the same way since
        common, records = common + ours, records[ours:]
        goes_on = self._goes_on(peer, told_to)
        if records and self._is_final(common):
            self.ctx.refuse(peer, "final", f"a fork before record {common + 1}, which a quorum has decided")
            self.branches.pop(peer, None)
            return None
        if records and place is not None and place.tip.beats(self.chain.tip):
            of_round = in_round and common == self.chain.epoch
            if self.holds_back(records, place, now, votes) or (of_round and self._holds_out(records[0], now)):
                self.branches.pop(peer, None)
                self.asked_at[peer] = now  # it is asked again after a while
                return []
            self.branches.clear()  # they are of forks from a chain that is ours no more
            added = self._switch(common, records)
            self.ahead_since.pop(peer, None)
            if goes_on:
                self.ask(peer, now)
            return added
        if goes_on and self._may_branch(peer, now):
            self.branches[peer] = Branch(common, records, place, now)
            self.ask(peer, now)
        else:
            self.branches.pop(peer, None)
        return []

    def _had(self, branch: Branch, message: Records) -> bool:
        """Whether the branch goes further than these records: they were sent twice."""
        last = message.records[-1]
        epoch = last.body.epoch
        return branch.holds(message) or (epoch <= branch.common and self.chain.head_at(epoch) == last.head)

    def _cut_ours(self, common: int, records: Sequence[Record]) -> Sequence[Record]:
        """Those after the ones that our chain has too, of records after `common`: nothing else is kept."""
        same, chain = 0, self.chain
        while same < len(records) and chain.head_at(common + same + 1) == records[same].head:
            same += 1
        return records[same:]

    def _may_branch(self, peer: str, now: float) -> bool:
        """Room is made where one no longer grows."""
        stall_s = self.ctx.rules.stall_s
        if peer not in self.branches and len(self.branches) >= BRANCHES_MAX:
            for other, branch in list(self.branches.items()):
                if now - branch.grown_at >= stall_s or not self.ctx.heard(other, now):
                    del self.branches[other]
        return peer in self.branches or len(self.branches) < BRANCHES_MAX

    def append(self, record: Record, newest: bool = True) -> None:
        """A record that the chain has checked."""
        self.chain.append(record)
        self._note_members(record)
        self.ctx.emit(AppendRecord(record, newest))

    def _note_members(self, record: Record) -> None:
        """The roll that the others are judged by is that of our newest record."""
        ctx, body = self.ctx, record.body
        ctx.enrol(self.chain.roll)
        for change in body.changes:
            self.ctx.emit(
                Note(f"epoch={body.epoch} change={change.kind} peer={change.peer} {change.value!r}")
            )
        if ctx.proposals.pending:
            ctx.proposals.prune(ctx.roll, self.chain.epoch + 1, ctx.crypto)

    def _check(self, records: Sequence[Record], at: Place) -> Place:
        """Each against the place before it. Returns where they lead. Raises InvalidRecord."""
        rules, crypto = self.ctx.rules, self.ctx.crypto
        for record in records:
            check_record(record, at, crypto, rules.max_influence, rules.on_quorum_loss)
            at = next_place(at, record)
        return at

    def _is_final(self, common: int) -> bool:
        """Whether leaving what we have after `common` would leave what a full electorate decided, in a run
        where that is for good.

        Where three or more never go on without a quorum, no honest member can have signed another record: who
        shows one has the keys of an old majority, and could make as long a past as it likes.
        """
        return self.ctx.rules.on_quorum_loss != "continue" and self._has_full_ones(common)

    def _has_full_ones(self, epoch: int) -> bool:
        """Whether a full electorate decided any record after `epoch`."""
        chain = self.chain
        newest = chain.epoch - chain.place.standing.since  # those after it are none
        return any(not chain.place_at(one).standing.since for one in range(newest, epoch, -1))

    def leave_hollow(self, voted: Tip | None, now: float) -> None:
        """Go back to the record whose state we hold, when nobody has given for `quorum_loss_s` what a smaller
        set made after it. `voted`: the head of the last round that we were in.

        No round is entered a second time without its vote (docs/decisions/007): we were in none since that
        record, or we stay where we are.
        """
        if self.stuck_since is None or now - self.stuck_since < self.ctx.pace.quorum_loss_s():
            return
        epoch = self.state_epoch
        if not self._on_hollow() or (voted is not None and voted.beats(self.chain.place_at(epoch).tip)):
            return
        left = self.chain.after(epoch, self.chain.epoch - epoch)
        self.doubts.add(left, now, self.ctx.pace.quorum_loss_s())
        self.chain.switch(epoch, ())
        self.ctx.emit(
            Note(f"fork=hollow common_epoch={epoch} dropped_records={len(left)} next=go_on_without_it")
        )
        self.ctx.emit(SwitchChain(epoch, ()))
        self.ctx.enrol(self.chain.roll)
        for table in (self.lacks, self.branches, self.fetches):
            table.clear()
        self.stuck_since = self.behind_since = None

    def _on_hollow(self) -> bool:
        """Whether we hold the state of an older record, and only a smaller set decided those after it."""
        if self.job or self.rollback_to is not None or not 0 <= self.held_epoch < self.chain.epoch:
            return False
        return not self._has_full_ones(self.state_epoch)

    def _switch(self, common: int, theirs: Sequence[Record]) -> list[Record]:
        if common < self.chain.epoch:
            dropped, tokens = self.chain.switch(common, theirs)
            self.ctx.emit(
                Note(
                    f"fork=left common_epoch={common} dropped_records={dropped} "
                    f"dropped_tokens={tokens} gained_tokens={tokens_of(theirs)}"
                )
            )
            for record in theirs:
                self._note_members(record)
            self.lacks.clear()
            self.ctx.emit(SwitchChain(common, tuple(theirs)))
            if self.state_epoch > common or self.job:
                self.rollback_to = common if self.rollback_to is None else min(self.rollback_to, common)
        else:
            for record in theirs:
                self.append(record, newest=record is theirs[-1])
        return list(theirs)

    def _locator(self, peer: str) -> tuple[tuple[int, str], ...]:
        """Our head, then further and further back to the genesis: O(log epochs) entries."""
        known = []
        if peer in self.branches:
            branch = self.branches[peer]
            head = branch.records[-1].head if branch.records else self.chain.head_at(branch.common)
            known.append((branch.common + len(branch.records), head))
        epoch, step = self.chain.epoch, 1
        while epoch > 0:
            known.append((epoch, self.chain.head_at(epoch)))
            epoch -= step
            step *= 2
        known.append((0, self.chain.head_at(0)))
        return tuple(known)

    # --- state ---------------------------------------------------------------------------------

    def on_applied(self, epoch: int, digest: str) -> None:
        """A job brought the state to `epoch`. Compared with what is signed, where it is."""
        job, self.job = self.job, ""
        self.stuck_since = None
        self.state_epoch, self.state_digest = epoch, digest
        self.need_state = False
        if self.rollback_to is not None and epoch <= self.rollback_to:
            self.rollback_to = None
        if job == "apply" and epoch <= self.chain.epoch:
            self.doubts.dispel(self.chain.after(epoch - 1, 1)[0])
        if self.rollback_to is not None or epoch > self.chain.epoch:
            return  # on the way back: pump goes on
        signed = self.chain.state_digest_at(epoch)
        if signed is not None and signed != digest:
            self._diverged(f"job={job}")

    def on_update_fetched(self, head: str) -> None:
        if self.fetches.pop(head, None) is not None:
            self.stuck_since = None
        self.ctx.keep_update(head)

    def on_fetch_failed(self, failed: FetchFailed, now: float) -> None:
        donor, reason = failed.donor, failed.reason
        if failed.head:
            fetch = self.fetches.get(failed.head)
            if fetch is not None and donor in ("", fetch.donor):
                del self.fetches[failed.head]
                self._update_failed(fetch, reason, now)
            return  # else it was of a round
        if self.job != "state" and not (donor == "" and self.job in ("apply", "rollback", "return")):
            return
        job, self.job = self.job, ""
        if donor == "":
            self.need_state = True
            self.ctx.emit(Note(f"{job}=failed reason={reason!r} next=fetch_state"))
            return
        for peer in (donor, *failed.others):
            if peer in self.ctx.peers:
                self.failed_at[peer] = now
        self.ctx.emit(Note(f"{job}=failed donor={donor} reason={reason!r}"))

    def _update_failed(self, fetch: Fetch, reason: str, now: float) -> None:
        donor = fetch.donor
        if donor in self.ctx.peers:
            if reason == "missing" and not fetch.guessed:
                self.lacks[donor] = max(self.lacks.get(donor, 0), fetch.epoch)
            else:
                self.failed_at[donor] = now
        if not fetch.guessed or reason != "missing":  # else it was a guess, and `reason` tells of it
            self.ctx.emit(Note(f"update=failed donor={donor} reason={reason!r}"))

    def pump(self, now: float) -> None:
        """Start the next job, if one is due and none is out; and fetch what the jobs after it will need."""
        if not self.job:
            self._next_job(now)
        if not self.need_state and self.rollback_to is None:
            self._fetch_updates(now)
        if self.at_head:
            self.behind_since = None
        elif self.behind_since is None:
            self.behind_since = now
        waits = not self.job and not self.at_head
        if waits and self.stuck_since is None and not self._asked_who_has_it():
            self.stuck_since = now

    def _asked_who_has_it(self) -> bool:
        return any(f.epoch == self.state_epoch + 1 and not f.guessed for f in self.fetches.values())

    def _next_job(self, now: float) -> None:
        if self.rollback_to is not None and not self.need_state:
            if self.state_epoch > self.rollback_to:
                self.job = "rollback"
                self.ctx.emit(Rollback(self.rollback_to))
                return
            self.rollback_to = None
        if not self.need_state and self.state_epoch < self.chain.epoch:
            self._advance()
        if self.need_state:
            self._fetch_state(now)

    def _advance(self) -> None:
        """By one update; or to where the records say that the state is an earlier one again."""
        (record,) = self.chain.after(self.state_epoch, 1)
        step = self.chain.step_from(self.state_epoch)
        if record.body.state_digest != self.state_digest:
            self._diverged(f"record={record.body.epoch}")
        elif step in self.chain.rolled:
            self.job = "return"
            self.ctx.emit(Rollback(step))
        elif record.head in self.ctx.updates:
            del self.ctx.updates[record.head]
            self.job = "apply"
            self.ctx.emit(Apply(record))

    def _fetch_updates(self, now: float) -> None:
        """Those that are missing next, while there is room. In the round after them all have the update."""
        begin = self.state_epoch + (1 if self.job == "apply" else 0)
        for record in self.chain.updates_after(begin, FETCHES_MAX):
            if len(self.fetches) >= FETCHES_MAX or self.need_state:
                return
            if record.head not in self.ctx.updates and record.head not in self.fetches:
                self._fetch_update(record, now)

    def _fetch_update(self, record: Record, now: float) -> None:
        """From who is further on our chain. If all of them have dropped it we need a state of theirs.

        If nobody is, whom to ask is a guess: who voted for the record may not know that it was decided.
        """
        epoch, head = record.body.epoch, record.head
        donors = [peer for peer, status in self._donors(now) if status.state_epoch >= epoch]
        able = [p for p in donors if self.lacks.get(p, 0) < epoch]
        is_next = epoch == self.state_epoch + 1
        if donors and not able and is_next:
            if not self.job:
                self._fetch_state(now)
            return
        asked = able or (self._others(now) if is_next else [])
        if asked:
            donor = asked[epoch % len(asked)]
            self.fetches[head] = Fetch(epoch, donor, guessed=not able)
            self.ctx.emit(FetchUpdate(epoch, head, record.body.result, donor))

    def _fetch_state(self, now: float) -> None:
        """From one of the furthest on our chain, and from others at the same time, but not before we know
        where the head is."""
        if self._head_ahead(now):
            return
        held = {peer: status.state_epoch for peer, status in self._donors(now)}
        donors = [peer for peer, epoch in held.items() if epoch == max(held.values())]
        newest = max(0, self.chain.epoch - 1)  # nobody has signed the one after, unless it is not new
        if self.chain.epoch in self.chain.rolled:
            newest = self.chain.epoch
        if donors and newest > self.held_epoch:
            first = self.chain.epoch % len(donors)
            order = [*donors[first:], *donors[:first], *[p for p in held if p not in donors]]
            self.job, self.state_donor = "state", order[0]
            self.rollback_to = None
            self.ctx.emit(FetchState(tuple(order[:STATE_DONORS_MAX]), newest, self.held_epoch + 1))

    def _head_ahead(self, now: float) -> bool:
        """Whether records are still to come: somebody says so, and in every stall_s gives some."""
        ahead = False
        for peer, view in self.ctx.peers.items():
            if view.status is None or not self.ctx.heard(peer, now) or not self.ctx.roll.may_contribute(peer):
                continue  # to go and come back gains it no time
            if view.status.epoch <= self.chain.epoch:
                self.ahead_since.pop(peer, None)
            elif now - self.ahead_since.setdefault(peer, now) < self.ctx.rules.stall_s:
                ahead = True
        return ahead

    def _donors(self, now: float) -> list[tuple[str, Status]]:
        """Peers with a head on our chain and a state further than ours: they have made it, or been given it.

        What a peer says of a head that we do not know proves nothing.
        """
        donors = []
        for peer in self._others(now):
            status = self.ctx.peers[peer].status
            if status is None or self.chain.head_at(status.epoch) != status.head:
                continue
            if self.held_epoch < status.state_epoch <= status.epoch:
                donors.append((peer, status))
        return donors

    def _others(self, now: float) -> list[str]:
        """Peers heard of late, of which nothing was asked in vain just now."""
        wait_s = 2 * self.ctx.rules.resend_s
        return [
            peer
            for peer in sorted(self.ctx.peers)
            if (self.ctx.roll.may_contribute(peer) or peer in self.ctx.roll.removed)
            and self.ctx.heard(peer, now)
            and now - self.failed_at.get(peer, -1e9) >= wait_s
        ]

    def _diverged(self, where: str) -> None:
        self.need_state = True
        self.ctx.emit(Note(f"state_digest=diverged epoch={self.state_epoch} {where} next=fetch_state"))
