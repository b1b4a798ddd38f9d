"""Records, heads, electorates and fork choice: the lineage of a run (G6).

State e is what e committed updates made of the genesis. Record e+1 says which contributions made state
e+1 out of state e, and is signed by a quorum of the electorate that record e named. `head_e` is the digest
of record e's *body*; signatures are outside it, so that two leaders who gather different signatures for one
decision still name one head.

A signature covers the head *and the ballot*. Without the ballot, accepts of one value in two ballots could
be added up to a quorum that no ballot ever had (Lamport, "Paxos Made Simple", 2001, section 2.2: a value is
chosen when a majority accepted *one proposal*, number included).

A body carries the digest of state e, the state *before* its update: every member has had a whole epoch to
compute it, so it costs nothing on the critical path, and a member whose arithmetic went astray is found
before it contributes (docs/decisions/001-state-digest.md).

What a record is worth when two chains meet (`Tip`) and who belongs to the run (`Roll`) are functions of the
bodies alone: see docs/decisions/010-members.md.

Standard library only. Text form: canon.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from tapestry.node.protocol.agreement import ALIKE, Agreement, agreement_from, agreement_to_list
from tapestry.node.protocol.canon import EPOCH_MAX as EPOCH_MAX
from tapestry.node.protocol.canon import MEMBERS_MAX as MEMBERS_MAX
from tapestry.node.protocol.canon import WEIGHT_MAX as WEIGHT_MAX
from tapestry.node.protocol.canon import Crypto as Crypto
from tapestry.node.protocol.canon import InvalidRecord as InvalidRecord
from tapestry.node.protocol.canon import canonical as canonical
from tapestry.node.protocol.canon import peer_field
from tapestry.node.protocol.canon import quorum as quorum
from tapestry.node.protocol.members import (
    CHANGES_BYTES_MAX,
    CHANGES_MAX,
    Change,
    Charter,
    Roll,
    change_bytes,
    change_from,
    change_to_list,
    changes_fault,
    charter_of,
    charter_to_dict,
    first_roll,
    pairs_from,
    voice_weights,
)
from tapestry.node.protocol.strict import Malformed, boolean, hexadecimal, integer, sequence, table, text

BALLOT_MAX = 2**53  # out of a liar's reach: see BALLOT_STEP_MAX in round.py
VERSION = 2  # of bodies and of the genesis: 1 knew no members


@dataclass(frozen=True, slots=True)
class Member:
    """One line of a roster. Weight 0 and contribution "" is a voter that contributed nothing."""

    peer: str
    weight: int  # in the mean: what the roll's charter gives it (members.voice_weights)
    contribution: str  # its name, 64 hex digits: commitment.py; "" if none
    life: str = ""  # 32 hex digits, drawn with the disk that its votes are on: see Vote
    tokens: int = 0  # that it says it trained on


@dataclass(frozen=True, slots=True)
class Behind:
    """Who signed the record before, in one ballot: told while that one is not a full electorate's."""

    ballot: int
    signatures: tuple[tuple[str, str], ...]  # (peer, signature), sorted by peer


@dataclass(frozen=True, slots=True)
class Body:
    """What is decided in a round."""

    run_id: str
    epoch: int  # of the state this record makes; >= 1
    prev: str  # head of record epoch - 1
    state_digest: str  # of state epoch - 1
    members: tuple[Member, ...]  # sorted by peer; the electorate of the next round
    result: str  # digest of the encoded mean
    forced: bool = False  # made without a quorum, by the policy of on_quorum_loss
    agreement: Agreement = ALIKE  # of the contributions: a function of them and the weights, as `result` is
    changes: tuple[Change, ...] = ()  # of the roll, in force from the state that this record makes
    behind: Behind | None = None  # who signed record epoch - 1, where that says more than its own standing


@dataclass(frozen=True, slots=True)
class Record:
    """A decided body with the proof that it was decided."""

    body: Body
    head: str
    ballot: int
    signatures: tuple[tuple[str, str], ...]  # (peer, signature), sorted by peer


@dataclass(frozen=True, slots=True)
class Genesis:
    """Where a run begins. Its digest is the run id, and the head of epoch 0."""

    spec: str  # the run spec's canonical text
    founder: str
    state_digest: str  # of state 0
    schema: str  # schema hash of the parameter layout
    params: int  # length of the flat vector
    nonce: str  # 32 hex digits, random: who founds anew, with all else the same, founds another run
    run_id: str
    signature: str
    charter: Charter = Charter()  # noqa: RUF009  frozen
    founders: tuple[str, ...] = ()  # all that belong to the run from the start, the founder among them


class Standing(NamedTuple):
    """What stands behind a record: a function of the bodies up to it, and so of its head."""

    full: int  # records so far that a majority of the last full electorate signed
    electorate: tuple[str, ...]  # the last full one
    roll: Roll  # of that moment: whose voices count behind what came after
    signers: tuple[str, ...]  # of that roll, who signed records since; sorted
    voice: int  # theirs
    since: int  # records since; 0: this one is full


class Tip(NamedTuple):
    """Where a chain ends, as fork choice sees it. A node only ever moves to a tip that beats its own."""

    full: int
    voice: int
    since: int
    head: str

    def beats(self, other: Tip) -> bool:
        """What full electorates signed comes first, then the voices behind what smaller sets made, then its
        length, then the lower head. Every record that is appended makes a tip that beats the one before."""
        mine, theirs = (self.full, self.voice, self.since), (other.full, other.voice, other.since)
        return mine > theirs or (mine == theirs and self.head < other.head)


class Place(NamedTuple):
    """Where a chain is after a record: all that it takes to judge the next one."""

    epoch: int
    head: str
    electorate: tuple[str, ...]
    roll: Roll
    standing: Standing

    @property
    def tip(self) -> Tip:
        s = self.standing
        return Tip(s.full, s.voice, s.since, self.head)


# --- canonical text ---------------------------------------------------------------------------------


def body_to_dict(body: Body) -> dict[str, Any]:
    return {
        "version": VERSION,
        "run_id": body.run_id,
        "epoch": body.epoch,
        "prev": body.prev,
        "state_digest": body.state_digest,
        "members": [member_to_list(m) for m in body.members],
        "result": body.result,
        "forced": body.forced,
        "agreement": agreement_to_list(body.agreement),
        "changes": [change_to_list(c) for c in body.changes],
        "behind": behind_to_list(body.behind),
    }


def body_from_dict(raw: Any) -> Body:
    """Strict. Raises InvalidRecord."""
    try:
        return _body_from(raw)
    except Malformed as error:
        raise InvalidRecord("malformed", str(error)) from None


_BODY_KEYS = (
    *("version", "run_id", "epoch", "prev", "state_digest", "members", "result", "forced", "changes"),
    *("behind", "agreement"),
)


def _body_from(raw: Any) -> Body:
    fields = table(raw, _BODY_KEYS, "body")
    integer(fields["version"], VERSION, VERSION, "version")
    body = Body(
        run_id=sys.intern(hexadecimal(fields["run_id"], (64,), "run_id")),
        epoch=integer(fields["epoch"], 1, EPOCH_MAX, "epoch"),
        prev=sys.intern(hexadecimal(fields["prev"], (64,), "prev")),
        state_digest=hexadecimal(fields["state_digest"], (64,), "state_digest"),
        members=tuple([_member_from(m) for m in sequence(fields["members"], MEMBERS_MAX, "members", 1)]),
        result=hexadecimal(fields["result"], (64,), "result"),
        forced=boolean(fields["forced"], "forced"),
        agreement=agreement_from(fields["agreement"], "agreement"),
        changes=changes_from(fields["changes"]),
        behind=behind_from(fields["behind"]),
    )
    peers = [m.peer for m in body.members]
    if peers != sorted(set(peers)):
        raise Malformed("members must be sorted by peer, each once")
    if not any(m.weight for m in body.members):
        raise Malformed("a record without any contribution")
    return body


def record_to_dict(record: Record) -> dict[str, Any]:
    return {
        "body": body_to_dict(record.body),
        "ballot": record.ballot,
        "signatures": [list(pair) for pair in record.signatures],
    }


def wire_bytes(member_count: int, signature_count: int, changes_bytes: int = CHANGES_BYTES_MAX) -> int:
    """No record with so many takes more in msgpack: `record_to_dict` of the longest values."""
    return 512 + 192 * member_count + 192 * signature_count + changes_bytes


def record_bytes(record: Record) -> int:
    """No less than what `record` takes in msgpack."""
    body = record.body
    signatures = len(record.signatures) + (len(body.behind.signatures) if body.behind is not None else 0)
    return wire_bytes(len(body.members), signatures, sum(change_bytes(c) for c in body.changes))


def changes_from(raw: Any) -> tuple[Change, ...]:
    """Strict. Raises Malformed."""
    return tuple([change_from(c) for c in sequence(raw, CHANGES_MAX, "changes")])


def behind_to_list(behind: Behind | None) -> list[Any]:
    return [] if behind is None else [behind.ballot, [list(pair) for pair in behind.signatures]]


def behind_from(raw: Any) -> Behind | None:
    """Strict. Raises Malformed."""
    values = sequence(raw, 2, "behind")
    if not values:
        return None
    ballot, signatures = sequence(values, 2, "behind", 2)
    pairs = pairs_from(signatures, "behind")
    if not pairs:
        raise Malformed("behind must name somebody")
    return Behind(integer(ballot, 0, BALLOT_MAX, "ballot"), pairs)


def record_from_dict(raw: Any, crypto: Crypto) -> Record:
    """Strict, without the signatures' check (`check_record`). Raises InvalidRecord."""
    try:
        return _record_from(raw, crypto)
    except Malformed as error:
        raise InvalidRecord("malformed", str(error)) from None


def _record_from(raw: Any, crypto: Crypto) -> Record:
    fields = table(raw, ("body", "ballot", "signatures"), "record")
    body = _body_from(fields["body"])
    signatures = pairs_from(fields["signatures"], "signatures")
    ballot = integer(fields["ballot"], 0, BALLOT_MAX, "ballot")
    return Record(body, sys.intern(head_of(body, crypto)), ballot, signatures)


def genesis_to_dict(genesis: Genesis) -> dict[str, Any]:
    return {**_genesis_core(genesis), "signature": genesis.signature}


def genesis_from_dict(raw: Any, crypto: Crypto) -> Genesis:
    """Strict, signature checked. Raises InvalidRecord."""
    try:
        genesis = _genesis_from(raw)
    except Malformed as error:
        raise InvalidRecord("malformed", str(error)) from None
    core = canonical(_genesis_core(genesis))
    if not crypto.verify(genesis.founder, genesis.signature, b"tapestry genesis v2\0" + core):
        raise InvalidRecord("signature", "the genesis is not signed by the founder it names")
    return replace(genesis, run_id=crypto.digest(core))


def _genesis_from(raw: Any) -> Genesis:
    names = ("version", "spec", "founder", "state_digest", "schema", "params", "nonce", "signature")
    fields = table(raw, (*names, "charter", "founders"), "genesis")
    integer(fields["version"], VERSION, VERSION, "version")
    founders = tuple(
        [peer_field(p, "founder") for p in sequence(fields["founders"], MEMBERS_MAX, "founders", 1)]
    )
    if len(set(founders)) < len(founders) or fields["founder"] not in founders:
        raise Malformed("founders must be named once each, the founder among them")
    return Genesis(
        spec=text(fields["spec"], 64 * 1024, "spec", 1),
        founder=text(fields["founder"], 128, "founder", 1),
        state_digest=hexadecimal(fields["state_digest"], (64,), "state_digest"),
        schema=hexadecimal(fields["schema"], (64,), "schema"),
        params=integer(fields["params"], 1, 2**40, "params"),
        nonce=hexadecimal(fields["nonce"], (32,), "nonce"),
        run_id="",
        signature=text(fields["signature"], 256, "signature", 1),
        charter=charter_of(fields["charter"], len(founders)),
        founders=founders,
    )


def found(
    spec: str,
    founder: str,
    state_digest: str,
    schema: str,
    params: int,
    nonce: str,
    crypto: Crypto,
    charter: Charter = Charter(),  # noqa: B008  frozen
    founders: Sequence[str] = (),
) -> Genesis:
    """Make and sign the genesis of a new run. `nonce`: 32 hex digits, drawn for this one. `founders`: who
    belongs to it from the start, beside the founder."""
    named = tuple(dict.fromkeys([founder, *founders]))
    genesis = Genesis(spec, founder, state_digest, schema, params, nonce, "", "", charter, named)
    core = canonical(_genesis_core(genesis))
    signature = crypto.sign(b"tapestry genesis v2\0" + core)
    return replace(genesis, run_id=crypto.digest(core), signature=signature)


def _genesis_core(genesis: Genesis) -> dict[str, Any]:
    return {
        "version": VERSION,
        "charter": charter_to_dict(genesis.charter),
        "founders": list(genesis.founders),
        "spec": genesis.spec,
        "founder": genesis.founder,
        "state_digest": genesis.state_digest,
        "schema": genesis.schema,
        "params": genesis.params,
        "nonce": genesis.nonce,
    }


# --- decisions --------------------------------------------------------------------------------------


def head_of(body: Body, crypto: Crypto) -> str:
    return crypto.digest(_body_text(body))


@lru_cache(maxsize=32)  # one body is asked for by all parts of a round, and in the simulator by all nodes
def _body_text(body: Body) -> bytes:
    return canonical(body_to_dict(body))


def accept_message(head: str, ballot: int) -> bytes:
    """What an ACCEPT signs."""
    return b"tapestry accept v1\0%s\0%d" % (head.encode(), ballot)


def leader_order(electorate: Iterable[str], head: str, crypto: Crypto) -> tuple[str, ...]:
    """Who leads ballot b: entry b mod n. Another order after every head, so nobody leads by right."""
    return tuple(sorted(electorate, key=lambda peer: (crypto.digest(f"{head}|{peer}".encode()), peer)))


def genesis_place(genesis: Genesis) -> Place:
    """Where a run begins: its founder decides the first round, and all founders belong to it."""
    founders = genesis.founders or (genesis.founder,)
    roll = first_roll(genesis.run_id, genesis.charter, founders)
    electorate = (genesis.founder,)
    return Place(0, genesis.run_id, electorate, roll, Standing(0, electorate, roll, (), 0, 0))


def next_place(at: Place, record: Record) -> Place:
    """Where the chain is after a checked record."""
    body = record.body
    roll = at.roll.after(body.epoch, body.changes, [(m.peer, m.weight) for m in body.members])
    electorate = roll.voters([m.peer for m in body.members])
    return Place(body.epoch, record.head, electorate, roll, _next_standing(at, body, electorate, roll))


def _next_standing(at: Place, body: Body, electorate: tuple[str, ...], roll: Roll) -> Standing:
    """What stands behind the state that `body` makes.

    An ordinary record after a full one is full: a majority of that electorate signed it. After a forced one
    it is not, whatever quorum of the island it has, until a body shows that a majority of the last full
    electorate signed one record of this side: then that record is full, and its electorate the last full one.
    """
    before = at.standing
    full, last, last_roll, signers, count = (
        before.full,
        before.electorate,
        before.roll,
        before.signers,
        before.since,
    )
    if count and body.behind is not None:
        told = [p for p, _ in body.behind.signatures]
        if is_majority(told, last):
            full, last, last_roll, signers, count = full + 1, at.electorate, at.roll, (), 0
        else:
            signers = tuple(sorted({*signers, *told}))
    if not count and not body.forced:
        return Standing(full + 1, electorate, roll, (), 0, 0)
    if body.forced:
        signers = tuple(sorted({*signers, *[m.peer for m in body.members if m.peer in last_roll.members]}))
    voice = sum(last_roll.voice_of(p) for p in signers)
    return Standing(full, last, last_roll, signers, voice, count + 1)


def is_majority(peers: Iterable[str], electorate: Sequence[str]) -> bool:
    named = set(peers)
    return sum(p in named for p in electorate) >= quorum(len(electorate))


def waits(at: Place, on_quorum_loss: str) -> bool:
    """Whether nobody may go on after `at` without a quorum. `auto`: where three or more decide, or did."""
    if on_quorum_loss == "auto":
        return len(at.electorate) >= 3 or len(at.standing.electorate) >= 3
    return on_quorum_loss == "wait"


def behind_of(at: Place, record: Record | None) -> Behind | None:
    """What a body after `record` has to tell of it; None if it stands by itself, or nobody's voice is new."""
    if not at.standing.since or record is None:
        return None
    known = at.standing.roll.members
    signatures = tuple([pair for pair in record.signatures if pair[0] in known])
    told = [p for p, _ in signatures]
    if not told or (set(told) <= set(at.standing.signers) and not is_majority(told, at.standing.electorate)):
        return None
    return Behind(record.ballot, signatures)


def body_fault(body: Body, at: Place, max_influence: float, crypto: Crypto) -> str | None:
    """Why `body` cannot follow `at`, whoever signs it, in a word; None if it can."""
    roll = at.roll
    if body.run_id != roll.run_id:
        return "foreign"
    if body.epoch != at.epoch + 1 or body.prev != at.head:
        return "unlinked"
    for member in body.members:
        if not roll.may_contribute(member.peer) or (member.peer not in roll.members and not member.weight):
            return "not_member"
    if not body.forced and not is_majority([m.peer for m in body.members], at.electorate):
        return "electorate"
    contributors = [m for m in body.members if m.contribution]
    weights = voice_weights(roll, [(m.peer, m.tokens) for m in contributors], max_influence)
    if weights != [m.weight for m in contributors]:
        return "weights"
    return _behind_fault(body.behind, at, crypto) or changes_fault(
        roll, body.epoch, body.changes, [m.peer for m in body.members], crypto
    )


def _behind_fault(behind: Behind | None, at: Place, crypto: Crypto) -> str | None:
    if behind is None:
        return None
    if not at.standing.since:
        return "behind"
    message = accept_message(at.head, behind.ballot)
    for peer, signature in behind.signatures:
        if peer not in at.standing.roll.members or not crypto.verify(peer, signature, message):
            return "behind"
    return None


def check_record(
    record: Record, at: Place, crypto: Crypto, max_influence: float = 1.0, on_quorum_loss: str = "continue"
) -> None:
    """Whether `record` follows `at` by a decision of its electorate. Raises InvalidRecord.

    An ordinary record needs one ballot's signatures of a quorum, and its members must hold a quorum too, so
    that electorates overlap from round to round. A forced one needs the signature of every member it names,
    one of the electorate among them, and a run that lets an island go on. Only members sign anything.
    """
    body, electorate = record.body, at.electorate
    fault = body_fault(body, at, max_influence, crypto)
    if fault is not None:
        raise InvalidRecord(fault, f"record {body.epoch} cannot follow {at.head[:12]}: {fault}")
    members = {m.peer for m in body.members}
    signers = {peer for peer, _ in record.signatures}
    if body.forced:
        if waits(at, on_quorum_loss):
            raise InvalidRecord("forced", f"record {body.epoch} is forced, in a run that waits")
        if signers != members:
            raise InvalidRecord("unsigned", f"forced record {body.epoch} lacks a member's signature")
        if members.isdisjoint(electorate):
            raise InvalidRecord("electorate", f"forced record {body.epoch} by strangers to the electorate")
    else:
        count, need = sum(p in signers for p in electorate), quorum(len(electorate))
        if count < need:
            raise InvalidRecord("unsigned", f"record {body.epoch}: {count} signed, need {need}")
    if not signers <= members.union(electorate):
        raise InvalidRecord("unsigned", f"record {body.epoch} is signed by a stranger")
    message = accept_message(record.head, record.ballot)
    for peer, signature in record.signatures:
        if not crypto.verify(peer, signature, message):
            raise InvalidRecord("signature", f"record {body.epoch}: bad signature of {peer}")


class Chain:
    """The records from the genesis to the head, in memory, each checked when it was added."""

    def __init__(self, genesis: Genesis, records: Iterable[Record] = ()) -> None:
        self.genesis = genesis
        self.records: list[Record] = []  # records[i].body.epoch == i + 1
        self.places: list[Place] = [genesis_place(genesis)]  # places[e]: after record e
        self.tokens = 0  # that members say they trained on, up to the head
        for record in records:  # from our own disk: checked before they were written
            self.append(record)

    @property
    def epoch(self) -> int:
        return len(self.records)

    @property
    def head(self) -> str:
        return self.records[-1].head if self.records else self.genesis.run_id

    @property
    def place(self) -> Place:
        return self.places[-1]

    @property
    def tip(self) -> Tip:
        return self.places[-1].tip

    @property
    def roll(self) -> Roll:
        """Who belongs to the run now."""
        return self.places[-1].roll

    def head_at(self, epoch: int) -> str:
        """The head of `epoch`; "" where we have none, so that it equals nobody's."""
        if not 0 <= epoch <= len(self.records):
            return ""
        return self.records[epoch - 1].head if epoch else self.genesis.run_id

    def electorate_at(self, epoch: int) -> tuple[str, ...]:
        return self.places[epoch].electorate

    def state_digest_at(self, epoch: int) -> str | None:
        """The digest of state `epoch` as signed: by the genesis or by the record after. None at the head."""
        if epoch == 0:
            return self.genesis.state_digest
        return self.records[epoch].body.state_digest if epoch < self.epoch else None

    def append(self, record: Record) -> None:
        """A checked record. Our bug if it does not follow."""
        assert record.body.epoch == self.epoch + 1 and record.body.prev == self.head
        self.places.append(next_place(self.places[-1], record))
        self.records.append(record)
        self.tokens += tokens_of((record,))

    def switch(self, epoch: int, records: Sequence[Record]) -> tuple[Record, ...]:
        """Leave a fork: checked records take the place of those after `epoch`. Returns those."""
        dropped = tuple(self.records[epoch:])
        self.tokens -= tokens_of(dropped)
        del self.records[epoch:], self.places[epoch + 1 :]
        for record in records:
            self.append(record)
        return dropped

    def after(self, epoch: int, count_max: int) -> tuple[Record, ...]:
        return tuple(self.records[epoch : epoch + count_max])

    def settings_of(self, record: Record) -> Mapping[str, float]:
        """What records before it have changed of the spec: it is a record of this chain."""
        return self.places[record.body.epoch - 1].roll.settings

    def check(
        self,
        record: Record,
        crypto: Crypto,
        max_influence: float = 1.0,
        on_quorum_loss: str = "continue",
    ) -> None:
        """Whether `record` may be appended. Raises InvalidRecord."""
        check_record(record, self.place, crypto, max_influence, on_quorum_loss)


def tokens_of(records: Iterable[Record]) -> int:
    """That their members say they trained on."""
    return sum(m.tokens for r in records for m in r.body.members)


# --- fields -----------------------------------------------------------------------------------------


def member_from(raw: Any) -> Member:
    """Strict. Raises InvalidRecord."""
    try:
        return _member_from(raw)
    except Malformed as error:
        raise InvalidRecord("malformed", str(error)) from None


def _member_from(raw: Any) -> Member:
    peer, weight, contribution, life, tokens = sequence(raw, 5, "a member", 5)
    integer(weight, 0, WEIGHT_MAX, "weight")
    integer(tokens, 0, WEIGHT_MAX, "tokens")
    if (weight == 0) != (contribution == ""):
        raise Malformed("a member has weight and contribution or neither")
    hexadecimal(contribution, (0, 64), "contribution")
    hexadecimal(life, (0, 32), "life")
    return Member(peer_field(peer, "peer"), weight, contribution, sys.intern(life), tokens)


def member_to_list(member: Member) -> list[Any]:
    return [member.peer, member.weight, member.contribution, member.life, member.tokens]
