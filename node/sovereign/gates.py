"""Whether a new version takes the place of the one before: HOME/gates.toml, or what holds without one.

    gain_kept_min = 0.95         # rebase: how far below the old base's loss it stays

    [[gate]]
    measure = "*/loss"           # names of measures, * for any text; several with |, each measured
    own = true                   # only what was held out of the member's own data
    gain_min = 0.02              # at least 2 % better than the base

    [[gate]]
    measure = "general/loss"
    fall_max = 0.01              # at most 1 % worse than the base

A gate that finds no measure of its name does not hold: what was not measured is not known to be good. Without
the file: what is held out of the member's own data is not worse than with the base (of preferences, the share
that is preferred; what their training costs in likelihood is no reason), and a rebase keeps 95 % of the gain.

The gain that a rebase keeps is counted from the old base, for both versions: people get a model that knows
what theirs knew. How much of it the new base knows by itself is said beside it, and is no reason to refuse:
where a base has learnt a member's language, there is less left to add. That the new version is better than
the new base alone is the other gate.

Must not import torch.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tapestry.node.errors import UserError
from tapestry.node.sovereign.derivative import Measure
from tapestry.node.spec.tables import Between, TableError, read_table, read_toml

OWN = "*/loss|*/prefers"
_SMALL = 1e-12  # a figure of 0 has no shares of itself


@dataclass(frozen=True, slots=True)
class Gate:
    """One condition."""

    measure: Annotated[
        str, "Which measures: names of the report, * for any text; several with |, each must be there."
    ]
    own: Annotated[bool, "Only those of the member's own held-out data."] = False
    gain_min: Annotated[float, Between(-1e9, 1e9), "At least so much better."] = 0.0
    fall_max: Annotated[float, Between(0.0, 1e9), "At most so much worse; it goes before gain_min."] = 0.0
    absolute: Annotated[bool, "In the measure's own unit. Else as a share of the base's figure."] = False
    against: Annotated[Literal["base", "before"], "The parent's figure, or that of the version before."] = (
        "base"
    )

    @property
    def least(self) -> float:
        return -self.fall_max if self.fall_max else self.gain_min


@dataclass(frozen=True, slots=True)
class Gates:
    """All that must hold."""

    gate: Annotated[tuple[Gate, ...], "Every one of them."] = (Gate(OWN, own=True),)
    gain_kept_min: Annotated[
        float,
        Between(-10.0, 10.0),
        "rebase: the gain over the old base on own held-out data, as a share of the version before's.",
    ] = 0.95

    @classmethod
    def load(cls, path: Path) -> Gates:
        """Those of the file; the usual ones if there is none. Raises UserError."""
        if not path.exists():
            return cls()
        try:
            return read_table(cls, read_toml(path))
        except TableError as error:
            raise UserError(f"{path}: {error}") from error


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether all gates hold, and what each found."""

    holds: bool
    reasons: tuple[str, ...]  # those that do not hold first


def judge(
    gates: Gates,
    now: Sequence[Measure],
    base: Sequence[Measure],
    before: Sequence[Measure] = (),  # of the version before, on the same sets
    before_base: Sequence[Measure] = (),  # of the base that it stands on
) -> Verdict:
    """Decides promotion. A version that was made from another one is also asked what it kept of its gain."""
    found = [line for gate in gates.gate for line in _asked(gate, now, base, before)]
    if before:
        found += _share_kept(gates.gain_kept_min, now, base, before, before_base)
    failed = [text for held, text in found if not held]
    return Verdict(not failed, (*failed, *(text for held, text in found if held)))


def _asked(
    gate: Gate, now: Sequence[Measure], base: Sequence[Measure], before: Sequence[Measure]
) -> Iterator[tuple[bool, str]]:
    meant = [one for one in now if one.own or not gate.own]
    chosen = [one for one in meant if _matches(one.name, gate.measure)]
    # Text has no preferences and preferences have no loss: of what is asked without a file, one is enough.
    for wanted in [gate.measure] if gate.measure == OWN else gate.measure.split("|"):
        if not any(_matches(one.name, wanted) for one in meant):
            yield False, f"{wanted}: was not measured"
    others = _by_name(before or base if gate.against == "before" else base)
    for one in chosen:
        other = others.get(one.name)
        if other is None:
            yield False, f"{one.name}: was not measured on the {gate.against}"
            continue
        gain = one.gain_over(other.value)
        if not gate.absolute:
            gain /= max(abs(other.value), _SMALL)
        yield gain >= gate.least, _said(one, other, gain, gate)


def _said(one: Measure, other: Measure, gain: float, gate: Gate) -> str:
    by = f"{gain:+.4f}" if gate.absolute else f"{100 * gain:+.2f} %"
    least = f"{gate.least:+.4f}" if gate.absolute else f"{100 * gate.least:+.2f} %"
    verb = "holds" if gain >= gate.least else "fails"
    return (
        f"{one.name}: {verb}: {other.value:.4f} to {one.value:.4f} against the {gate.against}, "
        f"a gain of {by}, asked {least}"
    )


def _share_kept(
    least: float,
    now: Sequence[Measure],
    base: Sequence[Measure],
    before: Sequence[Measure],
    before_base: Sequence[Measure],
) -> Iterator[tuple[bool, str]]:
    """Of every own loss: the gain over the old base, beside what the version before had over it."""
    new_grounds, olds, grounds = _by_name(base), _by_name(before), _by_name(before_base)
    for one in now:
        old, ground, new_ground = olds.get(one.name), grounds.get(one.name), new_grounds.get(one.name)
        if not (one.own and _matches(one.name, OWN)) or not (old and ground and new_ground):
            continue
        had = old.gain_over(ground.value)
        if had <= _SMALL:
            continue  # there is nothing that could be kept
        share, by_base = one.gain_over(ground.value) / had, new_ground.gain_over(ground.value) / had
        verb = "holds" if share >= least else "fails"
        yield (
            share >= least,
            f"{one.name}: {verb}: keeps {100 * share:.1f} % of the gain of the version before "
            f"(the new base alone has {100 * by_base:.1f} %), asked {100 * least:.1f} %",
        )


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split("|"))


def _by_name(measures: Iterable[Measure]) -> dict[str, Measure]:
    return {one.name: one for one in measures}
