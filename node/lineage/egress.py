"""HOME/egress.jsonl: what left this node, when, how much, to whom, under which rule; the lines are linked.

    {"kind": "start", "at": ..., "run_id": ..., "cut_bytes": 0}
    {"kind": "contribution", "at": ..., "bytes": 812344, "receivers": {PEER: bytes, ...}, "rule": "roster",
     "parts": [[epoch, digest], ...], "more_parts": 0}

A line tells of two seconds at most, of control ten minutes (daemon/egress.py). `bytes` are those of frames
with their headers, as the metric tapestry_network_bytes_total counts them; what libp2p and TCP put around
them is not counted by either.

    kind          parts                                                 rule
    contribution  epoch, its name, which proves each of its shards      roster: shards go to their reducers
    result        epoch, digest of a shard's mean                       mean: to the members of the round
    state         epoch, and of an update its record's head, of a       state: what peers of the run ask for
                  checkpoint the state's digest, of a file its own
    control       epoch, head of the records that were sent             protocol: rounds, records, addresses
    audit         epoch, head of the record that drew what was sent     audit: drawn shards, proofs of lies

The writer is daemon/egress.py; here is what reads and checks. Presence records in the DHT are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tapestry.node.disk.linked import BrokenLink, Linked, Tail, read_linked
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage.columns import short, wrapped
from tapestry.node.protocol import strict

KINDS = ("contribution", "result", "state", "control", "audit")
RULES = {
    "contribution": "roster",
    "result": "mean",
    "state": "state",
    "control": "protocol",
    "audit": "audit",
}
PARTS_MAX = 64  # of a line; guess: a line of a busy toy run stays under 8 kB
RECEIVERS_MAX = 4096  # above max_peers
BYTES_MAX = 2**60
TEXT_MAX = 128
INDENT = " " * 22  # under the second column


@dataclass(frozen=True, slots=True)
class Left:
    """One line: what left since the line before, of one kind."""

    at: str
    kind: str
    bytes: int
    receivers: dict[str, int]
    rule: str
    parts: tuple[tuple[int, str], ...]
    more_parts: int  # that the line has no room for

    def value(self) -> dict[str, Any]:
        """As the line has it."""
        return {
            "at": self.at,
            "kind": self.kind,
            "bytes": self.bytes,
            "receivers": self.receivers,
            "rule": self.rule,
            "parts": [list(part) for part in self.parts],
            "more_parts": self.more_parts,
        }


@dataclass(frozen=True, slots=True)
class Started:
    """A start of the node: what follows is of this run, until the next one."""

    at: str
    run_id: str
    cut_bytes: int  # of a torn last line of the time before

    def value(self) -> dict[str, Any]:
        """As the line has it."""
        return {"at": self.at, "kind": "start", "run_id": self.run_id, "cut_bytes": self.cut_bytes}


@dataclass(slots=True)
class Totals:
    """Summed over lines."""

    lines: int = 0
    starts: int = 0
    cut_bytes: int = 0
    by_kind: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def add(self, entry: Left | Started) -> None:
        self.lines += 1
        if isinstance(entry, Left):
            self.by_kind[entry.kind] += entry.bytes
        else:
            self.starts += 1
            self.cut_bytes += entry.cut_bytes

    @property
    def bytes(self) -> int:
        return sum(self.by_kind.values())


def read_egress(home: Home) -> Iterator[Left | Started]:
    """Oldest first, each line checked against the one before and in itself. A line that a node is writing is
    not there yet. Raises UserError."""
    try:
        for line in read_linked(home.egress):
            if isinstance(line, Linked):
                yield entry_of(line)
    except BrokenLink as error:
        raise UserError(
            f"{home.path}/{error}",
            exit_code=ExitCode.FAILED,
            hint=f"the file was changed; tapestry verify {home.path} says what else does not hold",
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {home.egress}: {error.strerror}", exit_code=ExitCode.FAILED) from error


def counted(home: Home, totals: Totals) -> Iterator[Linked | Tail]:
    """Every line, also checked in itself, and added up. Raises BrokenLink, OSError."""
    for line in read_linked(home.egress):
        if isinstance(line, Linked):
            totals.add(entry_of(line))
        yield line


def entry_of(line: Linked) -> Left | Started:
    """What a line says. Raises BrokenLink."""
    try:
        return _started(line.value) if line.value.get("kind") == "start" else _left(line.value)
    except (ValueError, AttributeError) as error:
        raise BrokenLink(line.file, line.number, str(error)) from error


def _started(value: Any) -> Started:
    fields = strict.table(value, ("at", "kind", "run_id", "cut_bytes"), "a start")
    return Started(
        strict.text(fields["at"], TEXT_MAX, "at"),
        strict.text(fields["run_id"], TEXT_MAX, "run_id"),
        strict.integer(fields["cut_bytes"], 0, BYTES_MAX, "cut_bytes"),
    )


def _left(value: Any) -> Left:
    keys = ("at", "kind", "bytes", "receivers", "rule", "parts", "more_parts")
    fields = strict.table(value, keys, "what left")
    kind, receivers = fields["kind"], fields["receivers"]
    if kind not in KINDS or fields["rule"] != RULES[kind]:
        raise ValueError("no kind of ours, or another rule than its own")
    if not isinstance(receivers, dict) or len(receivers) > RECEIVERS_MAX:
        raise ValueError("receivers must be a table of bytes by peer")
    for peer, count in receivers.items():
        strict.text(peer, TEXT_MAX, "a receiver")
        strict.integer(count, 0, BYTES_MAX, "bytes of a receiver")
    total = strict.integer(fields["bytes"], 0, BYTES_MAX, "bytes")
    if total != sum(receivers.values()):
        raise ValueError("its bytes are not the sum of its receivers' bytes")
    parts = []
    for part in strict.sequence(fields["parts"], PARTS_MAX, "parts"):
        epoch, digest = strict.sequence(part, 2, "a part", 2)
        parts.append((strict.integer(epoch, 0, 2**53, "an epoch"), strict.text(digest, TEXT_MAX, "a digest")))
    more = strict.integer(fields["more_parts"], 0, BYTES_MAX, "more_parts")
    at = strict.text(fields["at"], TEXT_MAX, "at")
    return Left(at, kind, total, dict(receivers), fields["rule"], tuple(parts), more)


def lines(entries: Iterator[Left | Started]) -> Iterator[str]:
    """For people; the totals last."""
    totals = Totals()
    yield f"{'time':<20}  {'kind':<12}  {'bytes':>14}  {'epochs':<15}  rule"
    for entry in entries:
        totals.add(entry)
        if isinstance(entry, Started):
            cut = f", {entry.cut_bytes} bytes of an unfinished line cut off" if entry.cut_bytes else ""
            yield from wrapped(f"{entry.at} start of run {entry.run_id[:12]}{cut}", "", INDENT)
            continue
        epochs = [epoch for epoch, _ in entry.parts]
        shown = (
            "-" if not epochs else f"{min(epochs)}-{max(epochs)}" if len(set(epochs)) > 1 else str(epochs[0])
        )
        yield f"{entry.at:<20}  {entry.kind:<12}  {entry.bytes:>14}  {shown:<15}  {entry.rule}"
        receivers = sorted(entry.receivers.items())
        told = ", ".join(f"{short(peer) if peer else 'others'} {count}" for peer, count in receivers)
        yield from wrapped(told, INDENT, INDENT)
    by_kind = ", ".join(f"{kind} {count}" for kind, count in totals.by_kind.items())
    yield from wrapped(f"{totals.bytes} bytes left in {totals.starts} starts: {by_kind}")
