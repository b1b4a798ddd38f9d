"""Vectors in files of the home that nobody else sees: memory that the kernel may write out and take back.

Parameters and outer state are such files, mapped. Their pages are the node's and the trainer's at once, they
are not anonymous memory, and a model may be larger than what is free of that. A file has no name (O_TMPFILE;
where there is none it is unlinked at once). So nothing is left behind however the node ends, and nothing that
a step left half-written can be taken for a state: a restart makes its state of checkpoint and updates
(docs/decisions/009-state-in-files.md).

All room on the disk is taken when a file gets its size. A sparse file that meets a full disk in the middle of
a step would end the process with SIGBUS, and no word of why.

HOME/state may be a link to a folder elsewhere: on a faster disk, or on a tmpfs, which is memory again.

Raises UserError, in words for whoever runs the node. Imports torch only where it is used: the trainer's
process is started before the node has it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tapestry.node.errors import ExitCode, UserError

if TYPE_CHECKING:
    from torch import Tensor

FLOAT_BYTES = 4
_HINT = "make room there, or make it a link to a folder of a local disk that has room"


def create_scratch(folder: Path) -> int:
    """A descriptor of an empty file without a name in `folder`, which is made if it is not there."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        fd = _open_nameless(folder)
    except OSError as error:
        raise _unusable(folder, f"cannot make files there: {error.strerror}") from error
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        mmap.mmap(fd, mmap.PAGESIZE).close()
        os.ftruncate(fd, 0)
    except (OSError, ValueError) as error:
        os.close(fd)
        raise _unusable(folder, f"its file system cannot map files to memory: {error}") from error
    return fd


def reserve(fd: int, size: int, folder: Path) -> None:
    """Room for so many bytes, zeros at first, on the disk now."""
    try:
        stat = os.fstatvfs(fd)
        free = stat.f_bavail * stat.f_frsize
        missing = size - os.fstat(fd).st_size
        if missing > free:
            raise _no_room(folder, size, free)
        _allocate(fd, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(folder, size, free) from error
        raise _unusable(folder, f"cannot make files there: {error.strerror}") from error


def scratch_vectors(
    folder: Path, names: Sequence[str], n: int
) -> dict[str, Tensor]:  # f32 (n,) for each name, zeros
    """Each in a file of its own, which lives as long as the tensor."""
    return {name: _scratch_vector(folder, n) for name in names}


def _scratch_vector(folder: Path, n: int) -> Tensor:
    import torch

    fd = create_scratch(folder)
    try:
        reserve(fd, FLOAT_BYTES * n, folder)
        return torch.frombuffer(mmap.mmap(fd, FLOAT_BYTES * n), dtype=torch.float32)
    finally:
        os.close(fd)  # the mapping has one of its own


def _open_nameless(folder: Path) -> int:
    if hasattr(os, "O_TMPFILE"):
        with contextlib.suppress(OSError):  # a file system without it says EOPNOTSUPP, EISDIR or EINVAL
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    path = folder / f"scratch-{os.getpid()}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    path.unlink()
    return fd


def _allocate(fd: int, size: int) -> None:
    """Where a file system cannot give room before it is written, the C library writes zeros, or we hope."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(fd, size)


def _no_room(folder: Path, size: int, free: int) -> UserError:
    line = f"no room for the state in {folder}: a file needs {size:,} bytes, {free:,} are free"
    return UserError(line, exit_code=ExitCode.FAILED, hint=_HINT)


def _unusable(folder: Path, why: str) -> UserError:
    return UserError(f"{folder} cannot hold the state: {why}", exit_code=ExitCode.FAILED, hint=_HINT)
