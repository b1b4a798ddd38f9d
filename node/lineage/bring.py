"""`tapestry rejoin --bring`: what was learnt on an island, as part of one contribution to the run.

The difference of the parameters, at the island's head and where it began, goes to HOME/brought.safetensors.
From then on each contribution of this member carries it (trainer/brought.py), until the chain has a record
that names one: then the file goes aside, to HOME/brought.given. The chain alone decides that, so the
difference counts once however the node ends. It comes back if that record is left with a fork, or undone by a
rollback, and is deleted when no rollback can reach it any more. A contribution in a record of an epoch after
the island began carried it, because there was none without; but the first of those epochs was under way when
the island began, so of that one the contribution must be one that was made with it (HOME/brought.offered).

What it was learnt from is written down before the file (uses.py): it may be revoked meanwhile, and a
withdrawal names the record that took it.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tapestry.node.disk.files import atomic_write
from tapestry.node.disk.held import bare_state, open_run
from tapestry.node.disk.scratch import scratch_vectors
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage import island
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.snapshot import snapshot
from tapestry.node.lineage.uses import note, note_brought, note_taken_back
from tapestry.node.progress import Told
from tapestry.node.protocol.chain import Chain, records_from
from tapestry.node.protocol.members import ROLLBACK_EPOCHS_MAX, rollback_of
from tapestry.node.protocol.record import Record
from tapestry.node.spec.run import RunSpec
from tapestry.node.spec.training import ExternalSpec
from tapestry.node.trainer.brought import BroughtError, read_about, write_brought

OFFERED_MAX = 64  # guess: contributions of one epoch that was begun so often

_log = logging.getLogger("tapestry.node")


def bring(home: Home, told: Told) -> None:
    """Write the difference down, before `island.end`. Raises UserError."""
    began, here = island.require(home)
    note_brought(home, began.run_id, began.epoch)
    try:
        with tempfile.TemporaryDirectory(prefix=".bring-", dir=home.path) as scratch:
            told("bringing", 0, 2)
            before = _params(Home(home.island), began.epoch, Path(scratch) / "before")
            told("bringing", 1, 2)
            difference = _params(home, here.epoch, Path(scratch) / "after").sub_(before)
            about = {
                "run_id": began.run_id,
                "since_epoch": str(began.epoch),
                "since_head": began.head,
                "epoch": str(here.epoch),
                "head": here.head,
            }
            for old in (home.given, home.offered):  # of an island before
                old.unlink(missing_ok=True)
            write_brought(home.brought, difference, about)
    except OSError as error:
        raise UserError(
            f"cannot write {home.brought}: {error.strerror or error}", exit_code=ExitCode.FAILED
        ) from error


def _params(home: Home, epoch: int, folder: Path) -> Tensor:  # f32 (n,), a mapped file
    run = open_run(snapshot(home, folder), ReaderCrypto())
    assert run is not None, "island.require has read its chain"
    _require_bringable(run.spec)
    genesis = run.chain.genesis
    params = scratch_vectors(folder, ("params",), genesis.params)["params"]
    state = bare_state(run.spec, params, genesis.schema, genesis.run_id, folder)
    restored = run.restore(state, epoch)
    if restored is None or restored.epoch != epoch:
        raise UserError(
            f"{home.path} no longer holds what makes epoch {epoch}",
            exit_code=ExitCode.FAILED,
            hint="tapestry rejoin --keep NAME keeps what there is as a derivative",
        )
    shutil.rmtree(folder)  # the vectors have no name
    return params


def _require_bringable(spec: RunSpec) -> None:
    hint = "tapestry rejoin --keep NAME keeps it as a derivative"
    if isinstance(spec.model, ExternalSpec):
        raise UserError("a script trains this run's model, and cannot bring what was learnt alone", hint=hint)
    if not spec.train.inner_steps:
        raise UserError("a run of gradients (inner_steps = 0) takes no difference of parameters", hint=hint)


class Brought:
    """Of a running node: puts the file aside when a record names a contribution of `own`, and back where that
    record is left with a fork, or undone by a rollback."""

    def __init__(self, home: Home, own: str, run_id: str) -> None:
        """Raises UserError."""
        self._home, self._own, self._run_id = home, own, run_id
        self._since = -1
        self._given: int | None = None  # epoch of the record that has it
        path = home.brought if home.brought.exists() else home.given
        if not path.exists():
            return
        try:
            about = read_about(path)
            self._since = int(about.get("since_epoch", ""))
        except (BroughtError, ValueError) as error:
            raise _unusable(path, str(error)) from error
        if about.get("run_id") != run_id:
            raise _unusable(path, "it is of another run")

    @property
    def is_pending(self) -> bool:
        return self._since >= 0 and self._given is None

    def offer(self, contribution: str) -> None:
        """A contribution that carries it is about to be sent; on disk when this returns. Raises OSError.

        The round that was under way when the island began may have counted one that does not.
        """
        if self.is_pending:
            names = [*self._offered(), contribution][-OFFERED_MAX:]
            atomic_write(self._home.offered, "".join(name + "\n" for name in names).encode(), 0o600)

    def _offered(self) -> list[str]:
        try:
            return self._home.offered.read_text().split()
        except FileNotFoundError:
            return []

    def meet(self, chain: Chain) -> None:
        """At a start: what the whole chain says, however the node ended."""
        if 0 <= self._since < chain.epoch:
            for record in records_from(chain, self._since, chain.epoch):
                self._take(record)
        if self._since >= 0:
            self._settle(chain.epoch)

    def look(self, records: Sequence[Record], left: int | None = None) -> None:
        """Records that are on disk; `left`: the epoch after which they took the place of others."""
        if self._since < 0:
            return
        if left is not None and self._given is not None and self._given > left:
            self._given = None
        for record in records:
            self._take(record)
        self._settle(records[-1].body.epoch if records else 0)

    def _take(self, record: Record) -> None:
        body = record.body
        back = rollback_of(body.changes)
        if back is not None:  # nothing is made of its contributions
            self._given = None if self._given is not None and self._given > back[0] else self._given
            return
        if self._given is not None or body.epoch <= self._since:
            return
        # A weight of none is a bare signature: nothing of this member is in the record.
        own = [one.contribution for one in body.members if one.peer == self._own and one.weight]
        if own and (body.epoch > self._since + 1 or own[0] in self._offered()):
            self._given = body.epoch

    def _settle(self, epoch: int) -> None:
        """The file is where it belongs: with the trainer, or aside as long as its record may be undone."""
        pending, aside = self._home.brought, self._home.given
        if self._given is None and not pending.exists():
            if aside.exists():
                note_taken_back(self._home)
                os.replace(aside, pending)
                _log.warning(
                    "brought=again the record that had it was left or undone; the next contribution has it"
                )
        elif self._given is not None and pending.exists():
            os.replace(pending, aside)
            self._note(self._given)
            _log.info("brought epoch=%d; what was learnt on the island is in it", self._given)
        if self._given is not None and epoch > self._given + ROLLBACK_EPOCHS_MAX:
            aside.unlink(missing_ok=True)
            self._home.offered.unlink(missing_ok=True)
            self._since, self._given = -1, None

    def _note(self, epoch: int) -> None:
        """After the file is gone, which must not count twice. Without the note more is taken for touched."""
        try:
            note(self._home, "given", run_id=self._run_id, epoch=epoch)
        except UserError as error:
            _log.error("brought=not-noted reason=%r", error.line)


def _unusable(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} cannot be brought to the run: {why}",
        hint="move it away to go on without; the island itself lies in islands/",
    )
