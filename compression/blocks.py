"""What every codec here shares: blocks of 256, one scale each, one contiguous payload.

    payload = codes, one byte each (n,)  +  scales, little-endian f32 (ceil(n / 256),)

`BlockCodec` walks a vector in pieces that fit the cache, with scratch that each thread keeps: page faults and
trips to memory cost more than the arithmetic. So that others can stay in the cache too, encoding asks for
its vector piece by piece (`encode_pieces`) and decoding gives any piece (`open`). What a codec does with a
piece is its `BlockKernel`. The last block may be short; it is encoded as if zeros followed it.

A vector on a CUDA device is encoded there, by the same operations, and only the payload crosses the bus.

Absolute maxima are found by comparing the bits of |x| as integers. That orders floats as their values do,
puts infinity and NaN above everything finite, is several times faster than torch's aminmax over rows, and
cannot be led astray by a processor that flushes subnormals.

All of this also runs in a script's process, whose default device and float type may be any: each tensor that
is made here names its own.

Must not import: anything of ours but refusals; asyncio; anything that does I/O.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tapestry.compression.refusals import RefusedPayload, RefusedVector

BLOCK = 256  # the format of the codecs; scales are 4 bytes of 260
PIECE = 128 * 1024  # elements: 512 KiB. The fastest of 32k..256k on 2 MiB of level 2 cache
DEVICE_PIECE = 16 * 1024 * 1024  # elements on a GPU: 64 MiB of scratch there. Guess
ROW = 1024  # elements that are added at once: the fastest of 256 to 4096 on 2 MiB of level 2 cache
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

    @property
    def devices(self) -> tuple[str, ...]:
        """The kinds of device that encode_blocks works on."""

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
        scales: Tensor,  # f32 (b, 1)
        out: Tensor,  # f32 (b, 256), written
    ) -> None: ...

    def check_codes(self, codes: Tensor) -> None:
        """Raise RefusedPayload if the codes, uint8 (n,), contain one that encode never writes."""


@dataclass(frozen=True, slots=True)
class OpenPayload:
    """A payload that passed `check`, to be decoded piece by piece. Made by `BlockCodec.open` alone."""

    kernel: BlockKernel
    codes: list[Tensor]  # uint8 (b, 256) for each of `pieces`, or (1, n % 256); views of the payload
    scales: list[Tensor]  # f32 (b, 1) for each

    def decode_piece(
        self,
        index: int,
        out: Tensor,  # f32 (stop - start,), written; start and stop as in pieces(n)[index]
    ) -> None:
        """The bits that the whole payload decodes to."""
        codes = self.codes[index]
        self.kernel.decode_blocks(codes, self.scales[index], out.view(codes.shape))

    def accumulate_piece(
        self,
        index: int,
        coefficient: float,
        acc: Tensor,  # f32 (stop - start,), changed; as in decode_piece
    ) -> None:
        """acc += f32(coefficient) * decoded: each product and each sum rounded by itself.

        Passes of their own, so that no compiler can fuse them; all in the cache.
        """
        factor = float(np.float32(coefficient))
        assert math.isfinite(factor)
        values = thread_scratch("room", acc.numel())
        self.decode_piece(index, values)
        acc.add_(values.mul_(factor))

    def square_of_piece(self, index: int) -> float:
        """The sum of the squares of code * scale, to 2**-16 of itself, in an order that never changes.

        In units of a power of two near the largest scale, so that no square overflows; f64 holds the result
        whatever the payload.
        """
        codes, scales = self.codes[index], self.scales[index]
        unit, units = unit_of(float(scales.max()))
        values = thread_scratch("room", codes.numel())
        self.kernel.decode_blocks(codes, scales * units[0] * units[1], values.view(codes.shape))
        return ordered_sum(values.mul_(values).numpy()) * unit * unit


@dataclass(frozen=True, slots=True)
class BlockCodec:
    """A `tapestry.compression.codecs.Codec` made of a kernel. Payloads are on the CPU."""

    name: str
    wire_id: int
    kernel: BlockKernel

    @property
    def devices(self) -> tuple[str, ...]:
        """The kinds of device that a vector is encoded on: the kernel says it."""
        return self.kernel.devices

    def payload_size(self, n: int) -> int:
        """Bytes of the payload of n elements."""
        return n + SCALE_BYTES * block_count(n)

    def pieces(self, n: int) -> list[tuple[int, int]]:
        """Whole blocks that fit the cache, and at last a short block."""
        return pieces(n)

    def encode(
        self,
        x: Tensor,  # f32 (n,), on the CPU or where the kernel works
        out: Tensor | None = None,  # uint8 (payload_size(n),), on the CPU
    ) -> Tensor:  # uint8 (payload_size(n),), on the CPU
        """Encode; raise RefusedVector for a wrong dtype, shape, device, a NaN or an infinity.

        After a refusal the contents of `out` are unspecified. The payload of a vector on a GPU has the same
        bytes as on the CPU and, unless `out` is given, lies in pinned memory.
        """
        check_vector(x, self.devices)
        if x.device.type == "cpu":
            return self.encode_pieces(lambda _, start, stop: x[start:stop], x.numel(), out)
        if out is None:
            out = torch.empty(self.payload_size(x.numel()), dtype=torch.uint8, device="cpu", pin_memory=True)
        return self.encode_rows(x, 1, out)

    def encode_pieces(
        self,
        source: Callable[[int, int, int], Tensor],  # (index, start, stop) -> f32 (stop - start,) on the CPU
        n: int,
        out: Tensor | None = None,  # uint8 (payload_size(n),)
    ) -> Tensor:  # uint8 (payload_size(n),)
        """Encode what `source` gives, a piece at a time and each element once, so that it may be scratch.

        Raises RefusedVector("not_finite"); the contents of `out` are then unspecified.
        """
        payload = torch.empty(self.payload_size(n), dtype=torch.uint8, device="cpu") if out is None else out
        assert payload.dtype == torch.uint8 and payload.shape == (self.payload_size(n),)
        scales = torch.empty(block_count(n), dtype=torch.float32, device="cpu")
        for index, (start, stop) in enumerate(pieces(n)):
            x = source(index, start, stop)
            self._encode_piece(
                x, payload[start:stop], scales[start // BLOCK :], thread_scratch("room", PIECE)
            )
        payload[n:].numpy()[:] = scales.numpy().astype("<f4", copy=False).view(np.uint8)
        return payload

    def encode_rows(
        self,
        x: Tensor,  # f32 (rows * m,), where the kernel works; m is a multiple of 256 unless rows is 1
        rows: int,
        out: Tensor,  # uint8 (rows * payload_size(m),), on the CPU, written
    ) -> Tensor:  # uint8 (rows * payload_size(m),)
        """Encode vectors that lie one after another, all at once: what a GPU takes for each small one is time
        to start, and to be waited for. Raises RefusedVector("not_finite").
        """
        payloads = self.encode_on_device(x, rows)
        assert out.dtype == torch.uint8 and out.shape == payloads.shape
        return out.copy_(payloads)

    def encode_on_device(
        self,
        x: Tensor,  # f32 (rows * m,), as in encode_rows
        rows: int = 1,
    ) -> Tensor:  # uint8 (rows * payload_size(m),), where x is
        """Encode without leaving the device. Raises RefusedVector("not_finite")."""
        n, blocks = x.numel(), block_count(x.numel())
        m = n // rows
        assert m * rows == n and (rows == 1 or m % BLOCK == 0)
        codes = torch.empty(n, dtype=torch.uint8, device=x.device)
        scales = torch.empty(blocks, dtype=x.dtype, device=x.device)
        scratch = torch.empty(max(BLOCK, min(n, DEVICE_PIECE)), dtype=x.dtype, device=x.device)
        for start, stop in pieces(n, DEVICE_PIECE):
            self._encode_piece(x[start:stop], codes[start:stop], scales[start // BLOCK :], scratch)
        payloads = torch.empty(rows, self.payload_size(m), dtype=torch.uint8, device=x.device)
        payloads[:, :m].copy_(codes.view(rows, m))
        # Every machine with a GPU is little-endian.
        payloads[:, m:].copy_(scales.view(torch.uint8).view(rows, SCALE_BYTES * blocks // rows))
        return payloads.view(-1)

    def decode(
        self,
        payload: Tensor,  # uint8 (payload_size(n),)
        n: int,
        out: Tensor | None = None,  # f32 (n,)
    ) -> Tensor:  # f32 (n,)
        """Decode; raise RefusedPayload for what `check` refuses, before anything is allocated."""
        opened = self.open(payload, n)
        values = torch.empty(n, dtype=torch.float32, device="cpu") if out is None else out
        _assert_vector(values, n)
        for index, (start, stop) in enumerate(pieces(n)):
            opened.decode_piece(index, values[start:stop])
        return values

    def accumulate(
        self,
        payload: Tensor,  # uint8 (payload_size(n),)
        n: int,
        coefficient: float,
        acc: Tensor,  # f32 (n,), changed
    ) -> None:
        """acc += f32(coefficient) * decode(payload), every operation rounded by itself.

        Raises RefusedPayload for what `check` refuses, before acc is touched.
        """
        opened = self.open(payload, n)
        _assert_vector(acc, n)
        for index, (start, stop) in enumerate(pieces(n)):
            opened.accumulate_piece(index, coefficient, acc[start:stop])

    def open(
        self,
        payload: Tensor,  # uint8 (payload_size(n),), not to be changed while it is open
        n: int,
    ) -> OpenPayload:
        """Check the whole payload, once, for decoding it piece by piece. Raises as `check`."""
        self.check(payload, n)
        codes = [payload[start:stop].view(-1, min(BLOCK, stop - start)) for start, stop in pieces(n)]
        scales = _read_scales(payload, n)[:, None]
        firsts = [start // BLOCK for start, _ in pieces(n)]
        spans = [scales[first : first + len(c)] for first, c in zip(firsts, codes, strict=True)]
        return OpenPayload(self.kernel, codes, spans)

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
        n = x.numel()
        if n % BLOCK:
            padded, padded_codes = x.new_zeros(BLOCK), codes.new_empty(BLOCK)
            padded[:n] = x
            self._encode_piece(padded, padded_codes, scales, scratch)
            codes.copy_(padded_codes[:n])
            return
        blocks, room = x.view(-1, BLOCK), scratch[:n].view(-1, BLOCK)
        absmax = _absmax(blocks, room)
        self.kernel.encode_blocks(blocks, absmax, codes.view(-1, BLOCK), scales[: len(blocks)], room)


def pieces(n: int, size: int = PIECE) -> list[tuple[int, int]]:
    """Start and stop of the pieces of n elements: whole blocks, up to `size` elements; last a short block."""
    whole = n - n % BLOCK
    cuts = [(start, min(start + size, whole)) for start in range(0, whole, size)]
    return cuts if whole == n else [*cuts, (whole, n)]


def thread_scratch(use: str, n: int) -> Tensor:  # f32 (n,)
    """Room for n <= PIECE elements, the same for every call of this thread with this use.

    Kept, because the page faults of new memory cost more than the arithmetic.
    """
    assert n <= PIECE
    scratch: Tensor | None = getattr(_kept, use, None)
    if scratch is None:
        scratch = torch.empty(PIECE, dtype=torch.float32, device="cpu")
        setattr(_kept, use, scratch)
    return scratch[:n]


_kept = threading.local()


def unit_of(largest: float) -> tuple[float, tuple[float, float]]:
    """A power of two just above `largest`, and two factors that divide by it: one might not fit f32."""
    _, exponent = math.frexp(largest)
    half = exponent // 2
    return 2.0**exponent, (2.0**-half, 2.0 ** (half - exponent))


def ordered_sum(
    values: np.ndarray[tuple[int], np.dtype[np.float32]],  # (count,), written over
) -> float:
    """In an order that is the same on every machine: rows onto one another, then halves."""
    count = len(values)
    if count > ROW:
        whole = count - count % ROW
        rest = math.fsum(values[whole:].tolist())
        values, count = np.add.reduce(values[:whole].reshape(-1, ROW), axis=0), ROW
        return ordered_sum(values) + rest
    while count > 1:
        half = count // 2
        values[:half] += values[count - half : count]
        count -= half
    return float(values[0]) if count else 0.0


def block_count(n: int) -> int:
    """Blocks, and so scales, of n elements."""
    return -(-n // BLOCK)


def check_vector(x: Tensor, devices: tuple[str, ...] = ("cpu",)) -> None:
    """Raise RefusedVector unless x is f32 (n,), contiguous, on such a device. Does not look at the values."""
    if x.dtype != torch.float32:
        raise RefusedVector("dtype", f"a vector is f32, not {x.dtype}")
    if x.dim() != 1:
        raise RefusedVector("shape", f"a vector has one dimension, not {tuple(x.shape)}")
    if x.device.type not in devices:
        raise RefusedVector("device", f"a vector lies on {' or '.join(devices)}, not on {x.device}")
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


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"


def _assert_vector(x: Tensor, n: int) -> None:
    assert x.dtype == torch.float32 and x.shape == (n,) and x.is_contiguous()
