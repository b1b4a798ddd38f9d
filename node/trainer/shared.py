"""Vectors that two processes see: anonymous memory behind a file descriptor.

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


def create_buffer(name: str) -> int:
    """A descriptor of an empty buffer; an unlinked temporary file where the system has no memfd."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name, os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def size_buffer(fd: int, n: int) -> None:
    """Room for f32 (n,), zeros at first; what is there already stays."""
    os.ftruncate(fd, 4 * n)


def map_buffer(
    fd: int,
    n: int,
    writable: bool,
) -> Tensor:  # f32 (n,)
    """A view that lives as long as the tensor. Writing to one that is not writable kills the process."""
    import torch

    if os.fstat(fd).st_size != 4 * n:
        raise ValueError(f"the shared buffer holds {os.fstat(fd).st_size} bytes, expected {4 * n}")
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    memory = mmap.mmap(fd, 4 * n, flags=mmap.MAP_SHARED, prot=protection)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(memory, dtype=torch.float32)
