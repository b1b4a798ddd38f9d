"""Small files of every format, and the shortest way to what a source gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tapestry.node.spec.data import DataSettings, resolved_data
from tapestry.node.trainer.data.corpus import Corpus, Use, open_corpus
from tapestry.node.trainer.tokenizers.api import Tokenizer
from tapestry.node.trainer.tokenizers.byte import EOS_ID, ByteTokenizer

LENGTH = 8  # of a window


def settings_of(*paths: object, **more: Any) -> DataSettings:
    """As `--data` gives them."""
    return resolved_data(DataSettings(paths=tuple(map(str, paths)), **more), "")


def corpus_of(
    settings: DataSettings,
    cache: Path,
    tokenizer: Tokenizer | None = None,
    windows_per_epoch: int = 1,
    attend: bool = True,
    cursor: Path | None = None,
) -> Corpus:
    use = Use(LENGTH, windows_per_epoch, 7, attend, cursor)
    return open_corpus(settings, tokenizer or ByteTokenizer(), cache, use)


def documents_of(corpus: Corpus, source: int = 0) -> list[str]:
    """The text of a source, document by document, out of its bytes."""
    tokens = corpus.parts[source].tokens
    ends = np.flatnonzero(tokens == EOS_ID)
    starts = [0, *(ends[:-1] + 1)]
    return [
        bytes(tokens[start:end].astype(np.uint8)).decode() for start, end in zip(starts, ends, strict=True)
    ]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text, "n": 1}) + "\n" for text in texts))
    return path
