"""`tapestry log`: what the chain in a home says, an epoch a line; of a running node or a stopped one.

Members, shares, agreement and head are in the records, which all members signed. Not signed are the time,
when this node wrote the update to its disk, as long as the update is there; and the loss, this node's own of
that epoch, as its history has it (surface/history.py thins out what is long ago). Bytes are those of the
update. It streams and checks as `verify` does, though it recomputes no numbers.
"""

from __future__ import annotations

import datetime
import os
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tapestry.node.disk.update_header import update_name
from tapestry.node.errors import ExitCode, UserError, printable
from tapestry.node.home import Home
from tapestry.node.lineage.anchor import Anchor
from tapestry.node.lineage.columns import ids_cut, who, wrapped
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.follow import Broken, Follower, island_from, read_genesis, read_records
from tapestry.node.protocol.canon import InvalidRecord
from tapestry.node.protocol.members import Change, read_rollback
from tapestry.node.protocol.place import Place, genesis_place, next_place
from tapestry.node.protocol.record import Genesis, Record

INDENT = " " * 9  # under the first column
_NONE_KNOWN: Mapping[int, float] = {}


@dataclass(frozen=True, slots=True)
class Line:
    """One epoch."""

    epoch: int
    time: str  # UTC; "" where the update is gone
    members: tuple[tuple[str, float], ...]  # who contributed, with its share of the mean; by peer id
    voters: int  # named in the record, contributors among them
    signers: int
    forced: bool
    update_bytes: int  # 0 where the update is gone
    head: str
    run_id: str
    cosine: float | None  # how far the contributions agreed: mean cosine to the mean; None of one alone
    loss: float | None = None  # this node's own, of the epoch's steps
    changes: tuple[Change, ...] = ()  # of who belongs to the run, and of its rules and settings
    names: Mapping[str, str] = field(default_factory=dict)  # what people call the members, by peer id

    def table(self) -> dict[str, Any]:
        """For --json."""
        return {
            "epoch": self.epoch,
            "time": self.time or None,
            "members": [{"peer": peer, "share": round(share, 6)} for peer, share in self.members],
            "voters": self.voters,
            "signers": self.signers,
            "forced": self.forced,
            "update_bytes": self.update_bytes or None,
            "head": self.head,
            "cosine": self.cosine,
            "loss": self.loss,
            "changes": [
                {"kind": c.kind, "peer": c.peer, "value": c.value, "asked_by": [p for p, _ in c.signatures]}
                for c in self.changes
            ],
        }


def read_log(home: Home, last: int | None, losses: Mapping[int, float] = _NONE_KNOWN) -> Iterator[Line]:
    """Oldest first; of a long chain the `last` ones; `losses` by epoch. Raises UserError where the chain does
    not hold."""
    names: dict[str, str] = {}
    records = _records(home, names)
    chosen = records if last is None else iter(deque(records, maxlen=last))
    for record in chosen:
        yield _line(record, home.updates, losses.get(record.body.epoch), names)


def newest(home: Home) -> Anchor:
    """The head, to be published. Raises UserError."""
    genesis, _ = _genesis(home)
    found = deque(_records(home), maxlen=1)
    return Anchor.of(genesis, found[0] if found else None)


def place_of(home: Home) -> Place:
    """Where the home's chain is: who belongs to the run, for one. Raises UserError."""
    genesis, _ = _genesis(home)
    at = genesis_place(genesis)
    for record in _records(home):
        at = next_place(at, record)
    return at


def _genesis(home: Home) -> tuple[Genesis, Any]:
    try:
        return read_genesis(home.genesis, ReaderCrypto())
    except FileNotFoundError:
        if home.is_held():
            raise UserError(
                f"{home.path} holds no run yet: its node has not joined",
                hint=f"tapestry status --home {home.path} says what it waits for",
            ) from None
        raise UserError(f"{home.path} holds no run") from None
    except PermissionError:
        raise  # of another user
    except OSError as error:
        raise UserError(f"cannot read {home.genesis}: {error.strerror}", exit_code=ExitCode.FAILED) from error
    except Broken as error:
        raise UserError(f"{home.genesis}: {error}", exit_code=ExitCode.FAILED) from error


def _records(home: Home, names: dict[str, str] | None = None) -> Iterator[Record]:
    """Each checked against the one before. A live node's half-written last line is not there yet. `names` is
    filled with those of all who were members up to there."""
    genesis, spec = _genesis(home)
    crypto = ReaderCrypto()
    follower = Follower.start(genesis, spec, crypto, island_from(home))
    try:
        for record in read_records(home.chain, crypto):
            follower.take(record)
            if names is not None:
                names.update((peer, seat.name) for peer, seat in follower.at.roll.members.items())
            yield record
    except Broken as error:
        if error.unfinished:
            return
        raise _broken(home, error.epoch, error) from error
    except InvalidRecord as error:
        raise _broken(home, follower.epoch + 1, error) from error
    except OSError as error:
        raise UserError(f"cannot read {home.chain}: {error.strerror}", exit_code=ExitCode.FAILED) from error


def _broken(home: Home, epoch: int | None, error: Exception) -> UserError:
    return UserError(
        f"{home.chain}, epoch {epoch}: {error}",
        exit_code=ExitCode.FAILED,
        hint=f"tapestry verify {home.path} says what else does not hold",
    )


def _line(record: Record, updates: Path, loss: float | None, names: Mapping[str, str]) -> Line:
    body = record.body
    total = sum(member.weight for member in body.members)
    time, size = "", 0
    try:
        info = os.stat(updates / update_name(body.epoch, record.head))
        stamp = datetime.datetime.fromtimestamp(info.st_mtime, datetime.UTC)
        time, size = stamp.strftime("%Y-%m-%dT%H:%M:%SZ"), info.st_size
    except OSError:
        pass  # the limits of the update log have taken it
    return Line(
        epoch=body.epoch,
        time=time,
        members=tuple((m.peer, m.weight / total) for m in body.members if m.weight),
        voters=len(body.members),
        signers=len(record.signatures),
        forced=body.forced,
        update_bytes=size,
        head=record.head,
        run_id=body.run_id,
        cosine=body.agreement.shares()["cosine"] if sum(bool(m.weight) for m in body.members) > 1 else None,
        loss=loss,
        changes=body.changes,
        names=names,
    )


def lines(log: Iterator[Line]) -> Iterator[str]:
    """For people: figures on one line, who contributed below it, and what the record changed."""
    heading = (
        f"{'epoch':>7}  {'time, UTC':<16}  {'loss':>7}  {'agree':>6}  {'update':>9}  {'signed':>7}  head"
    )
    first = list(islice(log, 1))  # what cannot be read is said without a heading
    yield heading
    for line in chain(first, log):
        time = line.time[:16].replace("T", " ") or "-"
        loss = "-" if line.loss is None else f"{line.loss:.4f}"
        agree = "-" if line.cosine is None else f"{line.cosine:.3f}"
        yield (
            f"{line.epoch:>7}  {time:<16}  {loss:>7}  {agree:>6}  {_size(line.update_bytes):>9}  "
            f"{f'{line.signers}/{line.voters}':>7}  {line.head[:12]}"
        )
        shares = (
            f"{who(peer, line.names.get(peer, ''))} {100 * share:.0f} %" for peer, share in line.members
        )
        forced = "forced: " if line.forced else ""
        yield from wrapped(forced + ", ".join(shares), INDENT, INDENT)
        for change in line.changes:
            begin = "" if change.kind == "rollback" else INDENT
            yield from wrapped(_change(line, change), begin, INDENT)


def _change(line: Line, change: Change) -> str:
    if change.kind == "rollback":
        to, _, why = read_rollback(change.value)
        because = f", because {ids_cut(printable(why))}" if why else ""
        return f"epoch {line.epoch}: the state is that of epoch {to} again{because}"
    value = "" if change.kind == "invite" else ids_cut(printable(change.value))  # uses, and a moment
    name = line.names.get(change.peer, "")
    if change.kind == "admit":
        name, value = change.value, ""
    of = who(change.peer, name) if change.peer else ""
    by = ", ".join(who(peer, line.names.get(peer, "")) for peer, _ in change.signatures)
    return f"{' '.join(filter(None, [change.kind, of, value]))}, asked for by {by}"


def _size(count: int) -> str:
    if not count:
        return "-"
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"
