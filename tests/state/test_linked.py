"""Linked files: what was written is found changed, a torn end is cut, rotation does not break the chain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tapestry.node.disk import linked
from tapestry.node.disk.linked import (
    BrokenLink,
    Linked,
    LinkedFile,
    Tail,
    append_once,
    copy_linked,
    read_linked,
)


def values(path: Path) -> list[object]:
    return [line.value for line in read_linked(path) if isinstance(line, Linked)]


def write(path: Path, count: int, file_bytes_max: int = 1 << 20) -> None:
    file = LinkedFile(path, file_bytes_max)
    for number in range(count):
        file.append([{"n": number}])
    file.close()


def test_lines_are_read_back_in_order_and_a_reopened_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 3)
    assert append_once(path, "more") == 0
    assert values(path) == [{"n": 0}, {"n": 1}, {"n": 2}, "more"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_bit_is_flipped_unseen(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 3)
    data = path.read_bytes()
    missed = []
    for place in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            try:
                list(read_linked(path))
            except BrokenLink:
                continue
            missed.append((place, bit))
    assert missed == []


def test_wherever_an_append_was_cut_off_it_is_torn_and_not_broken(tmp_path: Path) -> None:
    """Also right before its newline, and where a disk had room for it, but not yet its bytes."""
    path = tmp_path / "a.jsonl"
    write(path, 2)
    data = path.read_bytes()
    begins = data.index(b"\n") + 1
    for end in range(begins + 1, len(data)):
        for zeros in (b"", b"\0" * (len(data) - end)):
            path.write_bytes(data[:end] + zeros)
            assert list(read_linked(path))[1:] == [Tail("a.jsonl", end + len(zeros) - begins)]
    file = LinkedFile(path)
    file.close()
    assert file.torn_bytes == len(data) - begins and path.read_bytes() == data[:begins]


def test_a_last_newline_that_was_flipped_is_neither_cut_off_nor_left_out_of_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 2)
    data = path.read_bytes()
    path.write_bytes(flipped := data[:-1] + b"\x0b")
    with pytest.raises(BrokenLink, match="line 2: it ends with another byte"):
        LinkedFile(path)
    assert path.read_bytes() == flipped
    (tmp_path / "copy").mkdir()
    copy_linked(path, tmp_path / "copy")
    assert (tmp_path / "copy" / "a.jsonl").read_bytes() == flipped


def test_where_the_next_file_cannot_be_opened_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files, a quota: it goes on as soon as one can be."""
    path = tmp_path / "a.jsonl"
    file = LinkedFile(path, 100)
    file.append([{"n": 0}])

    def refused(path: Path) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(linked, "_opened", refused)
        for _ in range(2):
            with pytest.raises(OSError, match="Too many open files"):
                file.append([{"n": 1}])
    for number in (1, 2):
        file.append([{"n": number}])
    file.close()
    assert values(path) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a-000001.jsonl", "a-000002.jsonl", "a.jsonl"]


@pytest.mark.parametrize("lines", [[0, 2], [1, 0, 2], [0, 0, 1, 2]])
def test_a_line_that_was_taken_out_moved_or_repeated_is_found(tmp_path: Path, lines: list[int]) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 3)
    kept = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept[number] for number in lines))
    with pytest.raises(BrokenLink):
        values(path)


def test_a_torn_end_is_told_to_a_reader_and_cut_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 2)
    with path.open("ab") as file:
        file.write(b'{"link":"ab')
    assert list(read_linked(path))[-1] == Tail("a.jsonl", 11)
    (tmp_path / "copy").mkdir()
    copy_linked(path, tmp_path / "copy")
    assert values(tmp_path / "copy" / "a.jsonl") == [{"n": 0}, {"n": 1}]
    file = LinkedFile(path)
    assert file.torn_bytes == 11
    file.append(["after"])
    file.close()
    assert values(path) == [{"n": 0}, {"n": 1}, "after"]


def test_full_files_get_numbers_and_the_chain_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 20, file_bytes_max=500)
    names = sorted(one.name for one in tmp_path.iterdir())
    assert len(names) > 3 and names[0] == "a-000001.jsonl" and names[-1] == "a.jsonl"
    assert values(path) == [{"n": n} for n in range(20)]
    (tmp_path / "a-000001.jsonl").unlink()  # the oldest may be taken away: what is left holds
    assert values(path)[-1] == {"n": 19} and len(values(path)) < 20
    (tmp_path / "a-000003.jsonl").unlink()  # one in the middle not
    with pytest.raises(BrokenLink, match="does not follow"):
        values(path)


def test_a_file_that_is_full_when_its_writer_died_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 20, file_bytes_max=500)
    os.rename(path, tmp_path / "a-000099.jsonl")  # killed between the rename and the next line
    write(path, 1)
    assert len(values(path)) == 21


WRITER = """
import sys
from pathlib import Path
from tapestry.node.disk.linked import LinkedFile
file = LinkedFile(Path(sys.argv[1]), 100_000)
while True:
    file.append([{"text": "x" * 300}] * 7)
    print("wrote", flush=True)
"""


def test_what_a_killed_writer_left_is_whole_lines_that_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        for _ in range(200):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    before = len(values(path))
    assert before >= 7 * 200
    write(path, 1)
    assert len(values(path)) == before + 1
