"""What the benchmarks share: tables, results as JSON, and packages that only they need.

Two of those packages are not of the project's environment. hivemind 1.1.12 averages nothing with NumPy 2.4
or later, and says nothing about it; matplotlib draws the curves. Both go into a folder in the user's cache,
which is put before the environment's packages for the processes that need it, and for no others.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from tapestry.node.trainer.encoder import Write

PACKAGES = ("numpy==2.3.5", "matplotlib==3.11.2")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [list(head), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = [
        "| " + " | ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in columns) + " |"
        for columns in (list(enumerate(zip(line, widths, strict=True))) for line in lines)
    ]
    rule = (
        "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    )
    return "\n".join([shown[0], rule, *shown[1:]])


def cell(value: object) -> str:
    """Three digits that mean something; nothing where there is no figure."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3g}"


def into(out: Tensor) -> Callable[[Write], float]:
    """For an encoder, in InnerLoop.finish: takes the contribution as it is, f32 (n,), and says no norm."""

    def take(write: Write) -> float:
        write(0, out.numel(), out)
        return math.nan

    return take


def write_json(path: Path | None, results: object) -> None:
    """Where --json says, if it says so."""
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n")


def machine() -> str:
    """What the figures were taken on."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "hivemind"))
    return f"{len(os.sched_getaffinity(0))} cores of {model}, Python {sys.version.split()[0]}, {versions}"


def extra_packages() -> Path:
    """The folder of PACKAGES, made if it is not there. Raises SystemExit where pip cannot."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "tapestry" / "-".join(["bench", *(name.replace("==", "-") for name in PACKAGES)])
    done = folder / ".done"
    if not done.exists():
        print(f"# installing {', '.join(PACKAGES)} into {folder}", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        if subprocess.run([*pip, "--upgrade", "--target", str(folder), *PACKAGES], check=False).returncode:
            raise SystemExit(f"error: pip cannot install {', '.join(PACKAGES)}; its reason is above")
        done.touch()
    return folder


def environment(extra: bool = False) -> dict[str, str]:
    """For a process of a benchmark: one thread, nothing of the user's own settings, PACKAGES if `extra`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TAPESTRY_")}
    before = [str(extra_packages())] if extra else []
    path = os.pathsep.join([*before, *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": path} if path else {})
