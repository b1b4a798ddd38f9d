"""The tensor half of a round: what is sent is what the trainer encoded, and not what it writes there next."""

import pytest
import torch

from tapestry.compression.codecs import get_codec
from tapestry.compression.reduce import WEIGHTED
from tapestry.compression.refusals import Refused
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.protocol.agreement import ShardSums
from tapestry.node.protocol.messages import Result, Shard
from tapestry.node.state.means import payload_digest

N = 1000
HEAD = "ab" * 32
OURS = "alice"
SUMS = ShardSums((1.0,), 1.0, (1.0,), (1.0,), 1.0, 1, 0)


def averaging() -> Averaging:
    return Averaging(get_codec("int8-block"), N, 256, WEIGHTED)


def vector(seed: int) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed))


def encoded(seed: int) -> torch.Tensor:  # uint8 (size,)
    """A contribution as the trainer leaves it in shared memory."""
    codec, x = get_codec("int8-block"), vector(seed)
    return torch.cat([codec.encode(x[start : start + 256]) for start in range(0, N, 256)])


def test_a_frame_that_was_sent_is_the_payload_that_is_received():
    a = averaging()
    payloads = a.take(encoded(1), copy=True)
    name = a.commit(OURS, 3, payloads)
    for shard, payload in enumerate(payloads):
        frame = bytearray(b"".join(bytes(part) for part in a.frame(shard, payload)))
        assert len(frame) <= a.frame_bytes_max
        got, digest = a.unpack(OURS, Result(0, HEAD, 0, shard, "", None, SUMS, ""), frame)
        assert torch.equal(got.tensor, payload) and digest == payload_digest(payload)
        assert b"".join(bytes(part) for part in a.frame(shard, got)) == frame
        got, digest = a.unpack(OURS, Shard(3, name, shard, None, a.path(name, shard)), frame)
        assert torch.equal(got, payload) and digest == payload_digest(payload)


@pytest.mark.parametrize("shard", [4, 10**6])
def test_a_shard_that_the_run_has_not_is_refused(shard):
    a = averaging()
    frame = bytearray(b"".join(bytes(part) for part in a.frame(0, a.take(encoded(1), copy=True)[0])))
    with pytest.raises(Refused):
        a.unpack(OURS, Shard(0, HEAD, shard, None), frame)


def test_a_shard_of_another_length_is_refused():
    a = averaging()  # the last shard has 232 elements, the others 256
    frame = bytearray(b"".join(bytes(part) for part in a.frame(0, a.take(encoded(1), copy=True)[0])))
    with pytest.raises(Refused):
        a.unpack(OURS, Shard(0, HEAD, 3, None), frame)


def test_a_shard_that_is_not_of_the_contribution_it_names_is_refused():
    a = averaging()
    payloads = a.take(encoded(1), copy=True)
    name, path = a.commit(OURS, 3, payloads), a.path(a.commit(OURS, 3, payloads), 0)
    frames = [bytearray(b"".join(map(bytes, a.frame(0, one)))) for one in payloads[:2]]
    a.unpack(OURS, Shard(3, name, 0, None, path), frames[0])
    for peer, message, frame in (
        (OURS, Shard(3, name, 0, None, path), frames[1]),  # other bytes
        (OURS, Shard(3, name, 1, None, path), frames[0]),  # in another place
        (OURS, Shard(4, name, 0, None, path), frames[0]),  # in a later round
        ("bob", Shard(3, name, 0, None, path), frames[0]),  # of somebody else
        (OURS, Shard(3, HEAD, 0, None, path), frames[0]),
        (OURS, Shard(3, name, 0, None, ()), frames[0]),
    ):
        with pytest.raises(Refused, match="not of the contribution"):
            a.unpack(peer, message, frame)


@pytest.mark.parametrize(("place", "value"), [(0, 128), (256 + 3, 255), (N + 15, 255)])
def test_a_payload_that_no_encoder_writes_is_refused(place, value):
    """A code of -128; and of the first and the last shard a scale that is negative or not a number."""
    buffer = encoded(1)
    buffer[place] = value
    with pytest.raises(Refused):
        averaging().take(buffer, copy=False)


def test_what_was_taken_stays_when_the_trainer_writes_its_next_contribution():
    a, buffer = averaging(), encoded(1)
    payloads = a.take(buffer, copy=True)
    buffer.copy_(encoded(2))
    assert torch.equal(torch.cat(payloads), encoded(1))


def test_the_mean_is_the_same_whoever_computes_it():
    one, other = averaging(), averaging()
    inputs = [one.take(encoded(seed), copy=True) for seed in range(3)]
    for shard in range(4):
        blobs = [payloads[shard] for payloads in inputs]
        a, digest_a, sums_a = one.reduce(shard, blobs, [3, 1, 5])
        b, digest_b, sums_b = other.reduce(shard, [blob.clone() for blob in blobs], [3, 1, 5])
        assert torch.equal(a.tensor, b.tensor) and digest_a == digest_b
        assert sums_a == sums_b and sums_a.of_so_many(3)


def test_where_a_mean_overflows_the_largest_contribution_is_named():
    """It was the last by peer id, an honest member as likely as not."""
    a, top = averaging(), torch.finfo(torch.float32).max
    huge, honest = a.codec.encode(torch.full((256,), top)), a.codec.encode(vector(1)[:256])
    assert [a.longest(0, [huge, honest, honest]), a.longest(0, [honest, honest, huge])] == [0, 2]
