"""Folders of sockets: those of the dead are swept, those of the living never, whatever their pid and age."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tapestry.dht.p2pd import hold_folder, make_socket_folder


@pytest.fixture
def folders():
    made: list[str] = []
    yield made
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_live_folder_is_left_though_its_pid_is_not_in_our_proc(folders):
    """As it is with two containers that share /tmp: the other's pid means nothing here."""
    held, unlocked = "/tmp/tapestry-999999999-held", "/tmp/tapestry-999999999-new"
    folders += [held, unlocked]
    for folder in (held, unlocked):
        os.mkdir(folder, 0o700)
    with hold_folder(held):
        folders.append(make_socket_folder())
        assert os.path.isdir(held) and os.path.isdir(unlocked)
    # as the kernel lets go of it when the process has ended
    folders.append(make_socket_folder())
    assert not os.path.exists(held)
    assert os.path.isdir(unlocked), "whose owner has not locked it yet"


def _is_locked(folder: Path) -> bool:
    """As systemd-tmpfiles asks."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def test_the_folder_itself_is_locked_while_it_is_held(tmp_path: Path) -> None:
    with hold_folder(str(tmp_path)):
        assert _is_locked(tmp_path)
    assert not _is_locked(tmp_path)


def test_where_folders_cannot_be_locked_the_node_starts_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on NFS, which locks exclusively only what is open for writing."""
    flock = fcntl.flock

    def of_files_alone(fd: int, how: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(9, "Bad file descriptor")
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", of_files_alone)
    with caplog.at_level(logging.WARNING), hold_folder(str(tmp_path)):
        assert f"folder={tmp_path} cannot be locked: Bad file descriptor" in caplog.text
        assert (tmp_path / "lock").exists()


@pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="no systemd here")
def test_systemd_tmpfiles_leaves_a_held_folder_alone(tmp_path: Path) -> None:
    """A file stands for a socket whose path in /proc/net/unix is another, as with PrivateTmp."""
    aged = tmp_path / "tmp"
    held, left = aged / "tapestry-1-held", aged / "tapestry-1-left"
    for folder in (held, left):
        folder.mkdir(parents=True)
        (folder / "p2pd.sock").touch()
    config = tmp_path / "age.conf"
    config.write_text(f"e {aged} - - - 1us\n")
    with hold_folder(str(held)):
        subprocess.run(["systemd-tmpfiles", "--clean", str(config)], check=True, timeout=30)
        assert sorted(path.name for path in held.iterdir()) == ["lock", "p2pd.sock"]
    assert not left.exists(), "what nobody holds is deleted: the look is not blind"
