"""Which process has a home: a lock that the kernel drops with it, and what its file says of the holder.

A lock (flock) on HOME/lock excludes a second node; the kernel drops it with the process, so a `kill -9`
leaves nothing in the way. Whether a node is there is asked of the lock itself, which holds across
containers, and which a copy of the home does not have. The lock file names its holder too: by pid and start
time, so that no process that happens to reuse the pid is taken for it, and by boot, pid namespace and host,
where that pid means something.

A process that inherits the lock's descriptor would keep the home locked. It is close-on-exec; do not fork
without exec while it is held.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path

LOCK_BYTES_MAX = 512
LOCK_TRIES, LOCK_AGAIN_S = 5, 0.02  # somebody who only looks holds it for a moment


class Held(Exception):
    """A live process has the lock."""


def take(path: Path) -> HomeLock:
    """For this process, which the file then names. Raises Held, OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _take(fd)
        text = Holder.of_this_process().text().encode()
        os.pwrite(fd, text, 0)
        os.ftruncate(fd, len(text))
    except OSError as error:
        os.close(fd)
        if _is_of_another(error):
            raise Held from error
        raise
    return HomeLock(fd)


def is_held(path: Path) -> bool:
    """Whether a live process has it, wherever that runs. Raises PermissionError: of another user's file
    nobody can say."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        raise
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _is_of_another(error)
    finally:
        os.close(fd)
    return False


def holder_of(path: Path) -> Holder | None:
    """The process that wrote the file last, whether it still lives or not; None if the file names none."""
    try:
        with path.open("rb") as file:
            return Holder.parse(file.read(LOCK_BYTES_MAX))
    except OSError:
        return None


class HomeLock:
    """A home that is ours until `release`, or until this process ends in whatever way."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    def __enter__(self) -> HomeLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let go. The file stays: to remove it would let two nodes lock two files of one name."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        try:
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that took the lock, as its file has it: one line of five words."""

    pid: int
    start_ticks: int
    boot_id: str
    pid_namespace: str  # in which `pid` means something
    host: str

    @classmethod
    def of_this_process(cls) -> Holder:
        host = os.uname().nodename.split()
        ticks = _start_ticks(os.getpid()) or 0
        return cls(os.getpid(), ticks, _boot_id(), _pid_namespace(), host[0][:64] if host else "-")

    @classmethod
    def parse(cls, data: bytes) -> Holder | None:
        words = data.decode(errors="replace").split()
        if len(words) != 5 or not all(word.isdecimal() and len(word) < 20 for word in words[:2]):
            return None
        return cls(int(words[0]), int(words[1]), words[2], words[3], words[4])

    def text(self) -> str:
        return f"{self.pid} {self.start_ticks} {self.boot_id} {self.pid_namespace} {self.host}\n"

    def is_here(self) -> bool:
        """Whether `pid` is that process for us too."""
        ours = (self.boot_id, self.pid_namespace) == (_boot_id(), _pid_namespace())
        return ours and _start_ticks(self.pid) == self.start_ticks


def _take(fd: int) -> None:
    """Raises OSError if another has it, and not only for a look."""
    for again in range(LOCK_TRIES, 0, -1):
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if again == 1 or not _is_of_another(error):
                raise
        time.sleep(LOCK_AGAIN_S)


def _is_of_another(error: OSError) -> bool:
    return error.errno in (errno.EWOULDBLOCK, errno.EAGAIN)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() or "-"
    except (OSError, ValueError):
        return "-"


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return "-"


def _start_ticks(pid: int) -> int | None:
    """When the process began, in clock ticks since boot; None if it is gone or a zombie. proc(5), stat."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold blanks and parentheses
    state, start_ticks = fields[0], int(fields[19])
    return None if state in ("Z", "X") else start_ticks
