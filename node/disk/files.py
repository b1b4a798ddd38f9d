"""Files that are there whole or not at all, and texts that know whether they were damaged.

`atomic_write` is for small contents in memory; `write_file` streams one that must not be copied.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from tapestry.node.protocol.canon import canonical
from tapestry.node.protocol.strict import table

TEMPORARY = ".tmp"
_LOST = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)  # the latter two by file systems with checksums
_SEALED, _SEALED_VALUE = b'{"digest":"', b'","value":'

_log = logging.getLogger("tapestry.disk")


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """For commands that change `path` beside each other: waits for its turn, by a lock in a file beside it.

    Raises OSError.
    """
    fd = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def atomic_write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by a file with `data`; else as `write_file`."""
    write_file(path, lambda file: _write(file, data), mode)


def write_file(path: Path, write: Callable[[BinaryIO], None], mode: int = 0o644) -> None:
    """Replace `path` by what `write` writes, or leave it as it was and raise OSError (a full disk, say).

    Temporary file, fsync, rename, fsync of the folder. One writer per path at a time: the temporary name is
    fixed, so that writers which were killed leave one file behind, not many.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    done = False
    try:
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(fd, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        done = True
    finally:
        if not done:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """All of it, at this offset: one call may write less."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def sync_folder(folder: Path) -> None:
    """Make renames and removals in the folder durable, where the file system can."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
        _tell_unsynced(str(folder))
    finally:
        os.close(fd)


@functools.cache  # once
def _tell_unsynced(folder: str) -> None:
    _log.warning(
        "folder=%s cannot be synced: after a power cut its newest files may be those of before; put the "
        "home on another file system if that must not be",
        folder,
    )


def remove_temporaries(folder: Path) -> None:
    """What a writer that was killed left behind."""
    for path in sorted(folder.glob(f"*{TEMPORARY}")):
        _log.info("removed an unfinished file path=%s", path)
        path.unlink(missing_ok=True)


def set_aside(path: Path, why: str, cure: str = "check the disk: the others are asked for it") -> None:
    """Rename a file of no use to *.corrupt: out of the way, but not lost to whoever wants to look."""
    _log.warning("file set aside path=%s.corrupt reason=%r; %s", path, why, cure)
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, path.with_name(path.name + ".corrupt"))


def is_damage(error: Exception) -> bool:
    """Whether bytes on the disk are lost: they do not hold, or the disk no longer gives them, as of a bad
    sector. Then others are asked for them; a disk that is full or gone is something else."""
    return isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno in _LOST)


def seal(value: Any) -> bytes:
    """One line of canonical JSON that carries the digest of its value."""
    return canonical({"digest": _digest(value), "value": value})


def unseal(line: bytes) -> Any:
    """The value. Raises ValueError if a single bit of it changed."""
    try:
        return _unsealed(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unsealed(line: bytes) -> Any:
    if line[: len(_SEALED)] == _SEALED and line[75:85] == _SEALED_VALUE and line[-1:] == b"}":
        text = line[85:-1]  # as `seal` writes it: its bytes need not be made again to be compared
        if blake3(text).hexdigest().encode() == line[len(_SEALED) : 75]:
            return json.loads(text)
    raw = json.loads(line)
    table(raw, ("digest", "value"), "a sealed value")
    if raw["digest"] != _digest(raw["value"]):
        raise ValueError("its digest does not match")
    return raw["value"]


def has_another_end(line: bytes) -> bool:
    """Of a last line without a newline: whether it is a sealed one, whole but for its newline's byte. That is
    damage: a write that was cut off is shorter, or has zeros where the disk had nothing yet."""
    if line.endswith(b"\0"):
        return False
    try:
        unseal(line[:-1])
    except ValueError:
        return False
    return True


def is_sealed(line: bytes, value: Any) -> bool:
    """Whether `line` is `seal(value)`, of a line that `unseal` took: its digest need not be made again."""
    start = line[: len(_SEALED)] == _SEALED and line[75:85] == _SEALED_VALUE and line[-1:] == b"}"
    return start and line[85:-1] == canonical(value)


def _digest(value: Any) -> str:
    return blake3(canonical(value)).hexdigest()
