"""What is said of a model that cannot be used: one line, and what to do about it.

Standard library only: the command line shows these lines, and the worker sends them to its node.
"""

from __future__ import annotations


class ModelError(ValueError):
    """A base, a configuration or weights that cannot be used; `hint` says what to do, or is empty."""

    def __init__(self, line: str, hint: str = "") -> None:
        super().__init__(line)
        self.hint = hint


def one_line(error: Exception) -> str:
    """What a library raised, clipped, for the line of a ModelError."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
