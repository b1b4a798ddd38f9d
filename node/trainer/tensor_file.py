"""A file of tensors, written whole or not at all: the state of an inner optimizer, what is brought."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str]) -> None:
    """Replace `path`: on disk when this returns. Raises OSError, and `path` is as it was."""
    new = path.with_name(path.name + ".tmp")
    try:
        save_file(dict(tensors), new, metadata=about)
        _sync(new)
        os.replace(new, path)
        _sync(path.parent)
    except SafetensorError as error:  # how the library reports a failed write, a full disk included
        raise OSError(str(error)) from error
    finally:
        new.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
