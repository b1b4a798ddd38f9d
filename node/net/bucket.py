"""How many bytes may pass now: a token bucket, kept as a debt (the leaky bucket as a meter).

Turner, "New directions in communications" (1986); the same as GCRA, the virtual scheduling algorithm of ITU-T
I.371, annex A, with the emission interval 1/rate and the tolerance burst/rate.

Every byte adds to the debt, which the rate pays off. Bulk asks first, and waits until its piece fits under
the burst; control never asks, and what it spends bulk waits for. So at the moment a bulk piece is let
through, what has passed in any t seconds up to then is at most burst + rate * t, control included. Nothing is
saved up beyond the burst: an idle hour buys no flood. And no more is owed than DEBT_S of the rate, of today's
where it changes: who floods us with what we did not ask for would else stop our bulk for long after. Where
whole messages are read once the debt is paid, one of them is always owed in full: else who is slow enough
would have a message for less than it costs, each DEBT_S.

Pure: `now` comes in, how long to wait comes out. Imports nothing.
"""

from __future__ import annotations

BURST_S = 0.1  # of the rate: 5 % of two seconds, and more than a busy loop is late. Guess
PIECE_S = (
    0.02  # of the rate: a piece of bulk is so long on the line, and waits so long for its forerunner. Guess
)
DEBT_S = 2.0  # Guess: longer than the control messages of a round take
PIECE_BYTES_MIN = 1 << 12  # below, what each write costs is more than its bytes. Guess
PIECE_BYTES_MAX = 1 << 18  # as much as an uncapped link writes at once


class Bucket:
    """One direction's budget. Bytes and seconds."""

    def __init__(
        self, bytes_per_second: float, now: float, debt_s: float = DEBT_S, message_bytes_max: int = 0
    ) -> None:
        """Of a debt as large as `message_bytes_max`, beyond the burst, nothing is forgiven."""
        self.piece_bytes = int(min(max(PIECE_S * bytes_per_second, PIECE_BYTES_MIN), PIECE_BYTES_MAX))
        self.burst_bytes = max(BURST_S * bytes_per_second, 2.0 * self.piece_bytes)
        self._debt_s = debt_s
        self._message_bytes_max = message_bytes_max
        self._rate = bytes_per_second
        self._debt = 0.0
        self._at = now

    def set_rate(self, bytes_per_second: float, now: float) -> None:
        """From now on. The burst stays, and what is owed, as far as `debt_s` of this rate pay for it, or one
        message."""
        self._pay(now)
        self._rate = bytes_per_second
        self._debt = min(self._debt, self._debt_bytes_max)

    def is_owed(self, now: float) -> bool:
        """Whether some of what passed is not paid off yet."""
        self._pay(now)
        return self._debt > 0.0

    def wait_s(self, count: int, now: float) -> float:
        """How long till `count` bytes, at most `piece_bytes`, may pass; 0.0 if now."""
        assert count <= self.piece_bytes, "a piece has to fit under the burst"
        self._pay(now)
        over = self._debt + count - self.burst_bytes
        return over / self._rate if over >= 1.0 else 0.0  # less than a byte is a rounding of the clock

    def spend(self, count: int, now: float) -> None:
        """`count` bytes pass now, allowed or not."""
        self._pay(now)
        self._debt = min(self._debt + count, self._debt_bytes_max)

    @property
    def _debt_bytes_max(self) -> float:
        return self.burst_bytes + max(self._debt_s * self._rate, self._message_bytes_max)

    def _pay(self, now: float) -> None:
        self._debt = max(0.0, self._debt - self._rate * max(0.0, now - self._at))
        self._at = max(self._at, now)
