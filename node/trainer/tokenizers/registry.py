"""Tokenizers by the name in the run spec's data.tokenizer."""

from __future__ import annotations

from pathlib import Path

from tapestry.node.spec.training import DataSpec
from tapestry.node.trainer.tokenizers.api import Tokenizer, TokenizerError
from tapestry.node.trainer.tokenizers.base import BaseTokenizer, bos_id_of, eos_id_of
from tapestry.node.trainer.tokenizers.byte import ByteTokenizer


def open_tokenizer(
    name: str, path: Path | None = None, eos_id: int | None = None, bos_id: int | None = None
) -> Tokenizer:
    """`path` is a tokenizer.json, `eos_id` ends a document, `bos_id` begins one (None: nothing does); "byte"
    needs none of them. Raises TokenizerError."""
    if name == "byte":
        return ByteTokenizer()
    if name == "base":
        if path is None or eos_id is None:
            raise TokenizerError("the tokenizer of the base needs its tokenizer.json and the id of its eos")
        return BaseTokenizer(path, eos_id, bos_id)
    raise TokenizerError(f"there is no tokenizer {name!r}: byte or base")


def run_tokenizer(data: DataSpec, folder: Path) -> Tokenizer:
    """As a run reads documents. `folder` holds the base's tokenizer, or that of a model made from it. Raises
    TokenizerError."""
    if data.tokenizer == "byte":
        return ByteTokenizer()
    bos_id = bos_id_of(folder) if data.add_bos else None
    return open_tokenizer(data.tokenizer, folder / "tokenizer.json", eos_id_of(folder), bos_id)
