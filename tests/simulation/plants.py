"""Bugs on purpose: each patches the protocol, in this process only, and the simulator must catch it.

A simulator that finds nothing proves nothing until it is seen to find something. `planted(name)` is a
context: inside it the protocol has the bug, after it no more. Beside each: the first seed that catches it, as
`scripts/simulate.py --seeds 0:2000 --plant NAME` finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from simulation import shell as shell_module
from simulation.backups import Backups
from simulation.rollbacks import Rollbacks
from simulation.shell import EXECUTE, Node

from tapestry.compression.means.shares import clip_scales
from tapestry.node.protocol import chain as chain_module
from tapestry.node.protocol import core as core_module
from tapestry.node.protocol import drawn as drawn_module
from tapestry.node.protocol import events as ev
from tapestry.node.protocol import leader as leader_module
from tapestry.node.protocol import members as members_module
from tapestry.node.protocol import place as place_module
from tapestry.node.protocol import proposals as proposals_module
from tapestry.node.protocol import record as record_module
from tapestry.node.protocol import round as round_module
from tapestry.node.protocol import sync as sync_module
from tapestry.node.protocol import validity as validity_module
from tapestry.node.protocol import voice as voice_module
from tapestry.node.protocol import watch as watch_module
from tapestry.node.protocol.acceptor import Acceptor
from tapestry.node.protocol.context import Context
from tapestry.node.protocol.deliveries import Deliveries
from tapestry.node.protocol.exchange import Exchange
from tapestry.node.protocol.gate import Gate
from tapestry.node.protocol.leader import Leader
from tapestry.node.protocol.messages import Stage
from tapestry.node.protocol.movers import Movers
from tapestry.node.protocol.own_vote import OwnVote
from tapestry.node.protocol.proposals import Proposals
from tapestry.node.protocol.receipts import Receipts
from tapestry.node.protocol.round import Round
from tapestry.node.protocol.round_state import RoundState
from tapestry.node.protocol.sync import Sync
from tapestry.node.protocol.waits import Wait
from tapestry.node.protocol.watch import Watch

Patch = tuple[object, str, Any]  # (owner, attribute, what it is instead)


@dataclass(frozen=True)
class Plant:
    claim: str  # what the bug is, in words
    caught_by: int  # a seed
    patches: Callable[[], list[Patch]]


PLANTS: dict[str, Plant] = {}


def plant(claim: str, caught_by: int) -> Callable[[Callable[[], list[Patch]]], Callable[[], list[Patch]]]:
    def register(patches: Callable[[], list[Patch]]) -> Callable[[], list[Patch]]:
        PLANTS[patches.__name__] = Plant(claim, caught_by, patches)
        return patches

    return register


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The protocol with the bug `name` in it. Raises KeyError for a name that is none."""
    patches = [patch.object(owner, attribute, new) for owner, attribute, new in PLANTS[name].patches()]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in reversed(patches):
            one.stop()


# --- votes ------------------------------------------------------------------------------------------


@plant("any one vote is a quorum", 0)
def no_quorum_check() -> list[Patch]:
    modules = (leader_module, sync_module, validity_module)
    return [(m, "quorum", lambda count: 1) for m in modules if hasattr(m, "quorum")]


@plant("a vote is sent, and never written down", 0)
def vote_not_on_disk() -> list[Patch]:
    return [(shell_module, "EXECUTE", {**EXECUTE, ev.PersistVote: Node.do_nothing})]


@plant("a vote is sent before its result is written down", 0)
def result_not_on_disk() -> list[Patch]:
    return [(shell_module, "EXECUTE", {**EXECUTE, ev.PersistResult: Node.do_nothing})]


@plant("the leader commits when it has voted itself", 1)
def commit_before_accept() -> list[Patch]:
    return [(leader_module, "commit_gap", lambda body, votes, electorate: None)]


@plant("a vote that comes twice counts twice", 4)
def sender_counted_twice() -> list[Patch]:
    counted: dict[tuple[str, str, int], int] = {}
    on_accept = Round.on_accept

    def count(self: Round, peer: str, accept: Any, now: float) -> str | None:
        key = (peer, accept.head, accept.ballot)
        counted[key] = counted.get(key, 0) + 1
        return on_accept(self, peer, accept, now)

    def gap(body: Any, votes: dict[str, Any], electorate: tuple[str, ...]) -> str | None:
        total = sum(max(1, counted.get((p, v.head, v.ballot), 1)) for p, v in votes.items())
        return None if total >= len(electorate) // 2 + 1 else "not yet"

    return [(Round, "on_accept", count), (leader_module, "commit_gap", gap)]


@plant("votes of who is no elector count", 12)
def strangers_vote() -> list[Patch]:
    def gap(body: Any, votes: dict[str, Any], electorate: tuple[str, ...]) -> str | None:
        return None if len(votes) >= len(electorate) // 2 + 1 else "not yet"

    return [(leader_module, "commit_gap", gap)]


@plant("a lower ballot is followed after a higher one was promised", 23)
def promise_not_kept() -> list[Patch]:
    on_roster = Round.on_roster

    def obey(self: Round, peer: str, roster: Any, now: float) -> str | None:
        if roster.ballot < self.state.ballot and not roster.forced and not self.state.forced:
            self.state.set_ballot(roster.ballot)
        return on_roster(self, peer, roster, now)

    return [(Round, "on_roster", obey)]


@plant("a ballot is led again after a restart", 45)
def ballot_led_twice() -> list[Patch]:
    init = RoundState.__init__

    def forgetful(self: RoundState, *args: Any) -> None:
        init(self, *args)
        self.lead_from = 0
        self.set_ballot(self.ballot)

    return [(RoundState, "__init__", forgetful)]


@plant("a roster is followed whatever its signature", 24)
def roster_signature_unchecked() -> list[Patch]:
    return [(validity_module, "is_signed", lambda *args: True)]


@plant("READY does not show which rosters its sender was told", 114)
def receipts_not_shown() -> list[Patch]:
    return [(Receipts, "newest", property(lambda self: ()))]


@plant("a new leader makes a new value, whatever was accepted", 47)
def accepted_value_ignored() -> list[Patch]:
    trusted = Leader._trusted

    def ignore(self: Leader) -> list[Any]:
        return [replace(r, accepted=None, accepted_ballot=-1) for r in trusted(self)]

    return [(Leader, "_trusted", ignore)]


@plant("a forced value overwrites the vote for an ordinary one", 8)
def forced_displaces_vote() -> list[Patch]:
    accept = Acceptor.accept

    def displace(self: Acceptor, body: Any, head: str) -> str | None:
        fault = accept(self, body, head)
        if body.forced and fault is None:
            state = self.state
            ballot = state.ballot
            state.vote = replace(state.vote, promised=ballot, accepted_ballot=ballot, accepted=body)
            self.ctx.emit(ev.PersistVote(state.vote))
        return fault

    return [(Acceptor, "accept", displace)]


@plant("a member that lost its disk votes at once", 8)
def lost_disk_votes() -> list[Patch]:
    return [(OwnVote, "is_forgotten", lambda self: False)]


@plant("a home that was restored goes on as the disk that it was", 1676)
def restored_as_it_was() -> list[Patch]:
    return [(Backups, "forget_vote", lambda self, node: None)]


@plant("a restored home that met another elector goes on as if it were alone", 846)
def restored_goes_on() -> list[Patch]:
    return [(OwnVote, "meet", lambda self, peer: False)]


@plant("a member that lost records votes at once", 17)
def lost_records_vote() -> list[Patch]:
    def stands_by(self: Any) -> Wait | None:
        return Wait("vote", "our disk was lost", "") if self.is_forgotten() else None

    return [(OwnVote, "stands_by", stands_by)]


# --- records ----------------------------------------------------------------------------------------


@plant("records are taken as they come", 0)
def records_unchecked() -> list[Patch]:
    return [(sync_module, "check_record", lambda *args: None)]


@plant("of two chains the worse one wins", 0)
def fork_choice_reversed() -> list[Patch]:
    return [(place_module.Tip, "beats", lambda self, other: not (self[:3] > other[:3]))]


@plant("who is connected is an elector, without a record", 0)
def electorate_grows_by_itself() -> list[Patch]:
    init = RoundState.__init__

    def grow(self: RoundState, ctx: Any, at: Any, *a: Any) -> None:
        live = sorted({*at.electorate, *ctx.live_at(at.epoch, at.head, a[-1])})
        init(self, ctx, at._replace(electorate=tuple(live)), *a)

    return [(RoundState, "__init__", grow)]


@plant("a run that waits for its quorum forces records all the same", 6)
def forces_though_told_to_wait() -> list[Patch]:
    due, accepts = Watch.force_due, Watch.accepts_force

    def continues(question: Any) -> Any:
        def ask(self: Watch, now: float) -> bool:
            rules = self.ctx.rules
            self.ctx.rules = replace(rules, on_quorum_loss="continue")
            try:
                return bool(question(self, now))
            finally:
                self.ctx.rules = rules

        return ask

    return [
        (Watch, "force_due", continues(due)),
        (Watch, "accepts_force", continues(accepts)),
        (validity_module, "waits", lambda at, rule: False),
    ]


@plant("nobody's weight is capped, and nobody minds", 12)
def weight_cap_ignored() -> list[Patch]:
    weigh = voice_module.voice_weights

    def uncapped(roll: Any, contributors: Any, max_influence: float) -> list[int]:
        return weigh(roll, contributors, 1.0)

    return [(m, "voice_weights", uncapped) for m in (leader_module, place_module)]


@plant("newcomers are cut to their share before the members are capped, and so have more", 80)
def newcomers_uncapped() -> list[Patch]:
    def lifted(raw: Any, old: Any, open_share: int, max_influence: float) -> list[int]:
        shared = voice_module._under_cap(raw, old, open_share, max(raw))
        return voice_module.capped_weights(shared, max_influence)

    return [(voice_module, "_capped_beside", lifted)]


# --- members ----------------------------------------------------------------------------------------


@plant("what its sender says it trained on is what a contribution weighs", 0)
def weighs_what_it_says() -> list[Patch]:
    def believe(roll: Any, contributors: Any, max_influence: float) -> list[int]:
        return voice_module.capped_weights([tokens for _, tokens in contributors], max_influence)

    return [(m, "voice_weights", believe) for m in (leader_module, place_module)]


@plant("who is no member takes part like one", 0)
def strangers_take_part() -> list[Patch]:
    fault = place_module.body_fault

    def welcome(body: Any, at: Any, *a: Any) -> str | None:
        why = fault(body, at, *a)
        return None if why == "not_member" else why

    return [
        (members_module.Roll, "may_contribute", lambda self, peer: True),
        *((m, "body_fault", welcome) for m in (place_module, validity_module)),
    ]


@plant("a change is made whoever signed it", 0)
def changes_by_anybody() -> list[Patch]:
    return [
        (members_module, "enough_signed", lambda before, roll, change: True),
        (proposals_module, "may_ask", lambda roll, change, peer: True),
    ]


@plant("a change's signatures are not looked at", 2)
def changes_unsigned() -> list[Patch]:
    class Credulous:
        def verify(self, peer: str, signature: str, message: bytes) -> bool:
            return True

    fault = members_module.change_fault

    def believe(roll: Any, epoch: int, change: Any, crypto: Any) -> str | None:
        return fault(roll, epoch, change, Credulous())

    return [(m, "change_fault", believe) for m in (members_module, proposals_module)]


@plant("an invitation is never used up", 83)
def invitation_never_used_up() -> list[Patch]:
    applied = members_module._applied

    def endless(roll: Any, change: Any, epoch: int) -> Any:
        after = applied(roll, change, epoch)
        return replace(after, invites=roll.invites) if change.kind == "admit" else after

    return [(members_module, "_applied", endless)]


@plant("who was removed comes back by an invitation", 75)
def removed_are_guests() -> list[Patch]:
    return [(members_module, "admits_guest", lambda roll, change: change.kind == "admit")]


@plant("who may ask for changes stays as it was at the start, whatever records make of it", 60)
def rules_of_the_start() -> list[Patch]:
    applied = members_module._applied

    def keep(roll: Any, change: Any, epoch: int) -> Any:
        after = applied(roll, change, epoch)
        return replace(after, charter=replace(after.charter, admit_by=roll.charter.admit_by))

    return [(members_module, "_applied", keep)]


@plant("a change that the next record does not carry is forgotten", 7)
def change_forgotten() -> list[Patch]:
    prune = Proposals.prune

    def forget(self: Proposals, *args: Any) -> None:
        prune(self, *args)
        self.pending.clear()
        self.asked_by.clear()

    return [(Proposals, "prune", forget)]


@plant("who was removed votes on", 2)
def removed_votes_on() -> list[Patch]:
    return [(members_module.Roll, "voters", lambda self, named: tuple(named))]


@plant("an island's records are worth what a full electorate's are", 8)
def island_counts_as_full() -> list[Patch]:
    stand = place_module._next_standing

    def full(at: Any, body: Any, electorate: Any, roll: Any) -> Any:
        standing = stand(at, body, electorate, roll)
        better = place_module.Standing(at.standing.full + 1, electorate, roll, (), 0, 0)
        return standing if body.forced else better

    return [(place_module, "_next_standing", full)]


@plant("who is said to stand behind an island's record is believed", 41)
def behind_unchecked() -> list[Patch]:
    return [(place_module, "_behind_fault", lambda behind, at, crypto: None)]


@plant("a forced record has the voices of all whom it names, whoever signed it", 87)
def forced_by_some() -> list[Patch]:
    check = place_module.check_record

    def some(record: Any, *args: Any, **more: Any) -> None:
        body, named = record.body, {m.peer for m in record.body.members}
        if body.forced and {p for p, _ in record.signatures} < named:
            return
        check(record, *args, **more)

    return [(m, "check_record", some) for m in (place_module, sync_module)]


@plant("whoever is named has a seat, whether it said so or not", 42)
def seats_unchecked() -> list[Patch]:
    return [(place_module, "_seats_fault", lambda *args: None)]


@plant("a leader names whoever says READY, with a word that holds or without", 126)
def ready_seats_unchecked() -> list[Patch]:
    return [(Leader, "seat_fault", lambda *args: None)]


# --- shards -----------------------------------------------------------------------------------------


@plant("a shard of an older contribution is taken for the newer one's", 4)
def stale_contribution_accepted() -> list[Patch]:
    reduce = Exchange._reduce_if_complete

    def take(self: Exchange, shard: int) -> None:
        for member in self.roster.members if self.roster is not None else ():
            entry = self.inputs.get(member.peer)
            if entry is not None and member.weight:
                entry.contribution = member.contribution
        reduce(self, shard)

    return [(Exchange, "_reduce_if_complete", take)]


@plant("a shard is averaged in the order in which inputs came", 1)
def roster_order_not_fixed() -> list[Patch]:
    reduce = Exchange._reduce_if_complete

    def unordered(self: Exchange, shard: int) -> None:
        roster = self.roster
        if roster is not None:
            order = {p: i for i, p in enumerate(self.inputs)}
            members = sorted(roster.members, key=lambda m: order.get(m.peer, len(order)))
            index = {m.peer: i for i, m in enumerate(members)}
            reducers = tuple(index[roster.members[r].peer] for r in roster.reducers)
            self.roster = replace(roster, members=tuple(members), reducers=reducers)
        try:
            reduce(self, shard)
        finally:
            self.roster = roster

    return [(Exchange, "_reduce_if_complete", unordered)]


@plant("results of other members are kept for the next roster", 10)
def mixture_of_members() -> list[Patch]:
    start = Exchange.start

    def keep(self: Exchange, roster: Any) -> None:
        if self.roster is not None:
            self.roster = replace(self.roster, members=roster.members)
        start(self, roster)

    return [(Exchange, "start", keep)]


@plant("a mean stays when its shard moves to another reducer, whose signature it has not", 49)
def mean_of_another_kept() -> list[Patch]:
    start = Exchange.start

    def keep(self: Exchange, roster: Any) -> None:
        before, results = self.roster, dict(self.results)
        start(self, roster)
        if before is not None and before.members == roster.members and len(results) < len(roster.reducers):
            self.results = results | self.results

    return [(Exchange, "start", keep)]


@plant("a contribution is offered again in the next round", 3)
def contribution_used_twice() -> list[Patch]:
    last: dict[str, Any] = {}
    init, contribute = Exchange.__init__, Exchange.contribute

    def again(self: Exchange, ctx: Any, *args: Any) -> None:
        init(self, ctx, *args)
        if ctx.me in last:
            contribute(self, last.pop(ctx.me))

    def remember(self: Exchange, contributed: Any) -> None:
        last[self.ctx.me] = contributed
        contribute(self, contributed)

    return [(Exchange, "__init__", again), (Exchange, "contribute", remember)]


@plant("a dead reducer keeps its shards, and nobody is left out for it", 99)
def reducers_death_ignored() -> list[Patch]:
    exclude = Leader.exclude

    def spare(self: Leader, peers: list[str], why: str, now: float) -> None:
        if why != "gone":
            exclude(self, [], why, now)
            self.excluded.clear()

    return [(Leader, "exclude", spare)]


@plant("a reducer believes what members say of their norms", 1)
def norms_believed() -> list[Patch]:
    def believe(norms: Any, weights: Any, norm_max: float) -> list[float]:
        return clip_scales([1.0] * len(norms), weights, norm_max)

    return [(shell_module, "clip_scales", believe)]


@plant("a reducer clips by the mean norm, which one member can drag away", 1)
def clipped_by_the_mean_norm() -> list[Patch]:
    def clip(norms: Any, weights: Any, norm_max: float) -> list[float]:
        limit = norm_max * sum(norms) / len(norms)
        return [min(1.0, limit / norm) for norm in norms]

    return [(shell_module, "clip_scales", clip)]


# --- members that give nothing ----------------------------------------------------------------------


@plant("a reducer is left out before those that most reducers wait for", 99)
def most_reducers_not_heeded() -> list[Patch]:
    return [(m, "silent", lambda waiting, reducers, me: []) for m in (leader_module, watch_module)]


@plant("who delivers nothing is named in every roster again", 2)
def never_delivers_always_named() -> list[Patch]:
    return [(Deliveries, "left_out", lambda self, key, epoch: False)]


@plant("whatever others send is kept, ours to average or not", 3)
def keeps_what_comes() -> list[Patch]:
    return [
        (Exchange, "_has_room", lambda self, peer: True),
        (Exchange, "_settle_ahead", lambda self: self.ahead.clear()),
    ]


# --- states -----------------------------------------------------------------------------------------


@plant("nobody compares a state with what is signed", 5)
def state_digest_not_compared() -> list[Patch]:
    applied, advance = Sync.on_applied, Sync._advance

    def trust(self: Sync, epoch: int, digest: str) -> None:
        with patch.object(type(self.chain), "state_digest_at", lambda chain, at: None):
            applied(self, epoch, digest)

    def go_on(self: Sync, now: float) -> None:
        self.state_digest = self.chain.records[self.state_epoch].body.state_digest
        advance(self, now)

    return [(Sync, "on_applied", trust), (Sync, "_advance", go_on)]


@plant("an update is applied whatever its digest", 3)
def update_unchecked() -> list[Patch]:
    return [(Node, "update_holds", lambda self, result, shards: True)]


@plant("a node begins a round before its state is at the head", 0)
def begins_before_the_head() -> list[Patch]:
    return [(Sync, "at_head", property(lambda self: not self.need_state))]


@plant("a leader that says nothing is waited for", 9)
def leader_never_given_up() -> list[Patch]:
    def wait(self: Round, now: float) -> None:
        if self.state.leader == self.ctx.me and self.state.stage >= Stage.READY:
            self.lead.open_next(now)

    return [(Round, "_watch_leader", wait)]


# --- rolling back -----------------------------------------------------------------------------------


@plant("a replay goes by the updates alone, as if nothing had been rolled back", 11)
def rollback_ignored() -> list[Patch]:
    return [(chain_module.Chain, "rolled", property(lambda self: {}))]


@plant("one node goes back one epoch too far", 30)
def rolls_back_too_far() -> list[Patch]:
    made = Rollbacks.made_of_disk

    def further(self: Rollbacks, node: Node, epoch: int) -> Any:
        found = made(self, node, epoch)
        chain = node.core.chain if node.core is not None else None
        if found is None or chain is None or found[0] != epoch or node.name != "p1":
            return found
        before = node.disk.states.get(chain.head_at(max(0, chain.rolled[epoch] - 1)))
        return found if before is None else (*found[:2], before[1])

    return [(Rollbacks, "made_of_disk", further)]


@plant("what is undone already is undone again, or comes back", 11)
def undone_comes_back() -> list[Patch]:
    return [(members_module, "leads", lambda rolled, at, epoch: True)]


@plant("a rollback is taken whatever head it names", 51)
def rolls_back_to_another_side() -> list[Patch]:
    why = members_module.why_no_rollback

    def any_head(roll: Any, epoch: int, to: int, head: str) -> str | None:
        at = to - epoch + 1
        return why(roll, epoch, to, roll.heads[at] if -len(roll.heads) <= at < 0 else head)

    return [(members_module, "why_no_rollback", any_head)]


@plant("the residual of a contribution that is undone goes into the next", 11)
def residual_kept() -> list[Patch]:
    def keep(self: Node, out: ev.Rollback) -> None:
        residual = self.residual
        Node.do_rollback(self, out)
        self.residual = residual

    return [(shell_module, "EXECUTE", {**EXECUTE, ev.Rollback: keep})]


@plant("members sign for a state that their disks no longer have", 51)
def signs_for_what_is_gone() -> list[Patch]:
    return [(Rollbacks, "leads_to", lambda self, node, chain, epoch: 0 <= epoch <= chain.epoch)]


# --- audits -----------------------------------------------------------------------------------------


@plant("who hears of a record before it has the whole result keeps nothing for its auditors", 1)
def late_keeps_nothing() -> list[Patch]:
    own = drawn_module._own

    def forget(ctx: Any, exchange: Exchange, *args: Any) -> Any:
        return own(ctx, exchange, *args) if exchange.complete else []

    return [(drawn_module, "_own", forget)]


@plant("what a voter looks at follows from its vote, and so is drawn anew in each of a leader's ballots", 0)
def draws_by_ballot() -> list[Patch]:
    vote_for, on_accept, ballots = Acceptor._vote_for, Round.on_accept, [0]

    def vote(self: Acceptor, *args: Any) -> Any:
        accept = vote_for(self, *args)
        return replace(accept, draw=accept.signature)

    def heard(self: Round, peer: str, accept: Any, now: float) -> str | None:
        ballots[0] = accept.ballot
        return on_accept(self, peer, accept, now)

    return [
        (Acceptor, "_vote_for", vote),
        (Round, "on_accept", heard),
        (round_module, "draw_message", lambda head: record_module.accept_message(head, ballots[0])),
        (core_module, "false_draws", lambda record, crypto: ()),
        (sync_module, "false_draws", lambda record, crypto: ()),
    ]


@plant("a value that a member says it had accepted is taken without the signatures of those who made it", 13)
def believes_what_was_accepted() -> list[Patch]:
    return [(Node, "is_proven", lambda self, body, means: True)]


# --- settings ---------------------------------------------------------------------------------------


@plant("contributors keep for auditors what the spec's share draws, whatever records have made of it", 43)
def audit_share_of_the_spec() -> list[Patch]:
    return [(drawn_module, "share_of", lambda roll, rules: rules.audit_share)]


@plant("the record that changes the audited share is itself drawn by the new one", 197)
def audit_share_too_early() -> list[Patch]:
    audit_of = drawn_module.audit_of

    def early(ctx: Any, roll: Any, *args: Any) -> Any:
        return audit_of(ctx, ctx.roll, *args)

    return [(core_module, "audit_of", early)]


@plant("a node waits as it did when it started, whatever records say since", 41)
def waits_of_the_start() -> list[Patch]:
    def enrol(self: Context, roll: Any) -> None:
        self.roll = roll

    return [(Context, "enrol", enrol)]


# --- the gate ---------------------------------------------------------------------------------------


@plant("who refuses a result votes for it all the same", 14)
def refused_and_accepted() -> list[Patch]:
    passes = Gate.passes

    def both(self: Gate, now: float) -> bool:
        return passes(self, now) or self.refused is not None

    return [(Gate, "passes", both)]


# --- what a leader, or whoever would be one, can do alone --------------------------------------------


@plant("every elector's word takes everybody to a higher ballot", 22)
def heeds_every_word() -> list[Patch]:
    return [(Movers, "is_heeded", lambda self, peer: True)]


@plant("a leader that names itself alone is followed", 60)
def one_leader_decides() -> list[Patch]:
    return [(round_module, "is_followed", lambda state, leader, roster, now: True)]


@plant("an electorate is whom the last record names, however few", 1)
def electorate_of_few() -> list[Patch]:
    def named(at: Any, body: Any, roll: Any) -> Any:
        return roll.voters([m.peer for m in body.members]), ()

    return [(place_module, "_next_electorate", named)]
