"""What was found by `tapestry verify`, and what a chain that holds says of one epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tapestry.node.protocol.record import Record
from tapestry.node.protocol.settings import Settings

FAULTS_MAX = 100  # that are kept: more say nothing new


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that does not hold."""

    file: str  # relative to what was verified
    epoch: int | None
    what: str

    def __str__(self) -> str:
        at = "" if self.epoch is None else f", epoch {self.epoch}"
        return f"{self.file}{at}: {self.what}"


@dataclass(slots=True)
class Proof:
    """What was found."""

    kind: str  # home, export, derivative
    run_id: str = ""
    run_name: str = ""
    epoch: int = 0
    head: str = ""
    alone_from: int | None = None  # epoch of the record from which on no majority stands behind the chain
    rolled: Mapping[int, int] = field(default_factory=dict)  # as protocol/path.py has it
    records: int = 0
    signatures: int = 0
    updates: int = 0
    checkpoints: int = 0
    files: int = 0
    derivatives: int = 0  # versions
    branches: int = 0  # that lost at forks
    descriptions: int = 0  # members that say something of their data
    egress_lines: int = 0
    egress_bytes: int = 0
    replayed_from: int | None = None
    replayed_to: int | None = None
    proven: bool | None = None  # the tensors of an export, by what members signed; None of a home
    unproven: str = ""  # why not, and what to do
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.faults

    def fault(self, file: str, what: str, epoch: int | None = None) -> None:
        if len(self.faults) < FAULTS_MAX:
            self.faults.append(Fault(file, epoch, what))


@dataclass(frozen=True, slots=True)
class Signed:
    """What the chain says of one epoch."""

    head: str
    result: str  # of the update that made it; "" of epoch 0
    state: str | None  # digest of the state, signed one record later; None at the head
    record: Record | None = None  # None of epoch 0
    settings: Settings = field(default_factory=dict)  # that the roll before the record had
