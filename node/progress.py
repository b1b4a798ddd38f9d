"""How far something long is: one class, and one form, for commands, the log and /status.

    replaying 41 %, 12 of 29, 0.8/s, 21 s left
    writing 63 %, 171 of 271 MB, 9.8 MB/s, 10 s left       its `what` is "writing bytes"
    restoring, 14 s                                        nobody knows how long it takes

What is long is given a `Told` and calls it with what it does, how much of it is done, and of how much; it
knows nothing of who shows it. The rate is that since `what` began here: a download that goes on where an
earlier one ended is as fast as it is now.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Told = Callable[[str, int, int], None]
BYTES = " bytes"  # how `what` ends where bytes are counted
UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "B"))


def silent(_what: str, _done: int, _total: int) -> None:
    """For who does not want to know."""


def counted(told: Told, what: str, total: int) -> Callable[[int], None]:
    """For what says how much was done since it spoke last."""
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done = min(total, done + count)
        told(what, done, total)

    return more


class Progress:
    """Where one thing after the other is."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._what = ""
        self._done = self._total = self._from = 0
        self._began_s = clock()

    def update(self, what: str, done: int, total: int) -> None:
        """A `Told`. `total` 1: nobody knows how much it is; 0: `what` says it all."""
        if what != self._what or done < self._done or total != self._total:
            self._what, self._from, self._began_s = what, done, self._clock()
        self._done, self._total = done, total

    def end(self) -> None:
        """Nothing is under way."""
        self._what = ""

    @property
    def text(self) -> str:
        """As above; "" where nothing is under way."""
        seconds = self._clock() - self._began_s
        if not self._what:
            return ""
        if self._total == 0:
            return self._what.removesuffix(BYTES)
        if self._total == 1:
            return f"{self._what.removesuffix(BYTES)}, {_span(seconds)}"
        rate = (self._done - self._from) / seconds if seconds > 0 else 0.0
        return form(self._what, self._done, self._total, rate)


def form(what: str, done: int, total: int, rate: float) -> str:
    """`rate` in a second; 0: not known."""
    words = f"{what.removesuffix(BYTES)} {100 * min(done, total) // max(total, 1)} %"
    if what.endswith(BYTES):
        unit, _ = _unit(total)
        words += f", {done / unit:.{_digits(total)}f} of {size(total)}"
        speed = f"{size(rate)}/s"
    else:
        words += f", {done} of {total}"
        speed = f"{rate:.1f}/s" if rate >= 0.1 else f"{_span(1 / rate)} each" if rate > 0 else ""
    left = f", {_span((total - done) / rate)} left" if rate > 0 and done < total else ""
    return f"{words}, {speed}{left}" if rate > 0 else words


def size(count: float) -> str:
    """Bytes in words: `9.8 MB`."""
    unit, name = _unit(count)
    return f"{count / unit:.{_digits(count)}f} {name}"


def _unit(count: float) -> tuple[int, str]:
    return next((pair for pair in UNITS if count >= pair[0]), UNITS[-1])


def _digits(count: float) -> int:
    unit, _ = _unit(count)
    return 1 if unit > 1 and count / unit < 100 else 0


def _span(seconds: float) -> str:
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"
