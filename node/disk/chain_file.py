"""The chain on the disk: one sealed record a line, and beside it what makes any of them quick to find.

    chain.jsonl   the truth: appended and synced, a record a line
    chain.index   40 bytes an epoch, from the genesis on: where its line ends (u64, little-endian), its head
    chain.marks   every EVERY epochs one sealed line: where the chain is there, what its records come to so
                  far (protocol/places.py), and the digest of the index since the mark before

A node of a year's run starts in seconds, and its memory does not grow with the chain: it reads the marks,
compares the index with their digests, the newest mark with the record that it is of, and reads the records
after that mark, strictly, as ever. What is before it was checked when it was written; each record is compared
with its seal and its head whenever it is read (docs/decisions/017-chain-on-disk.md).

Index and marks can be thrown away: what is missing, or does not hold, is made again of chain.jsonl. Entries
of the index after the newest mark are never believed at a start, so that they need no sync of their own.

A line that a kill left unfinished is cut off. Damage is set aside with all after it: peers have the rest.

One thread writes; any may read meanwhile. Blocking. Must not import: asyncio; hivemind; torch.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from tapestry.node.disk.files import (
    has_another_end,
    is_damage,
    pwrite_all,
    seal,
    sync_folder,
    unseal,
    write_file,
)
from tapestry.node.home import Home
from tapestry.node.protocol.canon import Crypto
from tapestry.node.protocol.chain import Point, tokens_of, walk
from tapestry.node.protocol.place import genesis_place, next_place
from tapestry.node.protocol.places import place_from_dict, place_to_dict
from tapestry.node.protocol.record import Genesis, Record, record_from_dict, record_to_dict
from tapestry.node.protocol.strict import integer, table

MARKS_VERSION = 2  # of a mark's text: marks of another are made again of the chain
EVERY = 1024  # epochs between marks. Guess: 0.2 s of reading at a start, 1 kB a mark of 3 members
NEAR_EVERY, NEAR_COUNT = 64, 16  # places of the newest epochs that stay in memory, for who opens the chain
LINE_BYTES_MAX = 16 << 20  # as in lineage/follow.py
COPY_BYTES = 1 << 20
TELL_S = 5.0  # between two lines about an index that is being made
_ENTRY = struct.Struct("<Q32s")

_log = logging.getLogger("tapestry.disk")


class ChainFile:
    """One home's chain; a `Past` (protocol/chain.py)."""

    def __init__(self, home: Home, genesis: Genesis, crypto: Crypto, every: int = EVERY) -> None:
        """Find out what the disk holds of this run, and mend it. Raises OSError."""
        self._path, self._index_path, self._marks_path = home.chain, home.chain_index, home.chain_marks
        self._crypto = crypto
        self._every = every
        self._genesis = genesis
        self._lock = threading.Lock()  # of all below, held for moments only: never while a disk is synced
        self._switches = 0
        self._count = 0
        self._end = 0  # of the last record's line
        self._point = Point(genesis_place(genesis), 0)
        self._near: deque[Point] = deque(maxlen=NEAR_COUNT)
        self._mark_ends: list[int] = []  # in chain.marks, of each mark's line
        self._chain = _Fd(self._path, os.O_RDWR) if self._path.exists() else None
        self._index = _Fd(self._index_path, os.O_RDWR | os.O_CREAT)
        pwrite_all(self._index.fd, _ENTRY.pack(0, bytes.fromhex(genesis.run_id)), 0)
        if self._chain is not None:
            try:
                self._believe_marks(os.fstat(self._chain.fd).st_size)
            except OSError as error:
                if not is_damage(error):
                    raise
                self._begin_index_anew(str(error))
            self._scan()
        else:
            self._cut_marks(0)

    # --- to read: a Past --------------------------------------------------------------------------

    @property
    def switches(self) -> int:
        return self._switches

    def __len__(self) -> int:
        return self._count

    def head_at(self, epoch: int) -> str:
        with self._lock:
            if not 0 < epoch <= self._count:
                return ""
            return os.pread(self._index.fd, 32, _ENTRY.size * epoch + 8).hex()

    def read(self, epoch: int, count_max: int) -> tuple[Record, ...]:
        """Raises OSError for a record that is damaged: the next start keeps what is before it."""
        with self._lock:
            count = min(count_max, self._count - epoch)
            if count <= 0 or self._chain is None:
                return ()
            try:
                entries = _entries(self._index, epoch, count + 1)
                start, end = (entries[0][0], entries[-1][0]) if len(entries) > count else (0, 0)
                data = os.pread(self._chain.fd, end - start, start) if end > start else b""
            except OSError as error:
                if not is_damage(error):
                    raise
                raise self._damaged(epoch + 1, str(error)) from error
        found = []
        for number, ((begin, _), (stop, head)) in enumerate(itertools.pairwise(entries), 1):
            try:
                record = self._parsed(data[begin - start : stop - start])
            except ValueError as error:
                raise self._damaged(epoch + number, str(error)) from error
            if (record.body.epoch, record.head) != (epoch + number, head):
                raise self._damaged(epoch + number, "it is another one")
            found.append(record)
        if len(found) < count:
            raise self._damaged(epoch + len(found) + 1, "its index has no end")
        return tuple(found)

    def kept(self, epoch: int) -> Point | None:
        with self._lock:
            near = next((p for p in reversed(self._near) if p.place.epoch <= epoch), None)
            number = min(epoch // self._every, len(self._mark_ends))
            ends = self._mark_ends[max(0, number - 2) : number]
        if near is not None and near.place.epoch >= number * self._every:
            return near
        if not number:
            return None
        begin, end = (0, *ends)[-2:]
        with self._marks_path.open("rb") as file:
            file.seek(begin)
            line = file.read(end - begin)
        try:
            mark = _mark_of(line)
            return Point(place_from_dict(mark.place), mark.tokens)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(number * self._every, f"its mark does not hold: {error}") from error

    def bytes_after(self, epoch: int) -> int:
        """Of the lines of the records after `epoch`."""
        return self._end - self._end_at(epoch)

    def copy_after(self, epoch: int, file: BinaryIO) -> None:
        """Those lines, as they are. In the thread that writes. Raises OSError."""
        if self._chain is not None:
            _copy(self._chain.fd, self._end_at(epoch), self.bytes_after(epoch), file)

    # --- to write ---------------------------------------------------------------------------------

    def append(self, record: Record) -> None:
        """Write the record that follows the last one. On OSError the chain on disk is as before."""
        assert record.body.epoch == self._count + 1
        line = line_of(record)
        end = self._end + len(line)
        fd = self._opened().fd
        try:
            self._put_entry(record, end)
            pwrite_all(fd, line, self._end)
            os.fsync(fd)
        except OSError:
            os.ftruncate(fd, self._end)
            os.ftruncate(self._index.fd, _ENTRY.size * (self._count + 1))
            raise
        self._took(record, end)

    def switch(self, epoch: int, records: Sequence[Record]) -> None:
        """Put `records` in the place of those after `epoch`: all of it, or on OSError nothing.

        The file is written anew: who reads the one before reads on in it.
        """
        point = self._point_at(epoch)
        kept_bytes = self._end_at(epoch)
        lines = [line_of(record) for record in records]

        def write(file: BinaryIO) -> None:
            if self._chain is not None:
                _copy(self._chain.fd, 0, kept_bytes, file)
            file.writelines(lines)

        write_file(self._path, write)
        chain = _Fd(self._path, os.O_RDWR)
        with self._lock:  # at one moment: who sees that there was a switch sees nothing of the side left
            self._chain = chain
            self._go_to(point, kept_bytes)
            self._switches += 1
        self._cut_marks(min(len(self._mark_ends), epoch // self._every))
        end = kept_bytes
        for record, line in zip(records, lines, strict=True):
            end += len(line)
            self._put_entry(record, end)
            self._took(record, end)

    def _took(self, record: Record, end: int) -> None:
        """A record whose line and entry are written."""
        place, tokens = self._point
        point = Point(next_place(place, record), tokens + tokens_of((record,)))
        with self._lock:
            self._point, self._end, self._count = point, end, record.body.epoch
            if self._count % NEAR_EVERY == 0:
                self._near.append(point)
        if self._count % self._every == 0 and self._count // self._every == len(self._mark_ends) + 1:
            self._mark()

    def _mark(self) -> None:
        """Of the newest record. The index is on the disk before the mark that vouches for it."""
        os.fsync(self._index.fd)
        line = seal(
            {
                "version": MARKS_VERSION,
                "end": self._end,
                "index": _index_digest(self._index, self._count - self._every, self._every),
                "place": place_to_dict(self._point.place),
                "tokens": self._point.tokens,
            }
        )
        start = self._mark_ends[-1] if self._mark_ends else 0
        marks = _Fd(self._marks_path, os.O_RDWR | os.O_CREAT)
        pwrite_all(marks.fd, line + b"\n", start)
        os.fsync(marks.fd)
        with self._lock:
            self._mark_ends.append(start + len(line) + 1)

    def _opened(self) -> _Fd:
        if self._chain is None:
            chain = _Fd(self._path, os.O_RDWR | os.O_CREAT)
            sync_folder(self._path.parent)
            with self._lock:
                self._chain = chain
        return self._chain

    def _put_entry(self, record: Record, end: int) -> None:
        entry = _ENTRY.pack(end, bytes.fromhex(record.head))
        pwrite_all(self._index.fd, entry, _ENTRY.size * record.body.epoch)

    def _go_to(self, point: Point, end: int) -> None:
        """Hold the lock."""
        self._point, self._end, self._count = point, end, point.place.epoch
        while self._near and self._near[-1].place.epoch > self._count:
            self._near.pop()

    def _cut_marks(self, count: int) -> None:
        with self._lock:
            del self._mark_ends[count:]
        if self._marks_path.exists():
            os.truncate(self._marks_path, self._mark_ends[-1] if self._mark_ends else 0)

    def _end_at(self, epoch: int) -> int:
        if epoch == self._count:
            return self._end
        return _entries(self._index, epoch, 1)[0][0]

    def _point_at(self, epoch: int) -> Point:
        if epoch == self._count:
            return self._point
        return walk(self.kept(epoch) or Point(genesis_place(self._genesis), 0), self, epoch)

    # --- at the start -----------------------------------------------------------------------------

    def _believe_marks(self, size_bytes: int) -> None:
        """Go to the newest mark that is of this chain, with an index that has its digests up to there."""
        ends, marks = [], self._read_marks()
        for number, (end, mark) in enumerate(marks, 1):
            block = _index_digest(self._index, (number - 1) * self._every, self._every)
            if mark.end > size_bytes or block != mark.index:
                break
            ends.append(end)
        self._mark_ends = ends
        while self._mark_ends and not self._go_to_last_mark():
            self._mark_ends.pop()
        self._cut_marks(len(self._mark_ends))

    def _begin_index_anew(self, why: str) -> None:
        """Neither index nor marks hold anything that the chain does not."""
        _log.warning(
            "chain index=unreadable path=%s reason=%r; made again of the chain. Check the disk",
            self._index_path,
            why,
        )
        self._marks_path.unlink(missing_ok=True)
        self._mark_ends = []
        self._index_path.unlink()
        self._index = _Fd(self._index_path, os.O_RDWR | os.O_CREAT)
        pwrite_all(self._index.fd, _ENTRY.pack(0, bytes.fromhex(self._genesis.run_id)), 0)
        with self._lock:
            self._go_to(Point(genesis_place(self._genesis), 0), 0)
            self._near.clear()

    def _read_marks(self) -> Iterator[tuple[int, Mark]]:
        """Each with where its line ends, up to the first that does not hold."""
        if not self._marks_path.exists():
            return
        end = 0
        with self._marks_path.open("rb") as file:
            while line := file.readline(LINE_BYTES_MAX):
                end += len(line)
                try:
                    yield end, _mark_of(line)
                except ValueError:
                    return

    def _go_to_last_mark(self) -> bool:
        """Whether its record lies where the index says."""
        assert self._chain is not None
        epoch = len(self._mark_ends) * self._every
        try:
            point = self.kept(epoch)
            (begin, _), (end, head) = _entries(self._index, epoch - 1, 2)
            record = self._parsed(os.pread(self._chain.fd, max(0, end - begin), begin))
        except (ValueError, OSError):
            return False
        if point is None or (point.place.epoch, point.place.head, head) != (epoch, record.head, record.head):
            return False
        if record.body.run_id != self._genesis.run_id:
            return False  # a genesis that somebody put there: the chain is of another run
        with self._lock:
            self._go_to(point, end)
            self._near.clear()
        return True

    def _scan(self) -> None:
        """Read what follows, and write down where it lies; cut off what does not hold."""
        assert self._chain is not None
        why, unreadable, told_at = "", False, time.monotonic()
        with self._path.open("rb") as file:
            file.seek(self._end)
            while True:
                try:
                    line = file.readline(LINE_BYTES_MAX)
                except OSError as error:
                    if not is_damage(error):
                        raise
                    why, unreadable = str(error), True
                    break
                if not line:
                    break
                if not line.endswith(b"\n"):
                    why = _why_no_line(line)
                    break
                try:
                    record = self._parsed(line)
                    self._require_link(record)
                except ValueError as error:
                    why = str(error)
                    break
                end = self._end + len(line)
                self._put_entry(record, end)
                self._took(record, end)
                if time.monotonic() - told_at > TELL_S:
                    told_at = time.monotonic()
                    _log.info("chain index=made_again path=%s epoch=%d", self._index_path, self._count)
        if unreadable:
            self._leave_unreadable(why)
        elif why:
            self._cut(why)

    def _require_link(self, record: Record) -> None:
        """Raise ValueError unless it follows. Its signatures were checked before it was written."""
        body, at = record.body, self._point.place
        if (body.epoch, body.prev, body.run_id) != (at.epoch + 1, at.head, self._genesis.run_id):
            raise ValueError(f"record {body.epoch} does not follow record {at.epoch}")

    def _cut(self, why: str) -> None:
        assert self._chain is not None
        path, fd, start = self._path, self._chain.fd, self._end
        rest_bytes = os.fstat(fd).st_size - start
        _log.warning(
            "chain cut path=%s records_kept=%d bytes_cut=%d reason=%r; the others are asked for what is "
            "missing. %s",
            *(path, self._count, rest_bytes, why),
            "A crash explains it" if why == "unfinished" else "Check the disk",
        )
        if why != "unfinished":
            aside = path.with_name(path.name + ".corrupt")
            write_file(aside, lambda file: _copy(fd, start, rest_bytes, file))
        os.ftruncate(fd, start)
        os.fsync(fd)

    def _leave_unreadable(self, why: str) -> None:
        """The file stays as it is, for who may yet read it; what could be read goes to one of its own."""
        assert self._chain is not None
        path, fd, kept_bytes = self._path, self._chain.fd, self._end
        aside = path.with_name(path.name + ".corrupt")
        _log.warning(
            "chain unreadable path=%s records_kept=%d set_aside=%s reason=%r; check the disk",
            *(path, self._count, aside, why),
        )
        aside.unlink(missing_ok=True)
        os.link(path, aside)
        try:
            write_file(path, lambda file: _copy(fd, 0, kept_bytes, file))
        except OSError as error:
            if is_damage(error):  # before the marks, which spared us to read it: the next start reads all
                self._marks_path.unlink(missing_ok=True)
            raise
        self._chain = _Fd(path, os.O_RDWR)

    # --- records ----------------------------------------------------------------------------------

    def _parsed(self, line: bytes) -> Record:
        """Strict. Raises ValueError."""
        return record_from_dict(unseal(line[:-1] if line.endswith(b"\n") else b""), self._crypto)

    def _damaged(self, epoch: int, why: str) -> OSError:
        """The disk gave back other bytes than it was given. Without marks the next start reads all of it."""
        self._marks_path.unlink(missing_ok=True)
        text = f"record {epoch} is damaged: {why}; the next start keeps what is before it"
        return OSError(errno.EIO, text, str(self._path))


@dataclass(frozen=True, slots=True)
class Mark:
    """One line of chain.marks, whose place is read when it is asked for."""

    end: int  # of its record's line in chain.jsonl
    index: str  # digest of the entries since the mark before
    place: dict[str, Any]
    tokens: int


def _mark_of(line: bytes) -> Mark:
    """Raises ValueError."""
    fields = table(unseal(line.removesuffix(b"\n")), ("version", "end", "index", "place", "tokens"), "a mark")
    integer(fields["version"], MARKS_VERSION, MARKS_VERSION, "version")
    return Mark(**{name: value for name, value in fields.items() if name != "version"})


def _why_no_line(line: bytes) -> str:
    """Of what does not end in a newline."""
    if len(line) == LINE_BYTES_MAX:
        return "a line without an end"
    return "it ends with another byte than a newline" if has_another_end(line) else "unfinished"


def line_of(record: Record) -> bytes:
    """Of chain.jsonl."""
    return seal(record_to_dict(record)) + b"\n"


class _Fd:
    """A descriptor that is closed when nobody reads by it any more."""

    def __init__(self, path: Path, flags: int) -> None:
        self.fd = -1
        self.fd = os.open(path, flags | os.O_CLOEXEC, 0o644)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _entries(index: _Fd, epoch: int, count: int) -> list[tuple[int, str]]:
    """(end, head) of `epoch` and of those after it; fewer where the file ends."""
    data = os.pread(index.fd, _ENTRY.size * count, _ENTRY.size * epoch)
    whole = len(data) - len(data) % _ENTRY.size
    return [(end, head.hex()) for end, head in _ENTRY.iter_unpack(data[:whole])]


def _index_digest(index: _Fd, epoch: int, count: int) -> str:
    """Of the entries after `epoch`."""
    return blake3(os.pread(index.fd, _ENTRY.size * count, _ENTRY.size * (epoch + 1))).hexdigest()


def _copy(fd: int, start: int, count: int, file: BinaryIO) -> None:
    """So many bytes from `start`, a piece at a time."""
    while count:
        piece = os.pread(fd, min(COPY_BYTES, count), start)
        if not piece:
            raise OSError(errno.EIO, "the file is shorter than it was")
        file.write(piece)
        start, count = start + len(piece), count - len(piece)
