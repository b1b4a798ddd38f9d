"""Memory that two processes see: anonymous memory behind a file descriptor.

The node creates a buffer, the worker inherits its descriptor, both map it. The kernel frees it when the
last of them is gone, however it went: nothing is left in /dev/shm or a temporary folder.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# What the worker reads, what it writes, and what it writes once, for a founder: else that is empty.
BUFFERS = ("params", "contribution", "initial")
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
    import torch

    if os.fstat(fd).st_size != size:
        raise ValueError(f"the shared buffer holds {os.fstat(fd).st_size} bytes, expected {size}")
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=protection)
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
