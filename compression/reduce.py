"""The weighted mean of encoded shards: the one number that everybody in a round must agree on.

    acc = +0
    for each member, in roster order:
        acc = f32(acc + f32(f32(weight / total) * decode(payload)))

weight / total is divided in f64 (correctly rounded, from integers) and rounded once to f32. So the result
is a function of the roster's order, the weights and the payloads: not of who computes it, nor of the
number of threads. Every payload is checked before the first one is added, and the sum of finite values may
still pass the largest f32: then there is no mean, and it is refused with the reason "overflow".

Small products are subnormal, so a processor told to flush them would disagree with all others: that is
noticed and raised.

Must not import: anything outside this package of ours; asyncio; anything that does I/O.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tapestry.compression.blocks import thread_scratch
from tapestry.compression.codecs import Codec, OpenPayload
from tapestry.compression.refusals import RefusedPayload, RefusedVector, RefusedWeights


def reduce_shard(
    payloads: Sequence[Tensor],  # uint8 (codec.payload_size(n),) each, in roster order
    weights: Sequence[int],
    codec: Codec,
    n: int,
    out: Tensor | None = None,  # uint8 (codec.payload_size(n),)
) -> Tensor:  # uint8 (codec.payload_size(n),)
    """The weighted mean, encoded once: the bytes that every member gets. Raises as weighted_mean.

    A piece is averaged and encoded while it is in the cache; the mean is nowhere whole.
    """
    members = _open(payloads, weights, codec, n)

    def mean_of(index: int, start: int, stop: int) -> Tensor:
        acc = thread_scratch("mean", stop - start)
        _add_up(members, index, acc)
        return acc

    try:
        return codec.encode_pieces(mean_of, n, out)
    except RefusedVector as refused:  # not finite: all that is added up is
        raise _overflow() from refused


def weighted_mean(
    payloads: Sequence[Tensor],  # uint8 (codec.payload_size(n),) each, in roster order
    weights: Sequence[int],
    codec: Codec,
    n: int,
    out: Tensor | None = None,  # f32 (n,)
) -> Tensor:  # f32 (n,)
    """The mean of the module's docstring.

    Raises RefusedWeights (count, weight, total) and RefusedPayload (as codec.check; the detail says which)
    before `out` is touched, RefusedVector("overflow") after, and RuntimeError if this processor flushes
    subnormals.
    """
    members = _open(payloads, weights, codec, n)
    mean = torch.empty(n) if out is None else out
    for index, (start, stop) in enumerate(codec.pieces(n)):
        _add_up(members, index, mean[start:stop])
        _check_finite(mean[start:stop])
    return mean


def _open(
    payloads: Sequence[Tensor], weights: Sequence[int], codec: Codec, n: int
) -> list[tuple[OpenPayload, float]]:
    coefficients = _coefficients(weights, len(payloads))
    members = [_open_member(codec, payload, n, index) for index, payload in enumerate(payloads)]
    _require_subnormals()
    return list(zip(members, coefficients, strict=True))


def _coefficients(weights: Sequence[int], count: int) -> list[float]:
    if len(weights) != count:
        raise RefusedWeights("count", f"{len(weights)} weights for {count} payloads")
    for index, weight in enumerate(weights):
        if isinstance(weight, bool) or not isinstance(weight, int) or weight < 0:
            raise RefusedWeights("weight", f"weight {index} is {weight!r}, not an integer >= 0")
    total = sum(weights)
    if total == 0:
        raise RefusedWeights("total", "the weights add up to zero")
    return [weight / total for weight in weights]


def _open_member(codec: Codec, payload: Tensor, n: int, index: int) -> OpenPayload:
    try:
        return codec.open(payload, n)
    except RefusedPayload as refused:
        raise RefusedPayload(refused.reason, f"payload {index}: {refused.detail}") from refused


def _require_subnormals() -> None:
    half = torch.tensor([2.0**-126]) * 0.5
    if int(half.view(torch.int32)) == 0:
        raise RuntimeError("subnormals are flushed to zero here (torch.set_flush_denormal?): no common mean")


def _add_up(members: list[tuple[OpenPayload, float]], index: int, acc: Tensor) -> None:
    acc.zero_()
    for member, coefficient in members:
        member.accumulate_piece(index, coefficient, acc)


def _check_finite(acc: Tensor) -> None:
    lowest, highest = torch.aminmax(acc)
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise _overflow()


def _overflow() -> RefusedVector:
    return RefusedVector("overflow", "the weighted mean is larger than the largest f32")
