"""What scripts that start processes share: a folder that goes away again, and an end that cleans up."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


@contextlib.contextmanager
def work_folder(keep: Path | None, prefix: str) -> Iterator[Path]:
    """The new folder `keep`, which stays; or, if None, a temporary one."""
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep
        return
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def exit_by_signal(number: int, frame: FrameType | None) -> None:
    """A signal handler: unwinds, so that what was made is taken away."""
    raise SystemExit(128 + number)
