"""The mean of encoded shards: the one number that everybody in a round must agree on.

Which mean it is the run says (means/); without a word, `mean`:

    acc = +0
    for each member, in roster order:
        acc = f32(acc + f32(f32(weight / total) * decode(payload)))

weight / total is divided in f64 (correctly rounded, from integers) and rounded once to f32. So the result
is a function of the roster's order, the weights and the payloads: not of who computes it, nor of the
number of threads. Every payload is checked before the first one is looked at, and the sum of finite values
may still pass the largest f32: then there is no mean, and it is refused with the reason "overflow".

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
from tapestry.compression.means.api import Contribution, GivePiece, Mean
from tapestry.compression.means.weighted import WeightedMean
from tapestry.compression.refusals import RefusedPayload, RefusedVector, RefusedWeights

WEIGHTED = WeightedMean()


def reduce_shard(
    payloads: Sequence[Tensor],  # uint8 (codec.payload_size(n),) each, in roster order
    weights: Sequence[int],
    codec: Codec,
    n: int,
    out: Tensor | None = None,  # uint8 (codec.payload_size(n),)
    mean: Mean = WEIGHTED,
) -> Tensor:  # uint8 (codec.payload_size(n),)
    """The mean, encoded once: the bytes that every member gets. Raises as mean_of_shard.

    A piece is averaged and encoded while it is in the cache; the mean is nowhere whole.
    """
    give = _open(payloads, weights, codec, n, mean)

    def mean_of(index: int, start: int, stop: int) -> Tensor:
        acc = thread_scratch("mean", stop - start)
        give(index, acc)
        return acc

    try:
        return codec.encode_pieces(mean_of, n, out)
    except RefusedVector as refused:  # not finite: all that is added up is
        raise _overflow() from refused


def mean_of_shard(
    payloads: Sequence[Tensor],  # uint8 (codec.payload_size(n),) each, in roster order
    weights: Sequence[int],
    codec: Codec,
    n: int,
    out: Tensor | None = None,  # f32 (n,)
    mean: Mean = WEIGHTED,
) -> Tensor:  # f32 (n,)
    """The mean before it is encoded.

    Raises RefusedWeights (count, weight, total) and RefusedPayload (as codec.check; the detail says which)
    before `out` is touched, RefusedVector("overflow") after, and RuntimeError if this processor flushes
    subnormals.
    """
    give = _open(payloads, weights, codec, n, mean)
    result = torch.empty(n) if out is None else out
    for index, (start, stop) in enumerate(codec.pieces(n)):
        give(index, result[start:stop])
        _check_finite(result[start:stop])
    return result


def _open(payloads: Sequence[Tensor], weights: Sequence[int], codec: Codec, n: int, mean: Mean) -> GivePiece:
    shares = _shares(weights, len(payloads))
    opened = [_open_member(codec, payload, n, index) for index, payload in enumerate(payloads)]
    _require_subnormals()
    made = zip(opened, weights, shares, strict=True)
    return mean.over([Contribution(*one) for one in made], codec.pieces(n))


def _shares(weights: Sequence[int], count: int) -> list[float]:
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


def _check_finite(acc: Tensor) -> None:
    lowest, highest = torch.aminmax(acc)
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise _overflow()


def _overflow() -> RefusedVector:
    return RefusedVector("overflow", "the mean is larger than the largest f32")
