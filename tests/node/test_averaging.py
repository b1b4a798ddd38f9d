"""The tensor half of a round: what is sent is what was encoded, and a residual is kept only if it counted."""

import pytest
import torch

from tapestry.compression.codecs import get_codec
from tapestry.compression.refusals import Refused, RefusedVector
from tapestry.node.averaging import Averaging, payload_digest
from tapestry.node.protocol.messages import Result, Shard

N = 1000
HEAD, TOKEN = "ab" * 32, "cd" * 16


def averaging(residual: bool = False) -> Averaging:
    return Averaging(get_codec("int8-block"), N, 256, residual)


def vector(seed: int) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed))


def decoded(a: Averaging, payloads: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([a.codec.decode(p, s.n) for s, p in zip(a.shards, payloads, strict=True)])


def test_a_frame_that_was_sent_is_the_payload_that_is_received():
    a = averaging()
    payloads = a.encode(vector(1))
    for shard, payload in enumerate(payloads):
        frame = bytearray(b"".join(bytes(part) for part in a.frame(shard, payload)))
        assert len(frame) <= a.frame_bytes_max
        got, digest = a.unpack(Result(0, HEAD, 0, shard, "", None), frame)
        assert torch.equal(got, payload) and digest == payload_digest(payload)
        got, digest = a.unpack(Shard(0, TOKEN, shard, None), frame)
        assert torch.equal(got, payload) and digest == ""


@pytest.mark.parametrize("shard", [4, 10**6])
def test_a_shard_that_the_run_has_not_is_refused(shard):
    a = averaging()
    frame = bytearray(b"".join(bytes(part) for part in a.frame(0, a.encode(vector(1))[0])))
    with pytest.raises(Refused):
        a.unpack(Shard(0, TOKEN, shard, None), frame)


def test_a_shard_of_another_length_is_refused():
    a = averaging()  # the last shard has 232 elements, the others 256
    frame = bytearray(b"".join(bytes(part) for part in a.frame(0, a.encode(vector(1))[0])))
    with pytest.raises(Refused):
        a.unpack(Shard(0, TOKEN, 3, None), frame)


def test_a_contribution_that_is_not_finite_is_refused():
    x = vector(1)
    x[N - 1] = float("nan")
    with pytest.raises(RefusedVector):
        averaging().encode(x)


def test_the_mean_is_the_same_whoever_computes_it():
    one, other = averaging(), averaging()
    inputs = [one.encode(vector(seed)) for seed in range(3)]
    for shard in range(4):
        blobs = [payloads[shard] for payloads in inputs]
        a, digest_a = one.reduce(shard, blobs, [3, 1, 5])
        b, digest_b = other.reduce(shard, [blob.clone() for blob in blobs], [3, 1, 5])
        assert torch.equal(a, b) and digest_a == digest_b


def test_the_residual_of_a_committed_contribution_is_added_to_the_next():
    a, x = averaging(residual=True), vector(1)
    lost = x - decoded(a, a.encode(x, "one"))
    a.settle("one")
    y = vector(2)
    assert torch.equal(decoded(a, a.encode(y)), decoded(averaging(), averaging().encode(y + lost)))


def test_the_residual_of_a_contribution_that_did_not_count_is_dropped():
    a = averaging(residual=True)
    a.encode(vector(1), "one")
    a.settle(None)
    y = vector(2)
    assert torch.equal(decoded(a, a.encode(y)), decoded(averaging(), averaging().encode(y)))


def test_the_callers_vector_is_left_alone():
    a, x = averaging(residual=True), vector(1)
    before = x.clone()
    a.encode(x, "one")
    a.settle("one")
    a.encode(x, "two")
    assert torch.equal(x, before)


def test_a_residual_is_kept_only_by_the_contribution_that_the_record_names():
    a, y = averaging(residual=True), vector(3)
    a.encode(vector(1), "one")
    a.encode(vector(2), "two")
    a.settle("one")
    assert torch.equal(decoded(a, a.encode(y)), decoded(averaging(), averaging().encode(y)))


def test_a_round_may_end_while_its_contribution_is_encoded(monkeypatch):
    a, y = averaging(residual=True), vector(3)
    decode = a.codec.decode

    def decode_late(*args, **kwargs):
        a.settle(None)
        return decode(*args, **kwargs)

    monkeypatch.setattr(type(a.codec), "decode", lambda self, *args, **kwargs: decode_late(*args, **kwargs))
    a.encode(vector(1), "late")
    monkeypatch.undo()
    a.settle(None)
    assert torch.equal(decoded(a, a.encode(y)), decoded(averaging(), averaging().encode(y)))
