"""int8-block against a naive numpy reference, bit for bit, and against its error bound in f64."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tapestry.compression.blocks import DEVICE_PIECE, PIECE, pieces
from tapestry.compression.blockwise import INT8_BLOCK, SCALE_MAX, SCALE_MIN
from tapestry.compression.refusals import RefusedPayload, RefusedVector

CHECKED = settings(max_examples=80, deadline=None)
SIZES = (0, 1, 2, 255, 256, 257, 511, 512, 513, 1000)
MAGNITUDES = (1e-45, 1e-42, 1e-38, 1.2e-38, 1e-36, 3e-36, 1e-30, 1e-6, 1.0, 1e30, 3e38)
F32_MAX = float(np.finfo(np.float32).max)


@st.composite
def vectors(draw: st.DrawFn) -> np.ndarray:  # f32 (n,)
    """Blocks of very different magnitude, with zeros and both signs in them."""
    n = draw(st.sampled_from(SIZES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    magnitudes = rng.choice(draw(st.lists(st.sampled_from(MAGNITUDES), min_size=1, max_size=4)), n)
    per_block = np.resize(np.repeat(rng.choice(MAGNITUDES, -(-n // 256)), 256), n)
    x = rng.uniform(-1, 1, n) * (per_block if draw(st.booleans()) else magnitudes)
    x[rng.uniform(size=n) < draw(st.sampled_from((0.0, 0.3, 1.0)))] = 0
    return x.astype(np.float32)


def naive_encode(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # int8 (n,), f32 (blocks,)
    codes, scales = [], []
    for start in range(0, len(x), 256):
        block = x[start : start + 256]
        absmax = max(abs(value) for value in block)
        scale = np.float32(absmax) / np.float32(127)
        scale = np.float32(min(max(float(scale), SCALE_MIN), SCALE_MAX))
        codes += [int(np.rint(np.float32(value) / scale)) for value in block]
        scales.append(scale if absmax > 0 else np.float32(0))
    return np.array(codes, dtype=np.int8), np.array(scales, dtype=np.float32)


def naive_payload(x: np.ndarray) -> bytes:
    codes, scales = naive_encode(x)
    return codes.tobytes() + scales.astype("<f4").tobytes()


def naive_decode(payload: bytes, n: int) -> np.ndarray:  # f32 (n,)
    codes = np.frombuffer(payload[:n], np.int8)
    scales = np.frombuffer(payload[n:], "<f4")
    return np.array([np.float32(code) * scales[i // 256] for i, code in enumerate(codes)], np.float32)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


@CHECKED
@given(vectors())
def test_encode_gives_the_bytes_of_the_naive_reference(x: np.ndarray) -> None:
    assert INT8_BLOCK.encode(torch.from_numpy(x)).numpy().tobytes() == naive_payload(x)


@CHECKED
@given(vectors())
def test_decode_gives_the_bits_of_the_naive_reference(x: np.ndarray) -> None:
    payload = naive_payload(x)
    decoded = INT8_BLOCK.decode(torch.from_numpy(np.frombuffer(payload, np.uint8).copy()), len(x))
    assert same_bits(decoded.numpy(), naive_decode(payload, len(x)))


@CHECKED
@given(vectors())
def test_the_error_is_at_most_half_a_scale(x: np.ndarray) -> None:
    payload = INT8_BLOCK.encode(torch.from_numpy(x))
    decoded = INT8_BLOCK.decode(payload, len(x)).numpy()
    scales = np.repeat(payload[len(x) :].numpy().view("<f4").astype(np.float64), 256)[: len(x)]
    error = np.abs(x.astype(np.float64) - decoded.astype(np.float64))
    assert np.isfinite(decoded).all()
    assert (error <= scales / 2 * (1 + 2**-15)).all()


@CHECKED
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=300))
def test_any_finite_vector_is_encoded_as_the_reference_does(values: list[float]) -> None:
    x = np.array(values, dtype=np.float32)
    assert INT8_BLOCK.encode(torch.from_numpy(x)).numpy().tobytes() == naive_payload(x)


def test_vectors_longer_than_a_piece_are_encoded_and_decoded_as_the_reference_does() -> None:
    n = PIECE + 513
    x = np.random.default_rng(1).normal(size=n).astype(np.float32)
    payload = INT8_BLOCK.encode(torch.from_numpy(x))
    scales = np.abs(np.pad(x, (0, -n % 256))).reshape(-1, 256).max(1) / np.float32(127)
    codes = np.rint(x / np.repeat(scales, 256)[:n]).astype(np.int8)
    assert payload.numpy().tobytes() == codes.tobytes() + scales.tobytes()
    decoded = codes.astype(np.float32) * np.repeat(scales, 256)[:n]
    assert same_bits(INT8_BLOCK.decode(payload, n).numpy(), decoded)


def test_halves_are_rounded_to_the_even_code() -> None:
    x = torch.zeros(256)
    x[:6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -3.5])
    assert INT8_BLOCK.encode(x)[:6].view(torch.int8).tolist() == [127, 0, 2, 2, 0, -4]


def halfway() -> tuple[torch.Tensor, np.ndarray]:  # f32 (n,), f32 (n,)
    """Values halfway between codes, and their codes; multiplying by a reciprocal would give others."""
    rng = np.random.default_rng(4)
    scales = (rng.uniform(1, 2, 400).astype(np.float32) / np.float32(127))[:, None]
    x = (rng.integers(-126, 126, (400, 256)).astype(np.float32) + np.float32(0.5)) * scales
    x[:, 0] = np.float32(127) * scales[:, 0]
    scales = np.abs(x).max(1, keepdims=True) / np.float32(127)
    codes = np.rint(x / scales)
    assert (codes != np.rint(x * (np.float32(1) / scales))).any()  # so the tests can fail
    return torch.from_numpy(x.reshape(-1)), codes.reshape(-1)


def test_values_halfway_between_codes_are_divided_not_multiplied_by_a_reciprocal() -> None:
    x, codes = halfway()
    assert (INT8_BLOCK.encode(x)[: x.numel()].view(torch.int8).numpy() == codes).all()


def test_zeros_have_scale_zero_and_codes_zero() -> None:
    for zero in (0.0, -0.0):
        payload = INT8_BLOCK.encode(torch.full((300,), zero))
        assert not payload.any()
        assert same_bits(INT8_BLOCK.decode(payload, 300).numpy(), np.zeros(300, np.float32))


def test_the_largest_scale_is_the_largest_that_decodes_to_finite_values() -> None:
    with np.errstate(over="ignore"):
        assert np.isfinite(np.float32(127) * np.float32(SCALE_MAX))
        assert np.isinf(np.float32(127) * np.nextafter(np.float32(SCALE_MAX), np.float32(np.inf)))


def test_the_largest_f32_is_encoded_and_decoded_to_a_finite_value() -> None:
    x = torch.tensor([F32_MAX, -F32_MAX, 1.0])
    decoded = INT8_BLOCK.decode(INT8_BLOCK.encode(x), 3)
    assert torch.isfinite(decoded).all()
    assert decoded[0] > 0.999999 * F32_MAX


@CHECKED
@given(vectors())
def test_a_processor_that_flushes_subnormals_gets_the_same_bits(x: np.ndarray) -> None:
    vector = torch.from_numpy(x)
    payload = INT8_BLOCK.encode(vector)
    decoded = INT8_BLOCK.decode(payload, len(x))
    assert torch.set_flush_denormal(True)
    try:
        flushed_payload = INT8_BLOCK.encode(vector)
        flushed = INT8_BLOCK.decode(payload, len(x))
    finally:
        torch.set_flush_denormal(False)
    assert flushed_payload.numpy().tobytes() == payload.numpy().tobytes()
    assert same_bits(flushed.numpy(), decoded.numpy())


def test_the_number_of_threads_changes_no_bit() -> None:
    n = 2 * PIECE + 77
    x = torch.from_numpy(np.random.default_rng(2).normal(size=n).astype(np.float32))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            payload = INT8_BLOCK.encode(x)
            acc = torch.ones(n)
            INT8_BLOCK.accumulate(payload, n, 0.3, acc)
            results.append((payload.numpy().tobytes(), acc.numpy().tobytes()))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


@CHECKED
@given(vectors(), st.floats(0, 1, width=64))
def test_accumulate_is_decode_then_multiply_then_add(x: np.ndarray, coefficient: float) -> None:
    payload = naive_payload(x)
    n = len(x)
    before = np.random.default_rng(n).normal(size=n).astype(np.float32)
    acc = torch.from_numpy(before.copy())
    INT8_BLOCK.accumulate(torch.from_numpy(np.frombuffer(payload, np.uint8).copy()), n, coefficient, acc)
    product = np.float32(coefficient) * naive_decode(payload, n)
    assert same_bits(acc.numpy(), before + product)


@pytest.mark.parametrize("n", [1, 256, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 300])
def test_decoding_piece_by_piece_gives_the_bits_of_the_whole(n: int) -> None:
    payload = INT8_BLOCK.encode(torch.from_numpy(np.random.default_rng(n).normal(size=n).astype(np.float32)))
    opened = INT8_BLOCK.open(payload, n)
    whole, by_piece = torch.zeros(n), torch.zeros(n)
    INT8_BLOCK.accumulate(payload, n, 0.3, whole)
    for index, (start, stop) in enumerate(pieces(n)):
        values = torch.empty(stop - start)
        opened.decode_piece(index, values)
        by_piece[start:stop] = np.float32(0.3) * values
    assert same_bits(by_piece.numpy(), whole.numpy())
    assert len(opened.codes) == len(pieces(n))


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 511, 512, 1023, 1024, 1025, 2000])
def test_pieces_are_whole_blocks_without_gaps_and_at_last_a_short_one(n: int) -> None:
    cuts = pieces(n, 512)
    assert [start for start, _ in cuts] == ([0] + [stop for _, stop in cuts])[:-1]
    assert (cuts[-1][1] if cuts else 0) == n
    assert all(
        stop - start <= 512 and (stop - start) % 256 == 0 for start, stop in cuts if stop - start > 255
    )
    assert all(stop == n for start, stop in cuts if stop - start < 256)


def test_a_source_may_give_every_piece_in_the_same_memory() -> None:
    n = 2 * PIECE + 300
    x = torch.from_numpy(np.random.default_rng(5).normal(size=n).astype(np.float32))
    room, asked = torch.empty(PIECE), []

    def source(index: int, start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        assert pieces(n)[index] == (start, stop)
        return room[: stop - start].copy_(x[start:stop])

    assert torch.equal(INT8_BLOCK.encode_pieces(source, n), INT8_BLOCK.encode(x))
    assert asked == pieces(n)


def test_threads_that_work_at_once_do_not_share_scratch() -> None:
    n = 2 * PIECE
    vectors = [torch.from_numpy(np.random.default_rng(i).normal(size=n).astype(np.float32)) for i in range(4)]
    alone = [INT8_BLOCK.encode(x).numpy().tobytes() for x in vectors]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            together = threads.map(lambda x: INT8_BLOCK.encode(x).numpy().tobytes(), vectors)
            assert list(together) == alone


@CHECKED
@given(vectors())
def test_the_way_of_a_gpu_gives_the_same_bytes_on_the_cpu(x: np.ndarray) -> None:
    # What CUDA itself does is tested below, where there is one.
    assert INT8_BLOCK.encode_on_device(torch.from_numpy(x)).numpy().tobytes() == naive_payload(x)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("m", [0, 256, 1024])
def test_rows_are_encoded_each_by_itself(rows: int, m: int) -> None:
    x = torch.from_numpy(np.random.default_rng(m).standard_t(2, rows * m).astype(np.float32))
    out = torch.empty(rows * INT8_BLOCK.payload_size(m), dtype=torch.uint8)
    assert INT8_BLOCK.encode_rows(x, rows, out) is out
    assert torch.equal(out, torch.cat([INT8_BLOCK.encode(row) for row in x.view(rows, m)]))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.mark.gpu
@needs_gpu
@CHECKED
@given(vectors())
def test_a_gpu_encodes_to_the_bytes_of_the_naive_reference(x: np.ndarray) -> None:
    assert INT8_BLOCK.encode(torch.from_numpy(x).cuda()).numpy().tobytes() == naive_payload(x)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("n", [0, 1, 257, PIECE + 300, DEVICE_PIECE + 257])
def test_a_gpu_encodes_long_vectors_to_the_bytes_of_the_cpu(n: int) -> None:
    rng = np.random.default_rng(n)
    x = torch.from_numpy((rng.standard_t(2, n) * np.exp(rng.uniform(-80, 80, n))).astype(np.float32))
    out = torch.empty(INT8_BLOCK.payload_size(n), dtype=torch.uint8)
    payload = INT8_BLOCK.encode(x.cuda())
    assert payload.device.type == "cpu"
    assert torch.equal(payload, INT8_BLOCK.encode(x))
    assert INT8_BLOCK.encode(x.cuda(), out) is out
    assert torch.equal(out, payload)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_divides_and_does_not_multiply_by_a_reciprocal() -> None:
    x, codes = halfway()
    assert (INT8_BLOCK.encode(x.cuda())[: x.numel()].view(torch.int8).numpy() == codes).all()
    absmax = torch.rand(100_000) * torch.exp(torch.empty(100_000).uniform_(-60, 60))
    blocks = torch.zeros(100_000, 256)
    blocks[:, 7] = absmax
    payload = INT8_BLOCK.encode(blocks.view(-1).cuda())
    assert payload[blocks.numel() :].numpy().tobytes() == (absmax.numpy() / np.float32(127)).tobytes()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nan_or_infinity_on_a_gpu_is_refused(bad: float) -> None:
    x = torch.ones(1000)
    x[999] = bad
    with pytest.raises(RefusedVector) as refused:
        INT8_BLOCK.encode(x.cuda())
    assert refused.value.reason == "not_finite"


def test_fusing_the_multiply_and_the_add_would_be_noticed() -> None:
    # The test above could not fail if f32 and fused results were the same on its kind of data.
    rng = np.random.default_rng(3)
    value, before = (rng.normal(size=1000).astype(np.float32) for _ in range(2))
    factor = np.float32(1 / 3)
    fused = (np.float64(factor) * value + before).astype(np.float32)
    assert (fused != before + factor * value).any()


def test_results_are_written_into_the_buffers_given() -> None:
    x = torch.linspace(-1, 1, 700)
    out, values = torch.empty(INT8_BLOCK.payload_size(700), dtype=torch.uint8), torch.empty(700)
    assert INT8_BLOCK.encode(x, out) is out
    assert INT8_BLOCK.decode(out, 700, values) is values
    assert torch.equal(out, INT8_BLOCK.encode(x))
    assert torch.allclose(values, x, atol=0.004)


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 255, 256, 599, PIECE + 1])
def test_one_nan_or_infinity_anywhere_is_refused(bad: float, position: int) -> None:
    x = torch.ones(position + 20)
    x[position] = bad
    with pytest.raises(RefusedVector) as refused:
        INT8_BLOCK.encode(x)
    assert refused.value.reason == "not_finite"


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        (torch.zeros(4, dtype=torch.float64), "dtype"),
        (torch.zeros(4, dtype=torch.float16), "dtype"),
        (torch.zeros(4, dtype=torch.int32), "dtype"),
        (torch.zeros(2, 2), "shape"),
        (torch.tensor(1.0), "shape"),
        (torch.zeros(8)[::2], "contiguous"),
        (torch.zeros(4, device="meta"), "device"),
    ],
)
def test_what_is_no_flat_f32_vector_is_refused(vector: torch.Tensor, reason: str) -> None:
    with pytest.raises(RefusedVector) as refused:
        INT8_BLOCK.encode(vector)
    assert refused.value.reason == reason


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (float("nan"), "not_finite"),
        (-float("nan"), "not_finite"),
        (float("inf"), "not_finite"),
        (-float("inf"), "not_finite"),
        (F32_MAX, "not_finite"),
        (float(np.nextafter(np.float32(SCALE_MAX), np.float32(np.inf))), "not_finite"),
        (-1.0, "scale"),
        (-0.0, "scale"),
        (1e-45, "scale"),
        (float(np.nextafter(np.float32(SCALE_MIN), np.float32(0))), "scale"),
    ],
)
@pytest.mark.parametrize("block", [0, 2])
def test_a_scale_that_encode_never_writes_is_refused(scale: float, reason: str, block: int) -> None:
    n = 513  # one over two blocks, so that the scales are not aligned
    payload = INT8_BLOCK.encode(torch.ones(n))
    start = n + 4 * block
    payload[start : start + 4] = torch.from_numpy(np.array([scale], "<f4").view(np.uint8))
    acc = torch.zeros(n)
    for use in (
        lambda: INT8_BLOCK.check(payload, n),
        lambda: INT8_BLOCK.decode(payload, n, acc),
        lambda: INT8_BLOCK.accumulate(payload, n, 1.0, acc),
    ):
        with pytest.raises(RefusedPayload) as refused:
            use()
        assert refused.value.reason == reason
    assert not acc.any()


@pytest.mark.parametrize("scale", [0.0, SCALE_MIN, 1.0, SCALE_MAX])
def test_a_scale_that_encode_can_write_is_accepted(scale: float) -> None:
    payload = INT8_BLOCK.encode(torch.ones(3))
    payload[3:] = torch.from_numpy(np.array([scale], "<f4").view(np.uint8))
    assert torch.isfinite(INT8_BLOCK.decode(payload, 3)).all()


@pytest.mark.parametrize("position", [0, 256, 299])
def test_code_minus_128_is_refused(position: int) -> None:
    payload = INT8_BLOCK.encode(torch.ones(300))
    payload[position] = 0x80
    with pytest.raises(RefusedPayload) as refused:
        INT8_BLOCK.check(payload, 300)
    assert refused.value.reason == "code"


@pytest.mark.parametrize("change", [-4, -1, 1, 4])
def test_a_payload_of_the_wrong_length_is_refused(change: int) -> None:
    payload = torch.zeros(INT8_BLOCK.payload_size(300) + change, dtype=torch.uint8)
    with pytest.raises(RefusedPayload) as refused:
        INT8_BLOCK.decode(payload, 300)
    assert refused.value.reason == "length"


def test_a_payload_that_is_no_flat_byte_vector_is_refused() -> None:
    size = INT8_BLOCK.payload_size(300)
    for payload in (
        torch.zeros(size),
        torch.zeros(1, size, dtype=torch.uint8),
        torch.zeros(2 * size, dtype=torch.uint8)[::2],
    ):
        with pytest.raises(RefusedPayload) as refused:
            INT8_BLOCK.check(payload, 300)
        assert refused.value.reason == "dtype"


def test_the_payload_has_a_byte_per_element_and_four_per_block() -> None:
    sizes = {0: 0, 1: 5, 255: 259, 256: 260, 257: 265, 512: 520}
    assert {n: INT8_BLOCK.payload_size(n) for n in sizes} == sizes
