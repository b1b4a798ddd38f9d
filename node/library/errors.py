"""What a script is told when its swarm cannot go on: one line, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class SwarmError(RuntimeError):
    """`str` is the line, with the details and the hint after it where there are some."""

    def __init__(self, line: str, hint: str | None = None, details: Sequence[str] = ()) -> None:
        self.line, self.hint, self.details = line, hint, tuple(details)
        super().__init__(
            "\n".join([line, *(f"  {one}" for one in details), *([f"hint: {hint}"] if hint else [])])
        )
