"""The run's mean, for whoever computes one: the reducer in a round, the auditor and the verifier after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from blake3 import blake3
from torch import Tensor

from tapestry.compression.codecs import Codec
from tapestry.compression.means.api import Mean
from tapestry.compression.means.registry import make_mean
from tapestry.compression.reduce import reduce_shard
from tapestry.compression.shards import Shard
from tapestry.node.spec.run import MeanSpec
from tapestry.node.spec.tables import plain

# Shard, encoded inputs and weights in the roster's order -> digest of their encoded mean. Raises Refused.
MeanDigest = Callable[[int, Sequence[Tensor], Sequence[int]], str]


def mean_of(spec: MeanSpec) -> Mean:
    """The mean that the run spec names."""
    settings = plain(spec)
    return make_mean(settings.pop("rule"), settings)


def mean_digest_of(codec: Codec, shards: Sequence[Shard], mean: Mean) -> MeanDigest:
    """What tells the digest of an honest reducer's mean. Inputs are checked as those of a round are."""

    def mean_digest(shard: int, payloads: Sequence[Tensor], weights: Sequence[int]) -> str:
        n = shards[shard].n
        for payload in payloads:
            codec.check(payload, n)
        return payload_digest(reduce_shard(payloads, weights, codec, n, mean=mean))

    return mean_digest


def payload_digest(
    payload: Tensor,  # uint8 (size,)
) -> str:
    """blake3 of the encoded bytes, as `Result.digest` names a shard."""
    return blake3(memoryview(payload.numpy())).hexdigest()  # type: ignore[arg-type]
