"""The records of a run, one after the other: each checked against the one before, and nothing else kept.

`Follower` holds what it takes to judge the next record (its place: head, electorate, members), so
a chain of any length is verified in the memory of one record. Reading touches no file: unlike disk/store.py
it cuts no torn line off, because a proof must not mend what it looks at.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tapestry.node.disk.files import has_another_end, is_sealed, unseal
from tapestry.node.home import Home
from tapestry.node.protocol import strict
from tapestry.node.protocol.canon import Crypto, InvalidRecord, canonical
from tapestry.node.protocol.members import ROLLBACK_EPOCHS_MAX
from tapestry.node.protocol.place import Place, check_record, genesis_place, next_place, waits
from tapestry.node.protocol.record import (
    Genesis,
    Record,
    genesis_from_dict,
    genesis_to_dict,
    record_from_dict,
    record_to_dict,
)
from tapestry.node.spec.run import RunSpec

GENESIS_BYTES_MAX = 1 << 20  # guess: a spec has at most 64 kB
LINE_BYTES_MAX = 16 << 20  # guess: a record with 1,024 members and as many signatures has 0.4 MB


class Broken(ValueError):
    """A file does not hold; `epoch` is of the record at fault, or None."""

    def __init__(self, text: str, epoch: int | None = None, unfinished: bool = False) -> None:
        super().__init__(text)
        self.epoch = epoch
        self.unfinished = unfinished  # it may be a line that a live node is writing


@dataclass(slots=True)
class Follower:
    """Where a chain is; `take` goes on by one record."""

    genesis: Genesis
    spec: RunSpec
    crypto: Crypto
    at: Place
    island_from: int | None = None  # epoch of the record with which an island of this home's begins
    finds_island: bool = False  # of an export, which names none: it begins where no other member goes along
    # Of the newest states, by epoch, as they are signed: a rollback goes back to one of them.
    signed: dict[int, str] = field(default_factory=dict)

    @property
    def epoch(self) -> int:
        return self.at.epoch

    @property
    def head(self) -> str:
        return self.at.head

    @property
    def electorate(self) -> tuple[str, ...]:
        """Who decides the next record."""
        return self.at.electorate

    @classmethod
    def start(
        cls, genesis: Genesis, spec: RunSpec, crypto: Crypto, island_from: int | None = None
    ) -> Follower:
        """At epoch 0."""
        return cls(genesis, spec, crypto, genesis_place(genesis), island_from)

    def take(self, record: Record) -> None:
        """Link, electorate, signatures, voices and changes, as a member judges them. Raises InvalidRecord."""
        body, rules = record.body, self.spec.round
        if self.epoch == 0 and body.state_digest != self.genesis.state_digest:
            raise InvalidRecord("genesis", "record 1 follows another state than that of the genesis")
        if self.finds_island and self.island_from is None and body.forced:
            self.island_from = body.epoch if waits(self.at, rules.on_quorum_loss) else None
        policy = "continue" if body.epoch == self.island_from else rules.on_quorum_loss
        check_record(record, self.at, self.crypto, rules.max_influence, policy)
        self._check_state(self.epoch, body.state_digest)
        self.at = next_place(self.at, record)

    def _check_state(self, epoch: int, digest: str) -> None:
        """Of the state that the next record says it is made from: where the run was rolled back, it was
        signed before. Raises InvalidRecord."""
        to = self.at.roll.rolled.get(epoch)
        if to is not None and self.signed.get(to) != digest:
            text = f"record {epoch + 1}: its state is not that of epoch {to}, which record {epoch} names"
            raise InvalidRecord("rollback", text)
        self.signed[epoch] = digest
        self.signed.pop(epoch - ROLLBACK_EPOCHS_MAX - 2, None)


def island_from(home: Home) -> int | None:
    """With which record the home's island begins, if it is on one or is one that was left. Raises OSError.

    Its first record is forced, which members of a run that waits (`on_quorum_loss`) take from nobody.
    """
    before = Home(home.island).chain
    if home.island.exists():
        with contextlib.suppress(FileNotFoundError), before.open("rb") as lines:
            return 1 + sum(line.endswith(b"\n") for line in lines)
        return 1
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
        said = strict.table(json.loads(home.left_island.read_bytes()), ("since_epoch",), "an island")
        return 1 + strict.integer(said["since_epoch"], 0, 2**53, "since_epoch")
    return None


def read_genesis(path: Path, crypto: Crypto) -> tuple[Genesis, RunSpec]:
    """Signed, and in exactly the form in which a node writes it. Raises Broken, UserError, OSError."""
    with path.open("rb") as file:
        data = file.read(GENESIS_BYTES_MAX + 1)
    try:
        genesis = genesis_from_dict(json.loads(data), crypto)
    except (ValueError, RecursionError) as error:
        raise Broken(str(error)) from error
    if canonical(genesis_to_dict(genesis)) + b"\n" != data:
        raise Broken("not in the form in which a node writes it")
    return genesis, RunSpec.of_genesis(genesis)


def read_records(path: Path, crypto: Crypto) -> Iterator[Record]:
    """Each in exactly the form in which a node writes it; not yet checked. Raises Broken, OSError."""
    if not path.exists():
        return
    epoch = 0
    with path.open("rb") as file:
        while line := file.readline(LINE_BYTES_MAX):
            epoch += 1
            if not line.endswith(b"\n"):
                if has_another_end(line):
                    raise Broken("it ends with another byte than a newline", epoch)
                raise Broken("its last line is not finished", epoch, unfinished=True)
            try:
                record = record_from_dict(unseal(line[:-1]), crypto)
            except ValueError as error:
                raise Broken(str(error), epoch) from error
            if not is_sealed(line[:-1], record_to_dict(record)):
                raise Broken("not in the form in which a node writes it", epoch)
            yield record
