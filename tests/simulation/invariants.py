"""What must hold after every event, by the numbers of the guarantees.

G1 one result: a head has one state digest, everywhere.
G2 all or nothing: every shard of an update averages exactly the members of its record, with their weights;
   a contribution is in at most one record of a chain.
G3 no silent fallback: a state advances only by the update that its record names.
mean: every shard scales each contribution down as `clipped` says, by the sizes of what was averaged. So 1e30
   counts for no more than 1.5 times the median, whoever reduced it and after whatever loss.
G4/consensus: without forced records there is one record for an epoch after a head; a vote never goes back.
G8 members decide: only members, by signed changes, are in a record, and only their signatures count; nobody
   is named as a voter, or on another disk, without its own word; what a majority of the last full electorate
   signed is left for nothing less.
audit: whoever signed a wrong mean that is looked at is found, and nobody else is. What is looked at follows
   from the head and the signers' keys, whatever the ballot.
G9 voice is policy: what a contribution weighs follows from the roll.
rollback: a record that carries one makes a state that was there before, as long ago as the rules allow and
   not undone since; no other record does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from simulation.shell import NORM_MAX, Mean, size_of
from simulation.voices import agree, weights_of

from tapestry.node.protocol.agreement import agreement
from tapestry.node.protocol.audit import Order, mean_message
from tapestry.node.protocol.core import Core
from tapestry.node.protocol.events import PersistResult, Vote
from tapestry.node.protocol.members import ROLLBACK_EPOCHS_MAX, UNIT, Change, Charter, change_message
from tapestry.node.protocol.messages import Accept, Message, Ready, Roster
from tapestry.node.protocol.record import Body, Genesis, Record, accept_message
from tapestry.node.protocol.sync import BRANCHES_MAX

if TYPE_CHECKING:
    from simulation.shell import Node
    from simulation.world import World


def majority(count: int) -> int:
    """The checker's own arithmetic, so that a bug in the protocol's is seen."""
    return count // 2 + 1


def clipped(sizes: list[float], weights: list[int]) -> list[float]:
    """The checker's own arithmetic for how much each contribution is scaled down."""
    if len(sizes) < 3:
        return [1.0] * len(sizes)
    reached = 0
    for size, weight in sorted(zip(sizes, weights)):  # noqa: B905
        reached += weight
        if reached * 2 >= sum(weights):
            return [min(1.0, NORM_MAX * size / other) for other in sizes]
    return []


OF_RULES = {  # settings that a round goes by, and where the protocol has them
    "gate.margin": "gate_margin",
    "round.straggler_wait_s": "straggler_wait_s",
    "round.closing_grace_s": "closing_grace_s",
    "round.commit_grace_s": "commit_grace_s",
    "round.stall_s": "stall_s",
    "round.exchange_max_s": "exchange_max_s",
    "round.quorum_loss_s": "quorum_loss_s",
    "round.wait_max_s": "wait_max_s",
}


class Invariants:
    def __init__(self, world: World) -> None:
        self.world = world
        self.state_of: dict[str, str] = {}  # head -> state digest
        self.next_of: dict[str, str] = {}  # head -> head of the ordinary record after it
        self.table_max = 4 * world.rules.peers_max
        self.at = {world.genesis.run_id: Ground.of_genesis(world.genesis)}  # head -> what is known there
        # node -> standing and head of the best it said READY at
        self.furthest: dict[str, tuple[tuple[int, int, int], str]] = {}
        self.promised: dict[tuple[str, str], int] = {}  # (node, head) -> highest ballot it said READY in
        self.accepted: dict[tuple[str, str], int] = {}  # (node, head) -> highest ballot it wrote a vote in
        self.forgotten: set[tuple[str, str]] = (
            set()
        )  # (node, head): it promised there, and lost its disk since
        self.proposed: dict[tuple[str, str, int], Roster] = {}  # what was in whose ballot
        # A leader that tells members different things may cause a fork, but never two states under a head.
        # So may one that says it had accepted what it signed as a reducer: the decision may be another.
        inventors = world.inventors
        splits = world.faults.split_roster > 0 or bool(world.splitters.name)
        self.liar_leads = splits or bool(inventors.name and inventors.signs)
        # who, in which life and round, and the shards that rosters of it made its to average
        self.averages: dict[tuple[str, int, str], set[int]] = {}
        self.verified: Record | None = None  # whose signatures were good: all nodes append one object
        self.contributions: dict[str, tuple[Body, set[str]]] = {}  # head -> those of its record

    def fail(self, node: Node, text: str) -> NoReturn:
        self.world.fail(node.name, text)

    def on_state(self, node: Node, head: str, state: str) -> None:
        back_to = self.at[head].back_to
        if back_to and state != self.state_of.get(back_to):
            self.fail(node, f"rollback: the state at {head[:8]} is not that of {back_to[:8]}")
        if self.state_of.setdefault(head, state) != state:
            self.fail(node, f"G1: two states under head {head[:8]}")

    def on_train(self, node: Node, epoch: int) -> None:
        """G1, G3: what is trained from is the state of the head. Wrong arithmetic is found a round later."""
        head, disk = node.disk.state_head, node.disk
        if head != node.astray and disk.states[head][1] != self.state_of.get(head):
            self.fail(node, f"G1: trains from another state than that of head {head[:8]}")

    def on_send(self, node: Node, message: Message) -> None:
        """Promises and votes lie on disk before they are sent (section 5)."""
        self.world.gates.on_send(node, message)
        if type(message) is Ready:
            vote = node.disk.vote
            if vote is None or vote.head != message.head or vote.promised < message.ballot:
                self.fail(node, f"durability: a promise of ballot {message.ballot} is not on disk")
            self._on_ready(node, message)
        elif type(message) is Accept:
            vote = node.disk.vote
            if vote is None or vote.promised < message.ballot or message.body_head not in node.disk.updates:
                self.fail(
                    node, f"durability: the vote in ballot {message.ballot} or its result is not on disk"
                )
            core = node.core
            body = core.round.state.accepted_body if core is not None and core.round is not None else None
            if body is not None and not body.forced:
                if vote.accepted != body:
                    self.fail(node, f"durability: the vote in ballot {message.ballot} is not on disk")
                self._on_accept(node, body.prev, message.ballot)
        elif type(message) is Roster:
            key = (node.name, message.head, message.ballot)
            if self.proposed.setdefault(key, message) != message:
                self.fail(node, f"consensus: two rosters in ballot {message.ballot}")

    def _on_ready(self, node: Node, ready: Ready) -> None:
        """What was once said is not forgotten, whatever becomes of the disk: by an elector, that is."""
        if node.name not in self.electorate(node.disk.records):
            return
        key = (node.name, ready.head)
        if key in self.forgotten and not self.world.backups.is_unheard(node):
            self.fail(node, "consensus: it votes in a round in which it voted before its disk was lost")
        tip = (self.at[ready.head].standing, ready.head)
        standing, head = self.furthest.get(node.name, tip)
        if tip[0] < standing or (tip[0] == standing and tip[1] > head):
            self.fail(node, f"consensus: READY at {tip}, after one at {head[:8]} of {standing}")
        self.furthest[node.name] = tip
        if ready.ballot < self.promised.get(key, 0):
            self.fail(node, f"consensus: READY in ballot {ready.ballot}, {self.promised[key]} was promised")
        self.promised[key] = ready.ballot
        if ready.accepted_ballot < self.accepted.get(key, -1):
            self.fail(node, "consensus: what was accepted is kept from the next leader")

    def on_disk_lost(self, node: Node) -> None:
        mine = {key for key in self.promised if key[0] == node.name}
        self.forgotten |= mine
        self.promised = {key: b for key, b in self.promised.items() if key not in mine}
        self.accepted = {key: b for key, b in self.accepted.items() if key[0] != node.name}
        self.proposed = {key: v for key, v in self.proposed.items() if key[0] != node.name}
        self.furthest.pop(node.name, None)

    def on_vote_written(self, node: Node, vote: Vote) -> None:
        key = (node.name, vote.head)
        self.accepted[key] = max(vote.accepted_ballot, self.accepted.get(key, -1))

    def _on_accept(self, node: Node, head: str, ballot: int) -> None:
        key = (node.name, head)
        if ballot < self.promised.get(key, 0) and node.name in self.electorate(node.disk.records):
            self.fail(node, f"consensus: ACCEPT in ballot {ballot}, {self.promised[key]} was promised")

    def on_record(self, node: Node, record: Record) -> None:
        body = record.body
        ground = self.at[body.prev]
        if record.head not in self.at:
            self._check_members(node, record, ground)
            self.at[record.head] = ground.after(body, record.head)
        alone = record.head in self.world.colluders.made  # how long such a fork is says nothing of the run
        if not alone:
            self.world.furthest = max(self.world.furthest, body.epoch)
        if self.world.inventors.is_false(record.head):
            self.fail(node, f"G2: record {body.epoch} has a result that nobody made")
        self.world.autocrats.on_record(record)
        policy = self.world.rules.on_quorum_loss
        three = max(len(ground.electorate), len(ground.last.electorate)) >= 3
        if body.forced and (policy == "wait" or (policy == "auto" and three)):
            self.fail(node, "policy: a forced record in a run that waits")
        if body.state_digest != self.state_of.get(body.prev, body.state_digest):
            self.fail(node, f"G1: record {body.epoch} names another state than that of its head")
        if not body.forced and not self.liar_leads and not alone:
            known = self.next_of.setdefault(body.prev, record.head)
            if known != record.head:
                self.fail(node, f"consensus: two decisions after {body.prev[:8]}: epoch {body.epoch}")
        records = node.disk.records
        electorate = ground.electorate
        if not body.forced:
            signed = {peer for peer, _ in record.signatures} | self._left(node, record, electorate)
            if sum(p in signed for p in electorate) < majority(len(electorate)):
                self.fail(node, "consensus: a record without a quorum's signatures")
        if record is not self.verified:
            message = accept_message(record.head, record.ballot)
            if not all(node.crypto.verify(peer, signature, message) for peer, signature in record.signatures):
                self.fail(node, f"G6: record {body.epoch} bears a false signature")
            self._check_draws(node, record)
            self.verified = record
        mine = {m.contribution for m in body.members if m.weight}
        for earlier in records[-12:-1]:
            if not mine.isdisjoint(self._contributions(earlier)):
                self.fail(node, f"G2: a contribution in records {earlier.body.epoch} and {body.epoch}")

    def _check_draws(self, node: Node, record: Record) -> None:
        """Each signer's own, by the head alone: so it is the same in whichever ballot that was decided."""
        if [p for p, _ in record.draws] != [p for p, _ in record.signatures]:
            self.fail(node, f"audit: record {record.body.epoch} has not one draw for each signature")
        message = b"tapestry draw v1\0" + record.head.encode()
        if not all(node.crypto.verify(p, draw, message) for p, draw in record.draws):
            self.fail(node, f"audit: record {record.body.epoch} bears a false draw")

    def _left(self, node: Node, record: Record, electorate: tuple[str, ...]) -> set[str]:
        """Who had left the round, of two electors, as the record bears it."""
        if record.handover is None:
            return set()
        peer, head, signature = record.handover
        message = b"tapestry leave v1\0" + head.encode()
        here = {record.body.prev, *[r.body.prev for r in node.disk.records if r.head == record.body.prev]}
        if len(electorate) != 2 or head not in here or not node.crypto.verify(peer, signature, message):
            self.fail(
                node, f"handover: record {record.body.epoch} bears a leave of {peer} that does not count"
            )
        self.world.handovers += 1
        return {peer}

    def _check_members(self, node: Node, record: Record, ground: Ground) -> None:
        """G8, G9: who is in a record, who signed its changes, and what everybody weighs."""
        body, members = record.body, ground.members
        strangers = [m for m in body.members if m.peer not in members]
        if strangers and (
            not ground.is_open or any(not m.weight or not ground.is_newcomer(m.peer) for m in strangers)
        ):
            self.fail(node, f"G8: record {body.epoch} names {strangers[0].peer}, who is no member")
        if not {p for p, _ in record.signatures} <= {*(m.peer for m in body.members), *ground.electorate}:
            self.fail(node, f"G8: record {body.epoch} bears a stranger's signature")
        here = ground.copy()  # as the changes before it in this record leave it
        for change in body.changes:
            message = change_message(self.world.genesis.run_id, change)
            if not all(node.crypto.verify(p, s, message) for p, s in change.signatures):
                self.fail(node, f"G8: record {body.epoch} bears a change with a false signature")
            if not ground.allows(change, here):
                self.fail(node, f"G8: record {body.epoch} bears a change that too few asked for")
            here.apply(change)
        self._check_seats(node, body, ground)
        self._check_behind(node, record)
        for fault in ground.back_faults(body):
            self.fail(node, f"rollback: record {body.epoch} {fault}")
        named = [m for m in body.members if m.weight]
        voices = [(ground.voice_of(m.peer, m.tokens), m.peer in members) for m in named]
        influence = ground.influence or self.world.rules.max_influence
        expected = weights_of(voices, influence, ground.open_share)
        if not agree([m.weight for m in named], expected):
            weights = {m.peer: m.weight for m in named}
            self.fail(node, f"G9: {weights}, not {expected}, of {voices} at {influence}, {ground.open_share}")

    def _check_seats(self, node: Node, body: Body, ground: Ground) -> None:
        """G8: who is named has said so, and on which disk its votes lie: by its own signature, but for who
        contributes and is named on that disk already; or, of a forced record, by that of the record."""
        for m in body.members:
            if body.forced or (m.weight and (m.peer, m.life) in ground.named):
                if m.seat:
                    self.fail(node, f"G8: record {body.epoch} bears a word of {m.peer} that it needs not")
                continue
            word = b"tapestry seat v1\0" + body.prev.encode() + b"\0" + m.life.encode()
            if not node.crypto.verify(m.peer, m.seat, word):
                self.fail(node, f"G8: record {body.epoch} names {m.peer} on {m.life[:8]} without its word")

    def _check_behind(self, node: Node, record: Record) -> None:
        """G6: who is said to have signed the record before has, and of a forced one each member has."""
        body = record.body
        if body.behind is not None:
            message = accept_message(body.prev, body.behind.ballot)
            false = [p for p, s in body.behind.signatures if not node.crypto.verify(p, s, message)]
            if false:
                self.fail(node, f"G6: record {body.epoch} says that {false[0]} stands behind the one before")
        if body.forced and {m.peer for m in body.members} != {p for p, _ in record.signatures}:
            self.fail(node, f"G6: forced record {body.epoch} is not signed by all whom it names")

    def _contributions(self, record: Record) -> set[str]:
        body = record.body
        known = self.contributions.get(record.head)
        if known is None or known[0] is not body:
            known = self.contributions[record.head] = (body, {m.contribution for m in body.members})
        return known[1]

    def on_apply(self, node: Node, record: Record) -> tuple[int, tuple[object, ...]]:
        """Returns the update: (epoch, shards)."""
        body, disk = record.body, node.disk
        if self.at[record.head].back_to:
            self.fail(node, f"rollback: the update of record {body.epoch} is applied")
        if disk.state_head != body.prev:
            self.fail(node, f"G3: record {body.epoch} applied to another state")
        if disk.states[body.prev][1] != self.state_of.get(body.prev):
            self.fail(node, f"G1: record {body.epoch} applied to a state that is not its head's")
        epoch, shards = disk.updates[record.head]
        if not self.liar_leads:
            self._check_mean(node, record, shards)
        return epoch, shards

    def _check_mean(self, node: Node, record: Record, shards: tuple[object, ...]) -> None:
        expected = [(m.peer, m.contribution, m.weight) for m in record.body.members if m.weight]
        sizes = [size_of(contribution) for _, contribution, _ in expected]
        scales = clipped(sizes, [weight for _, _, weight in expected])
        if len(shards) != self.world.rules.shard_count:
            self.fail(node, f"G2: {len(shards)} shards applied")
        for index, blob in enumerate(shards):
            if isinstance(blob, str):
                self.fail(node, f"G1: shard {index} is not what the record names")
            assert isinstance(blob, Mean)
            got = blob.averaged
            if blob.shard != index or got != expected:
                self.fail(node, f"G2: shard {index} averages {got}, the record says {expected}")
            if blob.scales != scales:
                self.fail(node, f"mean: shard {index} scales by {blob.scales}, not by {scales}")
        sums = [blob.sums for blob in shards if isinstance(blob, Mean)]
        if record.body.agreement != agreement(sums, [weight for _, _, weight in expected]):
            self.fail(node, f"record {record.body.epoch} says another agreement than its shards")

    def on_result(self, node: Node, out: PersistResult) -> None:
        """What it has of others it can prove to be theirs: else nobody could have it from this node."""
        round_ = node.core.round if node.core is not None else None
        if round_ is None:
            return
        exchange = round_.exchange
        for shard, one in enumerate(out.means):
            message = mean_message(exchange.head, shard, one.digest, exchange.averaged)
            if not node.crypto.verify(one.reducer, one.signature, message):
                self.fail(node, f"G2: shard {shard} of its result is not signed by {one.reducer}")

    def on_audit(self, node: Node, order: Order, found: bool) -> None:
        """Every lie that is looked at is found, and nobody else is accused."""
        lied = order.digest in self.world.lied
        if found != lied:
            self.fail(
                node, f"audit: shard {order.shard} of {order.reducer} {'was' if lied else 'was no'} lie"
            )
        if lied and order.reducer not in (self.world.liar, self.world.inventors.name):
            self.fail(node, f"audit: {order.reducer} signed what another made")
        self.world.audits[lied] = self.world.audits.get(lied, 0) + 1

    def on_vote(self, node: Node, before: Vote | None, after: Vote) -> None:
        if before is None or (before.epoch, before.head) != (after.epoch, after.head):
            return
        if after.promised < before.promised or after.accepted_ballot < before.accepted_ballot:
            self.fail(node, f"a vote went back: {before} -> {after}")
        if after.accepted_ballot == before.accepted_ballot and after.accepted != before.accepted:
            self.fail(node, f"two values accepted in ballot {after.accepted_ballot}")
        if after.accepted is not None and after.accepted.forced:
            self.fail(node, "consensus: a forced value displaces what a quorum may have chosen")

    def after_event(self, node: Node, core: Core) -> None:
        if node.left is not None:
            self._on_fork_left(node, *node.left)
            node.left = None
        limit, round_ = self.table_max, core.round
        sync = core.sync
        if len(core.ctx.peers) > limit or len(sync.asked_at) > limit or len(sync.branches) > BRANCHES_MAX:
            self.fail(node, "G7: a table outgrew its limit")
        if round_ is None:
            return
        state = round_.state
        if len(state.exchange.inputs) > limit or len(state.accepts) > limit or len(state.ready) > limit:
            self.fail(node, "G7: a round's table outgrew its limit")
        if self.world.floods.names:
            self._check_held(node, core)
        if self.world.splitters.name:
            self.world.splitters.after_event(node, state)
        records = core.sync.chain.records
        if state.epoch != len(records) or (records and state.head != records[-1].head):
            self.fail(node, "a round that does not start from the head")
        if state is not node.checked:
            node.checked = state
            if state.electorate != self.electorate(records):
                self.fail(node, "an electorate changed without a record")
            self._check_rules(node, core, self.at[state.head])

    def _check_rules(self, node: Node, core: Core, ground: Ground) -> None:
        """G8: whoever is in a round waits and judges as the records up to its head say, and the spec."""
        given, rules = self.world.rules, core.ctx.rules
        if core.ctx.pace.rules != rules:
            self.fail(node, "settings: some waits are of other rules")
        for key, field in OF_RULES.items():
            expected = getattr(given, field)
            if key in ground.settings:
                word = ground.settings[key]
                expected = None if word == "auto" or (word == "0" and field == "gate_margin") else float(word)
            if getattr(rules, field) != expected:
                text = f"{key} is {getattr(rules, field)} in the round of epoch {ground.line[-1][0]}"
                self.fail(node, f"settings: {text}, records say {expected}")

    def audit_share(self, record: Record) -> float:
        """Of the shards of this record: as it was in force when its round began."""
        set_to = self.at[record.body.prev].settings.get("audit.share")
        return self.world.rules.audit_share if set_to is None else float(set_to)

    def _check_held(self, node: Node, core: Core) -> None:
        """G7: of what others send unasked it holds a contribution's worth, or what all electors send."""
        round_ = core.round
        assert round_ is not None
        exchange, count = round_.exchange, self.world.rules.shard_count
        key, roster = (node.name, node.life, round_.head), exchange.roster
        mine = self.averages.setdefault(key, set())
        if roster is not None:
            names = [roster.members[index].peer for index in roster.reducers]
            mine.update(shard for shard, name in enumerate(names) if name == node.name)
        others = [e for p, e in exchange.inputs.items() if p != node.name]
        held = sum(shard not in mine for entry in others for shard in entry.blobs)
        electors = len(round_.electorate)
        if held > max(count, electors * -(-count // min(count, electors))):
            self.fail(node, f"G7: {held} shards held that are not its to average, of {count}")

    def _on_fork_left(self, node: Node, common: int, ours: list[Record]) -> None:
        """Section 5: what a majority of the last full electorate signed is left for nothing less; of islands,
        voices, then length, then the lower head."""
        theirs = node.disk.records[common:]
        if not theirs:
            self._on_gone_back(node, ours)
            return
        left, taken = self.at[ours[-1].head].standing, self.at[theirs[-1].head].standing
        if taken < left or (taken == left and theirs[-1].head > ours[-1].head):
            self.fail(node, f"fork choice: left {left} since epoch {common} for {taken}")
        # The same once more, by signatures alone: a fork of who is no majority beats no record of one.
        ground, first = self.at[ours[0].body.prev], ours[0]
        electors = ground.electorate
        if ground.since or first.body.forced:
            return
        behind = {p for r in theirs for p, _ in r.signatures}
        behind.update(r.handover.peer for r in theirs if r.handover is not None)
        if sum(p in behind for p in electors) < majority(len(electors)):
            self.fail(
                node,
                f"fork choice: left record {first.body.epoch}, which most of {electors} signed, for {behind}",
            )

    def _on_gone_back(self, node: Node, left: list[Record]) -> None:
        """To the record before `left`: only from what smaller sets made, and nobody gave this node."""
        if any(not self.at[record.head].since for record in left):
            self.fail(node, f"went back from record {left[0].body.epoch}, after which a majority decided")
        if node.disk.state_head != left[0].body.prev:
            self.fail(node, f"went back from record {left[0].body.epoch}, whose state it has")

    def electorate(self, records: Sequence[Record]) -> tuple[str, ...]:
        return self.at[records[-1].head if records else self.world.genesis.run_id].electorate


def rollbacks_in(body: Body) -> list[tuple[int, str]]:
    """Epoch, and how its head begins, of each in the record."""
    words = [change.value.split(" ") for change in body.changes if change.kind == "rollback"]
    return [(int(word[0]), word[1]) for word in words]


class Ground:
    """What is known at a record, by the checker's own arithmetic."""

    def __init__(
        self,
        members: dict[str, int],  # peer -> voice of fixed shares
        council: list[str],
        electorate: tuple[str, ...],
        charter: Charter,
    ) -> None:
        self.members = members
        self.council = council
        self.electorate = electorate
        self.voice = charter.voice
        self.rule = charter.admit_by
        self.is_open = charter.admission == "open"
        self.votes_after = charter.open_votes_after
        self.open_share = charter.open_share / 10**6
        self.influence = 0.0  # that a record has set; 0: the spec's
        self.settings: dict[str, str] = {}  # all that records have set, as they say it
        self.gone: dict[str, int] = {}  # electors -> records in a row that do not name them
        self.named: frozenset[tuple[str, str]] = frozenset()  # peers, and the disk that each has
        self.counted: dict[str, int] = {}
        self.removed: frozenset[str] = frozenset()
        self.invites: dict[str, int] = {}  # key -> how often it may still be used
        self.full, self.since = 0, 0
        self.last = self  # the last one that a full electorate signed
        self.behind: set[str] = set()
        self.line: tuple[tuple[int, str], ...] = ()  # epochs and heads of the states that this one is made of
        self.counting: tuple[frozenset[str], ...] = ()  # the contributions in each of them
        self.undone: frozenset[str] = frozenset()  # those to states that are not of it any more
        self.back_to = ""  # the head whose state this record brings back

    @classmethod
    def of_genesis(cls, genesis: Genesis) -> Ground:
        members = dict.fromkeys(genesis.founders, 1)
        ground = cls(members, list(genesis.founders), (genesis.founder,), genesis.charter)
        ground.line, ground.counting = ((0, genesis.run_id),), (frozenset(),)
        return ground

    def back_faults(self, body: Body) -> list[str]:
        """What is wrong with the rollbacks in the record after this one."""
        line, faults = self.line, []
        for to, head in rollbacks_in(body):
            here = [at for at, (epoch, known) in enumerate(line) if epoch == to and known.startswith(head)]
            if not here:
                faults.append(f"goes back to {to}, which is not on the line")
            elif here[0] == len(line) - 1 or to < body.epoch - 1 - ROLLBACK_EPOCHS_MAX:
                faults.append(f"goes back to {to}: too far, or nowhere")
            else:
                line = line[: here[0] + 1]
        return faults

    def _line_on(self, new: Ground, body: Body, head: str) -> None:
        cut = len(self.line)
        for to, _ in rollbacks_in(body):
            cut = next((at + 1 for at, (epoch, _) in enumerate(self.line) if epoch == to), cut)
            new.back_to = self.line[cut - 1][1]
        named = frozenset(m.contribution for m in body.members if m.weight)
        new.line = (*self.line[:cut], (body.epoch, head))
        new.counting = (*self.counting[:cut], frozenset() if new.back_to else named)
        new.undone = self.undone.union(*self.counting[cut:], named if new.back_to else ())

    def voice_of(self, peer: str, tokens: int) -> int:
        """What its contribution would weigh if nothing were cut."""
        if self.voice == "tokens":
            return tokens
        return UNIT * (self.members.get(peer, 1) if self.voice == "fixed" else 1)

    @property
    def standing(self) -> tuple[int, int, int]:
        last = self.last
        voice = sum((last.members[p] if last.voice == "fixed" else 1) for p in self.behind)
        return self.full, voice, self.since

    def is_newcomer(self, peer: str) -> bool:
        return peer not in self.members and peer not in self.removed and peer not in self.invites

    def allows(self, change: Change, here: Ground) -> bool:
        """By the rules before the record. `here`: as the changes before this one in it leave things."""
        signers = [peer for peer, _ in change.signatures]
        if change.kind == "remove" and change.peer in signers:
            return True
        good = [p for p in signers if self.invites.get(p, 0) and here.invites.get(p, 0)]
        if change.kind == "admit" and good and change.peer not in here.removed:
            return True
        if self.rule == "majority":
            return sum(p in self.members for p in signers) >= majority(len(self.members))
        need = 1 if self.rule == "founder" else int(self.rule[8:].split("/")[0])
        return sum(p in self.council for p in signers) >= min(need, len(self.council)) > 0

    def after(self, body: Body, head: str) -> Ground:
        new = self.copy()
        self._line_on(new, body, head)
        new.named = frozenset([(m.peer, m.life) for m in body.members])
        for change in body.changes:
            new.apply(change)
        if new.is_open:
            new._count([m.peer for m in body.members if m.weight and new.is_newcomer(m.peer)])
        named = [m.peer for m in body.members if m.peer in new.members]
        new.gone = {p: self.gone.get(p, 0) + 1 for p in self.electorate if p not in named}
        stay = sorted(p for p, records in new.gone.items() if p in new.members and records <= 64)
        room = 0 if body.forced or len(self.electorate) < 3 else max(0, 3 - len(named))
        new.electorate = tuple(sorted([*named, *stay[:room]]))
        new.named = new.named | {(p, life) for p, life in self.named if p in stay[:room]}
        self._stand(new, body)
        return new

    def copy(self) -> Ground:
        """Without where it stands, which is told anew."""
        new = Ground(dict(self.members), list(self.council), self.electorate, Charter(voice=self.voice))
        new.influence, new.settings = self.influence, dict(self.settings)
        new.rule, new.is_open, new.votes_after = self.rule, self.is_open, self.votes_after
        new.open_share, new.counted, new.removed = self.open_share, dict(self.counted), self.removed
        new.invites = dict(self.invites)
        return new

    def apply(self, change: Change) -> None:
        kind, peer, value = change.kind, change.peer, change.value
        if kind == "admit":
            self.members[peer] = 1
            self.removed = self.removed - {peer}
            self.counted.pop(peer, None)
            for key, _ in change.signatures:
                if key in self.invites:
                    self._use(key)
        elif kind == "invite":
            self.invites[peer] = int(value.split(" ")[0])
        elif kind == "remove" and peer in self.invites:
            del self.invites[peer]
        elif kind == "remove":
            del self.members[peer]
            self.removed = self.removed | {peer}
            self.council = [p for p in self.council if p != peer]
        elif kind == "rekey":
            self.members[value] = self.members.pop(peer)
            self.council = [value if p == peer else p for p in self.council]
            self.removed = (self.removed | {peer}) - {value}
            self.counted.pop(value, None)
        elif kind == "voice":
            self.members[peer] = int(value)
        elif kind == "set":
            key, word = value.split(" ")
            self.settings[key] = word
            if key == "round.max_influence":
                self.influence = float(word)
        elif kind == "charter":
            rule, word = value.split(" ", 1)
            self._reform(rule, word)

    def _use(self, key: str) -> None:
        self.invites[key] -= 1
        if not self.invites[key]:
            del self.invites[key]

    def _reform(self, rule: str, word: str) -> None:
        if rule == "admission":
            self.is_open = word == "open"
        elif rule == "admit_by":
            self.rule = word
        elif rule == "voice":
            self.voice = word
        elif rule == "open_share":
            self.open_share = int(word) / 10**6
        else:
            self.votes_after = int(word)

    def _count(self, newcomers: list[str]) -> None:
        for peer in newcomers:
            self.counted[peer] = self.counted.get(peer, 0) + 1
            if self.votes_after and self.counted[peer] >= self.votes_after:
                self.members[peer] = 1
                del self.counted[peer]

    def _stand(self, new: Ground, body: Body) -> None:
        last, behind, full, since = self.last, set(self.behind), self.full, self.since
        told = {p for p, _ in body.behind.signatures} if body.behind is not None else set()
        if sum(p in told for p in last.electorate) >= majority(len(last.electorate)):
            last, behind, full, since = self, set(), full + 1, 0
        else:
            behind |= told
        if not since and not body.forced:
            new.full, new.since, new.behind, new.last = full + 1, 0, set(), new
            return
        if body.forced:
            behind |= {m.peer for m in body.members if m.peer in last.members}
        new.full, new.since, new.behind, new.last = full, since + 1, behind, last
