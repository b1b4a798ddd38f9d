"""The result of the round under way, written to disk while its shards still come.

A file of the update log is needed whole, and on disk, before the vote for it. Written only then, it would be
what everybody waits for at the end of a round. So each shard goes to the disk as it comes, and little is left
to write and to sync.

A draft means nothing by itself: `finish` takes from it only the shards whose payloads are the very objects
that it is given, writes the others, and only then gives the file its name. One thread at a time.

Must not import: asyncio; hivemind.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tapestry.node.disk.files import TEMPORARY, pwrite_all, sync_folder

SYNC_BYTES = 8 << 20  # Guess: what a disk takes in a few milliseconds, so that the last sync is short


class Draft:
    """One at a time for a folder. Without a `put` nothing is on disk."""

    def __init__(
        self,
        folder: Path,
        header_bytes: int,
        sizes: Sequence[int],  # bytes of each shard's payload
    ) -> None:
        self._path = folder / f"draft{TEMPORARY}"  # swept up at the next start if this process is killed
        self._sizes = tuple(sizes)
        self._offsets = [header_bytes]
        for size in sizes:
            self._offsets.append(self._offsets[-1] + size)
        self._fd: int | None = None
        self._written: dict[int, tuple[Tensor, str]] = {}  # shard -> payload, its digest
        self._unsynced_bytes = 0

    def put(self, shard: int, payload: Tensor, digest: str) -> None:
        """Write a shard. What the disk refuses is left for `finish` to find out."""
        if payload.numel() != self._sizes[shard]:
            return
        try:
            self._write(shard, payload)
            self._unsynced_bytes += payload.numel()
            if self._unsynced_bytes >= SYNC_BYTES and self._fd is not None:
                os.fdatasync(self._fd)
                self._unsynced_bytes = 0
        except OSError:
            self._written.pop(shard, None)
        else:
            self._written[shard] = (payload, digest)

    def digests(self, payloads: Sequence[Tensor]) -> dict[int, str]:
        """Shard -> digest, of those that were put."""
        return {
            shard: self._written[shard][1]
            for shard, payload in enumerate(payloads)
            if shard in self._written and self._written[shard][0] is payload
        }

    def finish(self, path: Path, header: bytes, payloads: Sequence[Tensor]) -> None:
        """The file of these payloads at `path`, on disk; or none, and OSError. Empties the draft."""
        assert len(header) == self._offsets[0] and len(payloads) == len(self._sizes)
        try:
            there = self.digests(payloads)
            for shard, payload in enumerate(payloads):
                assert payload.numel() == self._sizes[shard]
                if shard not in there:
                    self._write(shard, payload)
            fd = self._open()
            pwrite_all(fd, memoryview(header), 0)
            os.ftruncate(fd, self._offsets[-1])
            os.fsync(fd)
            os.replace(self._path, path)
        finally:
            self.drop()
        sync_folder(path.parent)

    def drop(self) -> None:
        """Forget it; whoever finished it has the file already."""
        self._written.clear()
        self._unsynced_bytes = 0
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _write(self, shard: int, payload: Tensor) -> None:
        pwrite_all(self._open(), memoryview(payload.numpy()), self._offsets[shard])  # type: ignore[arg-type]

    def _open(self) -> int:
        if self._fd is None:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        return self._fd
