"""A checkpoint that is being fetched: a file that fills chunk by chunk, and survives the node that fetches.

    checkpoints/fetch.part    the checkpoint's own header, then its data, with holes where nothing has come

Nothing in it is believed: each chunk is compared with its digest when a download takes it up again. When it
is whole it gets the checkpoint's name, so it is not written a second time. One at a time: a new one takes the
place of an old one.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from tapestry.node.disk.files import pwrite_all

NAME = "fetch.part"
WRITE_OUT_BYTES = 16 << 20  # as checkpoints.py: the disk has the first bytes while the last are on their way


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a donor said of the checkpoint."""

    epoch: int
    head: str
    state_digest: str
    chunks: bytes  # blake3 (32 bytes) of each


class Part:
    """An open one."""

    def __init__(
        self, path: Path, pieces: Pieces, data_start: int, data_bytes: int, chunk_bytes: int
    ) -> None:
        self.path = path
        self.pieces = pieces
        self._start, self._bytes, self._chunk_bytes = data_start, data_bytes, chunk_bytes
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._unwritten = 0  # bytes that the kernel was not asked to write out
        self._lock = threading.Lock()  # a write may outlive the task that asked for it

    @property
    def epoch(self) -> int:
        return self.pieces.epoch

    def read(self, index: int) -> bytes:
        """A chunk, whole or not. Raises OSError."""
        start = index * self._chunk_bytes
        return os.pread(self._fd, min(self._chunk_bytes, self._bytes - start), self._start + start)

    def put(self, index: int, data: bytes | bytearray) -> None:
        """A chunk that has its digest. Raises OSError."""
        with self._lock:
            if self._fd >= 0:
                pwrite_all(self._fd, memoryview(data), self._start + index * self._chunk_bytes)
                self._unwritten += len(data)
                if self._unwritten >= WRITE_OUT_BYTES:
                    os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)  # and goes on
                    self._unwritten = 0

    def sync(self) -> None:
        os.fsync(self._fd)

    def drop(self) -> None:
        """It leads nowhere."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """The file stays."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
