"""Which member's contributions are unlike all others', round after round: it may train on something broken.

The rule: in LASTING records in a row that name it and two others at least, the cosine of its contribution to
the mean of all others (protocol/likeness.py) is below SHARE_MAX times the median of the others' cosines, and
lower by LESS_MIN.

Why so: members that each go their own way have cosines about 0, all of them, and nobody is told of. Of four,
three of whom agree by half and the fourth trains on random letters, the three have 0.5 and the fourth 0. Who
flips its signs has a negative one. Chance is small: two unrelated vectors of a million elements have a cosine
of 0.001. A member whose text is of another kind than the others', which are alike, is told of as well. That
is no fault, and it says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LASTING = 5  # records in a row
CONTRIBUTORS_MIN = 3  # of two nobody can say which is unlike the other
SHARE_MAX = 0.3  # Guess
LESS_MIN = (
    0.05  # Guess: of three members that agree by 0.13, as those of a small run do, one at random has 0.1 less
)

CURE = (
    "its text may be of another kind, which is no fault; or it trains on what is broken. Ask its operator to "
    "look at its data (tapestry data check) and losses"
)


@dataclass(frozen=True, slots=True)
class Unlike:
    """One member's, in the newest record that names it."""

    cosine: float
    others: float  # the median of theirs


class LikenessWatch:
    """At one node."""

    def __init__(self) -> None:
        self._in_a_row: dict[str, list[Unlike]] = {}  # LASTING at most

    @property
    def unlike(self) -> dict[str, Unlike]:
        """Who is unlike the others, for LASTING records or longer."""
        return {peer: seen[-1] for peer, seen in self._in_a_row.items() if len(seen) == LASTING}

    def seen(
        self, cosines: Mapping[str, float], is_member: Callable[[str], bool]
    ) -> tuple[list[str], list[str]]:
        """Of the contributors of a record; returns who is unlike the others from now on, and who no more."""
        for peer in [p for p in self._in_a_row if p not in cosines and not is_member(p)]:
            del self._in_a_row[peer]  # it has left
        before = self.unlike.keys()
        if len(cosines) < CONTRIBUTORS_MIN:
            return [], []
        for peer, cosine in cosines.items():
            others = statistics.median(other for name, other in cosines.items() if name != peer)
            if cosine < SHARE_MAX * others and cosine <= others - LESS_MIN:
                self._in_a_row[peer] = [*self._in_a_row.get(peer, ()), Unlike(cosine, others)][-LASTING:]
            else:
                self._in_a_row.pop(peer, None)
        now = self.unlike.keys()
        return sorted(now - before), sorted(before - now)
