"""Vectors in files: no name, all of their room taken at once, and one line for whoever has none."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tapestry.node.disk import scratch
from tapestry.node.disk.scratch import create_scratch, reserve, scratch_vectors
from tapestry.node.errors import UserError

FOLDER = "state"


def test_vectors_are_zeros_and_apart_and_leave_no_name(tmp_path: Path) -> None:
    vectors = scratch_vectors(tmp_path / FOLDER, ("m", "v"), 1000)
    assert [*vectors] == ["m", "v"] and all(v.shape == (1000,) and not v.any() for v in vectors.values())
    vectors["m"].fill_(1.0)
    assert not vectors["v"].any() and os.listdir(tmp_path / FOLDER) == []


def test_a_file_system_without_nameless_files_leaves_none_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    (vector,) = scratch_vectors(tmp_path / FOLDER, ("m",), 10).values()
    vector.fill_(2.0)
    assert torch.equal(vector, torch.full((10,), 2.0)) and os.listdir(tmp_path / FOLDER) == []


def test_all_room_is_taken_when_a_file_gets_its_size(tmp_path: Path) -> None:
    fd = create_scratch(tmp_path / FOLDER)
    reserve(fd, 1 << 20, tmp_path / FOLDER)
    stat = os.fstat(fd)
    os.close(fd)
    assert stat.st_size == 1 << 20 and stat.st_blocks * 512 >= 1 << 20


def test_a_disk_without_room_is_told_in_a_line_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fstatvfs", lambda fd: SimpleNamespace(f_bavail=3, f_frsize=1000))
    with pytest.raises(UserError, match="needs 4,000 bytes, 3,000 are free") as caught:
        scratch_vectors(tmp_path / FOLDER, ("m",), 1000)
    assert caught.value.hint is not None and "make room" in caught.value.hint


def test_a_disk_that_fills_while_the_room_is_taken_is_told_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="no room for the state"):
        scratch_vectors(tmp_path / FOLDER, ("m",), 1000)


def test_a_file_system_that_cannot_take_room_ahead_is_used_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    (vector,) = scratch_vectors(tmp_path / FOLDER, ("m",), 1000).values()
    assert vector.shape == (1000,)


def test_a_file_system_that_cannot_map_files_is_told_before_anything_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object, **__: object) -> Any:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(scratch, "mmap", SimpleNamespace(mmap=cannot, PAGESIZE=mmap.PAGESIZE))
    with pytest.raises(UserError, match="cannot map files to memory"):
        create_scratch(tmp_path / FOLDER)


def test_a_folder_that_is_a_link_leads_to_where_the_files_lie(tmp_path: Path) -> None:
    other = tmp_path / "other disk"
    other.mkdir()
    (tmp_path / FOLDER).symlink_to(other)
    fd = create_scratch(tmp_path / FOLDER)
    assert os.readlink(f"/proc/self/fd/{fd}").startswith(str(other))
    os.close(fd)
