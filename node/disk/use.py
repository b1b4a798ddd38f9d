"""What a home takes on disk, by kind, and what is left: for metrics. Blocking; walks the home's folders."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from tapestry.node.home import Home

BLOCK_BYTES = 512  # of st_blocks, whatever the file system's own block is: stat(2)
KINDS = (
    "chain",
    "updates",
    "checkpoints",
    "branches",
    "base",
    "trainer",
    "cache",
    "derivatives",
    "logs",
    "egress",
    "other",
)
_FOLDERS = ("updates", "checkpoints", "branches", "base", "trainer", "cache", "derivatives")


def disk_use(home: Home) -> dict[str, int]:
    """Bytes by KINDS, as the file system counts them: holes are nothing. What vanishes meanwhile is left out.

    A file of several names (a checkpoint that a branch needs too) counts once, by the first of KINDS. Not in
    it: files without a name in HOME/state, which `df` counts.
    """
    use = dict.fromkeys(KINDS, 0)
    seen: set[tuple[int, int]] = set()  # of files of several names
    with contextlib.suppress(OSError), os.scandir(home.path) as entries:
        for entry in sorted(entries, key=lambda one: KINDS.index(_kind_of(one.name))):
            with contextlib.suppress(OSError):
                is_folder = entry.is_dir(follow_symlinks=False)
                size = _folder_bytes(entry.path, seen) if is_folder else _bytes(os.lstat(entry.path), seen)
                use[_kind_of(entry.name)] += size
    return use


def disk_free(home: Home) -> int:
    """Bytes that this user may still write there. Raises OSError."""
    return shutil.disk_usage(home.path).free


def _kind_of(name: str) -> str:
    if name in _FOLDERS:
        return name
    if name.startswith(("chain.jsonl", "chain.index", "chain.marks")):
        return "chain"
    if name.startswith("egress"):
        return "egress"
    return "logs" if name.startswith(("node.log", "node.out", "history.jsonl", "tensorboard")) else "other"


def _folder_bytes(folder: str | Path, seen: set[tuple[int, int]]) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += _bytes(os.lstat(os.path.join(path, name)), seen)
    return total


def _bytes(info: os.stat_result, seen: set[tuple[int, int]]) -> int:
    if info.st_nlink > 1:
        if (info.st_dev, info.st_ino) in seen:
            return 0
        seen.add((info.st_dev, info.st_ino))
    return info.st_blocks * BLOCK_BYTES
