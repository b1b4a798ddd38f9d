"""The trainer's batches: which windows belong to step `step` of epoch `epoch`, whatever happened before.

`draw` may be asked again for any step of an epoch that has begun; `finish` comes once the epoch's steps are
done, before its contribution leaves. The rules are the cursor's. Must not import torch.
"""

from __future__ import annotations

from pathlib import Path

from tapestry.node.trainer.data.corpus import Batch, Corpus
from tapestry.node.trainer.data.cursor import Cursor
from tapestry.node.trainer.data.order import Position


class Feed:
    """Batches of `batch_size` windows of one corpus."""

    def __init__(self, corpus: Corpus, batch_size: int, cursor_path: Path) -> None:
        self._corpus = corpus
        self._batch_size = batch_size
        self._cursor = Cursor(cursor_path, corpus.order, corpus.seen, corpus.absent)
        self._latest: tuple[int, int, Position, Position] | None = (
            None  # epoch, step, its start, what follows
        )

    def take(self, batch_size: int) -> None:
        """So many windows a batch from now on; between two epochs, since an epoch's steps are of one size."""
        self._batch_size = batch_size

    def draw(self, epoch: int, step: int) -> Batch:
        """The batch of one step, from 0. The first of a new epoch begins the epoch."""
        batch, after = self._corpus.batch(self._position(epoch, step), self._batch_size)
        self._latest = (epoch, step + 1, self._cursor.begin(epoch), after)
        return batch

    def finish(self, epoch: int, steps: int) -> None:
        """The epoch took so many steps. Raises OSError."""
        self._cursor.finish(epoch, steps * self._batch_size)

    @property
    def key(self) -> str:
        """Equal keys, equal batches, also of processes that opened the data at different moments."""
        return self._cursor.key

    @property
    def passes(self) -> float:
        """Over the data, up to the last epoch that was finished."""
        return self._cursor.passes

    def _position(self, epoch: int, step: int) -> Position:
        """Mostly the place where the step before ended; else counted from the epoch's beginning."""
        start = self._cursor.begin(epoch)
        if self._latest is not None and self._latest[:3] == (epoch, step, start):
            return self._latest[3]
        return self._corpus.order.advance(start, step * self._batch_size)
