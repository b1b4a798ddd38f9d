"""Agreement: sums of shards that add up to what a plain calculation says of the whole vectors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tapestry.compression.agreement import agreement, agreement_sums
from tapestry.compression.blocks import PIECE
from tapestry.compression.blockwise import INT8_BLOCK
from tapestry.compression.bnb import BNB_DYNAMIC8
from tapestry.compression.codecs import Codec
from tapestry.compression.reduce import reduce_shard
from tapestry.compression.refusals import RefusedPayload
from tapestry.compression.shards import shard_bounds

CHECKED = settings(max_examples=12, deadline=None)
CODECS = (INT8_BLOCK, BNB_DYNAMIC8)


def contributions(seed: int, members: int, n: int, common: float = 0.0) -> list[torch.Tensor]:
    """Of norm about sqrt(n) each; `common` is the share of what all of them have."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=n)
    own = rng.normal(size=(members, n))
    mixed = math.sqrt(common) * shared + math.sqrt(1 - common) * own
    return list(torch.from_numpy(mixed.astype(np.float32)))


def sums_of(vectors: list[torch.Tensor], codec: Codec, shard_elements: int):  # type: ignore[no-untyped-def]
    found = []
    for shard in shard_bounds(vectors[0].numel(), shard_elements):
        payloads = [codec.encode(vector[shard.start : shard.stop]) for vector in vectors]
        mean = reduce_shard(payloads, [1] * len(payloads), codec, shard.n)
        found.append(agreement_sums(payloads, mean, codec, shard.n))
    return found


@CHECKED
@given(st.sampled_from(CODECS), st.integers(1, 5), st.sampled_from((1, 255, 257, 700)), st.integers(0, 99))
def test_the_figures_are_those_of_a_plain_calculation(codec: Codec, members: int, n: int, seed: int) -> None:
    vectors = contributions(seed, members, n, common=0.3)
    payloads = [codec.encode(vector) for vector in vectors]
    reduced = reduce_shard(payloads, [1] * members, codec, n)
    x = np.stack([codec.decode(payload, n).numpy().astype(np.float64) for payload in payloads])
    mean = codec.decode(reduced, n).numpy().astype(np.float64)
    norms = np.linalg.norm(x, axis=1)
    cosines = x @ mean / (norms * np.linalg.norm(mean))
    counted = x * mean != 0

    figures = agreement([agreement_sums(payloads, reduced, codec, n)])

    assert figures.cosines == pytest.approx(list(cosines), rel=1e-4, abs=1e-5)
    assert figures.cosine == pytest.approx(cosines.mean(), rel=1e-4, abs=1e-5)
    assert figures.norm_kept == pytest.approx(np.linalg.norm(mean) / norms.mean(), rel=1e-4)
    assert figures.sign_agreement == pytest.approx((x * mean > 0).sum() / max(1, counted.sum()))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_shards_add_up_to_the_same_figures_in_any_order(codec: Codec) -> None:
    sums = sums_of(contributions(1, 4, 3000, common=0.5), codec, 256)
    assert agreement(sums) == agreement(sums[::-1]) == agreement(sums[5:] + sums[:5])


def test_cuts_into_other_shards_change_next_to_nothing() -> None:
    vectors = contributions(2, 3, PIECE + 5000, common=0.2)
    fine = agreement(sums_of(vectors, INT8_BLOCK, 4096))
    whole = agreement(sums_of(vectors, INT8_BLOCK, 2 * PIECE))
    assert fine.sign_agreement == whole.sign_agreement
    assert fine.cosines == pytest.approx(whole.cosines, rel=1e-5)
    assert fine.norm_kept == pytest.approx(whole.norm_kept, rel=1e-5)


def test_the_sums_have_the_same_bits_for_any_number_of_threads() -> None:
    vectors = contributions(3, 3, PIECE + 1000)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(sums_of(vectors, INT8_BLOCK, 2 * PIECE))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_a_sample_of_the_pieces_says_nearly_the_same() -> None:
    vectors = contributions(7, 3, 4 * PIECE, common=0.3)
    payloads = [INT8_BLOCK.encode(vector) for vector in vectors]
    mean = reduce_shard(payloads, [1, 1, 1], INT8_BLOCK, 4 * PIECE)
    whole, sample = (agreement([agreement_sums(payloads, mean, INT8_BLOCK, 4 * PIECE, k)]) for k in (1, 4))
    assert sample.cosine == pytest.approx(whole.cosine, abs=0.005)
    assert sample.norm_kept == pytest.approx(whole.norm_kept, abs=0.005)
    assert sample.sign_agreement == pytest.approx(whole.sign_agreement, abs=0.005)


def test_members_that_are_alike_keep_the_whole_norm() -> None:
    vector = contributions(4, 1, 2000)[0]
    figures = agreement(sums_of([vector] * 4, INT8_BLOCK, 1024))
    assert figures.norm_kept == pytest.approx(1.0, abs=1e-3)
    assert figures.cosine == pytest.approx(1.0, abs=1e-3)
    assert figures.sign_agreement == 1.0


def test_members_that_each_go_their_own_way_keep_one_over_the_root_of_their_number() -> None:
    figures = agreement(sums_of(contributions(5, 4, 20_000), INT8_BLOCK, 4096))
    assert figures.norm_kept == pytest.approx(0.5, abs=0.01)
    assert figures.cosine == pytest.approx(0.5, abs=0.01)


def test_members_that_cancel_out_agree_in_nothing() -> None:
    vector = contributions(6, 1, 1000)[0]
    figures = agreement(sums_of([vector, -vector], INT8_BLOCK, 1024))
    assert (figures.cosine, figures.norm_kept, figures.sign_agreement) == (0.0, 0.0, 0.0)


def test_vectors_of_zeros_agree_in_nothing() -> None:
    figures = agreement(sums_of([torch.zeros(300)] * 2, INT8_BLOCK, 256))
    assert (figures.cosines, figures.norm_kept, figures.sign_agreement) == ((0.0, 0.0), 0.0, 0.0)


def test_the_largest_and_the_smallest_f32_do_not_overflow_or_vanish() -> None:
    for size in (3e38, 1e-30):
        vectors = [torch.full((300,), size), torch.full((300,), size)]
        figures = agreement(sums_of(vectors, INT8_BLOCK, 256))
        assert figures.cosine == pytest.approx(1.0, abs=1e-6)
        assert figures.norm_kept == pytest.approx(1.0, abs=1e-6)


def test_a_payload_that_is_none_is_refused() -> None:
    payload = INT8_BLOCK.encode(torch.ones(300))
    with pytest.raises(RefusedPayload, match="length"):
        agreement_sums([payload[:-1]], payload, INT8_BLOCK, 300)
