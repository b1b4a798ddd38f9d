"""How many may come: a token bucket, kept as the time when the next one is due. Pure: `now` comes in."""

from __future__ import annotations


class Turns:
    """So many a second, and as many as `burst` at once after a quiet time."""

    def __init__(self, per_s: float, burst: int) -> None:
        self.every_s = 1.0 / per_s
        self._burst_s = self.every_s * burst
        self._next_at = 0.0

    def wait_s(self, now: float) -> float:
        """Until the next one is due; 0 or less: it is."""
        return self._next_at - now

    def take(self, now: float) -> None:
        """One comes, due or not."""
        self._next_at = max(self._next_at, now - self._burst_s) + self.every_s
