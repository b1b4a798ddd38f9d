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

When the data change, each source goes on as seen.py says. Epochs that had begun then begin anew where the
last finished one ended, for their windows are others.

Must not import torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tapestry.node.trainer.data.order import Position, WindowOrder
from tapestry.node.trainer.data.seen import CURSOR_VERSION, Seen, counts_of, read_cursor
from tapestry.node.trainer.data.tokens import write_json

EPOCHS_KEPT = 256  # Guess: as many can be rolled back and still begin where they did


class Cursor:
    """Beginnings of epochs. `sources` are those of the order, as they go on; `absent` is to be remembered."""

    def __init__(
        self, path: Path, order: WindowOrder, sources: Sequence[Seen], absent: Sequence[Seen] = ()
    ) -> None:
        """Takes up what the file says; one that is missing, damaged or of other data says nothing."""
        self._path = path
        self._order = order
        self._sources = sources
        self._absent = absent
        self._key = _key(order, sources)
        self._starts: dict[int, Position] = {}
        self._ends: dict[int, Position] = {}
        self._next = Position(tuple(one.count for one in sources), order.start().drawn)
        self._load(read_cursor(path))

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
    def key(self) -> str:
        """Equal keys, equal order of the same windows."""
        return self._key

    @property
    def passes(self) -> float:
        """Over the data, up to the end of the last finished epoch."""
        return self._order.passes(self._next)

    def _plain(self) -> dict[str, Any]:
        """Only what was finished: the rest follows from it."""
        return {
            "version": CURSOR_VERSION,
            "key": self._key,
            "sources": [
                replace(one, count=count).to_plain()
                for one, count in zip(self._sources, self._next.seen, strict=True)
            ],
            "absent": [one.to_plain() for one in self._absent],
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
            if plain["version"] != CURSOR_VERSION or plain["key"] != self._key:
                return
            before = self._sized(plain["before"])
            if any(count < one.course.began for count, one in zip(before, self._sources, strict=True)):
                raise ValueError("before the order began")
            position = Position(before, self._sized(plain["next"]))
            epochs = {
                int(epoch): [Position(before, self._sized(one)) for one in both]
                for epoch, both in plain["epochs"].items()
            }
            starts = {epoch: start for epoch, (start, _) in epochs.items()}
            ends = {epoch: end for epoch, (_, end) in epochs.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            return
        self._next, self._starts, self._ends = position, starts, ends

    def _sized(self, plain: Any) -> tuple[int, ...]:
        counts = counts_of(plain)
        if len(counts) != len(self._sources):
            raise ValueError("of other sources")
        return counts


def _key(order: WindowOrder, sources: Sequence[Seen]) -> str:
    courses = [[one.key.hex(), one.sizes, one.start, one.number] for one in order.courses]
    texts = [[one.windows, one.digest, one.holds_out] for one in sources]
    value = json.dumps([order.shares, courses, texts])
    return hashlib.blake2b(value.encode(), digest_size=16).hexdigest()
