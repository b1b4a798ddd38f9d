"""Codec `bnb-dynamic8`: bitsandbytes 0.50.2, blockwise dynamic 8-bit, blocks of 256.

The dynamic data type: a sign, a run of zeros as decimal exponent, what is left as a linear fraction
(Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, arXiv 1511.04561; blockwise: arXiv
2110.02861). It spans seven decades below a block's maximum, where int8-block spans two: for heavy tails.

    scale  = absmax of the block, f32
    code   = bitsandbytes' choice for x / scale, put right next to zero: the nearest value of the map,
             or one so near to it that the error grows by less than 4e-5 * scale
    decode = f32(map[code] * scale)

    |x - decode(encode(x))| <= ERROR_BOUND * scale

Decoding is ours, with torch's elementwise operations and a map that is written down here, so that every
machine gets the same bits. bitsandbytes makes its map with torch.linspace, whose last bits depend on the
processor's vector width; these are the values it gives on x86-64 with AVX-512. Encoding is bitsandbytes'
own and may choose another of two near neighbours on another machine: what counts is the bytes sent.

On a CPU, bitsandbytes looks codes up in a table of 65536 equal steps over [-1, 1]. Below 1e-5 * scale that
table has one entry of each sign: zeros come back as 2.1e-5 * scale, every one with the same sign, and the
two lowest decades of the map are never used. `_correct_near_zero` decides those few elements again.

bitsandbytes is imported when something is first encoded: the import takes seconds and may print.
Must not import: anything of ours but blocks; bitsandbytes at the top.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from tapestry.compression.blocks import BLOCK, BlockCodec, thread_scratch

# Half the widest gap of the map, which is 0.01407, and the distance from -1 to its lowest value, -0.99297;
# plus bitsandbytes' choice of the second nearest. Measured over 3e8 values: 0.00705.
ERROR_BOUND = 0.0071

# bitsandbytes takes 1 / absmax in f32, which overflows, or loses digits, outside about [2**-126, 2**126].
# Blocks outside these limits are multiplied by a power of two first: exact, and the codes stay the same.
_ABSMAX_SMALL = 2.0**-100
_ABSMAX_LARGE = 2.0**100

_ZERO_CODE = 127
_NEAR_CODES = 7  # codes this far from zero's are decided again: the three lowest decades, |value| < 1e-4

# The positive values of the map below 1.0, ascending, little-endian f32: create_dynamic_map() of
# bitsandbytes 0.50.2 with torch 2.13.0.
_POSITIVE_HEX = (
    "b7a31335941a5a36ff0502370642b23734803738b3ef8a384b1fba380bd7233905e78c3983e2c739016f013ac1ec1e3a"
    "806a3c3a3ee8593aff65773a9defa73afca9f13a2db21d3b5c8f423b8a6c673bdd24863b7493983b0d02ab3ba470bd3b"
    "3bdfcf3bd34de23b6abcf43b8195033ccdcc0c3c1804163c643b1f3c48e13a3cc3f5683c1f858b3c5d8fa23c9a99b93c"
    "d7a3d03c15aee73c52b8fe3c48e10a3d6766163d85eb213da3702d3dc3f5383de17a443d0000503d1f855b3d3d0a673d"
    "5d8f723d7b147e3dcdcc843d5d8f8a3deb51903d7b14963d0ad79b3d9a99a13d2a5ca73db81ead3d48e1b23dd7a3b83d"
    "6766be3df728c43d85ebc93d3433db3d0000f83d66660a3ecdcc183e3333273e9a99353e0000443e6666523ecdcc603e"
    "33336f3e99997d3e0000863e34338d3e6666943e9a999b3ecccca23e0000aa3e3333b13e6666b83e9a99bf3eccccc63e"
    "0000ce3e3333d53e6666dc3e9a99e33eccccea3e0000f23e3233f93e3333003fcccc033f6666073f00000b3f9a990e3f"
    "3433123fcdcc153f6666193f00001d3f9a99203f3433243fcdcc273f66662b3f00002f3f9a99323f3433363fcdcc393f"
    "66663d3f0000413f9a99443f3333483fcdcc4b3f66664f3f0000533f9a99563f33335a3fcdcc5d3f6666613f0000653f"
    "9a99683f33336c3fcdcc6f3f6666733f0000773f9a997a3f33337e3f"
)


@dataclass(frozen=True, slots=True)
class Dynamic8Kernel:
    """Blocks <-> indices into the dynamic map."""

    scale_min: float = 2.0**-149  # the smallest f32: a scale is a magnitude that occurred
    scale_max: float = float.fromhex("0x1.fffffep+127")  # the largest f32; no map value exceeds 1
    devices: tuple[str, ...] = ("cpu",)  # bitsandbytes chooses codes by another way on CUDA

    def encode_blocks(
        self, blocks: Tensor, absmax: Tensor, codes: Tensor, scales: Tensor, scratch: Tensor
    ) -> None:
        """See the module; shapes as in BlockKernel."""
        scales.copy_(absmax)
        values = _moderate(blocks, absmax, scratch).view(-1)
        codes.copy_(_quantizer()(values, dynamic_map(), BLOCK)[0].view(codes.shape))
        codes.masked_fill_(blocks == 0, _ZERO_CODE)
        _correct_near_zero(codes.view(-1), blocks.view(-1), absmax)

    def decode_blocks(self, codes: Tensor, scales: Tensor, out: Tensor) -> None:
        """out = f32(map[code] * scale); shapes as in BlockKernel."""
        indices = thread_scratch("indices", codes.numel()).view(torch.int32)
        indices.copy_(codes.view(-1))
        torch.index_select(dynamic_map(), 0, indices, out=out.view(-1))
        out.mul_(scales)

    def check_codes(self, codes: Tensor) -> None:
        """Every code has a value in the map."""


BNB_DYNAMIC8 = BlockCodec(name="bnb-dynamic8", wire_id=2, kernel=Dynamic8Kernel())


@cache
def dynamic_map() -> Tensor:  # f32 (256,), ascending
    """The 256 values that the codes stand for, as bitsandbytes has them."""
    positive = np.frombuffer(bytes.fromhex(_POSITIVE_HEX), dtype="<f4").astype(np.float32)
    values = np.concatenate([-positive[::-1], np.zeros(1, np.float32), positive, np.ones(1, np.float32)])
    return torch.from_numpy(values)


@cache
def _quantizer() -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    # Importing it on a machine without a GPU logs a warning about an optional package.
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401  registers its operators with torch
    finally:
        logger.setLevel(level)
    quantize: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
    quantize = torch.ops.bitsandbytes.quantize_blockwise.default
    return quantize


def _moderate(
    blocks: Tensor,  # f32 (b, 256)
    absmax: Tensor,  # f32 (b,)
    scratch: Tensor,  # f32 (b, 256)
) -> Tensor:  # f32 (b, 256)
    small, large = absmax < _ABSMAX_SMALL, absmax > _ABSMAX_LARGE
    if not bool((small | large).any()):
        return blocks
    factor = torch.ones_like(absmax)
    factor.masked_fill_(small, 1 / _ABSMAX_SMALL).masked_fill_(large, 1 / _ABSMAX_LARGE)
    return torch.mul(blocks, factor[:, None], out=scratch)


def _correct_near_zero(
    codes: Tensor,  # uint8 (b * 256,), changed
    values: Tensor,  # f32 (b * 256,)
    absmax: Tensor,  # f32 (b,)
) -> None:
    lowest = _ZERO_CODE - _NEAR_CODES
    near_zero = (codes - lowest) <= 2 * _NEAR_CODES  # uint8: what is below the lowest wraps around to high
    near = torch.nonzero(near_zero & (codes != _ZERO_CODE)).view(-1)
    ratios = values[near].double() / absmax[near // BLOCK].double()
    codes[near] = torch.bucketize(ratios, _midpoints(), out_int32=True).to(torch.uint8)


@cache
def _midpoints() -> Tensor:  # f64 (255,)
    exact = dynamic_map().double()
    return (exact[:-1] + exact[1:]) / 2
