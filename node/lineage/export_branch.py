"""`tapestry export --branch NAME`: a state of what lost at a fork, as export.py writes one."""

from __future__ import annotations

from pathlib import Path

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage.asked import ExportError, Wanted, require_branch
from tapestry.node.lineage.branches import as_home
from tapestry.node.lineage.export import Written, beside, export_home
from tapestry.node.lineage.huggingface import Progress, silent


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
        wanted = require_branch(home, name, epoch)
        with beside(out) as scratch:
            one = as_home(home, name, scratch / "branch")
            return export_home(one, out, wanted, dtype=dtype, adapters=adapters, progress=progress)
    except ExportError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(
            f"cannot export to {out}: {error.strerror or error}", exit_code=ExitCode.FAILED
        ) from error
