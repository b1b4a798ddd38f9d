"""What `tapestry doctor` says, one line a look: daemon/doctor.py looks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    PASSED = "ok"
    WRONG = "WRONG"
    UNKNOWN = "not checked"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. A wrong one has a cure."""

    what: str
    verdict: Verdict
    text: str
    cure: str = ""

    def table(self) -> dict[str, str]:
        """For --json."""
        return {"what": self.what, "verdict": self.verdict.value, "text": self.text, "cure": self.cure}


def passed(what: str, text: str) -> Finding:
    return Finding(what, Verdict.PASSED, text)


def wrong(what: str, text: str, cure: str) -> Finding:
    return Finding(what, Verdict.WRONG, text, cure)


def unknown(what: str, text: str) -> Finding:
    return Finding(what, Verdict.UNKNOWN, text)
