"""What is brought from an island: on the disk when it is said to be, or an error that its writer knows."""

from __future__ import annotations

import os
import resource
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tapestry.node.trainer.brought import read_about, read_brought, write_brought


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may have more than 1000 bytes: for a program that is as a full disk."""
    before, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, heard)


def test_it_and_its_name_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def sync(fd: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(fd).st_mode))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", sync)
    write_brought(tmp_path / "brought", torch.ones(3), {"epoch": "5"})
    found = read_brought(tmp_path / "brought", 3)
    assert found is not None and torch.equal(found, torch.ones(3))
    assert read_about(tmp_path / "brought") == {"epoch": "5"}
    assert synced == [False, True] and os.listdir(tmp_path) == ["brought"]


def test_a_disk_without_room_is_an_os_error_and_leaves_nothing(tmp_path: Path, small_files: None) -> None:
    with pytest.raises(OSError, match="too large"):
        write_brought(tmp_path / "brought", torch.ones(3000), {})
    assert os.listdir(tmp_path) == []
