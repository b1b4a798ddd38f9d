"""`tapestry rejoin --bring`: what was learnt on an island, as part of one contribution to the run.

The difference of the parameters, at the island's head and where it began, goes to HOME/brought.safetensors.
From then on each contribution of this member carries it (trainer/brought.py), until the chain has a record
that names one: then the file goes. The chain alone decides that, so the difference counts once however the
node ends: a contribution in a record of an epoch after the island began carried it, because there was
none without. If a fork is lost whose record named it, it is lost with it, like any other contribution.

What it was learnt from is written down before the file (uses.py): it may be revoked meanwhile, and a
withdrawal names the record that took it.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from tapestry.node.disk.held import bare_state, open_run
from tapestry.node.disk.scratch import scratch_vectors
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage import island
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.export import snapshot
from tapestry.node.lineage.uses import note, note_brought
from tapestry.node.progress import Told
from tapestry.node.protocol.chain import Record
from tapestry.node.protocol.members import rollback_of
from tapestry.node.spec.run import RunSpec
from tapestry.node.spec.training import ExternalSpec
from tapestry.node.trainer.brought import BroughtError, read_about, write_brought

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
    """Of a running node: takes the file away when a record names a contribution of `own`."""

    def __init__(self, home: Home, own: str, run_id: str) -> None:
        """Raises UserError."""
        self._home, self._path, self._own, self._since = home, home.brought, own, -1
        self._run_id = run_id
        if not self._path.exists():
            return
        try:
            about = read_about(self._path)
            self._since = int(about.get("since_epoch", ""))
        except (BroughtError, ValueError) as error:
            raise _unusable(self._path, str(error)) from error
        if about.get("run_id") != run_id:
            raise _unusable(self._path, "it is of another run")

    @property
    def is_pending(self) -> bool:
        return self._since >= 0

    def look(self, records: Iterable[Record]) -> None:
        """Records that are on disk."""
        if not self.is_pending:
            return
        for record in records:
            body = record.body
            if rollback_of(body.changes) is not None:
                continue  # nothing is made of its contributions
            # A weight of none is a bare signature: nothing of this member is in the record.
            if body.epoch > self._since and any(one.peer == self._own and one.weight for one in body.members):
                self._path.unlink(missing_ok=True)
                self._since = -1
                self._note(body.epoch)
                _log.info("brought epoch=%d; what was learnt on the island is in it", body.epoch)
                return

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
