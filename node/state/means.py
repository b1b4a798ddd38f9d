"""The run's mean, for whoever computes one: the reducer in a round, the auditor and the verifier after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from blake3 import blake3
from torch import Tensor

from tapestry.compression.codecs import Codec
from tapestry.compression.means.api import Mean
from tapestry.compression.means.registry import make_mean
from tapestry.compression.reduce import reduce_shard
from tapestry.compression.refusals import Refused
from tapestry.compression.shards import Shard
from tapestry.node.spec.run import MeanSpec
from tapestry.node.spec.tables import plain

# Shard, encoded inputs and weights in the roster's order -> digest of their encoded mean; or NO_MEAN.
MeanDigest = Callable[[int, Sequence[Tensor], Sequence[int]], str]
NO_MEAN = ""  # the digest of none: of inputs of which no honest reducer makes, or signs, a mean


def mean_of(spec: MeanSpec) -> Mean:
    """The mean that the run spec names."""
    settings = plain(spec)
    return make_mean(settings.pop("rule"), settings)


def mean_digest_of(codec: Codec, shards: Sequence[Shard], mean: Mean) -> MeanDigest:
    """What tells the digest of an honest reducer's mean. Inputs are checked as those of a round are.

    Whether there is a mean depends on the inputs alone, as its bits do: who signs one of inputs that have
    none, say of bytes of its own that are no payload, lies as surely as who signs another.
    """

    def mean_digest(shard: int, payloads: Sequence[Tensor], weights: Sequence[int]) -> str:
        n = shards[shard].n
        try:
            for payload in payloads:
                codec.check(payload, n)
            return payload_digest(reduce_shard(payloads, weights, codec, n, mean=mean))
        except Refused:
            return NO_MEAN

    return mean_digest


def payload_of(
    data: bytes | bytearray,
) -> Tensor:  # uint8 (size,)
    """Encoded bytes of a peer, unchecked: they may be none at all. A bytearray is not copied."""
    if not data:  # which torch refuses
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(data if isinstance(data, bytearray) else bytearray(data), dtype=torch.uint8)


def payload_digest(
    payload: Tensor,  # uint8 (size,)
) -> str:
    """blake3 of the encoded bytes, as `Result.digest` names a shard."""
    return blake3(memoryview(payload.numpy())).hexdigest()  # type: ignore[arg-type]
