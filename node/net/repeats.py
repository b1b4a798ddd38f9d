"""Which of many like events may be told."""

from __future__ import annotations

import math

REPEATS_KEPT = 1024


class Repeats:
    """Which of many like events may be told: the first, and one in every `every_s`."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._told_at: dict[object, float] = {}

    def may_tell(self, key: object, now: float) -> bool:
        if now - self._told_at.get(key, -math.inf) < self._every_s:
            return False
        if len(self._told_at) >= REPEATS_KEPT:
            self._told_at.clear()
        self._told_at[key] = now
        return True
