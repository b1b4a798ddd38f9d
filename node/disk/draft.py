"""A file of the update log, written to disk while its shards still come: of a round, or from a donor.

A file of the update log is needed whole, and on disk, before the vote for it. Written only then, it would be
what everybody waits for at the end of a round. So each shard goes to the disk as it comes, and little is left
to write and to sync.

What was written is read where it lies: `put` gives a view of the mapped file, and its caller can let the
payload in memory go. So bytes that were written are never written over: a payload of another result, for a
shard that is there already, begins a new file, and the views of the old one live on with that file, which has
no name any more.

A draft means nothing by itself: `finish` takes from it only the shards whose payloads are the very views that
`put` gave, writes the others, and only then gives the file its name. One thread at a time.

Must not import: asyncio; hivemind; and torch only to map a file: a home is also read by commands that need no
tensors, and answer before torch would be there.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tapestry.node.disk.files import TEMPORARY, pwrite_all, sync_folder

if TYPE_CHECKING:
    from torch import Tensor

SYNC_BYTES = 8 << 20  # Guess: what a disk takes in a few milliseconds, so that the last sync is short


def mapped(
    fd: int,
    size_bytes: int,  # above 0
) -> Tensor:  # uint8 (size_bytes,), read only
    """A file's bytes where they lie; the file may lose its name meanwhile, but nothing may write to it."""
    import torch

    memory = mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(memory, dtype=torch.uint8)


class Draft:
    """One at a time for a folder and name. Without a `put` nothing is on disk."""

    def __init__(
        self,
        folder: Path,
        header_bytes: int,
        sizes: Sequence[int],  # bytes of each shard's payload
        name: str = "draft",
    ) -> None:
        self._path = folder / f"{name}{TEMPORARY}"  # swept up at the next start if this process is killed
        self._sizes = tuple(sizes)
        self._offsets = [header_bytes]
        for size in sizes:
            self._offsets.append(self._offsets[-1] + size)
        self._fd: int | None = None
        self._mapped: Tensor | None = None  # uint8 (size of the file,), read only
        self._written: dict[int, tuple[Tensor, str]] = {}  # shard -> view of the file, its digest
        self._unsynced_bytes = 0

    def put(self, shard: int, payload: Tensor, digest: str) -> Tensor:
        """Write a shard: the same bytes as a view of the file, to be read only. `finish` knows it by that.

        What the disk refuses is left for `finish` to find out; then it is the payload that is given back. All
        that was put before goes to a new file then: the kernel takes pages whose sync has failed for written,
        and says so to another sync of that file (fsync(2)).
        """
        if payload.numel() != self._sizes[shard]:
            return payload
        if shard in self._written:
            self.drop()
        try:
            self._write(shard, payload)
            view = self._view(shard)
            self._unsynced_bytes += payload.numel()
            if self._unsynced_bytes >= SYNC_BYTES and self._fd is not None:
                os.fdatasync(self._fd)
                self._unsynced_bytes = 0
        except OSError:
            self.drop()
            return payload
        self._written[shard] = (view, digest)
        return view

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
            if len(there) < len(self._written):
                self.drop()
                there = {}
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
        self._mapped = None
        self._unsynced_bytes = 0
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _write(self, shard: int, payload: Tensor) -> None:
        pwrite_all(self._open(), memoryview(payload.numpy()), self._offsets[shard])  # type: ignore[arg-type]

    def _view(self, shard: int) -> Tensor:  # uint8 (sizes[shard],)
        start, stop = self._offsets[shard], self._offsets[shard + 1]
        if self._mapped is None:
            os.ftruncate(self._open(), self._offsets[-1])
            self._mapped = mapped(self._open(), self._offsets[-1])
        return self._mapped[start:stop]

    def _open(self) -> int:
        if self._fd is None:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        return self._fd
