"""Tokenizers by the name in the run spec's data.tokenizer."""

from __future__ import annotations

from pathlib import Path

from tapestry.node.trainer.tokenizers.api import Tokenizer, TokenizerError
from tapestry.node.trainer.tokenizers.base import BaseTokenizer
from tapestry.node.trainer.tokenizers.byte import ByteTokenizer


def open_tokenizer(name: str, path: Path | None = None, eos_id: int | None = None) -> Tokenizer:
    """`path` is a tokenizer.json, `eos_id` ends a document; "byte" needs neither. Raises TokenizerError."""
    if name == "byte":
        return ByteTokenizer()
    if name == "base":
        if path is None or eos_id is None:
            raise TokenizerError("the tokenizer of the base needs its tokenizer.json and the id of its eos")
        return BaseTokenizer(path, eos_id)
    raise TokenizerError(f"there is no tokenizer {name!r}: byte or base")
