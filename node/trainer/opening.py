"""What a worker opens before it can train: its data, and the weights it begins from.

Must not import torch or transformers before it is asked: they take seconds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tapestry.node.spec.training import TransformersSpec, WorkerSettings
from tapestry.node.trainer import group
from tapestry.node.trainer.messages import TEXT_CHARS_MAX, Stop, Tokenizing

if TYPE_CHECKING:
    from tapestry.node.trainer.data.corpus import Corpus

TOKENIZING_INTERVAL_S = 1.0


class ChannelClosed(Exception):
    """The node has gone, or wants us gone."""


class WorkerFailure(Exception):
    """We cannot go on; `reason` as in messages.Failed."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def weights_folder(settings: WorkerSettings) -> Path:
    """Where state 0 is read from: adapters begin on the base that all hold, all else from a member's own."""
    model = settings.training.model
    whole = isinstance(model, TransformersSpec) and model.weights and not model.lora_rank
    return Path(settings.weights_dir if whole else settings.base_dir)


@contextlib.contextmanager
def model_refused() -> Iterator[None]:
    from tapestry.node.trainer.models.refusal import ModelError

    try:
        yield
    except ModelError as error:
        raise WorkerFailure("model", f"{error}; {error.hint}" if error.hint else str(error)) from error


def open_training_corpus(settings: WorkerSettings, channel: group.Channel | None) -> Corpus:
    """Tokenizes what is not yet, and tells the channel. Raises WorkerFailure and ChannelClosed."""
    from tapestry.node.trainer.data.corpus import Use, open_corpus
    from tapestry.node.trainer.data.errors import DataError
    from tapestry.node.trainer.tokenizers.api import TokenizerError
    from tapestry.node.trainer.tokenizers.registry import run_tokenizer

    training, base = settings.training, Path(settings.base_dir)
    use = Use(
        sequence_length=training.data.sequence_length,
        windows_per_epoch=training.train.batches * training.train.batch_size,
        seed=settings.node_seed,
        attend_across_documents=training.data.attend_across_documents,
        cursor_path=Path(settings.cursor_path),
    )
    try:
        tokenizer = run_tokenizer(training.data, base)
        progress = (lambda done, total: None) if channel is None else TellTokenizing(channel)
        cache = Path(settings.cache_dir)
        return open_corpus(
            settings.data, tokenizer, cache, use, progress, settings.protected, settings.located
        )
    except (DataError, TokenizerError) as error:
        raise WorkerFailure("data", sendable(str(error))) from error


def sendable(text: str) -> str:
    """Short enough for a message; the bytes of a file's name that are no text become question marks."""
    return text.encode("utf-8", "replace").decode()[:TEXT_CHARS_MAX]


class TellTokenizing:
    """Progress as messages, a few a second; and the moment to see that the node wants us gone."""

    def __init__(self, channel: group.Channel) -> None:
        self._channel = channel
        self._began_s = self._told_s = time.monotonic()
        self._first_bytes: int | None = None  # done by an earlier start

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        if self._first_bytes is None and total_bytes:
            self._first_bytes = done_bytes
        if now_s - self._told_s < TOKENIZING_INTERVAL_S:
            return
        self._told_s = now_s
        if isinstance(self._channel.receive(wait=False), Stop):
            raise ChannelClosed
        rate = (done_bytes - (self._first_bytes or 0)) / (now_s - self._began_s)
        self._channel.send(Tokenizing(done_bytes, total_bytes, max(0.0, rate)))
