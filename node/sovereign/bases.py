"""The shared base at the epochs that versions stand on: HOME/derivatives/.bases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage.export import export_home
from tapestry.node.sovereign.derivative import Parent, Shelf
from tapestry.node.sovereign.plans import begun_plan
from tapestry.node.sovereign.recipe import Told
from tapestry.node.trainer.models.weights import weights_digest


def export_base(shelf: Shelf, home: Home, epoch: int | None, told: Told) -> Parent:
    """The shared base at an epoch, in .bases; one that is there already is taken."""
    new = shelf.folder / ".bases" / "new"
    shutil.rmtree(new, ignore_errors=True)
    new.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    export_home(home, new, epoch, progress=told)
    lineage = json.loads((new / "tapestry.json").read_bytes())
    names = ("run_id", "run_name", "epoch", "head", "state_digest")
    parent = Parent(**{name: lineage[name] for name in names}, weights=weights_digest(new))
    target = shelf.base(parent)
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)
    return parent


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
    needed = {"new"}
    for path in shelf.folder.glob("*/v*/plan.json"):
        plan = begun_plan(path.parent)
        needed |= {plan.parent.folder} if plan else set()
    for name in shelf.names():
        needed |= {version.parent.folder for version in shelf.require(name).versions}
    for path in (shelf.folder / ".bases").iterdir():
        if path.name not in needed:
            shutil.rmtree(path, ignore_errors=True)
