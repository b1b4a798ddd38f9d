"""What a tokenizer is to this project."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class TokenizerError(ValueError):
    """A tokenizer cannot be used; one line that says why."""


class Tokenizer(Protocol):
    """Text to ids. `encode_batch` adds nothing at the beginning or end, and no text can spell a special
    token."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str:
        """Equal digests mean equal ids for every document, with what begins and ends it."""

    @property
    def vocab_size(self) -> int:
        """All ids are below."""

    @property
    def eos_id(self) -> int:
        """Ends every document."""

    @property
    def bos_id(self) -> int | None:
        """Begins every document; None: nothing does."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Unsigned integers (length,) for each text."""
