"""What a node remembers for those who watch it: a point of every curve for each epoch, the last records with
who was in them, and the last events in plain words.

Kept in memory on the loop, and in HOME/history.jsonl by a thread of its own: it survives a reload and a
restart, and no slow disk holds the node up. Everything is bounded: points are thinned out, the older half by
two, and so reach back to where the node began; of records and events the last ones stay; the file is written
anew before it is long. Nothing depends on it: a line that cannot be read is left out, a file that cannot be
written is told of once, and the history of another run is set aside.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tapestry.node.disk.files import atomic_write, set_aside
from tapestry.node.errors import printable

POINTS_MAX = 1000  # Guess: as many as a wide screen has columns for
RECORDS_MAX = 32
MEMBERS_SHOWN_MAX = 100  # of a record; of a larger one the count remains
EVENTS_MAX = 200
CONTRIBUTORS_MAX = 2048  # whose last epoch is remembered: more than a run has members. G7
TEXT_CHARS_MAX = 300
LINES_ADDED_MAX = 2000  # then the file is written anew, with what is remembered alone
FILE_BYTES_MAX = 16 * 2**20  # of a file that is read; ours have 3 MB at most
WAITING_MAX = 4096  # lines that the disk may be behind; later ones are lost to the file
CLOSE_S = 2.0

Kind = Literal["point", "record", "event"]
Level = Literal["info", "good", "warning"]

_log = logging.getLogger("tapestry.history")


@dataclass(frozen=True, slots=True)
class Point:
    """What is known of one epoch, or of those that were thinned out into it. None: not known (yet)."""

    epoch: int  # of the state that it made
    at: float  # unix time, s
    tokens: int | None = None  # behind the chain up to here, all members together
    loss: float | None = None  # nats; mean of this node's steps of the epoch
    validation: Mapping[str, float] = field(default_factory=dict)  # of the state, by this node's sets
    tokens_per_second: float | None = None  # of this node
    passes: float | None = None  # over this node's data
    round_s: float | None = None  # from having a contribution to the record
    phases: Mapping[str, float] = field(default_factory=dict)  # seconds in each stage of the round
    sent: int = 0  # bytes, since the point before
    received: int = 0
    sent_float32: int = 0  # the same, if contributions and results were float32
    received_float32: int = 0
    contributions: int | None = None  # that the record counts
    agreement: Mapping[str, float] = field(default_factory=dict)  # cosine, sign, norm_kept


@dataclass(frozen=True, slots=True)
class RecordSeen:
    """A record when it came, without its proofs."""

    epoch: int
    head: str
    at: float
    ballot: int
    forced: bool
    count: int  # of members
    members: tuple[tuple[str, int], ...]  # (peer id, weight), of MEMBERS_SHOWN_MAX at most


@dataclass(frozen=True, slots=True)
class EventSeen:
    """A sentence."""

    at: float
    level: Level
    text: str


Entry = Point | RecordSeen | EventSeen
_ADDED = ("sent", "received", "sent_float32", "received_float32")  # what lies between two points
_KINDS: dict[type, Kind] = {Point: "point", RecordSeen: "record", EventSeen: "event"}


class History:
    """One node's. On the loop only, but for what `HistoryFile` does."""

    def __init__(self) -> None:
        self._points: dict[int, Point] = {}  # by epoch, ascending
        self._records: deque[RecordSeen] = deque(maxlen=RECORDS_MAX)
        self._events: deque[EventSeen] = deque(maxlen=EVENTS_MAX)
        self._contributed: dict[str, int] = {}  # peer -> the last epoch that counts it, the oldest first
        self._news: deque[tuple[int, Entry]] = deque(maxlen=EVENTS_MAX)  # with their numbers
        self._count = 0
        self._file: HistoryFile | None = None

    # --- what is told --------------------------------------------------------------------------

    def point(self, epoch: int, **known: Any) -> None:
        """More is known of `epoch`: fields of Point; what is None or not finite is left as it was.

        With `contributions` it is the newest epoch: what comes after it was on a fork that was left.
        """
        if "contributions" in known:
            self._points = {e: p for e, p in self._points.items() if e <= epoch}
        old = self._points.get(epoch)
        if old is None and self._points and next(reversed(self._points)) > epoch:
            return  # thinned out since
        new = dataclasses.replace(old or Point(epoch, round(time.time(), 2)), **_finite(known))
        self._points[epoch] = new
        self._add(new)
        if len(self._points) > POINTS_MAX:
            self._points = _thinned(self._points)

    def record(self, record: RecordSeen) -> None:
        self._take_record(record)
        self._add(record)

    def contributed(self, epoch: int, peers: Iterable[str]) -> None:
        """These are counted in the record of `epoch`, also where it has more members than are shown of it."""
        for peer in peers:
            if epoch >= self._contributed.get(peer, 0):
                self._contributed.pop(peer, None)
                self._contributed[peer] = epoch
        while len(self._contributed) > CONTRIBUTORS_MAX:
            del self._contributed[next(iter(self._contributed))]

    def tell(self, text: str, level: Level = "info") -> None:
        """`text` may quote peers."""
        event = EventSeen(round(time.time(), 2), level, printable(text)[:TEXT_CHARS_MAX])
        self._events.append(event)
        self._add(event)

    # --- what is asked -------------------------------------------------------------------------

    def everything(self) -> dict[str, Any]:
        """For /history: all points, records and events, the oldest first."""
        return {
            "points": [plain(point) for point in self._points.values()],
            "records": [plain(record) for record in self._records],
            "events": [plain(event) for event in self._events],
        }

    @property
    def last_contributions(self) -> Mapping[str, int]:
        """Peer -> the last epoch that counts it, as far as it is remembered."""
        return self._contributed

    @property
    def count(self) -> int:
        """The number of the latest news."""
        return self._count

    def since(self, count: int) -> list[Entry] | None:
        """The news after number `count`, in order; None if some of it is forgotten: take everything."""
        if count >= self._count:
            return []
        if not self._news or self._news[0][0] > count + 1:
            return None
        return [entry for number, entry in self._news if number > count]

    # --- its file ------------------------------------------------------------------------------

    def keep_in(self, file: HistoryFile, before: Iterable[Entry]) -> None:
        """From now on it is written to `file`, and what was read from there goes before what is here."""
        here = self._entries()
        self._points.clear()
        self._records.clear()
        self._events.clear()
        for entry in [*before, *here]:
            if isinstance(entry, Point):
                self._points.pop(entry.epoch, None)
                self._points[entry.epoch] = entry
            elif isinstance(entry, RecordSeen):
                self._take_record(entry)
            else:
                self._events.append(entry)
        self._points = dict(sorted(self._points.items()))
        while len(self._points) > POINTS_MAX:
            self._points = _thinned(self._points)
        self._news.clear()  # whoever watches takes everything again
        self._count += 1
        self._file = file
        file.replace(self._lines())

    def _add(self, entry: Entry) -> None:
        self._count += 1
        self._news.append((self._count, entry))
        if self._file is None:
            return
        if self._file.added >= LINES_ADDED_MAX:
            self._file.replace(self._lines())
        else:
            self._file.add(_line(entry))

    def _entries(self) -> list[Entry]:
        return [*self._points.values(), *self._records, *self._events]

    def _lines(self) -> list[bytes]:
        return [_line(entry) for entry in self._entries()]

    def _take_record(self, record: RecordSeen) -> None:
        """The newest: what there is of its epoch or a later one was on a fork that was left."""
        if self._records and self._records[-1].epoch >= record.epoch:
            self._contributed = {p: e for p, e in self._contributed.items() if e < record.epoch}
        while self._records and self._records[-1].epoch >= record.epoch:
            self._records.pop()
        self._records.append(record)
        self.contributed(record.epoch, [peer for peer, weight in record.members if weight])


def kind_of(entry: Entry) -> Kind:
    return _KINDS[type(entry)]


def plain(entry: Entry) -> dict[str, Any]:
    """As JSON has it; what is not known is left out."""
    return {name: value for name, value in dataclasses.asdict(entry).items() if value not in (None, {})}


def _finite(known: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in known.items():
        if isinstance(value, Mapping):
            value = {key: v for key, v in value.items() if math.isfinite(v)}
        elif value is None or not math.isfinite(value):
            continue
        found[name] = value
    return found


def _thinned(points: Mapping[int, Point]) -> dict[int, Point]:
    """The older half with every second point taken into the one after it; the first stays where it is."""
    ordered = [*points.values()]
    half = len(ordered) // 4 * 2
    first, old = ordered[0], ordered[1 : half + 1]
    merged = [first]
    for one, two in zip(old[::2], old[1::2], strict=True):
        added = {name: getattr(one, name) + getattr(two, name) for name in _ADDED}
        validation = two.validation or one.validation  # not every epoch is measured
        merged.append(dataclasses.replace(two, **added, validation=validation))
    return {point.epoch: point for point in [*merged, *ordered[half + 1 :]]}


# --- the file ---------------------------------------------------------------------------------------


class HistoryFile:
    """Writes lines in a thread of its own. An error ends the writing, and nothing else."""

    def __init__(self, path: Path, run_id: str) -> None:
        self.added = 0  # lines, since it was written anew
        self._path = path
        self._first = json.dumps({"run_id": run_id}).encode() + b"\n"
        self._jobs: queue.Queue[bytes | list[bytes] | None] = queue.Queue(WAITING_MAX)
        self._thread = threading.Thread(target=self._write_all, name="history", daemon=True)
        self._thread.start()

    def add(self, line: bytes) -> None:
        """Write `line` at the end. Never blocks."""
        self.added += 1
        self._put(line)

    def replace(self, lines: list[bytes]) -> None:
        """Write `lines` in the place of what there is. Never blocks."""
        self.added = 0
        self._put(lines)

    def close(self) -> None:
        """Write what waits, for a bounded time."""
        self._put(None)
        self._thread.join(CLOSE_S)

    def _put(self, job: bytes | list[bytes] | None) -> None:
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self.added = LINES_ADDED_MAX  # what is lost comes with the next writing anew

    def _write_all(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                if isinstance(job, list):
                    atomic_write(self._path, self._first + b"".join(job), mode=0o600)
                else:
                    with self._path.open("ab") as file:
                        file.write(job)
        except OSError as error:
            _log.warning(
                "history=not_written path=%s reason=%r; make room or mend the disk: only the page misses it",
                self._path,
                str(error),
            )
            while self._jobs.get() is not None:
                continue  # nobody must wait, and nothing pile up


def look_at_history(path: Path) -> list[Entry]:
    """What the file says, of whatever run, for those who only look. Blocks."""
    try:
        with path.open("rb") as file:
            lines = file.read(FILE_BYTES_MAX).split(b"\n")[1:]
    except OSError:
        return []
    return [entry for entry in map(_entry, lines) if entry is not None]


def read_history(path: Path, run_id: str) -> list[Entry]:
    """What the file says of this run; nothing if there is none. Blocks."""
    try:
        with path.open("rb") as file:
            first, *lines = file.read(FILE_BYTES_MAX).split(b"\n")
    except OSError:
        return []
    if _json(first).get("run_id") != run_id:
        set_aside(path, "a history of another run", "nothing is to be done: the page begins anew")
        return []
    return [entry for entry in map(_entry, lines) if entry is not None]


def _line(entry: Entry) -> bytes:
    return json.dumps({kind_of(entry): plain(entry)}, separators=(",", ":")).encode() + b"\n"


def _entry(line: bytes) -> Entry | None:
    """None for what is torn, or of another version."""
    for kind, name in _KINDS.items():
        table = _json(line).get(name)
        if isinstance(table, dict):
            try:
                return _checked(kind(**table))
            except (TypeError, ValueError, OverflowError):
                return None
    return None


def _checked(entry: Entry) -> Entry:
    """Raises TypeError, ValueError or OverflowError for what is not as it was written: a page must not
    stumble over it."""
    if isinstance(entry, RecordSeen):
        members = tuple((str(peer), int(weight)) for peer, weight in entry.members)
        return dataclasses.replace(entry, epoch=int(entry.epoch), members=members, head=str(entry.head))
    if isinstance(entry, Point):
        for value in (getattr(entry, f.name) for f in dataclasses.fields(entry)):
            for number in value.values() if isinstance(value, dict) else [value]:
                if number is not None and not math.isfinite(number):  # a TypeError for what is no number
                    raise ValueError(f"{number!r} is not finite")
        return entry
    return dataclasses.replace(entry, at=float(entry.at), text=str(entry.text)[:TEXT_CHARS_MAX])


def _json(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
