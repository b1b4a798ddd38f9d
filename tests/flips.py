"""One bit of a file turned, for tests that want it to be found and the file to be named."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def flipped(path: Path, rng: random.Random) -> Iterator[str]:
    """While it lasts one bit of `path` is another; which one, in words."""
    whole = path.read_bytes()
    place, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
    path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
    try:
        yield f"{path.name} byte {place} bit {bit}"
    finally:
        path.write_bytes(whole)


def files_below(folder: Path) -> list[Path]:
    """All of them that hold anything."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
