"""Codec `int8-block`: f32[n] <-> int8 codes[n] + f32 scales[ceil(n / 256)].

Numeric contract, for any finite x, bit for bit the same on every IEEE machine and for any number of
threads (every operation is elementwise and rounded by itself, or an exact maximum):

    scale  = 0 for a block of zeros, else absmax / 127 rounded to f32, and then kept within
             SCALE_MIN <= scale <= SCALE_MAX
    code   = round-half-even(f32(x / scale)) in [-127, 127]
    decode = f32(code * scale)

    |x - decode(encode(x))| <= scale / 2 * (1 + 2**-15)

This holds on CUDA too: without --use_fast_math, which torch is not built with, division of f32 is rounded
as IEEE 754 says and subnormals are kept; rounding is rint's.

The last factor is what the two roundings to f32 can add; exact arithmetic would not need it. Decoding is
always finite.

SCALE_MIN is where the definition would break down: below it absmax / 127 is subnormal, loses its digits
and at last becomes zero, and codes would leave [-127, 127]. With 2**-125 the bound still holds (a block
that is smaller than 127 * SCALE_MIN gets fewer levels), no code depends on a subnormal, and none is ever
written: payloads and decoded values are the same on a processor that flushes subnormals.
SCALE_MAX is the largest f32 that 127 times over is still finite; absmax / 127 passes it by one unit in
the last place for values next to the largest f32.

Must not import: anything of ours but blocks and refusals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tapestry.compression.blocks import BlockCodec
from tapestry.compression.refusals import RefusedPayload

CODE_MAX = 127
SCALE_MIN = 2.0**-125
SCALE_MAX = float.fromhex("0x1.020406p+121")


@dataclass(frozen=True, slots=True)
class Int8Kernel:
    """Blocks <-> int8 codes, symmetric around zero."""

    scale_min: float = SCALE_MIN
    scale_max: float = SCALE_MAX
    devices: tuple[str, ...] = ("cpu", "cuda")

    def encode_blocks(
        self, blocks: Tensor, absmax: Tensor, codes: Tensor, scales: Tensor, scratch: Tensor
    ) -> None:
        """See the module; shapes as in BlockKernel."""
        # By a tensor: torch on CUDA multiplies by the reciprocal of a number.
        torch.div(absmax, absmax.new_full((1,), CODE_MAX), out=scales)
        scales.clamp_(self.scale_min, self.scale_max)
        torch.div(blocks, scales[:, None], out=scratch)
        codes.view(torch.int8).copy_(scratch.round_())  # torch rounds half to even
        scales.masked_fill_(absmax.view(torch.int32) == 0, 0.0)

    def decode_blocks(self, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        """out = f32(code * scale); shapes as in BlockKernel."""
        out.copy_(codes.view(torch.int8))
        out.mul_(scales)

    def check_codes(self, codes: Tensor) -> None:
        """Raise RefusedPayload("code") for -128."""
        if int(codes.view(torch.int8).min()) < -CODE_MAX:
            raise RefusedPayload("code", "int8-block has no code -128")


INT8_BLOCK = BlockCodec(name="int8-block", wire_id=1, kernel=Int8Kernel())
