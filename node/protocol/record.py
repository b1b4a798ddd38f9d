"""Records, bodies and the genesis: what is decided, signed and kept, and the one text that each of them has.

`head_e` is the digest of record e's *body*; signatures are outside it, so that two leaders who gather
different signatures for one decision still name one head.

A signature covers the head *and the ballot*. Without the ballot, accepts of one value in two ballots could
be added up to a quorum that no ballot ever had (Lamport, "Paxos Made Simple", 2001, section 2.2: a value is
chosen when a majority accepted *one proposal*, number included).

Beside its vote a voter signs the head alone: its *draw*, which decides the shards that it audits. It has no
ballot in it, so that a leader which proposes one value in two ballots gets the same draws (decision 014).

A body carries the digest of state e, the state *before* its update: every member has had a whole epoch to
compute it, so it costs nothing on the critical path, and a member whose arithmetic went astray is found
before it contributes (docs/decisions/001-state-digest.md).

What follows what is decided in place.py. Standard library only. Text form: canon.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from tapestry.node.protocol.agreement import ALIKE, Agreement, agreement_from, agreement_to_list
from tapestry.node.protocol.canon import (
    EPOCH_MAX,
    MEMBERS_MAX,
    WEIGHT_MAX,
    Crypto,
    InvalidRecord,
    canonical,
    peer_field,
)
from tapestry.node.protocol.handover import Handover
from tapestry.node.protocol.members import (
    CHANGES_BYTES_MAX,
    CHANGES_MAX,
    Change,
    Charter,
    change_bytes,
    change_from,
    change_to_list,
    charter_of,
    charter_to_dict,
    pairs_from,
)
from tapestry.node.protocol.strict import Malformed, boolean, hexadecimal, integer, sequence, table, text

BALLOT_MAX = 2**53  # out of a liar's reach: see BALLOT_STEP_MAX in round.py
VERSION = 3  # of bodies and of the genesis: 1 knew no members, 2 no seats
SIGNATURE_CHARS_MAX = 256
SEAT_BYTES = 136  # of a seat's signature in msgpack, at most

_GENESIS = b"tapestry genesis v3\0"


class OtherVersion(InvalidRecord):
    """A genesis of another version than this one reads: nothing of its run can be read here."""

    def __init__(self, found: int) -> None:
        super().__init__(
            "version",
            f"the run is of version {found} of the chain, and this version of tapestry reads {VERSION} only",
        )


@dataclass(frozen=True, slots=True)
class Member:
    """One line of a roster. Weight 0 and contribution "" is a voter that contributed nothing."""

    peer: str
    weight: int  # in the mean: what the roll's charter gives it (members.voice_weights)
    contribution: str  # its name, 64 hex digits: commitment.py; "" if none
    life: str = ""  # 32 hex digits, drawn with the disk that its votes are on: see Vote
    tokens: int = 0  # that it says it trained on
    seat: str = ""  # its own signature (`seat_message`), where place.py asks for one


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
    handover: Handover | None = None  # in the place of a second vote
    draws: tuple[tuple[str, str], ...] = ()  # (peer, signature of draw_message), one for each of `signatures`


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
    handover = {"handover": list(record.handover)} if record.handover is not None else {}
    return {
        "body": body_to_dict(record.body),
        "ballot": record.ballot,
        "signatures": [list(pair) for pair in record.signatures],
        "draws": [list(pair) for pair in record.draws],
        **handover,
    }


def wire_bytes(member_count: int, signature_count: int, changes_bytes: int = CHANGES_BYTES_MAX) -> int:
    """No record with so many takes more in msgpack: `record_to_dict` of the longest values.

    `signature_count`: votes and draws, of this record and of the one before.
    """
    return 512 + (192 + SEAT_BYTES) * member_count + 192 * signature_count + changes_bytes


def record_bytes(record: Record) -> int:
    """No less than what `record` takes in msgpack."""
    body = record.body
    signatures = len(record.signatures) + len(record.draws)
    signatures += len(body.behind.signatures) if body.behind is not None else 0
    signatures += 2 * (record.handover is not None)  # it is that long
    bare = sum(not m.seat for m in body.members)
    changes_bytes = sum(change_bytes(c) for c in body.changes)
    return wire_bytes(len(body.members), signatures, changes_bytes) - SEAT_BYTES * bare


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
    handed = isinstance(raw, dict) and "handover" in raw
    names = ("body", "ballot", "signatures", "draws")
    fields = table(raw, (*names, *(("handover",) if handed else ())), "record")
    body = _body_from(fields["body"])
    signatures, draws = pairs_from(fields["signatures"], "signatures"), pairs_from(fields["draws"], "draws")
    ballot = integer(fields["ballot"], 0, BALLOT_MAX, "ballot")
    handover = _handover_from(fields["handover"]) if handed else None
    return Record(body, sys.intern(head_of(body, crypto)), ballot, signatures, handover, draws)


def _handover_from(raw: Any) -> Handover:
    peer, head, signature = sequence(raw, 3, "handover", 3)
    signed = text(signature, SIGNATURE_CHARS_MAX, "signature", 1)
    return Handover(peer_field(peer, "peer"), hexadecimal(head, (64,), "head"), signed)


def genesis_to_dict(genesis: Genesis) -> dict[str, Any]:
    return {**_genesis_core(genesis), "signature": genesis.signature}


def genesis_from_dict(raw: Any, crypto: Crypto) -> Genesis:
    """Strict, signature checked. Raises InvalidRecord; OtherVersion for one of another version."""
    version = raw.get("version") if isinstance(raw, dict) else None
    if type(version) is int and version != VERSION:
        raise OtherVersion(version)
    try:
        genesis = _genesis_from(raw)
    except Malformed as error:
        raise InvalidRecord("malformed", str(error)) from None
    core = canonical(_genesis_core(genesis))
    if not crypto.verify(genesis.founder, genesis.signature, _GENESIS + core):
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
        signature=text(fields["signature"], SIGNATURE_CHARS_MAX, "signature", 1),
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
    signature = crypto.sign(_GENESIS + core)
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


def head_of(body: Body, crypto: Crypto) -> str:
    return crypto.digest(_body_text(body))


@lru_cache(maxsize=32)  # one body is asked for by all parts of a round, and in the simulator by all nodes
def _body_text(body: Body) -> bytes:
    return canonical(body_to_dict(body))


def accept_message(head: str, ballot: int) -> bytes:
    """What an ACCEPT signs."""
    return b"tapestry accept v1\0%s\0%d" % (head.encode(), ballot)


def seat_message(head: str, life: str) -> bytes:
    """What a READY signs: the sender takes part in the round from `head`, and its votes lie on this disk."""
    return b"tapestry seat v1\0%s\0%s" % (head.encode(), life.encode())


def draw_message(head: str) -> bytes:
    """What else an ACCEPT signs, in any ballot: which shards its sender audits follows from it."""
    return b"tapestry draw v1\0" + head.encode()


# --- fields -----------------------------------------------------------------------------------------


def member_from(raw: Any) -> Member:
    """Strict. Raises InvalidRecord."""
    try:
        return _member_from(raw)
    except Malformed as error:
        raise InvalidRecord("malformed", str(error)) from None


def _member_from(raw: Any) -> Member:
    peer, weight, contribution, life, tokens, seat = sequence(raw, 6, "a member", 6)
    integer(weight, 0, WEIGHT_MAX, "weight")
    integer(tokens, 0, WEIGHT_MAX, "tokens")
    if (weight == 0) != (contribution == ""):
        raise Malformed("a member has weight and contribution or neither")
    hexadecimal(contribution, (0, 64), "contribution")
    hexadecimal(life, (0, 32), "life")
    text(seat, SIGNATURE_CHARS_MAX, "seat")
    return Member(peer_field(peer, "peer"), weight, contribution, sys.intern(life), tokens, seat)


def member_to_list(member: Member) -> list[Any]:
    return [member.peer, member.weight, member.contribution, member.life, member.tokens, member.seat]
