"""Protocol messages as frame headers, and back: every field's type and bound is checked on arrival.

A header is a msgpack array: the message's name, then its fields in the order of the dataclass. What a peer
sends is data until it has passed here; what passes is a value that the core may take at its word, as far as
types and bounds go.

The payload of SHARD and RESULT is not looked at here (net/links.py checks it with the run's codec).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import msgpack

from tapestry.node.net.wire import RemoteProtocolError, unpack
from tapestry.node.protocol import members, strict
from tapestry.node.protocol.agreement import (
    ShardSums,
    agreement_from,
    agreement_to_list,
    sums_from,
    sums_to_list,
)
from tapestry.node.protocol.canon import EPOCH_MAX, MEMBERS_MAX, WEIGHT_MAX, Crypto, InvalidRecord
from tapestry.node.protocol.commitment import PATH_MAX
from tapestry.node.protocol.gate import WORSE_MAX
from tapestry.node.protocol.messages import (
    RECEIPTS_MAX,
    RECORDS_MAX,
    WAITING_MAX,
    Accept,
    Call,
    Changes,
    Closing,
    Commit,
    Control,
    GetRecords,
    Leave,
    Need,
    Propose,
    Ready,
    Receipt,
    Records,
    Refuse,
    Result,
    Roster,
    Seat,
    Shard,
    Stage,
    Status,
)
from tapestry.node.protocol.receipts import receipt_from, receipt_to_list
from tapestry.node.protocol.record import (
    BALLOT_MAX,
    SIGNATURE_CHARS_MAX,
    Behind,
    Body,
    Member,
    Record,
    behind_from,
    behind_to_list,
    body_from_dict,
    body_to_dict,
    changes_from,
    member_from,
    member_to_list,
    record_from_dict,
    record_to_dict,
)

SHARDS_MAX = 1 << 20  # of one vector: 2**40 parameters in the smallest useful shards
LOCATOR_MAX = 128  # entries of a GetRecords: two per doubling of the epoch, with room
PHASE_LENGTH_MAX = 16

Encode = Callable[[Any], Any]
Decode = Callable[[Any, str], Any]  # value and its name; raises ValueError


def encode_message(message: Control | Shard | Result) -> bytes:
    """The frame header of a message."""
    name, fields = _TABLE[type(message)]
    values = [encode(getattr(message, field)) for field, encode, _ in fields]
    header: bytes = msgpack.packb([name, *values])
    return header


class Reader:
    """Turns headers into messages. Records need the run's crypto to have a head."""

    def __init__(self, crypto: Crypto) -> None:
        self._crypto = crypto

    def control(self, header: bytes) -> Control:
        """A message without payload. Raises RemoteProtocolError."""
        kind, values = self._read(header, _CONTROL)
        if kind is Commit:
            return Commit(self._record(values[0]))
        if kind is Records:
            epoch, records = values
            return Records(epoch, tuple(self._record(r) for r in records))
        message: Control = kind(*values)
        return message

    def data(self, header: bytes, blob: object, digest: str) -> Shard | Result:
        """A SHARD or RESULT around its payload. Raises RemoteProtocolError."""
        kind, values = self._read(header, _DATA)
        if kind is Shard:
            epoch, contribution, shard, path = values
            return Shard(epoch, contribution, shard, blob, path)
        epoch, head, ballot, shard, sums, signature = values
        return Result(epoch, head, ballot, shard, digest, blob, sums, signature)

    def _read(self, header: bytes, kinds: Mapping[str, type]) -> tuple[type, list[Any]]:
        raw = unpack(header)
        if not isinstance(raw, tuple) or not raw or not isinstance(raw[0], str) or raw[0] not in kinds:
            raise RemoteProtocolError("malformed", "no such message")
        kind = kinds[raw[0]]
        fields = _TABLE[kind][1]
        if len(raw) != len(fields) + 1:
            raise RemoteProtocolError("malformed", f"{raw[0]} with {len(raw) - 1} fields")
        try:
            return kind, [decode(v, name) for v, (name, _, decode) in zip(raw[1:], fields, strict=True)]
        except InvalidRecord as e:
            raise RemoteProtocolError(e.reason, f"{raw[0]}: {e}") from None
        except (ValueError, TypeError) as e:
            raise RemoteProtocolError("malformed", f"{raw[0]}: {e}") from None

    def _record(self, raw: Any) -> Record:
        try:
            return record_from_dict(raw, self._crypto)
        except InvalidRecord as e:
            raise RemoteProtocolError(e.reason, str(e)) from None


# --- fields -----------------------------------------------------------------------------------------


def _same(value: Any) -> Any:
    return value


def _any(value: Any, what: str) -> Any:
    return value


def _integer(low: int, high: int) -> Decode:
    return lambda value, what: strict.integer(value, low, high, what)


def _text(length_max: int) -> Decode:
    return lambda value, what: strict.text(value, length_max, what)


def _hex(*lengths: int) -> Decode:
    return lambda value, what: strict.hexadecimal(value, lengths, what)


def _word(length_max: int) -> Decode:
    return lambda value, what: strict.word(value, length_max, what)


def _norm(value: Any, what: str) -> float:
    return strict.finite(value, what, 0.0)


def _worse(value: Any, what: str) -> float:
    worse = strict.finite(value, what, 0.0)
    if worse > WORSE_MAX:
        raise strict.Malformed(f"{what} must be at most {WORSE_MAX:g}")
    return worse


def _tuple_of(item: Decode, count_max: int) -> Decode:
    def decode(value: Any, what: str) -> tuple[Any, ...]:
        return tuple([item(v, what) for v in strict.sequence(value, count_max, what)])

    return decode


def _stage(value: Any, what: str) -> Stage:
    return Stage(strict.integer(value, 0, len(Stage) - 1, what))


def _known(value: Any, what: str) -> tuple[int, str]:
    epoch, head = strict.sequence(value, 2, what, 2)
    return _EPOCH(epoch, "epoch"), _HEAD(head, "head")


def _body(value: Any, what: str) -> Body:
    return body_from_dict(value)


def _member(value: Any, what: str) -> Member:
    return member_from(value)


def _sums(value: Any, what: str) -> ShardSums:
    return sums_from(value, MEMBERS_MAX, what)


def _optional_body(value: Any, what: str) -> Body | None:
    return None if value is None else _body(value, what)


def _encode_optional_body(body: Body | None) -> Any:
    return None if body is None else body_to_dict(body)


def _encode_members(named: tuple[Member, ...]) -> list[list[Any]]:
    return [member_to_list(m) for m in named]


def _encode_receipts(receipts: tuple[Receipt, ...]) -> list[list[Any]]:
    return [receipt_to_list(r) for r in receipts]


def _encode_records(records: tuple[Record, ...]) -> list[dict[str, Any]]:
    return [record_to_dict(r) for r in records]


def _changes(value: Any, what: str) -> tuple[members.Change, ...]:
    return changes_from(value)


def _behind(value: Any, what: str) -> Behind | None:
    return behind_from(value)


def _encode_changes(changes: tuple[members.Change, ...]) -> list[list[Any]]:
    return [members.change_to_list(c) for c in changes]


_EPOCH = _integer(0, EPOCH_MAX)
_BALLOT = _integer(0, BALLOT_MAX)
_SHARD = _integer(0, SHARDS_MAX - 1)
_HEAD = _hex(64)
_PEERS = _tuple_of(_word(128), MEMBERS_MAX)

_FIELDS: dict[type, dict[str, tuple[Encode, Decode]]] = {
    Status: {
        "epoch": (_same, _EPOCH),
        "head": (_same, _HEAD),
        "state_epoch": (_same, _integer(-1, EPOCH_MAX)),
        "phase": (_same, _word(PHASE_LENGTH_MAX)),
        "stage": (int, _stage),
        "ballot": (_same, _BALLOT),
        "progress": (_same, _integer(0, 2**53)),
        "waiting_on": (_same, _tuple_of(_word(128), WAITING_MAX)),
    },
    Call: {
        "epoch": (_same, _EPOCH),
        "head": (_same, _HEAD),
        "ballot": (_same, _BALLOT),
        "forced": (_same, strict.boolean),
    },
    Ready: {
        "epoch": (_same, _EPOCH),
        "head": (_same, _HEAD),
        "ballot": (_same, _BALLOT),
        "forced": (_same, strict.boolean),
        "state_digest": (_same, _hex(64)),
        "contribution": (_same, _hex(0, 64)),
        "weight": (_same, _integer(0, WEIGHT_MAX)),
        "norm": (_same, _norm),
        "accepted_ballot": (_same, _integer(-1, BALLOT_MAX)),
        "accepted": (_encode_optional_body, _optional_body),
        "life": (_same, _hex(0, 32)),
        "unheard": (_same, _PEERS),
        "refused": (_same, _hex(0, 64)),
        "seat": (_same, _text(SIGNATURE_CHARS_MAX)),
        "receipts": (_encode_receipts, _tuple_of(receipt_from, RECEIPTS_MAX)),
    },
    Closing: {"epoch": (_same, _EPOCH), "head": (_same, _HEAD), "ballot": (_same, _BALLOT)},
    Roster: {
        "epoch": (_same, _EPOCH),
        "head": (_same, _HEAD),
        "ballot": (_same, _BALLOT),
        "forced": (_same, strict.boolean),
        "state_digest": (_same, _hex(64)),
        "members": (_encode_members, _tuple_of(_member, MEMBERS_MAX)),
        "reducers": (_same, _tuple_of(_integer(0, MEMBERS_MAX), SHARDS_MAX)),
        "changes": (_encode_changes, _changes),
        "behind": (behind_to_list, _behind),
        "signature": (_same, _text(SIGNATURE_CHARS_MAX)),
    },
    Propose: {
        "epoch": (_same, _EPOCH),
        "head": (_same, _HEAD),
        "ballot": (_same, _BALLOT),
        "body": (body_to_dict, _body),
        "holders": (_same, _PEERS),
    },
    Accept: {
        "epoch": (_same, _EPOCH),
        "head": (_same, _HEAD),
        "ballot": (_same, _BALLOT),
        "body_head": (_same, _HEAD),
        "result": (_same, _hex(64)),
        "agreement": (agreement_to_list, agreement_from),
        "signature": (_same, _text(SIGNATURE_CHARS_MAX)),
        "draw": (_same, _text(SIGNATURE_CHARS_MAX)),
    },
    Refuse: {
        "epoch": (_same, _EPOCH),
        "head": (_same, _HEAD),
        "ballot": (_same, _BALLOT),
        "body_head": (_same, _HEAD),
        "worse": (_same, _worse),
    },
    Leave: {
        "epoch": (_same, _EPOCH),
        "head": (_same, _HEAD),
        "signature": (_same, _text(SIGNATURE_CHARS_MAX)),
    },
    Seat: {
        "epoch": (_same, _EPOCH),
        "head": (_same, _HEAD),
        "life": (_same, _hex(0, 32)),
        "signature": (_same, _text(SIGNATURE_CHARS_MAX)),
    },
    Commit: {"record": (record_to_dict, _any)},
    Need: {
        "epoch": (_same, _EPOCH),
        "head": (_same, _HEAD),
        "ballot": (_same, _BALLOT),
        "contribution": (_same, _hex(0, 64)),
        "shards": (_same, _tuple_of(_SHARD, SHARDS_MAX)),
    },
    GetRecords: {"known": (_same, _tuple_of(_known, LOCATOR_MAX))},
    Records: {"epoch": (_same, _EPOCH), "records": (_encode_records, _tuple_of(_any, RECORDS_MAX))},
    Changes: {"changes": (_encode_changes, _changes)},
    Shard: {
        "epoch": (_same, _EPOCH),
        "contribution": (_same, _hex(64)),
        "shard": (_same, _SHARD),
        "path": (_same, _tuple_of(_hex(64), PATH_MAX)),
    },
    Result: {
        "epoch": (_same, _EPOCH),
        "head": (_same, _HEAD),
        "ballot": (_same, _BALLOT),
        "shard": (_same, _SHARD),
        "sums": (sums_to_list, _sums),
        "signature": (_same, _text(SIGNATURE_CHARS_MAX)),
    },
}
_NOT_IN_HEADER = {"blob", "digest"}  # the payload, and what the receiver computes of it


def _table() -> dict[type, tuple[str, list[tuple[str, Encode, Decode]]]]:
    table = {}
    for kind, codecs in _FIELDS.items():
        names = [f.name for f in dataclasses.fields(kind) if f.name not in _NOT_IN_HEADER]
        assert names == list(codecs), f"{kind.__name__}: {names} and {list(codecs)}"
        table[kind] = (kind.__name__.lower(), [(n, *codecs[n]) for n in names])
    return table


_TABLE = _table()
_DATA = {kind.__name__.lower(): kind for kind in (Shard, Result)}
_CONTROL = {name: kind for kind, (name, _) in _TABLE.items() if name not in _DATA}
