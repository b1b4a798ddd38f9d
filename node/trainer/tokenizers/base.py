"""The tokenizer of a run's base: its tokenizer.json, through the `tokenizers` library, in that library's
threads.

How many threads it takes the environment of the process says (RAYON_NUM_THREADS, TOKENIZERS_PARALLELISM):
trainer/process.py sets both. A text that contains the name of a special token gets ordinary ids: data must
not be able to end a document or to speak as the system.

Must not import torch or transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from tapestry.node.trainer.tokenizers.api import TokenizerError
from tapestry.node.trainer.tokenizers.panics import panics_caught


class BaseTokenizer:
    """See api.Tokenizer."""

    name = "base"

    def __init__(self, path: Path, eos_id: int) -> None:
        """Raises TokenizerError. `eos_id` ends a document: the base's configuration says it, not `path`."""
        from tokenizers import Tokenizer

        self._path = path
        try:
            data = path.read_bytes()
            with panics_caught():
                self._tokenizer = Tokenizer.from_buffer(data)
        except OSError as error:
            raise TokenizerError(f"{path}: {error.strerror}") from error
        except Exception as error:  # the library raises Exception itself
            raise TokenizerError(f"{path}: not a tokenizer: {str(error)[:200]}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = _ids_end(self._tokenizer.get_vocab(with_added_tokens=True))
        if not 0 <= eos_id < self.vocab_size:
            raise TokenizerError(f"{path}: the end of a document is id {eos_id}, of {self.vocab_size} ids")
        self.eos_id = eos_id
        self.digest = blake3(data + b"%d" % eos_id).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Raises TokenizerError where the tokenizer has no token for a text."""
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        try:
            with panics_caught():
                encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises Exception itself: of an unknown token that it lacks
            raise TokenizerError(f"{self._path}: it cannot encode: {str(error)[:200]}") from error
        return [np.array(one.ids, dtype=dtype) for one in encoded]


def _ids_end(vocabulary: dict[str, int]) -> int:
    """Ids may have gaps."""
    return max(vocabulary.values(), default=-1) + 1


def eos_id_of(folder: Path) -> int:
    """The id that ends a document, by config.json, else tokenizer_config.json. Raises TokenizerError."""
    said = _json_of(folder / "config.json").get("eos_token_id")
    if isinstance(said, list) and said:
        said = said[0]
    if type(said) is int:
        return said
    token = _json_of(folder / "tokenizer_config.json").get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    for added in _json_of(folder / "tokenizer.json").get("added_tokens", []):
        if isinstance(added, dict) and added.get("content") == content and type(added.get("id")) is int:
            return int(added["id"])
    raise TokenizerError(
        f"{folder}: neither config.json nor tokenizer_config.json says which token ends a document"
    )


def _json_of(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
