"""What a node waits for: one form, made by the core and, before there is one, by the daemon.

    1 contribution, the run asks for 2, for 5 min; ends when one more member contributes: ...
    what, for how long, and what would end it

Status, /readyz, page, log and metrics show this and nothing else. A wait that has lasted for longer than is
usual is told to people without being asked for.

Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

USUAL_S = 60.0  # Guess: what is waited for longer, a person wants to hear of
USUAL_EPOCHS = 2.0  # for who still trains: so many of the epochs that were measured. Guess
UNMEASURED_S = 600.0  # for the same, before an epoch was measured. Guess
BY_ITSELF_S = math.inf  # where something comes, and says how far it is

KINDS = (
    "run",  # a restored home looks for its run
    "base",  # the base's weights come from a peer
    "admission",  # an applicant, or who was removed
    "trainer",  # it starts, or does not work; or a script is to open the home
    "state",  # records, updates or a state that this node lacks
    "vote",  # it lost its disk: a record must name it anew
    "quorum",  # a majority of the electorate is not there
    "members",  # too few for `round.min_members`
    "round",  # a round's own waiting: for who trains, for a leader, shards and votes
)


@dataclass(frozen=True, slots=True)
class Wait:
    """A node waits."""

    kind: str  # one of KINDS
    what: str  # for what, in words
    ends: str  # what would end it, and what a person can do
    for_s: float = 0.0  # seconds so far
    usual_s: float = USUAL_S  # up to here it is no news

    @property
    def lasting(self) -> bool:
        """Whether it is news."""
        return self.for_s >= self.usual_s

    @property
    def text(self) -> str:
        """All of it."""
        return f"{self.what}, for {span(self.for_s)}; {self.ends}"


def span(seconds: float) -> str:
    """`40 s`, `5.0 min`, `2.5 h`, `3.1 d`."""
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{max(seconds, 0.0):.0f} s"
