"""What was seen of a run in which one member lies: what promises are about."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

LOSS_MAX = 0.10  # Guess: above the run without the liar, at the same epoch, in few epochs on one seed


@dataclass(slots=True)
class Seen:
    """All about the honest members; `liar` is the peer id of the other."""

    name: str
    liar: str
    honest: int = 0
    one_head: bool = False  # all honest members came to one epoch with one digest, after the lie
    quiet_round_s: float = math.nan  # medians
    lied_round_s: float = math.nan
    slower: float = math.nan  # a share of the round
    longest_s: float = math.nan  # of the rounds since the lie began
    quiet_rounds: int = 0
    lied_rounds: int = 0
    records: int = 0  # since the lie began
    epoch: int = 0  # the last one that is compared
    loss: float = math.nan
    loss_without: float = math.nan  # of the run without the liar, at that epoch
    refused: dict[str, int] = field(default_factory=dict)  # by reason, since the lie began
    accused: dict[str, str] = field(default_factory=dict)  # peer -> what was proven of it
    accusers: int = 0  # honest members that show such a proof
    removed: dict[str, str] = field(default_factory=dict)  # peer -> why
    withheld: int = 0  # inputs that the liar did not give to audits
    contributed: int = 0  # of these, those that count a contribution of the liar
    share_max: float = 0.0  # the largest part of a record's weight that the liar had
    told_of_twin: bool = False  # the liar's own member: that another node uses its key
    gated: int = 0  # lines that say that the gate found the liar's contribution the furthest
    faults: list[str] = field(default_factory=list)  # of the promise, and of what always holds

    @property
    def worse(self) -> float:
        """By what share of it the loss is above that of the run without the liar; NaN if not measured."""
        return self.loss / self.loss_without - 1.0


def loss_fault(seen: Seen, most: float = LOSS_MAX) -> list[str]:
    """The promise of those that may move numbers within bounds."""
    if seen.worse > most:
        return [
            f"the loss is {seen.worse:.0%} above that of the run without it, at most {most:.0%} is promised"
        ]
    return []


def refused_fault(seen: Seen, *reasons: str) -> list[str]:
    """The promise of those whose lie is seen by whom it is told."""
    if any(seen.refused.get(reason) for reason in reasons):
        return []
    return [f"nothing was refused as {' or '.join(reasons)}"]


def proof_fault(seen: Seen, words: str) -> list[str]:
    """The promise of those whose lie leaves a proof: every honest member names it, and it is removed."""
    faults = []
    if words not in seen.accused.get(seen.liar, ""):
        faults.append(f"it was not accused: {words}")
    elif seen.accusers < seen.honest:
        faults.append(f"{seen.accusers} of {seen.honest} honest members have the proof")
    if seen.liar not in seen.removed:
        faults.append("it was not removed")
    return faults
