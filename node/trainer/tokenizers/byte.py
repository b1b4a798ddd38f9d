"""The byte tokenizer: UTF-8 bytes are ids 0 to 255, then three special ids. It needs no file.

Must not import torch, nor `tokenizers`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

VOCAB_SIZE = 259
BOS_ID, EOS_ID, PAD_ID = 256, 257, 258


class ByteTokenizer:
    """See api.Tokenizer. Text cut anywhere gives the same ids as the whole."""

    name = "byte"
    digest = "byte-1"
    vocab_size = VOCAB_SIZE
    eos_id = EOS_ID
    bos_id: int | None = None  # a run by bytes begins no document with BOS_ID

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8) for text in texts]


def encode(text: str) -> list[int]:
    """One text as a list."""
    return list(text.encode("utf-8", errors="surrogatepass"))
