"""What every codec here shares: blocks of 256, one scale each, one contiguous payload.

    payload = codes, one byte each (n,)  +  scales, little-endian f32 (ceil(n / 256),)

`BlockCodec` walks a vector in pieces that fit the cache, with one scratch buffer per call: allocations
cost more than the arithmetic. What a codec does with a piece is its `BlockKernel`. The last block may be
short; it is encoded as if zeros followed it.

Absolute maxima are found by comparing the bits of |x| as integers. That orders floats as their values do,
puts infinity and NaN above everything finite, is several times faster than torch's aminmax over rows, and
cannot be led astray by a processor that flushes subnormals.

Must not import: anything of ours but refusals; asyncio; anything that does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tapestry.compression.refusals import RefusedPayload, RefusedVector

BLOCK = 256  # the format of the codecs; scales are 4 bytes of 260
PIECE = 256 * 1024  # elements; 1 MiB of scratch. The fastest of 64k..512k on machines with 2 MiB of L2
SCALE_BYTES = 4
INFINITY_BITS = 0x7F80_0000


class BlockKernel(Protocol):
    """The arithmetic of one codec on whole blocks (b, 256). `scratch` is f32 (b, 256), free to use."""

    @property
    def scale_min(self) -> float:
        """The smallest scale, but zero, that the codec writes."""

    @property
    def scale_max(self) -> float:
        """The largest scale that the codec writes: all codes decode to finite values with it."""

    def encode_blocks(
        self,
        blocks: Tensor,  # f32 (b, 256), finite
        absmax: Tensor,  # f32 (b,)
        codes: Tensor,  # uint8 (b, 256), written
        scales: Tensor,  # f32 (b,), written
        scratch: Tensor,
    ) -> None: ...

    def decode_blocks(
        self,
        codes: Tensor,  # uint8 (b, 256)
        scales: Tensor,  # f32 (b,)
        out: Tensor,  # f32 (b, 256), written
        scratch: Tensor,
    ) -> None: ...

    def check_codes(self, codes: Tensor) -> None:
        """Raise RefusedPayload if the codes, uint8 (n,), contain one that encode never writes."""


@dataclass(frozen=True, slots=True)
class BlockCodec:
    """A `tapestry.compression.codecs.Codec` made of a kernel. All tensors are on the CPU."""

    name: str
    wire_id: int
    kernel: BlockKernel

    def payload_size(self, n: int) -> int:
        """Bytes of the payload of n elements."""
        return n + SCALE_BYTES * block_count(n)

    def encode(
        self,
        x: Tensor,  # f32 (n,)
        out: Tensor | None = None,  # uint8 (payload_size(n),)
    ) -> Tensor:  # uint8 (payload_size(n),)
        """Encode; raise RefusedVector for a wrong dtype, shape, device, a NaN or an infinity.

        After a refusal the contents of `out` are unspecified.
        """
        check_vector(x)
        n = x.numel()
        payload = torch.empty(self.payload_size(n), dtype=torch.uint8) if out is None else out
        assert payload.dtype == torch.uint8 and payload.shape == (self.payload_size(n),)
        scales = torch.empty(block_count(n))
        scratch = _scratch(n)
        whole = n - n % BLOCK
        for start in range(0, whole, PIECE):
            stop = min(start + PIECE, whole)
            self._encode_piece(x[start:stop], payload[start:stop], scales[start // BLOCK :], scratch)
        if whole < n:
            last, last_codes = torch.zeros(BLOCK), torch.empty(BLOCK, dtype=torch.uint8)
            last[: n - whole] = x[whole:]
            self._encode_piece(last, last_codes, scales[-1:], scratch)
            payload[whole:n] = last_codes[: n - whole]
        payload[n:].numpy()[:] = scales.numpy().astype("<f4", copy=False).view(np.uint8)
        return payload

    def decode(
        self,
        payload: Tensor,  # uint8 (payload_size(n),)
        n: int,
        out: Tensor | None = None,  # f32 (n,)
    ) -> Tensor:  # f32 (n,)
        """Decode; raise RefusedPayload for what `check` refuses, before anything is allocated."""
        self.check(payload, n)
        values = torch.empty(n) if out is None else out
        _assert_vector(values, n)
        scales = _read_scales(payload, n)
        scratch = _scratch(n)
        for start in range(0, n, PIECE):
            stop = min(start + PIECE, n)
            self._decode_piece(payload[start:stop], scales[start // BLOCK :], values[start:stop], scratch)
        return values

    def accumulate(
        self,
        payload: Tensor,  # uint8 (payload_size(n),)
        n: int,
        coefficient: float,
        acc: Tensor,  # f32 (n,), changed
    ) -> None:
        """acc += f32(coefficient) * decode(payload): each product and each sum rounded by itself.

        Three passes over memory, so that no compiler can fuse them. Raises RefusedPayload for what
        `check` refuses, before acc is touched.
        """
        self.check(payload, n)
        _assert_vector(acc, n)
        factor = float(np.float32(coefficient))
        assert np.isfinite(factor)
        scales = _read_scales(payload, n)
        scratch, term = _scratch(n), _scratch(n)
        for start in range(0, n, PIECE):
            stop = min(start + PIECE, n)
            values = term[: stop - start]
            self._decode_piece(payload[start:stop], scales[start // BLOCK :], values, scratch)
            values.mul_(factor)
            acc[start:stop].add_(values)

    def check(
        self,
        payload: Tensor,  # uint8 (payload_size(n),)
        n: int,
    ) -> None:
        """Raise RefusedPayload unless decode gives n finite values.

        Reasons: "dtype", "length", "not_finite" (a scale that is, or decodes to, NaN or infinity),
        "scale" (negative, or smaller than encode writes), "code" (one that encode never writes).
        """
        if payload.dtype != torch.uint8 or payload.dim() != 1 or payload.device.type != "cpu":
            raise RefusedPayload("dtype", f"a payload is uint8 (size,) on the CPU, not {_describe(payload)}")
        if payload.numel() != self.payload_size(n):
            raise RefusedPayload(
                "length",
                f"{self.name} of {n} elements has {self.payload_size(n)} bytes, not {payload.numel()}",
            )
        if not payload.is_contiguous():
            raise RefusedPayload("dtype", "a payload is contiguous")
        if n:
            self._check_scales(payload[n:].numpy().view("<f4"))
            self.kernel.check_codes(payload[:n])

    def _check_scales(self, scales: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
        # Float bits as unsigned integers: from zero up to the largest scale is one interval; infinity,
        # NaN and everything with a sign bit, minus zero included, lies above it.
        bits = scales.view("<u4")
        if bits.max() > _bits(self.kernel.scale_max):
            worst = float(scales[bits.argmax()])
            reason = "scale" if np.isfinite(worst) and worst <= 0 else "not_finite"
            raise RefusedPayload(reason, f"the scale {worst} decodes to no finite value of ours")
        if ((bits > 0) & (bits < _bits(self.kernel.scale_min))).any():
            raise RefusedPayload("scale", f"a scale lies below the smallest, {self.kernel.scale_min}")

    def _encode_piece(self, x: Tensor, codes: Tensor, scales: Tensor, scratch: Tensor) -> None:
        blocks = x.view(-1, BLOCK)
        room = scratch[: x.numel()].view(-1, BLOCK)
        self.kernel.encode_blocks(
            blocks, _absmax(blocks, room), codes.view(-1, BLOCK), scales[: len(blocks)], room
        )

    def _decode_piece(self, codes: Tensor, scales: Tensor, out: Tensor, scratch: Tensor) -> None:
        n = codes.numel()
        whole = n - n % BLOCK
        count = whole // BLOCK
        if whole:
            room = scratch[:whole].view(-1, BLOCK)
            self.kernel.decode_blocks(
                codes[:whole].view(-1, BLOCK), scales[:count], out[:whole].view(-1, BLOCK), room
            )
        if whole < n:
            short = codes[whole:].view(1, -1)
            room = scratch[whole:n].view(1, -1)
            self.kernel.decode_blocks(short, scales[count : count + 1], out[whole:].view(1, -1), room)


def block_count(n: int) -> int:
    """Blocks, and so scales, of n elements."""
    return -(-n // BLOCK)


def check_vector(x: Tensor) -> None:
    """Raise RefusedVector unless x is f32 (n,), contiguous, on the CPU. Does not look at the values."""
    if x.dtype != torch.float32:
        raise RefusedVector("dtype", f"a vector is f32, not {x.dtype}")
    if x.dim() != 1:
        raise RefusedVector("shape", f"a vector has one dimension, not {tuple(x.shape)}")
    if x.device.type != "cpu":
        raise RefusedVector("device", f"a vector lies on the CPU, not on {x.device}")
    if not x.is_contiguous():
        raise RefusedVector("contiguous", f"a vector is contiguous, not of stride {x.stride()}")


def _absmax(
    blocks: Tensor,  # f32 (b, 256)
    scratch: Tensor,  # f32 (b, 256)
) -> Tensor:  # f32 (b,)
    magnitudes = torch.abs(blocks, out=scratch).view(torch.int32)
    largest = magnitudes.amax(dim=1)
    if int(largest.max()) >= INFINITY_BITS:
        raise RefusedVector("not_finite", "the vector has a NaN or an infinity")
    return largest.view(torch.float32)


def _read_scales(
    payload: Tensor,  # uint8 (payload_size(n),)
    n: int,
) -> Tensor:  # f32 (block_count(n),)
    # A copy: behind n code bytes the scales need not be aligned, nor is the machine little-endian.
    return torch.from_numpy(payload[n:].numpy().view("<f4").astype(np.float32))


def _scratch(n: int) -> Tensor:
    return torch.empty(max(BLOCK, min(n, PIECE)))


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"


def _assert_vector(x: Tensor, n: int) -> None:
    assert x.dtype == torch.float32 and x.shape == (n,) and x.is_contiguous()
