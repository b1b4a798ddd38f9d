"""Agreement: sums of a shard that are what a plain calculation says, on any machine, cut up in any way."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tapestry.compression.agreement import AgreementSums, agreement_sums
from tapestry.compression.blocks import PIECE
from tapestry.compression.blockwise import INT8_BLOCK
from tapestry.compression.bnb import BNB_DYNAMIC8
from tapestry.compression.codecs import Codec
from tapestry.compression.reduce import reduce_shard
from tapestry.compression.refusals import RefusedPayload

CHECKED = settings(max_examples=12, deadline=None)
CODECS = (INT8_BLOCK, BNB_DYNAMIC8)


def contributions(seed: int, members: int, n: int, common: float = 0.0) -> list[torch.Tensor]:
    """Of norm about sqrt(n) each; `common` is the share of what all of them have."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=n)
    own = rng.normal(size=(members, n))
    mixed = math.sqrt(common) * shared + math.sqrt(1 - common) * own
    return list(torch.from_numpy(mixed.astype(np.float32)))


def sums_of(vectors: list[torch.Tensor], codec: Codec, every: int = 1) -> AgreementSums:
    n = vectors[0].numel()
    payloads = [codec.encode(vector) for vector in vectors]
    mean = reduce_shard(payloads, [1] * len(payloads), codec, n)
    return agreement_sums(payloads, mean, codec, n, every)


def plainly(vectors: list[torch.Tensor], codec: Codec) -> tuple[np.ndarray, np.ndarray]:
    """What the payloads decode to, f64 (members, n) and (n,)."""
    n = vectors[0].numel()
    payloads = [codec.encode(vector) for vector in vectors]
    reduced = reduce_shard(payloads, [1] * len(payloads), codec, n)
    decoded = np.stack([codec.decode(payload, n).numpy().astype(np.float64) for payload in payloads])
    return decoded, codec.decode(reduced, n).numpy().astype(np.float64)


@CHECKED
@given(st.sampled_from(CODECS), st.integers(1, 5), st.sampled_from((1, 255, 257, 700)), st.integers(0, 99))
def test_the_sums_are_those_of_a_plain_calculation(codec: Codec, members: int, n: int, seed: int) -> None:
    vectors = contributions(seed, members, n, common=0.3)
    x, mean = plainly(vectors, codec)

    sums = sums_of(vectors, codec)

    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(mean)
    assert sums.squares == sums.sampled_squares == pytest.approx(list((x * x).sum(1)), rel=1e-5)
    assert sums.mean_square == sums.sampled_mean_square == pytest.approx((mean * mean).sum(), rel=1e-5)
    assert np.abs(np.array(sums.sampled_dots) - x @ mean).max() <= 1e-5 * lengths.max()
    assert (sums.same_sign, sums.other_sign) == ((x * mean > 0).sum(), (x * mean < 0).sum())


def test_norms_are_of_all_pieces_and_the_rest_of_every_fourth() -> None:
    n = 5 * PIECE + 1000
    vectors = contributions(7, 3, n, common=0.3)
    whole, sample = sums_of(vectors, INT8_BLOCK), sums_of(vectors, INT8_BLOCK, every=4)
    x, mean = plainly(vectors, INT8_BLOCK)
    looked_at = (np.arange(n) // PIECE) % 4 == 0

    assert sample.squares == whole.squares and sample.mean_square == whole.mean_square
    assert sample.sampled_squares == pytest.approx(list((x * x)[:, looked_at].sum(1)), rel=1e-5)
    assert sample.sampled_mean_square == pytest.approx((mean * mean)[looked_at].sum(), rel=1e-5)
    assert sample.sampled_dots == pytest.approx(list(x[:, looked_at] @ mean[looked_at]), rel=1e-4)
    assert sample.same_sign == (x * mean > 0)[:, looked_at].sum()


def test_the_sums_have_the_same_bits_for_any_number_of_threads() -> None:
    vectors = contributions(3, 3, PIECE + 1000)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(sums_of(vectors, INT8_BLOCK))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_vectors_of_zeros_have_sums_of_zero_and_no_sign() -> None:
    sums = sums_of([torch.zeros(300)] * 2, INT8_BLOCK)
    assert (sums.squares, sums.sampled_dots) == ((0.0, 0.0), (0.0, 0.0))
    assert (sums.mean_square, sums.same_sign, sums.other_sign) == (0.0, 0, 0)


@pytest.mark.parametrize("size", [3e38, 1e18, 1e15, 1e-9, 1e-12, 1e-30])
def test_the_largest_and_the_smallest_f32_do_not_overflow_or_vanish(size: float) -> None:
    """Whether a piece has to be scaled, or just so not."""
    vectors = [torch.full((300,), size), torch.full((300,), size)]
    sums = sums_of(vectors, INT8_BLOCK)
    square = 300 * float(torch.tensor(size)) ** 2
    assert sums.squares == sums.sampled_dots == pytest.approx((square, square), rel=1e-6)


def test_a_payload_that_is_none_is_refused() -> None:
    payload = INT8_BLOCK.encode(torch.ones(300))
    with pytest.raises(RefusedPayload, match="length"):
        agreement_sums([payload[:-1]], payload, INT8_BLOCK, 300)
