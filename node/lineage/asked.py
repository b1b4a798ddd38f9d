"""Whether what `export` and `verify` are asked for is there: looked at before torch is, which takes seconds.

Commands call these before they import what does the work, which calls them again: a running node goes on.

Must not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage.branches import Ways
from tapestry.node.lineage.island import tip
from tapestry.node.lineage.manifest import NAME as MANIFEST

HEAD: Literal["head"] = "head"  # in place of an epoch

Wanted = int | Literal["head"] | None  # None: the newest epoch whose state was signed


class ExportError(RuntimeError):
    """The directory cannot be written; one line that says why."""


def require_epoch(home: Home, epoch: Wanted) -> None:
    """Raises UserError unless the home holds a run that has come so far."""
    if not home.genesis.exists():
        raise UserError(f"{home.path} holds no run to export")
    if isinstance(epoch, int) and epoch > (newest := tip(home).epoch):
        raise UserError(f"there is no epoch {epoch} yet: the run is at {newest} in {home.path}")


def require_branch(home: Home, name: str, epoch: Wanted) -> int:
    """The epoch of a branch that is meant: its head without another, for below it may be what both sides
    have. Raises UserError, OSError."""
    about = Ways(home).named(name).about
    if isinstance(epoch, int):
        return epoch
    if about.lacks:
        raise UserError(
            f"the head of branch {name} cannot be exported: it lacks {about.lacks}",
            exit_code=ExitCode.FAILED,
            hint="--epoch E exports an earlier state of it, if there is what makes it",
        )
    return about.lost.epoch


def require_free(out_dir: Path) -> None:
    """Raises ExportError unless `out_dir` can be made: it is not there, or an empty folder."""
    try:
        taken = out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir()))
    except OSError as error:
        raise ExportError(f"cannot write {out_dir}: {error}") from error
    if taken:
        raise ExportError(f"{out_dir} is there already: name a new or an empty folder")


def require_provable(path: Path, against: Path | None) -> None:
    """Raises UserError unless `path` is a home or an export, and `against`, which is for exports, one too."""
    for one in (path,) if against is None else (path, against):
        if not (is_export(one) or (one / "genesis.json").is_file()):
            raise UserError(
                f"{one} is neither a home with a run nor an export: no genesis.json, no {MANIFEST}"
            )
    if against is not None and not is_export(path):
        raise UserError(
            f"--against is for exports, and {path} is a home: it is replayed by itself",
            hint=f"tapestry verify {path}",
        )


def is_export(path: Path) -> bool:
    """By its manifest."""
    return (path / MANIFEST).is_file()
