"""Which of a run's settings a record may change, and what values they may have.

One table for both ways in: spec/run.py has the bounds of these keys from here, so that a change is judged as
run.toml is. What is not here shapes the state or the messages, or says who may go on alone: that takes
another run. A changed value is in force from the state that its record makes, and is looked up in the roll of
the state that is meant (`Roll.settings`), so that a restart, a joiner and a fork find the same.

Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tapestry.node.protocol.strict import Malformed

Value = float | str  # a word is one of Setting.words
Settings = Mapping[str, Value]  # keys of SETTINGS

NUMBER_CHARS_MAX = 24
SHOWN_CHARS_MAX = 60  # of a value that is refused


@dataclass(frozen=True, slots=True)
class Between:
    """A number from low to high; `above` leaves out low itself."""

    low: float
    high: float
    above: bool = False
    multiple_of: int = 1

    def admits(self, value: float) -> bool:
        inside = self.low <= value <= self.high and not (self.above and value == self.low)
        return inside and not (self.multiple_of > 1 and value % self.multiple_of)

    def __str__(self) -> str:
        low, high = _number(self.low), _number(self.high)
        steps = f", a multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"above {low}, at most {high}{steps}" if self.above else f"from {low} to {high}{steps}"


@dataclass(frozen=True, slots=True)
class Setting:
    """A key of run.toml that records may change."""

    bounds: Between | None  # of a number; None: it is a word
    words: tuple[str, ...] = ()  # that it may be in place of a number
    whole: bool = False

    def takes(self, value: Value) -> bool:
        return value in self.words if isinstance(value, str) else self.admits(value)

    def admits(self, number: float) -> bool:
        fits = self.bounds is not None and self.bounds.admits(number)
        return fits and not (self.whole and number != int(number))

    def __str__(self) -> str:
        kind = "an integer" if self.whole else "a number"
        numbers = [] if self.bounds is None else [f"{kind} {self.bounds}"]
        return " or ".join([*(f'"{word}"' for word in self.words), *numbers])


AUTO: Final = ("auto",)

SETTINGS: Final[Mapping[str, Setting]] = {
    "train.lr": Setting(Between(0, 10, above=True)),
    "train.inner_steps": Setting(Between(1, 100_000), whole=True),  # 0 in run.toml makes another kind of run
    "train.accumulation": Setting(Between(1, 4_096), whole=True),
    "train.batch_size": Setting(Between(1, 65_536), whole=True),
    "outer.lr": Setting(Between(0, 10, above=True)),
    "gate.margin": Setting(Between(0, 10)),
    "audit.share": Setting(Between(0, 1)),
    "audit.on_lie": Setting(None, ("remove", "rollback", "mark")),
    "round.straggler_wait_s": Setting(Between(0, 86_400), AUTO),
    "round.closing_grace_s": Setting(Between(0, 86_400), AUTO),
    "round.commit_grace_s": Setting(Between(0, 3_600)),
    "round.stall_s": Setting(Between(0.5, 3_600)),  # Guess: with less than run.toml takes, nobody is heard
    "round.exchange_max_s": Setting(Between(1, 604_800), AUTO),
    "round.quorum_loss_s": Setting(Between(1, 604_800), AUTO),
    "round.wait_max_s": Setting(Between(60, 604_800)),
    "round.min_members": Setting(Between(1, 10_000), whole=True),
    "round.max_influence": Setting(Between(0, 1, above=True)),
}


def bounds_of(key: str) -> Between:
    """What run.toml allows for a key of SETTINGS that is a number."""
    bounds = SETTINGS[key].bounds
    assert bounds is not None
    return bounds


def read_setting(value: str) -> tuple[str, Value]:
    """Of `set`: `key value`; a number in plain decimals, one text for one number. Raises Malformed."""
    key, _, word = value.partition(" ")
    setting = SETTINGS.get(key)
    if setting is None:
        raise Malformed(f"a setting must be one of {', '.join(SETTINGS)}")
    if word in setting.words:
        return key, word
    if not _is_plain(word) or not setting.admits(float(word)):
        raise Malformed(f"{key}: {word[:SHOWN_CHARS_MAX]} is not {setting}")
    return key, float(word)


def _is_plain(word: str) -> bool:
    short = len(word) <= NUMBER_CHARS_MAX
    return short and re.fullmatch(r"(0|[1-9]\d*)(\.\d*[1-9])?", word, re.ASCII) is not None


def number_of(settings: Settings, key: str, given: float) -> float:
    """A setting that is always a number. `given`: the spec's, where no record has changed it."""
    value = settings.get(key, given)
    assert not isinstance(value, str)
    return value


def word_of(settings: Settings, key: str, given: str) -> str:
    """A setting that is always a word."""
    return str(settings.get(key, given))


def shown(value: Value) -> str:
    """For people."""
    return value if isinstance(value, str) else f"{value:.9g}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)
