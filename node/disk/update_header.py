"""How a file of the update log is called, and how it begins.

    update file = magic "TAPU", version u32, epoch u64, head 32, result digest 32, shard count u32, zero u32
                  + payload length u64 of each shard + the payloads                        (little-endian)

Must not import torch: `tapestry log` looks at these files, and is to answer at once.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

UPDATE_SUFFIX = ".upd"
_UPDATE = struct.Struct("<4sIQ32s32sII")
_MAGIC = b"TAPU"
_VERSION = 1


def update_name(epoch: int, head: str) -> str:
    """Of its file in HOME/updates."""
    return f"{epoch:08d}-{head[:16]}{UPDATE_SUFFIX}"


def header_bytes(shards: int) -> int:
    """Where the payloads begin, in an update of so many shards."""
    return _UPDATE.size + 8 * shards


@dataclass(frozen=True, slots=True)
class UpdateHeader:
    """What an update file begins with."""

    epoch: int  # of the state that the update makes
    head: str
    result: str  # digest of the payloads
    lengths: tuple[int, ...]  # bytes of each payload

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return header_bytes(len(self.lengths)) + sum(self.lengths)

    def pack(self) -> bytes:
        head, result = bytes.fromhex(self.head), bytes.fromhex(self.result)
        fixed = _UPDATE.pack(_MAGIC, _VERSION, self.epoch, head, result, len(self.lengths), 0)
        return fixed + struct.pack(f"<{len(self.lengths)}Q", *self.lengths)


def read_update_header(file: BinaryIO) -> UpdateHeader:
    """Nothing is allocated before the file's length agreed with what it says. Raises ValueError."""
    file_bytes = os.fstat(file.fileno()).st_size
    fixed = file.read(_UPDATE.size)
    if len(fixed) < _UPDATE.size:
        raise ValueError("no header")
    magic, version, epoch, head, result, count, _ = _UPDATE.unpack(fixed)
    if (magic, version) != (_MAGIC, _VERSION) or file_bytes < header_bytes(count):
        raise ValueError("no update file of this version")
    lengths = struct.unpack(f"<{count}Q", file.read(8 * count))
    header = UpdateHeader(epoch, head.hex(), result.hex(), lengths)
    if header.size_bytes != file_bytes:
        raise ValueError(f"{file_bytes} bytes, should be {header.size_bytes}")
    return header
