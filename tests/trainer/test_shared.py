"""Where contributions lie: what the node still reads is never where the worker writes next."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tapestry.node.trainer.shared import (
    SLOTS,
    Slots,
    create_buffer,
    map_slot,
    size_buffer,
    slot_stride,
)

SIZE = 5000  # bytes: no whole pages


@pytest.fixture
def fd() -> Iterator[int]:
    fd = create_buffer("test")
    size_buffer(fd, SLOTS * slot_stride(SIZE))
    yield fd
    os.close(fd)


def contribute(fd: int, slots: Slots, value: int) -> torch.Tensor:
    """As a worker does that was told to begin; what the node then sees."""
    map_slot(fd, SIZE, slots.current, writable=True).fill_(value)
    return slots.view()


def test_a_contribution_stays_as_it_was_while_a_part_of_it_is_held(fd: int) -> None:
    slots = Slots(fd, SIZE)
    part = memoryview(contribute(fd, slots, 1)[100:200].numpy())  # type: ignore[arg-type]
    for value in (2, 3, 4):
        assert slots.next() is not None
        contribute(fd, slots, value)
        assert bytes(part) == b"\x01" * 100


def test_the_same_place_is_used_again_once_nobody_reads_it(fd: int) -> None:
    slots = Slots(fd, SIZE)
    view = contribute(fd, slots, 1)
    assert slots.next() == 1
    del view
    assert not slots.last
    contribute(fd, slots, 2)
    assert slots.next() == 1


def test_the_last_place_has_to_be_copied_and_let_go(fd: int) -> None:
    slots = Slots(fd, SIZE)
    held = contribute(fd, slots, 1)
    assert not slots.last
    slots.next()
    also = contribute(fd, slots, 2)
    assert slots.last and slots.next() is None
    del also
    assert slots.next() == 1
    assert held.eq(1).all()


def test_a_buffer_of_another_size_is_not_mapped(fd: int) -> None:
    with pytest.raises(ValueError, match="holds"):
        map_slot(fd, SIZE + slot_stride(SIZE), 0, writable=False)
