"""One measured recovery: the times, what they may be at most, and what did not hold."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


@dataclass
class Row:
    """One measured time, and what it may be at most."""

    fault: str
    guarantee: str
    limit_s: float | None
    times_s: list[float] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, time_s: float) -> None:
        self.times_s.append(round(time_s, 2))
        if self.limit_s is not None and time_s > self.limit_s:
            self.missed.append(f"{time_s:.2f} s is more than {self.limit_s:g} s")

    def check(self, holds: object, what: str) -> None:
        if not holds:
            self.missed.append(what)

    def line(self) -> str:
        times = self.times_s
        figures = (
            f"{len(times)} | {statistics.median(times):.2f} | {max(times):.2f}" if times else "0 | - | -"
        )
        limit = "-" if self.limit_s is None else f"{self.limit_s:g}"
        held = f"missed {len(self.missed)}" if self.missed else "held"
        return f"| {self.fault} | {self.guarantee} | {figures} | {limit} | {held} |"
