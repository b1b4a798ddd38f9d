"""The chain on the disk with its index and marks: found again after a kill, damage, a fork or their loss."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from state.kit import CRYPTO, IDENTITY, SCHEMA, flip, unreadable

from tapestry.node.disk.chain_file import ChainFile
from tapestry.node.disk.files import seal, unseal
from tapestry.node.home import Home
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.members import UNIT
from tapestry.node.protocol.record import Body, Member, Record, found, head_of

EVERY = 4
GENESIS = found("spec", IDENTITY.peer_id, "0d" * 32, SCHEMA, 700, "0" * 32, CRYPTO)


def records_after(chain: Chain, count: int, result: str = "1a" * 32) -> list[Record]:
    """Unsigned: a store asks for links only."""
    made, prev = [], chain.head
    for epoch in range(chain.epoch + 1, chain.epoch + 1 + count):
        members = (Member(IDENTITY.peer_id, UNIT, f"{epoch:064x}", "", epoch),)
        body = Body(GENESIS.run_id, epoch, prev, "0d" * 32, members, result)
        made.append(Record(body, head_of(body, CRYPTO), 0, ()))
        prev = made[-1].head
    return made


class Kept:
    """A chain file, and the same chain in memory."""

    def __init__(self, folder: Path, count: int) -> None:
        self.home = Home(folder)
        self.file = self.opened()
        self.chain = Chain(GENESIS)
        self.append(count)

    def opened(self) -> ChainFile:
        return ChainFile(self.home, GENESIS, CRYPTO, EVERY)

    def append(self, count: int) -> None:
        for record in records_after(self.chain, count):
            self.file.append(record)
            self.chain.append(record)

    def switch(self, epoch: int, records: list[Record]) -> None:
        self.file.switch(epoch, records)
        self.chain.switch(epoch, records)

    def agrees(self, file: ChainFile | None = None) -> None:
        """Whether what is read is what was written, by every question."""
        file, chain = file or self.opened(), self.chain
        assert len(file) == chain.epoch
        assert file.read(0, 99) == tuple(chain.records)
        assert [file.head_at(e) for e in range(1, chain.epoch + 2)] == [r.head for r in chain.records] + [""]
        for epoch in range(chain.epoch + 1):
            point = file.kept(epoch)
            assert point is None or point.place == chain.place_at(point.place.epoch)
            assert (point is None) == (epoch < EVERY) or point.place.epoch > epoch - EVERY
        paged = Chain(GENESIS, past=file, recent=2)
        assert (paged.place, paged.tokens) == (chain.place, chain.tokens)
        assert [paged.place_at(e) for e in range(chain.epoch)] == [
            chain.place_at(e) for e in range(chain.epoch)
        ]


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path, 11)  # two marks, and three records after them


def test_what_was_appended_is_read_back_now_and_after_a_kill(kept: Kept) -> None:
    kept.agrees(kept.file)
    kept.agrees()
    kept.file = kept.opened()
    kept.append(6)
    kept.agrees(kept.file)
    kept.agrees()


def test_a_start_reads_only_what_follows_the_last_mark(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    parse = ChainFile._parsed

    def counting(self: ChainFile, line: bytes) -> Record:
        record = parse(self, line)
        parsed.append(record.body.epoch)
        return record

    monkeypatch.setattr(ChainFile, "_parsed", counting)
    kept.opened()
    assert parsed == [8, 9, 10, 11]


@pytest.mark.parametrize("lost", ["index", "marks", "both"])
def test_a_lost_index_is_made_again(kept: Kept, lost: str) -> None:
    index, marks = kept.home.chain_index.read_bytes(), kept.home.chain_marks.read_bytes()
    if lost != "marks":
        kept.home.chain_index.unlink()
    if lost != "index":
        kept.home.chain_marks.unlink()
    kept.agrees()
    assert (kept.home.chain_index.read_bytes(), kept.home.chain_marks.read_bytes()) == (index, marks)


@pytest.mark.parametrize("version", [None, 1, 3])
def test_marks_of_another_version_are_made_again(kept: Kept, version: int | None) -> None:
    lines = kept.home.chain_marks.read_bytes()
    marks = [unseal(line) for line in lines.splitlines()]
    for mark in marks:
        mark["version"] = version
        if version is None:
            del mark["version"], mark["place"]["seats"]  # as before there were versions
    kept.home.chain_marks.write_bytes(b"".join(seal(mark) + b"\n" for mark in marks))
    kept.agrees()
    assert kept.home.chain_marks.read_bytes() == lines


def test_marks_that_the_disk_no_longer_gives_are_made_again(kept: Kept) -> None:
    unreadable(kept.home.chain_marks)
    kept.agrees()
    assert kept.home.chain_marks.stat().st_size


def test_a_sector_of_the_chain_that_cannot_be_read_keeps_the_records_before_it_and_the_file(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No start got past it. What lies behind the sector may be all there is, of a lone member."""
    whole, count = kept.home.chain.read_bytes(), len(kept.file)
    kept.home.chain_marks.unlink()
    opened = Path.open

    class BadSector:
        def __init__(self, file: Any) -> None:
            self._file, self._left = file, 3

        def __enter__(self) -> BadSector:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def seek(self, offset: int) -> None:
            self._file.seek(offset)

        def readline(self, limit: int) -> bytes:
            if not self._left:
                raise OSError(errno.EIO, "Input/output error")
            self._left -= 1
            line: bytes = self._file.readline(limit)
            return line

    def open_chain(path: Path, mode: str = "r", *args: Any) -> Any:
        file = opened(path, mode, *args)
        return BadSector(file) if path == kept.home.chain else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_chain)
        file = kept.opened()
    assert len(file) == 3 < count and file.read(0, 99) == tuple(kept.chain.records[:3])
    assert (kept.home.path / "chain.jsonl.corrupt").read_bytes() == whole
    assert kept.home.chain.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
    for record in kept.chain.records[3:]:
        file.append(record)
    kept.agrees()


def test_no_bit_of_index_or_marks_can_be_flipped_to_any_effect(kept: Kept) -> None:
    for path in (kept.home.chain_index, kept.home.chain_marks):
        whole = path.read_bytes()
        for at in range(0, len(whole), 7):
            flip(path, at)
            kept.agrees()
            assert path.read_bytes() == whole, f"byte {at} of {path.name} was not mended"


def test_an_index_that_a_power_cut_left_empty_behind_the_last_mark_is_filled(kept: Kept) -> None:
    whole = kept.home.chain_index.read_bytes()
    kept.home.chain_index.write_bytes(whole[: 40 * (2 * EVERY + 1)] + bytes(120))
    kept.agrees()
    assert kept.home.chain_index.read_bytes() == whole


@pytest.mark.parametrize("common", [0, 3, 4, 6, 8, 10, 11])
def test_a_fork_is_left_with_its_marks(kept: Kept, common: int) -> None:
    kept.switch(common, records_after(Chain(GENESIS, kept.chain.records[:common]), 3, "2b" * 32))
    assert kept.file.switches == 1
    kept.agrees(kept.file)
    kept.agrees()
    kept.append(6)
    kept.agrees(kept.file)
    kept.agrees()


def test_a_kill_between_the_new_chain_and_its_marks_is_found_by_the_marks(kept: Kept) -> None:
    marks, index = kept.home.chain_marks.read_bytes(), kept.home.chain_index.read_bytes()
    kept.switch(2, records_after(Chain(GENESIS, kept.chain.records[:2]), 8, "2b" * 32))
    kept.home.chain_marks.write_bytes(marks)
    kept.home.chain_index.write_bytes(index)
    kept.agrees()


def test_another_chain_in_its_place_is_found_by_the_marks(kept: Kept, tmp_path: Path) -> None:
    """`tapestry rejoin` puts back the chain of before an island, beside which no index lies."""
    (tmp_path / "other").mkdir()
    other = Kept(tmp_path / "other", 9)
    other.switch(1, records_after(Chain(GENESIS, other.chain.records[:1]), 9, "2b" * 32))
    kept.home.chain.write_bytes(other.home.chain.read_bytes())
    kept.chain = other.chain
    kept.agrees()


def test_damage_before_the_marks_ends_the_node_when_it_is_read_and_the_next_start_keeps_what_is_before(
    kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    lines = kept.home.chain.read_bytes().splitlines(keepends=True)
    flip(kept.home.chain, len(lines[0]) + len(lines[1]) // 2)
    file = kept.opened()
    assert len(file) == 11 and file.read(2, 9) == tuple(kept.chain.records[2:])
    with pytest.raises(OSError, match=r"record 2 is damaged.*the next start keeps what is before"):
        file.read(0, 5)
    assert len(kept.opened()) == 1
    assert "records_kept=1" in caplog.text
    aside = kept.home.chain.with_name("chain.jsonl.corrupt").read_bytes()
    assert aside[-len(lines[-1]) :] == lines[-1]


def test_a_reader_goes_on_while_a_fork_is_left(kept: Kept) -> None:
    """The core reads what both sides have before the disk thread has written, and after."""
    chain = Chain(GENESIS, past=kept.file, recent=2)
    theirs = records_after(Chain(GENESIS, kept.chain.records[:5]), 9, "2b" * 32)
    chain.switch(5, theirs)
    before = list(chain.records)
    kept.switch(5, theirs)
    assert list(chain.records) == before == list(kept.chain.records)


def test_who_sees_that_a_fork_was_left_sees_nothing_more_of_it(kept: Kept) -> None:
    """The loop may look between any two moments of the disk thread: then it lets go of what the disk has."""
    theirs = records_after(Chain(GENESIS, kept.chain.records[:5]), 9, "2b" * 32)
    heads = [r.head for r in kept.chain.records[:5]] + [r.head for r in theirs]
    file, lock, seen = kept.file, kept.file._lock, []

    class Watched:
        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()
            if file.switches:
                file._lock = lock
                seen.append([r.head for r in file.read(0, 99)])
                assert seen[-1] == heads[: len(seen[-1])] == [file.head_at(e + 1) for e in range(len(file))]
                file._lock = self  # type: ignore[assignment]

    file._lock = Watched()  # type: ignore[assignment]
    kept.switch(5, theirs)
    assert len(seen) > len(theirs)


def test_a_chain_of_another_run_is_not_believed_for_its_marks(kept: Kept) -> None:
    other = found("spec", IDENTITY.peer_id, "0d" * 32, SCHEMA, 700, "1" * 32, CRYPTO)
    assert len(ChainFile(kept.home, other, CRYPTO, EVERY)) == 0
    assert kept.home.chain.with_name("chain.jsonl.corrupt").exists()


def test_a_full_disk_leaves_the_chain_as_it_was(
    kept: Kept, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    (record,) = records_after(kept.chain, 1)
    with full_disk(), pytest.raises(OSError, match="No space left"):
        kept.file.append(record)
    kept.agrees(kept.file)
    kept.append(2)  # the second is due a mark
    kept.agrees()


def test_a_long_scan_says_so(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tapestry.node.disk.chain_file.TELL_S", -1.0)
    os.unlink(kept.home.chain_marks)
    with caplog.at_level(logging.INFO):
        kept.opened()
    assert "index=made_again" in caplog.text and "epoch=7" in caplog.text
