"""The node's buffers: what a worker is handed, what has room when, and that nothing stays open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tapestry.node.trainer.buffers import Buffers
from tapestry.node.trainer.shared import map_slot, map_vector

N, PAYLOAD_BYTES = 6, 5000  # no whole pages


@pytest.fixture
def buffers(tmp_path: Path) -> Iterator[Buffers]:
    buffers = Buffers(tmp_path / "state")
    buffers.map(N, PAYLOAD_BYTES)
    yield buffers
    buffers.close()


def contribute(buffers: Buffers, value: int) -> None:
    """As a worker does that was told to begin."""
    map_slot(buffers.fds["contribution"], PAYLOAD_BYTES, buffers.slot, writable=True).fill_(value)


def test_an_initial_state_has_room_only_while_it_is_taken(buffers: Buffers) -> None:
    with buffers.room_for_initial():
        map_vector(buffers.fds["initial"], N, writable=True).fill_(2.5)
        buffers.take_initial()
    assert buffers.params.eq(2.5).all()
    assert os.fstat(buffers.fds["initial"]).st_size == 0


def test_a_close_while_an_initial_state_is_awaited_leaves_other_descriptors_alone(buffers: Buffers) -> None:
    with buffers.room_for_initial():
        number = buffers.fds["initial"]
        buffers.close()
        other = os.memfd_create("another file that gets the number")
        os.dup2(other, number)
        os.ftruncate(number, 100)
    assert os.fstat(number).st_size == 100
    for fd in {other, number}:
        os.close(fd)


def test_a_step_aside_keeps_its_room(buffers: Buffers) -> None:
    buffers.room_aside().fill_(1.5)
    assert buffers.room_aside().eq(1.5).all()
    assert map_vector(buffers.fds["initial"], N, writable=False).eq(1.5).all()


def test_when_every_place_is_held_there_is_a_new_buffer_and_what_is_held_stays(buffers: Buffers) -> None:
    held, before = [], os.fstat(buffers.fds["contribution"]).st_ino
    here = [buffers.choose_slot()]
    for value in (1, 2):
        contribute(buffers, value)
        held.append(buffers.contribution)
        here.append(buffers.choose_slot())
    assert here == [True, True, False]
    contribute(buffers, 3)
    assert [int(one[0]) for one in held] == [1, 2] and buffers.contribution.eq(3).all()
    assert os.fstat(buffers.fds["contribution"]).st_ino != before
