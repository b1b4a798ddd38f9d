"""Where each epoch begins in the order of windows: kept on disk, so that nothing is skipped and nothing
repeated.

An epoch's windows are those that follow its beginning, so a beginning is all that must be kept. The rules:

- An epoch that begins anew, after an aborted round, a fork, a restart or the trainer's death, begins where it
  began before, and gives the same windows.
- One that never began begins where the last finished epoch before it ended. What an epoch that was never
  finished had drawn is drawn again: nothing came of it.
- To finish an epoch is to write it down, before its contribution leaves: one small file, synced, an epoch.
  An epoch that is finished again with another end (it was closed earlier this time) makes the beginnings of
  later epochs void: they belonged to a life that is over.
- With overlap, an epoch may begin before its base is there. It is the same beginning.

Nothing needs to be written at a beginning: if the trainer dies after it, the file still says where the last
finished epoch ended, and that is where the epoch begins again.

When the data change, the sources that stayed go on where they were; the others begin.

Must not import torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tapestry.node.trainer.data.order import Position, WindowOrder
from tapestry.node.trainer.data.tokens import write_json

CURSOR_VERSION = 1
EPOCHS_KEPT = 256  # Guess: as many can be rolled back and still begin where they did
CURSOR_BYTES_MAX = 16 << 20


class Cursor:
    """Beginnings of epochs. `source_keys` name the sources, in the order's order."""

    def __init__(self, path: Path, order: WindowOrder, source_keys: Sequence[str]) -> None:
        """Takes up what the file says; one that is missing or damaged says nothing."""
        self._path = path
        self._order = order
        self._source_keys = list(source_keys)
        self._key = _key(order, source_keys)
        self._starts: dict[int, Position] = {}
        self._ends: dict[int, Position] = {}
        self._next = order.start()
        self._load(_read(path))

    def begin(self, epoch: int) -> Position:
        """Where the epoch begins: where it did before, or where the last finished one before it ended."""
        if epoch not in self._starts:
            later = min((one for one in self._starts if one > epoch), default=None)
            self._starts[epoch] = self._next if later is None else self._starts[later]
        return self._starts[epoch]

    def finish(self, epoch: int, windows: int) -> None:
        """The epoch drew so many windows, and its contribution is about to leave. Raises OSError."""
        end = self._order.advance(self.begin(epoch), windows)
        if self._ends.get(epoch) != end:
            for later in [one for one in self._starts if one > epoch]:
                del self._starts[later]
                self._ends.pop(later, None)
        self._ends[epoch] = self._next = end
        for old in sorted(self._ends)[:-EPOCHS_KEPT]:
            del self._ends[old]
        for old in sorted(self._starts)[:-EPOCHS_KEPT]:
            del self._starts[old]
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(self._path, self._plain())

    @property
    def passes(self) -> float:
        """Over the data, up to the end of the last finished epoch."""
        return self._order.passes(self._next)

    def _plain(self) -> dict[str, Any]:
        """Only what was finished: the rest follows from it."""
        return {
            "version": CURSOR_VERSION,
            "key": self._key,
            "sources": self._source_keys,
            "before": list(self._next.before),
            "next": list(self._next.drawn),
            "epochs": {
                str(epoch): [list(self._starts[epoch].drawn), list(end.drawn)]
                for epoch, end in self._ends.items()
                if epoch in self._starts
            },
        }

    def _load(self, plain: dict[str, Any]) -> None:
        try:
            if plain["version"] != CURSOR_VERSION:
                return
            before, drawn = _counts(plain["before"]), _counts(plain["next"])
            if plain["key"] == self._key:
                position = Position(self._sized(before), self._sized(drawn))
                epochs = {
                    int(epoch): [Position(before, self._sized(_counts(one))) for one in both]
                    for epoch, both in plain["epochs"].items()
                }
                self._next = position
                self._starts = {epoch: start for epoch, (start, _) in epochs.items()}
                self._ends = {epoch: end for epoch, (_, end) in epochs.items()}
            else:
                seen = Position(before, drawn).seen
                known = dict(zip(plain["sources"], seen, strict=True))
                nothing = self._order.start().drawn
                self._next = Position(tuple(int(known.get(key, 0)) for key in self._source_keys), nothing)
        except (ValueError, TypeError, KeyError, AttributeError):
            self._starts, self._ends, self._next = {}, {}, self._order.start()

    def _sized(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        if len(counts) != len(self._source_keys):
            raise ValueError("of other sources")
        return counts


def _key(order: WindowOrder, source_keys: Sequence[str]) -> str:
    """Equal keys, equal order."""
    keys = [key.hex() for key in order.keys]
    value = [list(order.counts), list(order.shares), keys, list(source_keys)]
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _counts(plain: Any) -> tuple[int, ...]:
    counts = tuple(plain)
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("not counts")
    return counts


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(CURSOR_BYTES_MAX))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
