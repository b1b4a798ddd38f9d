"""`tapestry export --branch NAME`: a state of what lost at a fork, as export.py writes one."""

from __future__ import annotations

from pathlib import Path

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage.branches import Ways, as_home
from tapestry.node.lineage.export import HEAD, Wanted, Written, beside, export_home
from tapestry.node.lineage.huggingface import ExportError, Progress, silent


def export_branch(
    home: Home,
    name: str,
    out: Path,
    epoch: Wanted,
    *,
    dtype: str = "f32",
    adapters: bool = False,
    progress: Progress = silent,
) -> Written:
    """As `export_home`, of a branch; `epoch` None: its head, for below it may be what both sides have. Raises
    UserError."""
    try:
        about = Ways(home).named(name).about
        newest = epoch is None or epoch == HEAD
        if newest and about.lacks:
            raise UserError(
                f"the head of branch {name} cannot be exported: it lacks {about.lacks}",
                exit_code=ExitCode.FAILED,
                hint="--epoch E exports an earlier state of it, if there is what makes it",
            )
        with beside(out) as scratch:
            wanted = about.lost.epoch if newest else epoch
            one = as_home(home, name, scratch / "branch")
            return export_home(one, out, wanted, dtype=dtype, adapters=adapters, progress=progress)
    except ExportError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(
            f"cannot export to {out}: {error.strerror or error}", exit_code=ExitCode.FAILED
        ) from error
