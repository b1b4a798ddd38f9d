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

Standard library only. Text form is canonical JSON: sorted keys, no white space, integers and strings.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, NamedTuple, Protocol

from tapestry.node.protocol.agreement import ALIKE, Agreement, agreement_from, agreement_to_list
from tapestry.node.protocol.strict import Malformed, boolean, hexadecimal, integer, sequence, table, text

MEMBERS_MAX = 1024  # G7; a run spec's limits.max_peers is smaller
WEIGHT_MAX = 2**53  # tokens; exact in JSON, in float64 and in msgpack
EPOCH_MAX = 2**53
BALLOT_MAX = 2**53  # out of a liar's reach: see BALLOT_STEP_MAX in round.py


class Crypto(Protocol):
    """What the chain needs of cryptography; the simulator brings a cheap one."""

    def digest(self, data: bytes) -> str:
        """64 hex digits (blake3)."""
        ...

    def sign(self, message: bytes) -> str:
        """This node's signature, in hex (Ed25519)."""
        ...

    def verify(self, peer: str, signature: str, message: bytes) -> bool:
        """Whether `signature` over `message` is by `peer`. Never raises."""
        ...


class InvalidRecord(ValueError):
    """A record, genesis or body that does not hold; `reason` is a short word for counters."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Member:
    """One line of a roster. Weight 0 and contribution "" is a voter that contributed nothing."""

    peer: str
    weight: int  # tokens, after the cap of the spec's max_influence
    contribution: str  # 32 hex digits, chosen by the contributor; "" if none
    life: str = ""  # 32 hex digits, drawn with the disk that its votes are on: see Vote


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


class Tip(NamedTuple):
    """Where a chain ends, as fork choice sees it. A node only ever moves to a tip that beats its own."""

    weight: int  # committed since the genesis, or since a record that is common to both
    head: str

    def beats(self, other: Tip) -> bool:
        """More committed weight wins, ties go to the lower head."""
        return self.weight > other.weight or (self.weight == other.weight and self.head < other.head)


# --- canonical text ---------------------------------------------------------------------------------


_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def canonical(value: Any) -> bytes:
    return _ENCODER.encode(value).encode()


def body_to_dict(body: Body) -> dict[str, Any]:
    return {
        "run_id": body.run_id,
        "epoch": body.epoch,
        "prev": body.prev,
        "state_digest": body.state_digest,
        "members": [member_to_list(m) for m in body.members],
        "result": body.result,
        "forced": body.forced,
        "agreement": agreement_to_list(body.agreement),
    }


_BODY_KEYS = ("run_id", "epoch", "prev", "state_digest", "members", "result", "forced", "agreement")


def body_from_dict(raw: Any) -> Body:
    """Strict. Raises InvalidRecord."""
    try:
        return _body_from(raw)
    except Malformed as error:
        raise InvalidRecord("malformed", str(error)) from None


def _body_from(raw: Any) -> Body:
    fields = table(raw, _BODY_KEYS, "body")
    body = Body(
        run_id=sys.intern(hexadecimal(fields["run_id"], (64,), "run_id")),
        epoch=integer(fields["epoch"], 1, EPOCH_MAX, "epoch"),
        prev=sys.intern(hexadecimal(fields["prev"], (64,), "prev")),
        state_digest=hexadecimal(fields["state_digest"], (64,), "state_digest"),
        members=tuple([_member_from(m) for m in sequence(fields["members"], MEMBERS_MAX, "members", 1)]),
        result=hexadecimal(fields["result"], (64,), "result"),
        forced=boolean(fields["forced"], "forced"),
        agreement=agreement_from(fields["agreement"], "agreement"),
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


def wire_bytes(member_count: int, signature_count: int) -> int:
    """No record with so many takes more in msgpack: `record_to_dict` of the longest values."""
    return 512 + 144 * member_count + 192 * signature_count


def record_from_dict(raw: Any, crypto: Crypto) -> Record:
    """Strict, without the signatures' check (`check_record`). Raises InvalidRecord."""
    try:
        return _record_from(raw, crypto)
    except Malformed as error:
        raise InvalidRecord("malformed", str(error)) from None


def _record_from(raw: Any, crypto: Crypto) -> Record:
    fields = table(raw, ("body", "ballot", "signatures"), "record")
    body = _body_from(fields["body"])
    signatures = []
    for pair in sequence(fields["signatures"], MEMBERS_MAX, "signatures"):
        signer, signature = sequence(pair, 2, "a signature", 2)
        signatures.append((_peer(signer, "signer"), text(signature, 256, "signature", 1)))
    if [s[0] for s in signatures] != sorted({s[0] for s in signatures}):
        raise Malformed("signatures must be sorted by peer, each once")
    ballot = integer(fields["ballot"], 0, BALLOT_MAX, "ballot")
    return Record(body, sys.intern(head_of(body, crypto)), ballot, tuple(signatures))


def genesis_to_dict(genesis: Genesis) -> dict[str, Any]:
    return {**_genesis_core(genesis), "signature": genesis.signature}


def genesis_from_dict(raw: Any, crypto: Crypto) -> Genesis:
    """Strict, signature checked. Raises InvalidRecord."""
    try:
        genesis = _genesis_from(raw)
    except Malformed as error:
        raise InvalidRecord("malformed", str(error)) from None
    core = canonical(_genesis_core(genesis))
    if not crypto.verify(genesis.founder, genesis.signature, b"tapestry genesis v1\0" + core):
        raise InvalidRecord("signature", "the genesis is not signed by the founder it names")
    return replace(genesis, run_id=crypto.digest(core))


def _genesis_from(raw: Any) -> Genesis:
    names = ("spec", "founder", "state_digest", "schema", "params", "nonce", "signature")
    fields = table(raw, names, "genesis")
    return Genesis(
        spec=text(fields["spec"], 64 * 1024, "spec", 1),
        founder=text(fields["founder"], 128, "founder", 1),
        state_digest=hexadecimal(fields["state_digest"], (64,), "state_digest"),
        schema=hexadecimal(fields["schema"], (64,), "schema"),
        params=integer(fields["params"], 1, 2**40, "params"),
        nonce=hexadecimal(fields["nonce"], (32,), "nonce"),
        run_id="",
        signature=text(fields["signature"], 256, "signature", 1),
    )


def found(
    spec: str, founder: str, state_digest: str, schema: str, params: int, nonce: str, crypto: Crypto
) -> Genesis:
    """Make and sign the genesis of a new run. `nonce`: 32 hex digits, drawn for this one."""
    genesis = Genesis(spec, founder, state_digest, schema, params, nonce, "", "")
    core = canonical(_genesis_core(genesis))
    signature = crypto.sign(b"tapestry genesis v1\0" + core)
    return replace(genesis, run_id=crypto.digest(core), signature=signature)


def _genesis_core(genesis: Genesis) -> dict[str, Any]:
    return {
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


def quorum(electorate_count: int) -> int:
    """A strict majority."""
    return electorate_count // 2 + 1


def leader_order(electorate: Iterable[str], head: str, crypto: Crypto) -> tuple[str, ...]:
    """Who leads ballot b: entry b mod n. Another order after every head, so nobody leads by right."""
    return tuple(sorted(electorate, key=lambda peer: (crypto.digest(f"{head}|{peer}".encode()), peer)))


def check_record(record: Record, prev_head: str, electorate: Sequence[str], crypto: Crypto) -> None:
    """Whether `record` follows `prev_head` by a decision of `electorate`. Raises InvalidRecord.

    An ordinary record needs one ballot's signatures of a quorum, and its members must hold a quorum too, so
    that electorates overlap from round to round. A forced one needs the signature of every member it names,
    one of the electorate among them: else any stranger could write the next record alone.
    """
    body = record.body
    if body.prev != prev_head:
        raise InvalidRecord("unlinked", f"record {body.epoch} does not follow {prev_head[:12]}")
    members = {m.peer for m in body.members}
    signers = {peer for peer, _ in record.signatures}
    if body.forced:
        if signers != members:
            raise InvalidRecord("unsigned", f"forced record {body.epoch} lacks a member's signature")
        if members.isdisjoint(electorate):
            raise InvalidRecord("electorate", f"forced record {body.epoch} by strangers to the electorate")
    else:
        need = quorum(len(electorate))
        voters = [peer for peer in electorate if peer in signers]
        if len(voters) < need:
            raise InvalidRecord("unsigned", f"record {body.epoch}: {len(voters)} signed, need {need}")
        if sum(peer in members for peer in electorate) < need:
            raise InvalidRecord("electorate", f"record {body.epoch} drops the quorum that made it")
    if not signers <= members.union(electorate):
        raise InvalidRecord("unsigned", f"record {body.epoch} is signed by a stranger")
    message = accept_message(record.head, record.ballot)
    for peer, signature in record.signatures:
        if not crypto.verify(peer, signature, message):
            raise InvalidRecord("signature", f"record {body.epoch}: bad signature of {peer}")


def capped_weights(weights: Sequence[int], max_influence: float) -> list[int]:
    """Weights such that none is more than `max_influence` of their sum (rounding down aside).

    Solves for the cap c with c = max_influence * sum(min(w, c)): the k largest are cut to
    c = m * rest / (1 - k * m). Where m * n <= 1 no such cap exists and all that contribute weigh the same.
    """
    positive = sorted((w for w in weights if w > 0), reverse=True)
    if not positive or max_influence >= 1.0:
        return list(weights)
    cap, rest = positive[-1], sum(positive)
    for k, w in enumerate(positive):
        share = 1.0 - k * max_influence
        if share <= 0.0:
            break
        if w <= int(max_influence * rest / share):
            cap = int(max_influence * rest / share)
            break
        rest -= w
    return [min(w, cap) for w in weights]


def exceeds_influence(weights: Sequence[int], max_influence: float) -> bool:
    """Whether no honest leader made these weights: they are above what `capped_weights` gives."""
    positive = [w for w in weights if w > 0]
    if not positive or max_influence >= 1.0:
        return False
    if max_influence * len(positive) <= 1.0:
        return max(positive) != min(positive)
    return max(positive) > max_influence * sum(positive) + 1


class Chain:
    """The records from the genesis to the head, in memory, each checked when it was added."""

    def __init__(self, genesis: Genesis, records: Iterable[Record] = ()) -> None:
        self.genesis = genesis
        self.records: list[Record] = []  # records[i].body.epoch == i + 1
        self.records.extend(records)  # from our own disk: checked before they were written
        self.weight = weight_of(self.records)  # all that was committed

    @property
    def epoch(self) -> int:
        return len(self.records)

    @property
    def head(self) -> str:
        return self.records[-1].head if self.records else self.genesis.run_id

    @property
    def tip(self) -> Tip:
        return Tip(self.weight, self.head)

    def head_at(self, epoch: int) -> str:
        """The head of `epoch`; "" where we have none, so that it equals nobody's."""
        if not 0 <= epoch <= len(self.records):
            return ""
        return self.records[epoch - 1].head if epoch else self.genesis.run_id

    def electorate_at(self, epoch: int) -> tuple[str, ...]:
        if epoch == 0:
            return (self.genesis.founder,)
        return tuple(m.peer for m in self.records[epoch - 1].body.members)

    def state_digest_at(self, epoch: int) -> str | None:
        """The digest of state `epoch` as signed: by the genesis or by the record after. None at the head."""
        if epoch == 0:
            return self.genesis.state_digest
        return self.records[epoch].body.state_digest if epoch < self.epoch else None

    def append(self, record: Record) -> None:
        """A checked record. Our bug if it does not follow."""
        assert record.body.epoch == self.epoch + 1 and record.body.prev == self.head
        self.records.append(record)
        self.weight += weight_of((record,))

    def switch(self, epoch: int, records: Sequence[Record]) -> tuple[Record, ...]:
        """Leave a fork: checked records take the place of those after `epoch`. Returns those."""
        dropped = tuple(self.records[epoch:])
        self.records[epoch:] = records
        self.weight += weight_of(records) - weight_of(dropped)
        return dropped

    def after(self, epoch: int, count_max: int) -> tuple[Record, ...]:
        return tuple(self.records[epoch : epoch + count_max])

    def check(self, record: Record, crypto: Crypto) -> None:
        """Whether `record` may be appended. Raises InvalidRecord."""
        if record.body.epoch != self.epoch + 1:
            raise InvalidRecord("unlinked", f"record {record.body.epoch} at epoch {self.epoch}")
        if record.body.run_id != self.genesis.run_id:
            raise InvalidRecord("foreign", "a record of another run")
        check_record(record, self.head, self.electorate_at(self.epoch), crypto)


def weight_of(records: Iterable[Record]) -> int:
    return sum(m.weight for r in records for m in r.body.members)


def better(ours: Sequence[Record], theirs: Sequence[Record]) -> bool:
    """Fork choice: whether `theirs` wins over `ours`, both since the common record."""
    if not theirs or not ours:
        return bool(theirs)
    return Tip(weight_of(theirs), theirs[-1].head).beats(Tip(weight_of(ours), ours[-1].head))


# --- fields -----------------------------------------------------------------------------------------


def _peer(value: Any, what: str) -> str:
    """The same object in every record: a chain of a year has millions of them."""
    return sys.intern(text(value, 128, what, 1))


def member_from(raw: Any) -> Member:
    """Strict. Raises InvalidRecord."""
    try:
        return _member_from(raw)
    except Malformed as error:
        raise InvalidRecord("malformed", str(error)) from None


def _member_from(raw: Any) -> Member:
    peer, weight, contribution, life = sequence(raw, 4, "a member", 4)
    integer(weight, 0, WEIGHT_MAX, "weight")
    if (weight == 0) != (contribution == ""):
        raise Malformed("a member has weight and contribution or neither")
    hexadecimal(contribution, (0, 32), "contribution")
    hexadecimal(life, (0, 32), "life")
    return Member(_peer(peer, "peer"), weight, contribution, sys.intern(life))


def member_to_list(member: Member) -> list[Any]:
    return [member.peer, member.weight, member.contribution, member.life]
