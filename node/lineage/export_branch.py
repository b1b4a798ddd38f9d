"""`tapestry export --branch NAME`: a state of what lost at a fork, as export.py writes one."""

from __future__ import annotations

from pathlib import Path

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage.branches import Ways, as_home
from tapestry.node.lineage.export import beside, export_home
from tapestry.node.lineage.huggingface import ExportError, Progress, silent


def export_branch(
    home: Home,
    name: str,
    out: Path,
    epoch: int | None,
    *,
    dtype: str = "f32",
    adapters: bool = False,
    progress: Progress = silent,
) -> None:
    """As `export_home`, of a branch; `epoch` None: its head. Raises UserError."""
    try:
        about = Ways(home).named(name).about
        if epoch is None and about.lacks:
            raise UserError(
                f"the head of branch {name} cannot be exported: it lacks {about.lacks}",
                exit_code=ExitCode.FAILED,
                hint="--epoch E exports an earlier state of it, if there is what makes it",
            )
        with beside(out) as scratch:
            wanted = about.lost.epoch if epoch is None else epoch
            one = as_home(home, name, scratch / "branch")
            export_home(one, out, wanted, dtype=dtype, adapters=adapters, progress=progress)
    except ExportError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(
            f"cannot export to {out}: {error.strerror or error}", exit_code=ExitCode.FAILED
        ) from error
