"""Memory that two processes see: a file descriptor of memory, or of a file without a name (disk/scratch.py).

The node creates a buffer, the worker inherits its descriptor, both map it. The kernel frees it when the
last of them is gone, however it went: nothing is left in /dev/shm or a temporary folder.

The contribution's buffer has SLOTS places, one after another, each of whole pages. The worker writes to the
one that its `Begin` names. The node chooses one that nobody reads any more (`Slots`), so that links can send
what the trainer wrote without a copy.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import warnings
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# What the worker reads, what it writes, and what it writes once, for a founder. That is empty then, until the
# node takes a step aside there: aside.py.
BUFFERS = ("params", "contribution", "initial")
SLOTS = 2  # a contribution that a slow link still sends, and the next one
REGISTER_READ_ONLY = 0x08  # cudaHostRegisterReadOnly, of CUDA's driver_types.h


def create_buffer(name: str) -> int:
    """A descriptor of an empty buffer; an unlinked temporary file where the system has no memfd."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def size_buffer(fd: int, size: int) -> None:
    """Room for so many bytes, zeros at first; what is there already stays. Memory beyond it is freed."""
    os.ftruncate(fd, size)


def map_buffer(
    fd: int,
    size: int,
    writable: bool,
) -> Tensor:  # uint8 (size,)
    """A view that lives as long as the tensor. Writing to one that is not writable kills the process."""
    if os.fstat(fd).st_size != size:
        raise ValueError(f"the shared buffer holds {os.fstat(fd).st_size} bytes, expected {size}")
    return _viewed(_mapped(fd, size, 0, writable))


def map_slot(
    fd: int,
    size: int,  # of the payloads
    slot: int,
    writable: bool,
) -> Tensor:  # uint8 (size,)
    """The same of one place in the contribution's buffer."""
    if os.fstat(fd).st_size != SLOTS * slot_stride(size):
        raise ValueError(f"the shared buffer holds {os.fstat(fd).st_size} bytes, not {SLOTS} of {size}")
    return _viewed(_mapped(fd, size, slot * slot_stride(size), writable))


def slot_stride(size: int) -> int:
    """Bytes from one place to the next."""
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


class Slots:
    """The node's side of the contribution's buffer: which places are still read. Loop only.

    A place is read while a mapping of it lives, and that lives while any tensor, array or memoryview of it
    does: in the round's exchange, or in a link that still writes. There is no count that could be wrong.
    """

    def __init__(
        self,
        fd: int,
        size: int,  # bytes of the payloads
    ) -> None:
        self._fd = fd
        self._size = size
        self.current = 0  # the worker's, since the latest `next`
        self._read: dict[int, list[weakref.ref[mmap.mmap]]] = {slot: [] for slot in range(SLOTS)}

    def view(self) -> Tensor:  # uint8 (size,)
        """The worker's place, to be read only. While any of it is held, `next` does not choose it."""
        memory = _mapped(self._fd, self._size, self.current * slot_stride(self._size), writable=False)
        self._read[self.current].append(weakref.ref(memory))
        return _viewed(memory)

    def next(self) -> int | None:
        """The place for another contribution, from now on the worker's; None if all are read.

        The current one if nobody reads it: its pages are there already.
        """
        for slot in sorted(self._read, key=lambda slot: (slot != self.current, slot)):
            if not self._is_read(slot):
                self.current = slot
                return slot
        return None

    @property
    def last(self) -> bool:
        """Whether all places but the worker's are read: then it has to be copied to be kept."""
        return all(self._is_read(slot) for slot in self._read if slot != self.current)

    def _is_read(self, slot: int) -> bool:
        self._read[slot] = [memory for memory in self._read[slot] if memory() is not None]
        return bool(self._read[slot])


def _mapped(fd: int, size: int, offset: int, writable: bool) -> mmap.mmap:
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection, offset=offset)


def _viewed(
    memory: mmap.mmap,
) -> Tensor:  # uint8 (len(memory),)
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(memory, dtype=torch.uint8)


def map_vector(
    fd: int,
    n: int,
    writable: bool,
) -> Tensor:  # f32 (n,)
    """The same of floats."""
    import torch

    return map_buffer(fd, vector_size(n), writable).view(torch.float32)


def lock_for_gpu(
    shared: Tensor,  # of map_buffer or map_vector
    writable: bool,
) -> bool:
    """Keep it in physical memory, known to CUDA, which copies it several times faster then.

    False where CUDA does not take it: all works the same, only slower.
    """
    import torch

    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    flags = 0 if writable else REGISTER_READ_ONLY
    return bool(cudart.cudaHostRegister(shared.data_ptr(), shared.nbytes, flags) == cudart.cudaError.success)


def vector_size(n: int) -> int:
    """Bytes of f32 (n,)."""
    return 4 * n
