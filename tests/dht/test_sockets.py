"""Folders of sockets: those of the dead are swept, those of the living never, whatever their pid."""

from __future__ import annotations

import os
import shutil

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
    lock = hold_folder(held)
    folders.append(make_socket_folder())
    assert os.path.isdir(held) and os.path.isdir(unlocked)
    os.close(lock)  # as the kernel does when the process has ended
    folders.append(make_socket_folder())
    assert not os.path.exists(held)
    assert os.path.isdir(unlocked), "whose owner has not locked it yet"
