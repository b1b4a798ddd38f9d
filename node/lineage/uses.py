"""HOME/data-events.jsonl: what data were declared, used and revoked, and when; the lines are linked.

    {"event": "declared", "at": ..., "path": ..., "declaration": {...}}
    {"event": "used",     "at": ..., "purpose": "base", "run_id": ..., "epoch": 12, "sources": [PATH, ...],
             "peer": OWN, "island": false, "brings": false, "linked": [PATH, ...], "real": [PATH, ...]}
    {"event": "left",     "at": ..., "run_id": ..., "epoch": 9}
    {"event": "brought",  "at": ..., "run_id": ..., "epoch": 12, "sources": [PATH, ...],
             "real": [PATH, ...]}
    {"event": "rejoined", "at": ..., "run_id": ..., "epoch": 12}
    {"event": "given",    "at": ..., "run_id": ..., "epoch": 14}
    {"event": "restored", "at": ...}
    {"event": "revoked",  "at": ..., "path": ..., "reason": ...}

A use of the base's begins at a start of the node and ends where the next one begins: in between every
contribution of this member was made from those sources, and perhaps the one after that, which was on its way
when the node ended. `linked` are files that links led to, out of the sources; `real` is where sources lay
that were named by a link, which may lead elsewhere today. A use of a derivative's is one training.

A fork that was `left` at an epoch takes what is used back there: the epochs after it are made anew. What was
learnt on an island from some sources is `brought` by `rejoin --bring`, until the record at which it was
`given`; what was used on the island itself touched no record that is left after `rejoined`.

A home that was `restored` does not know what it did after its backup, and one whose newest records could not
be read (`behind`) does not know to which epoch it had come: what was used before may be in any epoch since.

Says what the member's own node did; it never leaves the home, unless the member leaves with it.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tapestry.node.disk.linked import LINE_BYTES_MAX, BrokenLink, Linked, append_once, read_linked
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.protocol import strict
from tapestry.node.spec.data import reals_of, split_field
from tapestry.node.spec.declared import BASE, READ, require

# What an event must say, and of which kind it is; more may stand there.
NEEDS: dict[str, tuple[str, ...]] = {
    "used": ("purpose", "run_id", "epoch", "sources"),
    "left": ("run_id", "epoch"),
    "brought": ("run_id", "epoch", "sources"),
    "given": ("epoch",),
}
TEXTS = frozenset({"purpose", "run_id", "peer", "path"})
LISTS = frozenset({"sources", "linked", "real"})

Touches = Callable[[str], bool]  # whether a source is meant, by its path


@dataclass(frozen=True, slots=True)
class Span:
    """Epochs that this member contributed to from certain sources: after `first`, up to `last`."""

    run_id: str
    first: int
    last: int | None  # None: it goes on

    def holds(self, epoch: int) -> bool:
        """Whether the record of this epoch may hold a contribution of it."""
        return self.first < epoch and (self.last is None or epoch <= self.last)


def note(home: Home, event: str, **said: Any) -> None:
    """Write an event down, on disk when this returns. Raises UserError."""
    at = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    try:
        home.create()
        append_once(home.data_events, {"event": event, "at": at, **said})
    except BrokenLink as error:
        raise _broken(home, error) from error
    except OSError as error:
        raise UserError(
            f"cannot write {home.data_events}: {error.strerror}", exit_code=ExitCode.FAILED
        ) from error


@dataclass(frozen=True, slots=True)
class Started:
    """What a node's start says beside its sources."""

    peer: str  # its own id: a key can be replaced
    island: bool = False  # trains on alone
    linked: tuple[str, ...] = ()  # real paths that its sources' links lead to


def note_use(
    home: Home, purpose: str, sources: Iterable[str], run_id: str, epoch: int, node: Started | None = None
) -> None:
    """Sources are about to be read for a purpose, on top of an epoch of a run. Raises UserError."""
    sources = list(sources)
    said: dict[str, Any] = {}
    if node is not None:
        said = {"peer": node.peer, "island": node.island, "brings": home.brought.exists()}
        said |= {"linked": list(node.linked)} if node.linked else {}
        said |= {"behind": True} if _lost_records(home) else {}
    if real := reals_of(split_field(one)[0] for one in sources):
        said["real"] = list(real)
    note(home, "used", purpose=purpose, run_id=run_id, epoch=epoch, sources=sources, **said)


def _lost_records(home: Home) -> bool:
    """Whether records were set aside since the base's last use (disk/chain_file.py)."""
    try:
        aside_s = os.stat(home.chain.with_name(home.chain.name + ".corrupt")).st_ctime
    except OSError:
        return False
    last = ""
    for event in events(home):
        if event["event"] == "used" and event["purpose"] == BASE:
            last = event["at"]
    # Of whole seconds; records are set aside when a node starts, a moment before that start's own use.
    return bool(last) and aside_s >= datetime.datetime.fromisoformat(last).timestamp() + 1


def note_left(home: Home, run_id: str, epoch: int) -> None:
    """A running node leaves a fork of the chain at this epoch. Raises OSError, which ends it."""
    try:
        note(home, "left", run_id=run_id, epoch=epoch)
    except UserError as error:
        raise OSError(error.line) from error


def events(home: Home) -> Iterator[dict[str, Any]]:
    """Oldest first, checked. Raises UserError."""
    try:
        for line in read_linked(home.data_events):
            if isinstance(line, Linked):
                yield _event_of(line)
    except BrokenLink as error:
        raise _broken(home, error) from error
    except OSError as error:
        raise UserError(
            f"cannot read {home.data_events}: {error.strerror}", exit_code=ExitCode.FAILED
        ) from error


def _event_of(line: Linked) -> dict[str, Any]:
    """Its value: what a later version adds is let be, but what is read here is of its kind. Raises
    BrokenLink."""
    said = line.value
    try:
        if not isinstance(said, dict):
            raise strict.Malformed("an event must be a table")
        event = strict.text(said.get("event"), LINE_BYTES_MAX, "event")
        for key in NEEDS.get(event, ()):
            if key not in said:
                raise strict.Malformed(f"{event} must have {key}")
        for key in sorted(TEXTS & said.keys()):
            strict.text(said[key], LINE_BYTES_MAX, key)
        for key in sorted(LISTS & said.keys()):
            for one in strict.sequence(said[key], LINE_BYTES_MAX, key):
                strict.text(one, LINE_BYTES_MAX, key)
        if "epoch" in said:
            strict.integer(said["epoch"], 0, 2**53, "epoch")
    except strict.Malformed as error:
        raise BrokenLink(line.file, line.number, str(error)) from error
    return said


def spans(home: Home, touches: Touches) -> list[Span]:
    """When a source was used for the base. Raises UserError."""
    told = _Told(touches)
    for event in events(home):
        if (take := told.takes.get(event["event"])) is not None:
            take(event)
    return told.all()


class _Told:
    """What the events say, oldest first, of the sources that are meant."""

    def __init__(self, touches: Touches) -> None:
        self._touches = touches
        self._closed: list[Span] = []
        self._alone: list[Span] = []  # of an island that was not left
        self._open: Span | None = None
        self._open_alone = False
        self._brought: Span | None = None
        self.takes: dict[str, Callable[[dict[str, Any]], None]] = {
            "used": self._used,
            "left": self._left,
            "brought": self._brings,
            "rejoined": self._rejoined,
            "given": self._given,
            "restored": self._restored,
        }

    def all(self) -> list[Span]:
        return [*self._closed, *self._alone, *(one for one in (self._open, self._brought) if one)]

    def _used(self, event: dict[str, Any]) -> None:
        if event["purpose"] != BASE:
            return
        run_id, epoch = event["run_id"], event["epoch"]
        if event.get("behind"):
            self._restored(event)
        self._close(run_id, epoch)
        if self._brought is not None and event.get("brings") is False:  # the file was moved away
            self._closed.append(_ended(self._brought, run_id, epoch))
            self._brought = None
        if any(map(self._touches, _names_in(event))):
            self._open, self._open_alone = Span(run_id, epoch, None), event.get("island", False)

    def _close(self, run_id: str, epoch: int) -> None:
        if self._open is not None:
            (self._alone if self._open_alone else self._closed).append(_ended(self._open, run_id, epoch))
            self._open = None

    def _restored(self, _event: dict[str, Any]) -> None:
        """What was going on may have gone on to any epoch."""
        if self._open is not None:
            (self._alone if self._open_alone else self._closed).append(self._open)
            self._open = None
        if self._brought is not None:  # it may have been given, and may be given yet
            self._closed.append(self._brought)

    def _left(self, event: dict[str, Any]) -> None:
        self._open = _from(self._open, event)
        self._brought = _from(self._brought, event)

    def _brings(self, event: dict[str, Any]) -> None:
        touched = any(map(self._touches, _names_in(event)))
        self._brought = Span(event["run_id"], event["epoch"], None) if touched else None

    def _rejoined(self, _event: dict[str, Any]) -> None:
        if self._open_alone:
            self._open, self._open_alone = None, False
        self._alone = []

    def _given(self, event: dict[str, Any]) -> None:
        if self._brought is not None:
            self._closed.append(replace(self._brought, last=event["epoch"]))
            self._brought = None


def _ended(span: Span, run_id: str, epoch: int) -> Span:
    """By a start at an epoch of a run. A node that went back to an earlier state contributed to later epochs
    before it did; and the round that it died in may have counted its contribution."""
    return replace(span, last=max(epoch, span.first) + 1 if run_id == span.run_id else None)


def _from(span: Span | None, left: dict[str, Any]) -> Span | None:
    """After a fork was left."""
    if span is None or span.run_id != left["run_id"]:
        return span
    return replace(span, first=min(span.first, left["epoch"]))


def _names_in(event: dict[str, Any]) -> Iterator[str]:
    """All paths by which it speaks of sources."""
    for key in sorted(LISTS & event.keys()):
        yield from event[key]


def training_uses(home: Home) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Of derivatives: name and sources of each training that was begun. Raises UserError."""
    for event in events(home):
        if event["event"] == "used" and event["purpose"].startswith("derive:"):
            yield event["purpose"].removeprefix("derive:"), tuple(_names_in(event))


def named(home: Home) -> Iterator[str]:
    """Every source of which an event speaks, as it was named then. Raises UserError."""
    for event in events(home):
        yield from (event["path"],) if "path" in event else ()
        yield from _names_in(event)


def own_ids(home: Home) -> set[str]:
    """By which this home's node was known when it used data: keys can be replaced. Raises UserError."""
    return {event["peer"] for event in events(home) if event.get("peer")}


def sources_since(home: Home, run_id: str, epoch: int) -> tuple[str, ...]:
    """All that the base was trained on in starts at this epoch or later, as --data names it."""
    return _used_since(home, run_id, epoch, ("sources",))


def read_since(home: Home, run_id: str, epoch: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths that starts at this epoch or later read for the base: of sources and of what links in them led
    to; and where sources lay that were named by a link."""
    named = _used_since(home, run_id, epoch, ("sources", "linked"))
    paths = tuple(dict.fromkeys(split_field(one)[0] for one in named))
    return paths, _used_since(home, run_id, epoch, ("real",))


def _used_since(home: Home, run_id: str, epoch: int, keys: tuple[str, ...]) -> tuple[str, ...]:
    """What such starts say under these keys."""
    found: dict[str, None] = {}
    for event in events(home):
        if event["event"] == "used" and event["purpose"] == BASE and event["run_id"] == run_id:
            if event["epoch"] == epoch:
                found = {}  # of an earlier start at this epoch; the last one went on from it
            if event["epoch"] >= epoch:
                found |= dict.fromkeys(path for key in keys for path in event.get(key, ()))
    return tuple(found)


# --- what an island brings ----------------------------------------------------------------------------


def note_brought(home: Home, run_id: str, epoch: int) -> None:
    """What was learnt alone since `epoch` is going to be contributed. Raises UserError."""
    sources = _used_since(home, run_id, epoch, ("sources", "linked"))
    real = _used_since(home, run_id, epoch, ("real",))
    note(home, "brought", run_id=run_id, epoch=epoch, sources=list(sources), real=list(real))


def note_taken_back(home: Home) -> None:
    """What was given is to be contributed again: its record was left or undone. Raises OSError, which ends a
    running node."""
    try:
        last = next((one for one in reversed([*events(home)]) if one["event"] == "brought"), None)
        if last is not None:
            said = {key: last[key] for key in ("run_id", "epoch", "sources", "real") if key in last}
            note(home, "brought", **said)
    except UserError as error:
        raise OSError(error.line) from error


def require_brought(home: Home, today: datetime.date) -> None:
    """Raises UserError if something is still to be contributed, and what it was learnt from may not be used
    for the base any more."""
    if not home.brought.exists():
        return
    brought: dict[str, Any] = {}
    for event in events(home):
        if event["event"] == "brought":
            brought = event
    try:
        require(home, [split_field(one)[0] for one in brought.get("sources", ())], BASE, today)
        require(home, brought.get("real", ()), READ, today)
    except UserError as error:
        raise UserError(
            f"{home.brought} was learnt from what may not be used: {error.line}",
            hint="move it away to go on without; the island itself lies in islands/",
        ) from error


def _broken(home: Home, error: BrokenLink) -> UserError:
    return UserError(
        f"{home.path}/{error}",
        exit_code=ExitCode.FAILED,
        hint=f"the file was changed; tapestry verify {home.path} says what else does not hold",
    )
