"""An append-only file whose lines are linked by their digests: what was written cannot be changed unseen.

    {"digest": of what follows, "link": digest of the line before, "number": 7, "value": ...}

Each line is canonical JSON. Without a signature somebody with the whole file could write it anew; who keeps a
digest from time to time sees that too. A file that has grown to `file_bytes_max` gets a number in its name
(egress-000001.jsonl) and a new one begins, whose first line links to the old one's last: the chain goes on.

A line is written with one call. A process that is killed in the middle leaves a torn last line: the next
opening cuts it off and says so in the log, and the caller in a line of its own. A line that is whole but for
its newline's byte is not torn: no write ends so, and it is as broken as any other. Only the owner may read
the files. One writer at a time: whoever holds the home's lock, or `append_once`'s own.

Knows nothing of what the values mean. Must not import torch.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from tapestry.node.disk.files import one_at_a_time
from tapestry.node.protocol.canon import canonical
from tapestry.node.protocol.strict import table

FILE_BYTES_MAX = 16 << 20  # guess: 60,000 lines, which an editor still opens
LINE_BYTES_MAX = 1 << 20  # guess: what is written here has a few hundred bytes

_log = logging.getLogger("tapestry.disk")


class BrokenLink(ValueError):
    """A line that is not what was written; `number` is the one that should stand there."""

    def __init__(self, file: str, number: int, what: str) -> None:
        super().__init__(f"{file}, line {number}: {what}")
        self.file = file
        self.number = number
        self.what = what


@dataclass(frozen=True, slots=True)
class Linked:
    """One line that was read."""

    file: str
    number: int  # from 1, over all files
    link: str  # digest of the line before; "" of the first
    value: Any
    digest: str  # the next one's link


@dataclass(frozen=True, slots=True)
class Tail:
    """A file that ends in the middle of a line."""

    file: str
    torn_bytes: int


class LinkedFile:
    """The writer. `path` is the file that grows now."""

    def __init__(self, path: Path, file_bytes_max: int = FILE_BYTES_MAX) -> None:
        """Goes on at the end of what is there. Raises OSError; BrokenLink if the last line is not ours."""
        self._path = path
        self._file_bytes_max = file_bytes_max
        self.torn_bytes = _cut_torn(path)
        last = last_line(path)
        self._number, self._link = (last.number, last.digest) if last else (0, "")
        self._fd = _opened(path)

    def append(self, values: list[Any], *, sync: bool = False) -> None:
        """One line for each, in order. Raises OSError; a line that was half written is taken back."""
        if not values:
            return
        size = os.fstat(self._fd).st_size
        if size >= self._file_bytes_max:
            self._rotate()
            size = 0
        number, link, lines = self._number, self._link, []
        for value in values:
            number += 1
            link, line = _line(link, number, value)
            if len(line) > LINE_BYTES_MAX:
                raise OSError(errno.EFBIG, f"a line of {len(line)} bytes", str(self._path))
            lines.append(line)
        data = b"".join(lines)
        try:
            if os.write(self._fd, data) != len(data):
                raise OSError(28, "No space left on device", str(self._path))
            if sync:
                os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, size)
            raise
        self._number, self._link = number, link

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _rotate(self) -> None:
        """The file gets the next number; whoever reads meanwhile sees the same lines."""
        os.fsync(self._fd)
        new = self._path.with_name(self._path.name + ".new")
        fd = _opened(new)  # before anything is changed: there may be no room, or too many are open
        older = _older_files(self._path)
        number = _number_of(older[-1]) + 1 if older else 1
        os.rename(self._path, self._path.with_name(f"{self._path.stem}-{number:06d}{self._path.suffix}"))
        os.rename(new, self._path)
        self.close()
        self._fd = fd


def append_once(path: Path, value: Any) -> int:
    """One line, for a command beside whatever else may write: waits for its turn. The torn bytes that it
    cut. Raises OSError, BrokenLink."""
    with one_at_a_time(path):
        file = LinkedFile(path)
        try:
            file.append([value], sync=True)
        finally:
            file.close()
        return file.torn_bytes


def read_linked(path: Path) -> Iterator[Linked | Tail]:
    """Every line of all files, oldest first, each checked against the one before. A Tail may come last.

    Files that were removed from the beginning are not missed: the first line says its number. Raises
    BrokenLink, OSError.
    """
    before: Linked | None = None
    for file in [*_older_files(path), *([path] if path.exists() else [])]:
        with file.open("rb") as lines:
            while line := lines.readline(LINE_BYTES_MAX):
                expected = before.number + 1 if before else 1
                if not line.endswith(b"\n"):
                    if file != path:
                        raise BrokenLink(file.name, expected, "it ends in the middle of a line")
                    _require_torn(file.name, line)
                    yield Tail(file.name, len(line))
                    return
                found = _parsed(file.name, line, expected)
                _check_follows(found, before)
                before = found
                yield found


def _check_follows(found: Linked, before: Linked | None) -> None:
    if before is None:
        if (found.number == 1) != (found.link == ""):
            raise BrokenLink(found.file, found.number, "it is no first line")
    elif (found.number, found.link) != (before.number + 1, before.digest):
        raise BrokenLink(found.file, before.number + 1, "it does not follow the line before it")


def copy_linked(path: Path, folder: Path) -> None:
    """All files but for a torn last line, beside a writer too. What is broken is copied as it is, so that
    whoever checks the copy finds it. Raises OSError."""
    for file in [*_older_files(path), *([path] if path.exists() else [])]:
        with file.open("rb") as source, open(_opened(folder / file.name), "wb") as target:
            while line := source.readline(LINE_BYTES_MAX):
                if line.endswith(b"\n") or _with_another_end(file.name, line):
                    target.write(line)


def last_line(path: Path) -> Linked | None:
    """The newest whole line, read from the end. Raises BrokenLink, OSError."""
    for file in [path, *reversed(_older_files(path))]:
        if file.exists() and (size := file.stat().st_size):
            with file.open("rb") as lines:
                lines.seek(max(0, size - LINE_BYTES_MAX))
                whole = lines.read().split(b"\n")
            if len(whole) > 1 and whole[-2]:
                return _parsed(file.name, whole[-2] + b"\n", 0)
    return None


def _line(link: str, number: int, value: Any) -> tuple[str, bytes]:
    """Its digest, and the line."""
    content = {"link": link, "number": number, "value": value}
    digest = blake3(canonical(content)).hexdigest()
    return digest, canonical({"digest": digest, **content}) + b"\n"


def _parsed(file: str, line: bytes, expected: int) -> Linked:
    try:
        raw = json.loads(line)
        table(raw, ("digest", "link", "number", "value"), "a line")
        digest, expected_line = _line(raw["link"], raw["number"], raw["value"])
        if type(raw["number"]) is not int or expected_line != line:
            raise ValueError("not in the form in which a node writes it")
    except (ValueError, RecursionError) as error:
        raise BrokenLink(file, expected, str(error)) from error
    return Linked(file, raw["number"], raw["link"], raw["value"], digest)


def _with_another_end(file: str, line: bytes) -> Linked | None:
    """A line that is whole but for its newline's byte. A write that was cut off is shorter, or has zeros
    where the disk had nothing yet."""
    if line.endswith(b"\0"):
        return None
    try:
        return _parsed(file, line[:-1] + b"\n", 0)
    except BrokenLink:
        return None


def _require_torn(file: str, line: bytes) -> None:
    """Of a last line without a newline. Raises BrokenLink."""
    if found := _with_another_end(file, line):
        raise BrokenLink(file, found.number, "it ends with another byte than a newline")


def _older_files(path: Path) -> list[Path]:
    """The full ones, oldest first."""
    found = [one for one in path.parent.glob(f"{path.stem}-*{path.suffix}") if _number_of(one)]
    return sorted(found, key=_number_of)


def _number_of(path: Path) -> int:
    match = re.fullmatch(r".*-([0-9]{6})", path.stem)
    return int(match[1]) if match else 0


def _cut_torn(path: Path) -> int:
    """Cut a last line that is not whole off; how many bytes it had. Raises BrokenLink, OSError."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return 0
    with path.open("r+b") as file:
        file.seek(max(0, size - LINE_BYTES_MAX))
        line = file.read().rpartition(b"\n")[2]
        torn = len(line)
        if torn:
            _require_torn(path.name, line)
            file.truncate(size - torn)
            os.fsync(file.fileno())
            _log.warning(
                "cut an unfinished last line off path=%s bytes=%d; a crash explains it, nothing is to "
                "be done",
                path,
                torn,
            )
    return torn


def _opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
