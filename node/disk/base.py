"""HOME/base: the files of the open base that a run continues, as the run pins them.

A base is a Hugging Face directory. A run takes of it the files that `FILE_NAMES` lists, and names each in
its spec by size and blake3 digest (`TransformersSpec.files`): so every member holds the same bytes, whoever
it had them from. A file is written under another name and gets its own when its digest was right; what is
here under its own name is therefore whole. A download that broke off leaves `NAME.part`, and goes on from
there. Where it led to another file, nobody knows which piece of it was false, for a run pins digests of whole
files: it is kept as it was before, and a second one, `NAME.anew.part`, begins from nothing. Where that one
breaks off and leads to another file as well, it is kept too, and `NAME.own.part` takes what one donor gives
by itself in one go; if that breaks off it is not kept. Whichever leads to the right file first ends all.
Where the disk has no room for several, the oldest makes place.

Blocking; any thread. Must not import torch, transformers or asyncio.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blake3 import blake3

from tapestry.node.disk.files import is_damage, sync_folder, write_file
from tapestry.node.spec.training import FILE_NAMES, WEIGHTS, TransformersSpec

PIECE_BYTES = 1 << 20  # that a donor sends for one request
PART, ANEW, OWN = ENDS = ".part", ".anew.part", ".own.part"
_READ_BYTES = 8 << 20


class BaseError(ValueError):
    """A file of the base is missing, torn or another one; one line that says which."""


@dataclass(frozen=True, slots=True)
class BaseFile:
    """One pinned file."""

    name: str
    size_bytes: int
    digest: str  # blake3, 64 hex digits

    @classmethod
    def of(cls, path: Path) -> BaseFile:
        """Read the file whole. Raises OSError."""
        hasher, size_bytes = blake3(), 0
        with path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                hasher.update(data)
                size_bytes += len(data)
        return cls(path.name, size_bytes, hasher.hexdigest())

    def __str__(self) -> str:
        """As the run spec names it."""
        return f"{self.name} {self.size_bytes} {self.digest}"


def pinned(spec: TransformersSpec) -> tuple[BaseFile, ...]:
    """The files that a run names."""
    words = (text.split(" ") for text in spec.files)
    return tuple(BaseFile(name, int(size), digest) for name, size, digest in words)


class BaseFolder:
    """HOME/base of one run: what is there, what is not, and what a donor gives of it."""

    def __init__(self, folder: Path, files: Sequence[BaseFile]) -> None:
        self.folder = folder
        self.files = {file.name: file for file in files}
        self._by_digest = {file.digest: file for file in files}

    def missing(self) -> list[BaseFile]:
        """Files that are not here, or here with another size."""
        return [file for file in self.files.values() if self._size(file.name) != file.size_bytes]

    def take(self, source: Path) -> list[BaseFile]:
        """Copy what is missing from a directory that has the same bytes; gives what is still missing."""
        for file in self.missing():
            path = source / file.name
            with contextlib.suppress(OSError):
                if path.stat().st_size == file.size_bytes and BaseFile.of(path) == file:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self.with_room(file, "", partial(copy_file, path, self.folder / file.name))
                    self.drop(file)
        return self.missing()

    def part(self, file: BaseFile, end: str = PART) -> Path:
        """Where a file lies while it comes; `end` is one of ENDS."""
        return self.folder / (file.name + end)

    def part_bytes(self, file: BaseFile, end: str = PART) -> int:
        """How much of a file an earlier download left here."""
        return min(self._size(file.name + end) or 0, file.size_bytes)

    def pieces(self, file: BaseFile, end: str) -> int:
        """How many whole pieces of it."""
        return self.part_bytes(file, end) // PIECE_BYTES

    def drop(self, file: BaseFile, ends: Sequence[str] = ENDS) -> None:
        """What earlier downloads left here. Raises OSError."""
        for end in ends:
            self.part(file, end).unlink(missing_ok=True)

    def with_room(self, file: BaseFile, end: str, write: Callable[[], None]) -> None:
        """Write. Where the disk has no room for it, what else is here of the file makes place, the oldest
        first, and it is written again. Raises OSError."""
        while True:
            try:
                write()
                return
            except OSError as error:
                others = [
                    part for other in ENDS if other != end and (part := self.part(file, other)).exists()
                ]
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not others:
                    raise
                others[0].unlink()

    def cut(self, file: BaseFile, end: str, size_bytes: int) -> None:
        """Keep so much of an earlier download. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.truncate(self.part(file, end), size_bytes)

    def append(self, file: BaseFile, data: bytes | bytearray, end: str = PART) -> None:
        """The next bytes of a download. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self._size(file.name + end) or 0

        def write() -> None:
            self.cut(file, end, before)
            with self.part(file, end).open("ab") as out:
                out.write(data)

        self.with_room(file, end, write)

    def finish(self, file: BaseFile, end: str = PART, keep_bytes: int = 0) -> None:
        """The download is whole: give it its name. Raises BaseError if it is another file: then so much of
        it is kept. Raises OSError; where the disk lost some of it nothing is kept."""
        part = self.part(file, end)
        if file.size_bytes == 0:
            part.touch()
        try:
            found = BaseFile.of(part)
        except OSError as error:
            if is_damage(error):
                part.unlink()
            raise
        if (found.size_bytes, found.digest) != (file.size_bytes, file.digest):
            if keep_bytes:
                self.cut(file, end, keep_bytes)
            else:
                part.unlink()
            raise BaseError(f"{file.name} has the digest {found.digest[:12]}, not {file.digest[:12]}")
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, self.folder / file.name)
        self.drop(file)
        sync_folder(self.folder)

    def piece(self, digest: str, index: int) -> bytes | None:
        """PIECE_BYTES of a file, by its digest; None where there is no such file or piece here."""
        file = self._by_digest.get(digest)
        if file is None or index * PIECE_BYTES >= max(1, file.size_bytes):
            return None
        try:
            with (self.folder / file.name).open("rb") as source:
                source.seek(index * PIECE_BYTES)
                data = source.read(PIECE_BYTES)
        except OSError:
            return None
        whole = min(PIECE_BYTES, file.size_bytes - index * PIECE_BYTES)
        return data if len(data) == whole else None

    def _size(self, name: str) -> int | None:
        try:
            return (self.folder / name).stat().st_size
        except OSError:
            return None


def take_base(source: Path, target: Path) -> tuple[BaseFile, ...]:
    """Copy a base's files, but not its weights, into HOME/base; gives what was copied. Raises OSError."""
    target.mkdir(parents=True, exist_ok=True)
    files = []
    for name in FILE_NAMES:
        if name != WEIGHTS and (source / name).is_file():
            copy_file(source / name, target / name)
            files.append(BaseFile.of(target / name))
    return tuple(files)


def copy_file(source: Path, target: Path) -> None:
    """The same bytes, whole or not at all. Raises OSError."""
    with source.open("rb") as file:
        write_file(target, lambda out: shutil.copyfileobj(file, out, _READ_BYTES))
