"""Codec names on the wire -> codec, and the strict frame that a payload travels in.

    frame  = header + payload
    header = magic "TAPF", version u16, codec u16, n u64, payload length u64   (24 bytes, little-endian)

`pack` gives the header alone, so that header and payload can be written one after the other and never
joined. `unpack` gives a view of the payload in the buffer that was received, and only after the header
said what the receiver expected, the length was right to the byte, and the codec passed every scale and
code. Nothing of the size of the vector is allocated before that.

Must not import: anything outside this package of ours; asyncio; anything that does I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tapestry.compression.blockwise import INT8_BLOCK
from tapestry.compression.bnb import BNB_DYNAMIC8
from tapestry.compression.refusals import RefusedCodec, RefusedPayload

_HEADER = struct.Struct("<4sHHQQ")
_MAGIC = b"TAPF"
_VERSION = 1
HEADER_BYTES = _HEADER.size


class OpenPayload(Protocol):
    """A checked payload, to be decoded piece by piece; `Codec.pieces` says which elements a piece has."""

    def decode_piece(
        self,
        index: int,
        out: Tensor,  # f32 (stop - start,), written
    ) -> None:
        """The bits that the whole payload decodes to."""

    def accumulate_piece(
        self,
        index: int,
        coefficient: float,
        acc: Tensor,  # f32 (stop - start,), changed
    ) -> None:
        """acc += f32(coefficient) * decoded, every operation rounded by itself."""

    def square_of_piece(self, index: int) -> float:
        """The sum of the decoded values' squares, to 2**-16 of itself: the same f64 on every machine."""


class Codec(Protocol):
    """f32 (n,) <-> one contiguous uint8 payload. Pure; may be used from several threads at once."""

    @property
    def name(self) -> str:
        """As the run spec writes it."""

    @property
    def wire_id(self) -> int:
        """As a frame's header writes it: u16."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The kinds of device on which a vector may lie that `encode` takes; the CPU is one of them."""

    def payload_size(self, n: int) -> int:
        """Bytes of the payload of n elements."""

    def pieces(self, n: int) -> Sequence[tuple[int, int]]:
        """Start and stop of the parts in which a vector of n elements is encoded and decoded, in order and
        without gaps. How it is cut is the codec's own affair; a piece should fit the cache."""

    def encode(
        self,
        x: Tensor,  # f32 (n,)
        out: Tensor | None = None,  # uint8 (payload_size(n),)
    ) -> Tensor:  # uint8 (payload_size(n),)
        """Codes (n,), then scales. Raises RefusedVector: dtype, shape, device, contiguous, not_finite.

        The payload is on the CPU; int8-block takes a vector on a CUDA device too.
        """

    def encode_pieces(
        self,
        source: Callable[[int, int, int], Tensor],  # (index, start, stop) -> f32 (stop - start,)
        n: int,
        out: Tensor | None = None,  # uint8 (payload_size(n),)
    ) -> Tensor:  # uint8 (payload_size(n),)
        """Encode a vector that is made while it is encoded. Raises RefusedVector("not_finite")."""

    def encode_rows(
        self,
        x: Tensor,  # f32 (rows * m,), on one of `devices`; m is a multiple of 256 unless rows is 1
        rows: int,
        out: Tensor,  # uint8 (rows * payload_size(m),), on the CPU, written
    ) -> Tensor:  # uint8 (rows * payload_size(m),)
        """Encode vectors that lie one after another, all at once. Raises RefusedVector("not_finite")."""

    def decode(
        self,
        payload: Tensor,  # uint8 (payload_size(n),)
        n: int,
        out: Tensor | None = None,  # f32 (n,)
    ) -> Tensor:  # f32 (n,)
        """The same bits on every machine. Raises RefusedPayload, as `check`."""

    def accumulate(
        self,
        payload: Tensor,  # uint8 (payload_size(n),)
        n: int,
        coefficient: float,
        acc: Tensor,  # f32 (n,), changed
    ) -> None:
        """acc += f32(coefficient) * decode(payload), every operation rounded by itself."""

    def open(
        self,
        payload: Tensor,  # uint8 (payload_size(n),), not to be changed while it is open
        n: int,
    ) -> OpenPayload:
        """Check it whole, once, to decode it piece by piece. Raises RefusedPayload, as `check`."""

    def check(
        self,
        payload: Tensor,  # uint8 (payload_size(n),)
        n: int,
    ) -> None:
        """Raise RefusedPayload (dtype, length, not_finite, scale, code) for what decode would refuse."""


_CODECS: dict[str, Codec] = {codec.name: codec for codec in (INT8_BLOCK, BNB_DYNAMIC8)}


def get_codec(name: str) -> Codec:
    """The codec of that name; raises RefusedCodec, which lists the names there are."""
    codec = _CODECS.get(name)
    if codec is None:
        raise RefusedCodec("codec", f"no codec is called {name!r}; there are {', '.join(_CODECS)}")
    return codec


def codec_names() -> tuple[str, ...]:
    """The names that get_codec knows."""
    return tuple(_CODECS)


def pack(
    codec: Codec,
    n: int,
    payload: Tensor,  # uint8 (payload_size(n),)
) -> bytes:
    """The header to send before the payload. Raises RefusedPayload("length") if they do not fit."""
    if payload.numel() != codec.payload_size(n):
        raise RefusedPayload("length", f"{n} elements need {codec.payload_size(n)}, not {payload.numel()}")
    return _HEADER.pack(_MAGIC, _VERSION, codec.wire_id, n, payload.numel())


def unpack(
    buffer: bytes | bytearray | memoryview,
    expect_codec: Codec,
    expect_n: int,
) -> Tensor:  # uint8 (payload_size(expect_n),), a view of the buffer, to be read only
    """The payload of a frame. Raises RefusedPayload: length, magic, version, codec, count, and `check`'s."""
    view = memoryview(buffer).cast("B")
    _check_header(view, expect_codec, expect_n)
    payload = _view_tensor(view[HEADER_BYTES:])
    expect_codec.check(payload, expect_n)
    return payload


def _check_header(view: memoryview, codec: Codec, n: int) -> None:
    if len(view) < HEADER_BYTES:
        raise RefusedPayload("length", f"a frame's header has {HEADER_BYTES} bytes, not {len(view)}")
    magic, version, wire_id, count, length = _HEADER.unpack_from(view)
    if magic != _MAGIC:
        raise RefusedPayload("magic", f"a frame begins with {_MAGIC!r}, not {magic!r}")
    if version != _VERSION:
        raise RefusedPayload("version", f"frame version {version}; this node speaks {_VERSION}")
    if wire_id != codec.wire_id:
        raise RefusedPayload("codec", f"codec {wire_id}, where {codec.name} ({codec.wire_id}) is expected")
    if count != n:
        raise RefusedPayload("count", f"{count} elements, where {n} are expected")
    if length != len(view) - HEADER_BYTES:
        raise RefusedPayload("length", f"{len(view) - HEADER_BYTES} bytes, where the header says {length}")


class _AsWritable:
    # torch warns on the user's screen about every array it cannot write to. The payload is only read, so
    # the array is shown to numpy again as a writable one, which keeps the buffer alive through `array`.
    def __init__(self, array: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self.array = array
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = array.__array_interface__ | {"data": (address, False)}


def _view_tensor(view: memoryview) -> Tensor:
    return torch.from_numpy(np.asarray(_AsWritable(np.frombuffer(view, dtype=np.uint8))))
