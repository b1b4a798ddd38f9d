"""HOME/data-events.jsonl: what data were declared, used and revoked, and when; the lines are linked.

    {"event": "declared", "at": ..., "path": ..., "declaration": {...}}
    {"event": "used",     "at": ..., "purpose": "base", "run_id": ..., "epoch": 12, "sources": [PATH, ...]}
             and where links of these led out of them: "linked": [PATH, ...]
    {"event": "revoked",  "at": ..., "path": ..., "reason": ...}

A use of the base's begins at a start of the node and ends where the next one begins: in between every
contribution of this member was made from those sources. A use of a derivative's is one training.
Says what the member's own node did; it never leaves the home, unless the member leaves with it.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tapestry.node.disk.linked import BrokenLink, Linked, append_once, read_linked
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.spec.declared import BASE, NO_LINKS, Beyond

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


def note_use(
    home: Home, purpose: str, sources: Iterable[str], run_id: str, epoch: int, linked: Beyond = NO_LINKS
) -> None:
    """Sources are about to be read for a purpose, on top of an epoch of a run. Raises UserError."""
    beyond = [real for every in linked.values() for real in every]
    said = {"linked": beyond} if beyond else {}
    note(home, "used", purpose=purpose, run_id=run_id, epoch=epoch, sources=list(sources), **said)


def events(home: Home) -> Iterator[dict[str, Any]]:
    """Oldest first, checked. Raises UserError."""
    try:
        for line in read_linked(home.data_events):
            if isinstance(line, Linked) and isinstance(line.value, dict):
                yield line.value
    except BrokenLink as error:
        raise _broken(home, error) from error
    except OSError as error:
        raise UserError(
            f"cannot read {home.data_events}: {error.strerror}", exit_code=ExitCode.FAILED
        ) from error


def spans(home: Home, touches: Touches) -> list[Span]:
    """When a source was used for the base. Raises UserError."""
    found: list[Span] = []
    open_from: tuple[str, int] | None = None
    for event in events(home):
        if event["event"] != "used" or event["purpose"] != BASE:
            continue
        run_id, epoch = event["run_id"], event["epoch"]
        if open_from is not None:
            # A node that went back to an earlier state contributed to later epochs before it did.
            found.append(Span(*open_from, max(epoch, open_from[1]) if run_id == open_from[0] else None))
        used = any(touches(path) for path in (*event["sources"], *event.get("linked", ())))
        open_from = (run_id, epoch) if used else None
    if open_from is not None:
        found.append(Span(*open_from, None))
    return found


def sources_since(home: Home, run_id: str, epoch: int) -> tuple[str, ...]:
    """All that the base was trained on in starts at this epoch or later, as --data names it."""
    found: dict[str, None] = {}
    for event in events(home):
        if event["event"] == "used" and event["purpose"] == BASE and event["run_id"] == run_id:
            if event["epoch"] == epoch:
                found = {}  # of an earlier start at this epoch; the last one went on from it
            if event["epoch"] >= epoch:
                found |= dict.fromkeys(event["sources"])
    return tuple(found)


def _broken(home: Home, error: BrokenLink) -> UserError:
    return UserError(
        f"{home.path}/{error}",
        exit_code=ExitCode.FAILED,
        hint=f"the file was changed; tapestry verify {home.path} says what else does not hold",
    )
