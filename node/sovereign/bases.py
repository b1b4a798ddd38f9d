"""The shared base at the epochs that versions stand on: HOME/derivatives/.bases.

Several commands may export at once, each to a folder of its own, and hold .bases/lock together; who removes
what is no longer needed takes it alone, or leaves that to the next command.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage.asked import HEAD
from tapestry.node.lineage.export import export_home
from tapestry.node.progress import Told
from tapestry.node.sovereign.derivative import Parent, Shelf
from tapestry.node.sovereign.plans import begun_plan
from tapestry.node.trainer.models.refusal import ModelError
from tapestry.node.trainer.models.weights import weights_digest

LOCK = "lock"  # its name in .bases


def export_base(shelf: Shelf, home: Home, epoch: int | None, told: Told) -> Parent:
    """The shared base at an epoch (None: the head), in .bases; one that is there already is taken."""
    with bases_in_use(shelf), tempfile.TemporaryDirectory(prefix="new.", dir=_folder(shelf)) as scratch:
        new = Path(scratch) / "base"
        export_home(home, new, HEAD if epoch is None else epoch, progress=told)
        lineage = json.loads((new / "tapestry.json").read_bytes())
        names = ("run_id", "run_name", "epoch", "head", "state_digest")
        parent = Parent(**{name: lineage[name] for name in names}, weights=weights_digest(new))
        target = shelf.base(parent)
        if not _is_whole(target, parent):
            shutil.rmtree(target, ignore_errors=True)
            new.rename(target)
    return parent


@contextmanager
def bases_in_use(shelf: Shelf) -> Iterator[None]:
    """No base is removed meanwhile. Raises OSError."""
    fd = _opened_lock(shelf)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def require_base(shelf: Shelf, home: Home, parent: Parent, told: Told) -> Path:
    """Its folder; made again from the home if it is gone or another's. Raises UserError."""
    folder = shelf.base(parent)
    if not folder.is_dir():
        export_base(shelf, home, parent.epoch, told)
    if not folder.is_dir() or weights_digest(folder) != parent.weights:
        raise UserError(
            f"{folder} is not the base at {parent}", exit_code=ExitCode.FAILED, hint="remove it and try again"
        )
    return folder


def prune_bases(shelf: Shelf) -> None:
    """Bases that no version stands on, and that no half-made one was begun on."""
    fd = _opened_lock(shelf)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _prune(shelf)
    except BlockingIOError:
        pass  # another command is at work on bases
    finally:
        os.close(fd)


def _prune(shelf: Shelf) -> None:
    needed = {LOCK}
    for path in shelf.folder.glob("*/v*/plan.json"):
        plan = begun_plan(path.parent)
        needed |= {plan.parent.folder} if plan else set()
    for name in shelf.names():
        needed |= {version.parent.folder for version in shelf.require(name).versions}
    for path in _folder(shelf).iterdir():
        if path.name not in needed:
            shutil.rmtree(path, ignore_errors=True)


def _is_whole(folder: Path, parent: Parent) -> bool:
    try:
        return folder.is_dir() and weights_digest(folder) == parent.weights
    except (ModelError, OSError):
        return False


def _folder(shelf: Shelf) -> Path:
    return shelf.folder / ".bases"


def _opened_lock(shelf: Shelf) -> int:
    _folder(shelf).mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.open(_folder(shelf) / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
