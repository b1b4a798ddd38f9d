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

    def __init__(self, path: Path, eos_id: int, bos_id: int | None = None) -> None:
        """Raises TokenizerError. `eos_id` ends a document and `bos_id` begins one (None: nothing does):
        `eos_id_of` and `bos_id_of` find them."""
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
        if bos_id is not None and not 0 <= bos_id < self.vocab_size:
            raise TokenizerError(f"{path}: its BOS is id {bos_id}, of {self.vocab_size} ids")
        self.eos_id = eos_id
        self.bos_id = bos_id
        begins = b"" if bos_id is None else b" bos %d" % bos_id
        self.digest = blake3(data + b"%d" % eos_id + begins).hexdigest()

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
    named = _named_id(folder, "eos_token")
    if named is None:
        raise TokenizerError(
            f"{folder}: neither config.json nor tokenizer_config.json says which token ends a document"
        )
    return named


def bos_id_of(folder: Path) -> int:
    """The id that begins a document: what tokenizer.json puts before a text, else the bos_token that
    tokenizer_config.json names.

    Raises TokenizerError where there is none, or where it is the one that ends a document: that stands before
    the next document already.
    """
    put = _put_before(folder / "tokenizer.json")
    bos_id = _named_id(folder, "bos_token") if put is None else put
    if bos_id is None:
        raise TokenizerError(f"{folder}: data.add_bos is true, but the tokenizer has no BOS: set it to false")
    if bos_id == eos_id_of(folder):
        raise TokenizerError(
            f"{folder}: data.add_bos is true, but the tokenizer's BOS is its EOS, which stands between "
            "documents already: set it to false"
        )
    return bos_id


def adds_bos(folder: Path) -> bool:
    """Whether the base was pretrained with BOS before each document, by its tokenizer: tokenizer.json puts it
    before a text, or tokenizer_config.json has add_bos_token = true. Raises TokenizerError."""
    bos_id = _put_before(folder / "tokenizer.json")
    if bos_id is None and _json_of(folder / "tokenizer_config.json").get("add_bos_token") is True:
        bos_id = _named_id(folder, "bos_token")
    return bos_id is not None and bos_id != eos_id_of(folder)


def _put_before(path: Path) -> int | None:
    """The one id that the post-processor of a tokenizer.json puts before a text; None if it puts none, or
    several. Raises TokenizerError."""
    from tokenizers import Tokenizer

    try:
        with panics_caught():
            tokenizer = Tokenizer.from_buffer(path.read_bytes())
            tokenizer.no_padding()
            tokenizer.no_truncation()
            bare, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror}") from error
    except Exception as error:  # the library raises Exception itself
        raise TokenizerError(f"{path}: not a tokenizer: {str(error)[:200]}") from error
    return int(whole[0]) if bare and whole[1 : 1 + len(bare)] == bare else None


def _named_id(folder: Path, name: str) -> int | None:
    """Of the special token that tokenizer_config.json has under this name."""
    token = _json_of(folder / "tokenizer_config.json").get(name)
    content = token.get("content") if isinstance(token, dict) else token
    for added in _json_of(folder / "tokenizer.json").get("added_tokens", []):
        if isinstance(added, dict) and added.get("content") == content and type(added.get("id")) is int:
            return int(added["id"])
    return None


def _json_of(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
