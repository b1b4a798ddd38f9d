"""HOME/derivatives: what was made of what, how, from which data, how it measured, and which version counts.

    derivatives/NAME/derivative.json   the versions, and which of them is current
    derivatives/NAME/v3/model/         a Hugging Face directory
    derivatives/NAME/v3/adapters/      method lora: the same as a PEFT directory
    derivatives/NAME/v3/report.json    its evaluations
    derivatives/NAME/v3/history.json   loss by step, as the trainer logged it
    derivatives/NAME/v3/work/          of a training that has not ended: from here it goes on
    derivatives/NAME/tokens.json       tokens of its own, the same for all of them
    derivatives/NAME/held-out.jsonl    ids that no version is trained on, the same for all of them
    derivatives/.bases/EPOCH-HEAD/     the shared base at the epochs that versions were made from

A version is written once, after all its files: one that is not in derivative.json is not finished. Versions
stay until a person removes them. The folder is closed to others: it holds the member's own data as ids.

Must not import torch or transformers.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tapestry.node.disk.files import atomic_write
from tapestry.node.errors import ExitCode, UserError, printable
from tapestry.node.home import Home
from tapestry.node.lineage.listed import NAME as FILE
from tapestry.node.lineage.listed import digest_of, listed, text_of
from tapestry.node.sovereign.recipe import Recipe
from tapestry.node.spec.tables import Between, Pattern, TableError, plain, read_table

FORM = 1  # of derivative.json
FILE_BYTES_MAX = 16 << 20  # guess: a version with 256 sources takes 100 kB
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
How = Literal["derive", "rebase", "merge", "island"]
HEX = Pattern(r"[0-9a-f]{64}", "64 hex digits")


@dataclass(frozen=True, slots=True)
class Parent:
    """The state of the shared base that a version stands on."""

    run_id: Annotated[str, HEX, "Of the run."]
    run_name: Annotated[str, "As people call it."]
    epoch: Annotated[int, Between(0, 2**53), "Of the state."]
    head: Annotated[str, HEX, "Of the record that made it; of epoch 0, the run id."]
    state_digest: Annotated[str, HEX, "As the chain signs it one record later."]
    weights: Annotated[str, HEX, "trainer/models/weights.py's digest of the exported tensors."]

    @property
    def folder(self) -> str:
        """Its name in .bases."""
        return f"{self.epoch:08d}-{self.head[:16]}"

    def __str__(self) -> str:
        return f"epoch {self.epoch} of {printable(self.run_name)} (head {self.head[:12]})"


@dataclass(frozen=True, slots=True)
class DataUse:
    """One source as it was when it was read."""

    source: Annotated[str, "As it was given."]
    digest: Annotated[str, HEX, "blake3 of the ids that it gave."]
    examples: Annotated[int, Between(0, 2**53), "Trained on: rows, or windows of text."]
    held_out: Annotated[int, Between(0, 2**53), "Measured on."]
    left_out: Annotated[tuple[str, ...], "What was not used, and why."] = ()
    real: Annotated[tuple[str, ...], "Where it lay, if it was named by a link."] = ()


@dataclass(frozen=True, slots=True)
class Transplant:
    """How differences were joined: transplant.py says what each way does."""

    way: Annotated[Literal["task", "ties", "dare"], "Task vectors, TIES or DARE."] = "task"
    scale: Annotated[float, Between(0.0, 10.0, above=True), "What each difference is multiplied by."] = 1.0
    density: Annotated[
        float,
        Between(0.0, 1.0, above=True),
        "ties: the share kept, the largest. dare: the share kept, drawn.",
    ] = 0.5
    seed: Annotated[int, Between(0, 2**31 - 1), "dare draws by it."] = 0


PLAIN = Transplant()


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of a report."""

    name: Annotated[str, "SET/loss, TASK/acc, COMMAND/...: gates name it."]
    value: Annotated[float, "Of this model."]
    higher_is_better: Annotated[bool, "Else lower is."]
    count: Annotated[int, Between(0, 2**53), "Of tokens, pairs or samples behind it; 0: not said."] = 0
    own: Annotated[bool, "Measured on what the member held out of its own data."] = False

    def gain_over(self, other: float) -> float:
        """By how much it is better than `other`."""
        return self.value - other if self.higher_is_better else other - self.value


@dataclass(frozen=True, slots=True)
class SourcesFor:
    """What was read for one purpose."""

    purpose: Annotated[str, "derive:NAME; read: where links led when they were read."]
    sources: Annotated[tuple[str, ...], "Paths."]


@dataclass(frozen=True, slots=True)
class Version:
    """One finished model."""

    number: Annotated[int, Between(1, 1_000_000), "From 1 on."]
    how: Annotated[How, "Which command made it."]
    parent: Annotated[Parent, "What it stands on."]
    recipe: Annotated[Recipe, "Of its training, or of its repair."]
    made_of: Annotated[tuple[str, ...], "Versions that a rebase or a merge took, as NAME:N."]
    transplant: Annotated[Transplant, "rebase and merge: how."]
    weights: Annotated[tuple[float, ...], "merge: of each in made_of."]
    data: Annotated[tuple[DataUse, ...], "What was trained on."]
    steps: Annotated[int, Between(0, 2**53), "Of the optimizer."]
    tokens: Annotated[int, Between(0, 2**53), "That it read while training."]
    seconds: Annotated[float, Between(0.0, 1e12), "Of training, restarts included."]
    made_at: Annotated[str, "UTC."]
    digest: Annotated[str, HEX, "trainer/models/weights.py's digest of model/."]
    report: Annotated[tuple[Measure, ...], "After."]
    base_report: Annotated[tuple[Measure, ...], "The same measures of the parent."]
    promoted: Annotated[bool, "Whether its gate held."]
    reasons: Annotated[tuple[str, ...], "Why not; or what each gate found."]
    own_tokens: Annotated[int, Between(0, 1 << 20), "That its tokenizer has beyond the base's."] = 0
    ids_saved: Annotated[
        float, Between(-1.0, 1.0), "By own tokens, of the ids that the base takes for what was held out."
    ] = 0.0
    uses: Annotated[
        tuple[SourcesFor, ...],
        "All that it and its parts were made from, or are measured on. Written by an older node: none.",
    ] = ()


@dataclass(frozen=True, slots=True)
class Derivative:
    """All versions of one name."""

    name: Annotated[str, "As on the command line."]
    current: Annotated[int, Between(0, 1_000_000), "The version that counts. 0: none passed its gate."]
    versions: Annotated[tuple[Version, ...], "Oldest first."]
    form: Annotated[int, Between(FORM, FORM), "Of this file."] = FORM
    files: Annotated[
        tuple[str, ...], "Every file of the finished versions, of own tokens and held out: digest and name."
    ] = ()
    digest: Annotated[
        str, "blake3 of all the rest here, as canonical JSON; written by an older node: none."
    ] = ""

    def version(self, number: int | None = None) -> Version:
        """A version; the current one, or where there is none the newest. Raises UserError."""
        wanted = number or self.current or self.versions[-1].number
        found = next((one for one in self.versions if one.number == wanted), None)
        if found is None:
            there = ", ".join(str(one.number) for one in self.versions)
            raise UserError(f"{self.name} has no version {wanted}; there are {there}")
        return found

    def released(self, number: int | None) -> Version:
        """The version to export: as `version`, but one that passed its gate where no number is given. Raises
        UserError."""
        if number is None and not self.current:
            raise UserError(
                f"no version of {self.name} passed its gate: there is none that counts",
                hint=f"--version {self.versions[-1].number} exports the newest one all the same",
            )
        return self.version(number)

    @property
    def next_number(self) -> int:
        return self.versions[-1].number + 1 if self.versions else 1

    def with_version(self, version: Version) -> Derivative:
        """The same with one more, which is current if its gate held."""
        current = version.number if version.promoted else self.current
        return replace(self, current=current, versions=(*self.versions, version))


class Shelf:
    """A home's derivatives. Making one touches nothing."""

    def __init__(self, home: Home) -> None:
        self._home = home

    @property
    def home(self) -> Home:
        return self._home

    @property
    def folder(self) -> Path:
        return self._home.path / "derivatives"

    @property
    def cache(self) -> Path:
        """What is tokenized, shared by all of them."""
        return self.folder / ".cache"

    def of(self, name: str) -> Path:
        """Raises UserError for a name that is none."""
        if not NAME.fullmatch(name):
            raise UserError(f"{name!r} is no name of a derivative: letters, digits, - and _, at most 64")
        if name == "base":
            raise UserError("base is the name of the shared base: choose another")
        return self.folder / name

    def base(self, parent: Parent) -> Path:
        return self.folder / ".bases" / parent.folder

    def model(self, name: str, number: int) -> Path:
        return self.of(name) / f"v{number}" / "model"

    def names(self) -> list[str]:
        return sorted(path.parent.name for path in self.folder.glob("*/derivative.json"))

    def read(self, name: str) -> Derivative | None:
        """None if no version of it was finished. Raises UserError for a file that is not ours."""
        path = self.of(name) / FILE
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}", exit_code=ExitCode.FAILED) from error
        try:
            return derivative_from(data)
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}", exit_code=ExitCode.FAILED) from error

    def require(self, name: str) -> Derivative:
        """Raises UserError if there is none."""
        found = self.read(name)
        if found is None or not found.versions:
            known = ", ".join(self.names()) or "none yet"
            raise UserError(f"there is no derivative {name} in {self._home.path} (there are: {known})")
        return found

    def parts(self, version: Version) -> list[tuple[str, Version]]:
        """What it was made of, with the derivatives' names; without those that are gone. Raises UserError."""
        found = []
        for made_of in version.made_of:
            name, _, number = made_of.partition(":")
            part = self.read(name)
            found += [(name, one) for one in (part.versions if part else ()) if one.number == int(number)]
        return found

    def write(self, derivative: Derivative, changed: int) -> Derivative:
        """Gives what it wrote: with the digests of the files of version `changed`, and of those beside."""
        folder = self.of(derivative.name)
        derivative = replace(derivative, files=listed(folder, derivative.files, changed), digest="")
        derivative = replace(derivative, digest=digest_of(plain(derivative)))
        atomic_write(folder / FILE, text_of(plain(derivative)), 0o600)
        return derivative

    @contextmanager
    def locked(self, name: str) -> Iterator[Path]:
        """The folder of `name`, made if it is not there, for this process alone. Raises UserError."""
        folder = self.of(name)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UserError(f"cannot make {folder}: {error.strerror}", exit_code=ExitCode.FAILED) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise UserError(f"another command is at work on {name}: wait for it, or end it") from error
        try:
            yield folder
        finally:
            os.close(fd)


def derivative_from(data: bytes) -> Derivative:
    """Strict. Raises ValueError."""
    if len(data) > FILE_BYTES_MAX:
        raise ValueError(f"larger than {FILE_BYTES_MAX} bytes")
    try:
        table: Any = json.loads(data)
        return read_table(Derivative, table)
    except (TableError, RecursionError) as error:
        raise ValueError(str(error)) from error
