"""The weighted mean: bit for bit a naive loop's, near the f64 mean, the same for whoever computes it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tapestry.compression.blocks import PIECE
from tapestry.compression.blockwise import INT8_BLOCK
from tapestry.compression.bnb import BNB_DYNAMIC8
from tapestry.compression.codecs import Codec
from tapestry.compression.reduce import mean_of_shard, reduce_shard
from tapestry.compression.refusals import RefusedPayload, RefusedVector, RefusedWeights

CHECKED = settings(max_examples=60, deadline=None)
CODECS = (INT8_BLOCK, BNB_DYNAMIC8)
WEIGHTS = st.lists(st.integers(0, 2**40), min_size=1, max_size=6).filter(any)
MAGNITUDES = st.sampled_from((1e-45, 1e-38, 1e-30, 1.0, 1e30))
F32_MAX = float(np.finfo(np.float32).max)


def contributions(seed: int, members: int, n: int, magnitude: float = 1.0) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy((rng.normal(size=n) * magnitude).astype(np.float32)) for _ in range(members)]


def naive_mean(decoded: list[np.ndarray], weights: list[int]) -> np.ndarray:  # f32 (n,)
    acc = np.zeros_like(decoded[0])
    for values, weight in zip(decoded, weights, strict=True):
        coefficient = np.float32(weight / sum(weights))
        for i, value in enumerate(values):
            acc[i] = acc[i] + coefficient * value
    return acc


@CHECKED
@given(
    st.sampled_from(CODECS), WEIGHTS, st.sampled_from((0, 1, 255, 257, 600)), MAGNITUDES, st.integers(0, 9)
)
def test_the_mean_has_the_bits_of_a_naive_loop(
    codec: Codec, weights: list[int], n: int, magnitude: float, seed: int
) -> None:
    payloads = [codec.encode(x) for x in contributions(seed, len(weights), n, magnitude)]
    decoded = [codec.decode(payload, n).numpy() for payload in payloads]
    mean = mean_of_shard(payloads, weights, codec, n)
    assert mean.numpy().tobytes() == naive_mean(decoded, weights).tobytes()


@CHECKED
@given(WEIGHTS, st.integers(0, 99))
def test_the_mean_is_the_f64_mean_to_a_few_roundings(weights: list[int], seed: int) -> None:
    n = 300
    payloads = [INT8_BLOCK.encode(x) for x in contributions(seed, len(weights), n)]
    decoded = np.stack([INT8_BLOCK.decode(payload, n).numpy().astype(np.float64) for payload in payloads])
    share = np.array(weights, dtype=np.float64) / sum(weights)
    error = np.abs(mean_of_shard(payloads, weights, INT8_BLOCK, n).numpy() - share @ decoded)
    assert (error <= 2 * len(weights) * 2.0**-24 * (share @ np.abs(decoded)) + 1e-45).all()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_the_number_of_threads_changes_no_bit(codec: Codec) -> None:
    n = PIECE + 1000
    payloads = [codec.encode(x) for x in contributions(1, 3, n)]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(reduce_shard(payloads, [3, 1, 2], codec, n).numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


def test_another_process_computes_the_same_bytes() -> None:
    n = 1000
    program = (
        "import sys, torch\n"
        "from tapestry.compression.blockwise import INT8_BLOCK as codec\n"
        "from tapestry.compression.reduce import reduce_shard\n"
        "data = bytearray(sys.stdin.buffer.read())\n"
        f"payloads = torch.frombuffer(data, dtype=torch.uint8).view(3, -1)\n"
        f"result = reduce_shard(list(payloads), [5, 7, 11], codec, {n})\n"
        "sys.stdout.buffer.write(result.numpy().tobytes())\n"
    )
    payloads = [INT8_BLOCK.encode(x) for x in contributions(2, 3, n)]
    joined = b"".join(payload.numpy().tobytes() for payload in payloads)
    done = subprocess.run([sys.executable, "-c", program], input=joined, capture_output=True, check=True)
    assert done.stdout == reduce_shard(payloads, [5, 7, 11], INT8_BLOCK, n).numpy().tobytes()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("n", [0, 700, 2 * PIECE + 300])
def test_reduce_shard_is_the_mean_encoded_once(codec: Codec, n: int) -> None:
    payloads = [codec.encode(x) for x in contributions(3, 3, n)]
    mean = mean_of_shard(payloads, [1, 2, 3], codec, n)
    out = torch.empty(codec.payload_size(n), dtype=torch.uint8)
    assert reduce_shard(payloads, [1, 2, 3], codec, n, out) is out
    assert torch.equal(out, codec.encode(mean))


def test_the_roster_order_decides_the_last_bits() -> None:
    # Why the order is part of the contract: sums in f32 do not commute with more than two members.
    payloads = [INT8_BLOCK.encode(x) for x in contributions(4, 3, 5000)]
    forward = mean_of_shard(payloads, [1, 2, 3], INT8_BLOCK, 5000)
    backward = mean_of_shard(payloads[::-1], [3, 2, 1], INT8_BLOCK, 5000)
    assert not torch.equal(forward, backward)
    assert torch.allclose(forward, backward, atol=1e-6)


def test_a_member_alone_gets_its_own_decoded_value() -> None:
    payload = INT8_BLOCK.encode(contributions(5, 1, 300)[0])
    assert torch.equal(mean_of_shard([payload], [17], INT8_BLOCK, 300), INT8_BLOCK.decode(payload, 300))


def test_a_member_of_weight_zero_has_no_influence() -> None:
    payloads = [INT8_BLOCK.encode(x) for x in contributions(6, 2, 300)]
    assert torch.equal(mean_of_shard(payloads, [0, 5], INT8_BLOCK, 300), INT8_BLOCK.decode(payloads[1], 300))


def test_what_lay_in_the_accumulator_before_is_gone() -> None:
    payloads = [INT8_BLOCK.encode(x) for x in contributions(7, 2, 300)]
    out = torch.full((300,), float("nan"))
    assert mean_of_shard(payloads, [1, 1], INT8_BLOCK, 300, out) is out
    assert torch.equal(out, mean_of_shard(payloads, [1, 1], INT8_BLOCK, 300))


def test_weights_larger_than_f64_can_count_are_divided_exactly() -> None:
    payloads = [INT8_BLOCK.encode(x) for x in contributions(8, 2, 300)]
    small = mean_of_shard(payloads, [1, 3], INT8_BLOCK, 300)
    assert torch.equal(mean_of_shard(payloads, [10**400, 3 * 10**400], INT8_BLOCK, 300), small)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ([1, -1], "weight"),
        ([2, -1], "weight"),
        ([1, float("nan")], "weight"),
        ([1, float("inf")], "weight"),
        ([1, 0.5], "weight"),
        ([1, True], "weight"),
        ([1, None], "weight"),
        ([0, 0], "total"),
        ([1], "count"),
        ([1, 1, 1], "count"),
        ([], "count"),
    ],
)
def test_weights_that_define_no_mean_are_refused_and_nothing_is_added(weights: list, reason: str) -> None:
    payloads = [INT8_BLOCK.encode(x) for x in contributions(9, 2, 300)]
    out = torch.full((300,), 5.0)
    with pytest.raises(RefusedWeights) as refused:
        mean_of_shard(payloads, weights, INT8_BLOCK, 300, out)
    assert refused.value.reason == reason
    assert (out == 5).all()


def test_a_mean_of_nobody_is_refused() -> None:
    with pytest.raises(RefusedWeights, match="total"):
        mean_of_shard([], [], INT8_BLOCK, 300)


def spoil_code(payload: torch.Tensor) -> torch.Tensor:
    payload[299] = 0x80
    return payload


def spoil_scale(payload: torch.Tensor) -> torch.Tensor:
    payload[300:304] = torch.from_numpy(np.array([np.nan], "<f4").view(np.uint8))
    return payload


def shorten(payload: torch.Tensor) -> torch.Tensor:
    return payload[:-1]


@pytest.mark.parametrize(
    ("spoil", "reason"), [(spoil_code, "code"), (spoil_scale, "not_finite"), (shorten, "length")]
)
@pytest.mark.parametrize("position", [0, 2])
def test_one_bad_payload_is_refused_by_its_place_and_nothing_is_added(
    spoil, reason: str, position: int
) -> None:
    payloads = [INT8_BLOCK.encode(x) for x in contributions(10, 3, 300)]
    payloads[position] = spoil(payloads[position])
    out = torch.full((300,), 5.0)
    with pytest.raises(RefusedPayload, match=f"payload {position}") as refused:
        mean_of_shard(payloads, [1, 1, 1], INT8_BLOCK, 300, out)
    assert refused.value.reason == reason
    assert (out == 5).all()


def test_a_mean_beyond_the_largest_f32_is_refused() -> None:
    # Twenty times f32(1/20), each sum rounded, is more than one.
    for sign in (1, -1):
        x = torch.zeros(300)
        x[7] = sign * F32_MAX
        payloads = [INT8_BLOCK.encode(x)] * 20
        with pytest.raises(RefusedVector) as refused:
            mean_of_shard(payloads, [1] * 20, INT8_BLOCK, 300)
        assert refused.value.reason == "overflow"
        with pytest.raises(RefusedVector) as refused:
            reduce_shard(payloads, [1] * 20, INT8_BLOCK, 300)
        assert refused.value.reason == "overflow"


def test_the_mean_of_huge_values_is_finite_where_f32_can_hold_it() -> None:
    payload = INT8_BLOCK.encode(torch.tensor([3e38, -3e38]))
    mean = mean_of_shard([payload] * 4, [1] * 4, INT8_BLOCK, 2)
    assert torch.equal(mean, INT8_BLOCK.decode(payload, 2))


def test_a_processor_that_flushes_subnormals_is_noticed() -> None:
    payload = INT8_BLOCK.encode(torch.ones(3))
    assert torch.set_flush_denormal(True)
    try:
        with pytest.raises(RuntimeError, match="subnormals"):
            mean_of_shard([payload], [1], INT8_BLOCK, 3)
    finally:
        torch.set_flush_denormal(False)
