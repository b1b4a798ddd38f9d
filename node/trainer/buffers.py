"""The node's side of the shared memory: the buffers that a trainer's workers map, one worker after another.

The node makes them before there is a worker and closes them after the last one: what lies in them outlives
each worker. They are empty until the first one has said how large the model is.

    params        the parameters, written here and read by the worker
    contribution  written by the worker, read here; it has two places (shared.Slots)
    initial       a founder's initial state, once; later the parameters after a step aside (aside.py)

Must not import torch: process.py says why.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tapestry.node.disk.scratch import create_scratch, reserve
from tapestry.node.trainer.shared import (
    BUFFERS,
    SLOTS,
    Slots,
    create_buffer,
    map_vector,
    size_buffer,
    slot_stride,
    vector_size,
)

if TYPE_CHECKING:
    from torch import Tensor

SCRATCH = ("params", "initial")  # those that lie in files, if there is a folder for them


class Buffers:
    """Make one, `map` it, `close` it in a finally. Loop only."""

    def __init__(self, folder: Path | None) -> None:
        """What is in SCRATCH lies in files without a name in `folder`; without one, all lies in memory.

        Raises UserError.
        """
        self.params: Tensor  # f32 (n,)
        self.fds: dict[str, int] = {}  # by name; what a worker is handed
        self._folder = folder
        for name in BUFFERS:
            if folder is not None and name in SCRATCH:
                self.fds[name] = create_scratch(folder)
            else:
                self.fds[name] = create_buffer(f"tapestry-{name}")
        self._n: int
        self._payload_bytes: int
        self._slots: Slots
        self._aside: Tensor | None = None  # f32 (n,)

    def map(self, n: int, payload_bytes: int) -> None:
        """Once: room for n parameters and their encoded contribution. Raises UserError."""
        self._n, self._payload_bytes = n, payload_bytes
        self._size("params", vector_size(n))
        self.params = map_vector(self.fds["params"], n, writable=True)
        self._map_slots()

    @property
    def contribution(self) -> Tensor:  # uint8 (payload_bytes,)
        """What lies in the worker's place, to be read only. It stays while it is held."""
        return self._slots.view()

    @property
    def must_copy(self) -> bool:
        """Whether the contribution has to be copied and let go: the next one has no other place."""
        return self._slots.last

    @property
    def slot(self) -> int:
        """The worker's place, since the latest `choose_slot`."""
        return self._slots.current

    def choose_slot(self) -> bool:
        """Choose a place that nobody reads for the next contribution. Whether the worker that is here has it.

        It has not if every place is held: then there is a new buffer, which the next worker is handed. That
        happens only if whoever was told `must_copy` still holds the original. What a peer is being sent must
        not change.
        """
        if self._slots.next() is not None:
            return True
        gc.collect()
        if self._slots.next() is not None:
            return True
        os.close(self.fds["contribution"])
        self.fds["contribution"] = create_buffer("tapestry-contribution")
        self._map_slots()
        return False

    @contextlib.contextmanager
    def room_for_initial(self) -> Iterator[None]:
        """Inside, a worker can write an initial state. Raises UserError."""
        try:
            self._size("initial", vector_size(self._n))
            yield
        finally:
            if "initial" in self.fds:  # else `close` has closed it, and its number may be another file's
                size_buffer(self.fds["initial"], 0)

    def take_initial(self) -> None:
        """Into `params`, what a worker has written; inside `room_for_initial`."""
        self.params.copy_(map_vector(self.fds["initial"], self._n, writable=False))

    def room_aside(self) -> Tensor:  # f32 (n,)
        """Where the parameters of a step aside go; it has room from the first time on. Raises UserError."""
        if self._aside is None:
            self._size("initial", vector_size(self._n))
            self._aside = map_vector(self.fds["initial"], self._n, writable=True)
        return self._aside

    def close(self) -> None:
        """What is mapped stays mapped while it is held. May be called twice."""
        while self.fds:
            os.close(self.fds.popitem()[1])

    def _map_slots(self) -> None:
        size_buffer(self.fds["contribution"], SLOTS * slot_stride(self._payload_bytes))
        self._slots = Slots(self.fds["contribution"], self._payload_bytes)

    def _size(self, name: str, size: int) -> None:
        """Raises UserError."""
        if self._folder is not None:
            reserve(self.fds[name], size, self._folder)
        else:
            size_buffer(self.fds[name], size)
