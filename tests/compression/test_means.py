"""Robust means: naive references, and what no member can do whatever it sends."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tapestry.compression.blocks import PIECE
from tapestry.compression.blockwise import INT8_BLOCK
from tapestry.compression.bnb import BNB_DYNAMIC8
from tapestry.compression.codecs import Codec
from tapestry.compression.means.api import Mean
from tapestry.compression.means.registry import make_mean, mean_names
from tapestry.compression.means.shares import clip_scales, lower_median
from tapestry.compression.means.trimmed import network
from tapestry.compression.reduce import mean_of_shard, reduce_shard
from tapestry.compression.refusals import RefusedPayload, RefusedWeights

CHECKED = settings(max_examples=40, deadline=None)
CODECS = st.sampled_from((INT8_BLOCK, BNB_DYNAMIC8))
WEIGHTS = st.lists(st.integers(0, 2**40), min_size=3, max_size=7).filter(lambda w: sum(x > 0 for x in w) > 2)
LENGTHS = st.sampled_from((1, 255, 257, 600))
NORM_MAX, TRIM = 1.5, 0.25
MEANS: dict[str, Mean] = {
    "mean": make_mean("mean", {}),
    "clipped": make_mean("clipped", {"norm_max": NORM_MAX}),
    "aligned": make_mean("aligned", {"norm_max": NORM_MAX}),
    "trimmed": make_mean("trimmed", {"trim": TRIM}),
    "sign-elected": make_mean("sign-elected", {"norm_max": NORM_MAX}),
}
ROBUST = [name for name in MEANS if name != "mean"]
EACH = pytest.mark.parametrize("name", MEANS)
F32_MAX = float(np.finfo(np.float32).max)


def contributions(seed: int, members: int, n: int, magnitude: float = 1.0) -> list[torch.Tensor]:
    """What honest members send: a common direction, each its own besides."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=n)
    made = [magnitude * (common + rng.normal(size=n)) for _ in range(members)]
    return [torch.from_numpy(x.astype(np.float32)) for x in made]


def encoded(vectors: list[torch.Tensor], codec: Codec) -> tuple[list[torch.Tensor], np.ndarray]:
    """Payloads, and what they decode to, f32 (members, n)."""
    payloads = [codec.encode(x) for x in vectors]
    return payloads, np.stack([codec.decode(p, x.numel()).numpy() for p, x in zip(payloads, vectors)])  # noqa: B905


def norms_of(decoded: np.ndarray) -> list[float]:
    return [math.sqrt(math.fsum(float(v) ** 2 for v in row)) for row in decoded]


def test_the_table_has_a_test_for_each_mean() -> None:
    assert set(mean_names()) == set(MEANS)
    with pytest.raises(KeyError):
        make_mean("median", {})


# --- naive references ---------------------------------------------------------------------------------


def near(found: torch.Tensor, expected: np.ndarray, decoded: np.ndarray) -> bool:
    room = 2.0**-14 * np.abs(decoded.astype(np.float64)).max(axis=0) + 1e-44
    return bool((np.abs(found.numpy().astype(np.float64) - expected) <= room).all())


def naive_scales(decoded: np.ndarray, weights: list[int]) -> list[float]:
    norms = norms_of(decoded)
    by_norm = sorted((n, w) for n, w in zip(norms, weights, strict=True) if w)
    upto = itertools.accumulate(w for _, w in by_norm)
    median = next(n for (n, _), w in zip(by_norm, upto, strict=True) if 2 * w >= sum(weights))
    return [min(1.0, NORM_MAX * median / n) if n else 1.0 for n in norms]


@CHECKED
@given(CODECS, WEIGHTS, LENGTHS, st.sampled_from((1e-30, 1.0, 1e30)), st.integers(0, 99))
def test_clipped_is_the_mean_of_vectors_made_no_longer_than_allowed(codec, weights, n, magnitude, seed):
    vectors = contributions(seed, len(weights), n, magnitude)
    vectors[seed % len(weights)] *= 7.0
    payloads, decoded = encoded(vectors, codec)
    scaled = np.array(naive_scales(decoded, weights)) * np.array(weights) / sum(weights)
    found = mean_of_shard(payloads, weights, codec, n, mean=MEANS["clipped"])
    assert near(found, scaled @ decoded.astype(np.float64), decoded)


@CHECKED
@given(WEIGHTS, st.sampled_from((255, 600)), st.integers(0, 99))
def test_clipped_has_the_bits_of_the_mean_where_nobody_is_clipped(weights, n, seed):
    payloads, _ = encoded(contributions(seed, len(weights), n), INT8_BLOCK)
    lenient = make_mean("clipped", {"norm_max": 1000.0})
    plain = mean_of_shard(payloads, weights, INT8_BLOCK, n)
    assert torch.equal(mean_of_shard(payloads, weights, INT8_BLOCK, n, mean=lenient), plain)


def naive_middle(values: list[tuple[float, int]], total: int) -> float:
    ordered = sorted(values, key=lambda one: (one[0], math.copysign(1, one[0])))  # equal ones as they came
    before = [sum(w for _, w in ordered[:i]) for i in range(len(ordered))]
    cut = TRIM * total
    counted = [
        (v, w) for (v, w), b in zip(ordered, before, strict=True) if b >= cut and total - b - w >= cut
    ] or [next((v, w) for (v, w), b in zip(ordered, before, strict=True) if 2 * (b + w) >= total)]
    return math.fsum(v * w for v, w in counted) / sum(w for _, w in counted)


@CHECKED
@given(CODECS, st.one_of(WEIGHTS, st.integers(3, 9).map(lambda n: [3] * n)), LENGTHS, st.integers(0, 99))
def test_trimmed_is_the_mean_of_each_elements_middle(codec, weights, n, seed):
    payloads, decoded = encoded(contributions(seed, len(weights), n), codec)
    columns = [[(float(v), w) for v, w in zip(column, weights) if w] for column in decoded.T]  # noqa: B905
    expected = np.array([naive_middle(column, sum(weights)) for column in columns])
    assert near(mean_of_shard(payloads, weights, codec, n, mean=MEANS["trimmed"]), expected, decoded)


@CHECKED
@given(CODECS, WEIGHTS, LENGTHS, st.integers(0, 99))
def test_sign_elected_is_the_mean_of_those_that_have_the_sums_sign(codec, weights, n, seed):
    payloads, decoded = encoded(contributions(seed, len(weights), n), codec)
    share = np.array(weights)[:, None] / sum(weights)
    x = decoded.astype(np.float64) * share * np.array(naive_scales(decoded, weights))[:, None]
    agrees = (np.sign(x) == np.sign(x.sum(axis=0))) & (x != 0)
    clear = np.abs(x.sum(axis=0)) > 1e-4 * np.abs(x).max(axis=0)  # else one rounding elects
    expected = (x * agrees).sum(axis=0) / np.maximum((share * agrees).sum(axis=0), 1e-12)
    found = mean_of_shard(payloads, weights, codec, n, mean=MEANS["sign-elected"])
    assert near(found[torch.from_numpy(clear)], expected[clear], decoded[:, clear])


@CHECKED
@given(CODECS, WEIGHTS, st.integers(0, 99), st.sets(st.integers(0, 6), max_size=3))
def test_aligned_is_clipped_among_those_that_pull_with_the_others(codec, weights, seed, flipped):
    n, weights = 600, [max(1, w) for w in weights]
    vectors = [-x if i in flipped else x for i, x in enumerate(contributions(seed, len(weights), n))]
    payloads, decoded = encoded(vectors, codec)
    x = decoded.astype(np.float64) * np.array(naive_scales(decoded, weights))[:, None]
    share = np.array(weights)[:, None] / sum(weights)
    dots = [float(row @ ((share * x).sum(axis=0) - row)) for row in share * x]
    kept = [i for i, dot in enumerate(dots) if dot >= 0] or list(range(len(weights)))
    if min(abs(dot) for dot in dots) > 1e-4 * max(
        float(row @ row) for row in share * x
    ):  # else one rounding decides
        expected = sum(weights[i] * x[i] for i in kept) / sum(weights[i] for i in kept)
        assert near(mean_of_shard(payloads, weights, codec, n, mean=MEANS["aligned"]), expected, decoded)


@pytest.mark.parametrize("count", range(1, 11))
def test_the_network_sorts_every_sequence_of_zeros_and_ones(count: int) -> None:
    # Knuth's 0-1 principle: then it sorts whatever comes.
    for values in itertools.product((0, 1), repeat=count):
        row = list(values)
        for low, high in network(count):
            row[low], row[high] = min(row[low], row[high]), max(row[low], row[high])
        assert row == sorted(row)


@given(st.lists(st.tuples(st.floats(0, 1e300), st.integers(1, 9)), min_size=1, max_size=9))
def test_the_lower_median_is_that_of_each_value_as_often_as_it_weighs(pairs) -> None:
    values, weights = [list(column) for column in zip(*pairs, strict=True)]
    spread = sorted(v for v, w in pairs for _ in range(w))
    assert lower_median(values, weights) == spread[(len(spread) - 1) // 2]


# --- what no member can do ----------------------------------------------------------------------------

LIES = {
    "1e30": lambda x: torch.full_like(x, 1e30),
    "1e37": lambda x: torch.full_like(x, -1e37),
    "the largest f32": lambda x: torch.full_like(x, F32_MAX),
    "100 times": lambda x: 100 * x,
    "-10 times": lambda x: -10 * x,
    "nothing": torch.zeros_like,
    "the smallest f32": lambda x: torch.full_like(x, 1e-45),
    "one element": lambda x: torch.nn.functional.pad(torch.tensor([1e30]), (0, x.numel() - 1)),
}


@pytest.mark.parametrize("codec", (INT8_BLOCK, BNB_DYNAMIC8), ids=lambda codec: codec.name)
@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize(("liars", "members"), [(1, 3), (1, 4), (2, 7), (3, 10)])
def test_a_few_liars_make_no_result_longer_than_honest_ones(codec, name, lie, liars, members):
    """Of 1e30 or 1e37 one contribution ended a run's learning for good."""
    n = 600
    honest = contributions(members, members - liars, n)
    lies = [LIES[lie](x) for x in contributions(99, liars, n)]
    payloads, decoded = encoded([*lies, *honest], codec)
    result = mean_of_shard(payloads, [1] * members, codec, n, mean=MEANS[name]).numpy().astype(np.float64)
    longest = NORM_MAX * max(norms_of(decoded[liars:]))
    # Where a liar elects a sign, sign-elected has its element as it is, and the others' of other places.
    assert np.linalg.norm(result) <= longest * (2 if name == "sign-elected" else 1.001)
    if name == "trimmed":
        ends = decoded[liars:].min(axis=0), decoded[liars:].max(axis=0)
        room = 1e-5 * np.abs(decoded[liars:]).max()
        assert (result >= ends[0] - room).all() and (result <= ends[1] + room).all()


@CHECKED
@given(st.integers(3, 9), st.integers(0, 99), st.floats(0, 1e30), st.floats(0.01, 10))
def test_one_member_moves_clipped_by_no_more_than_its_share_of_the_clipped_norm(members, seed, size, c):
    n, mean = 300, make_mean("clipped", {"norm_max": c})
    honest = contributions(seed, members - 1, n)
    liar = torch.full((n,), size, dtype=torch.float32)
    payloads, decoded = encoded([*honest, liar], INT8_BLOCK)
    shares = np.array(clip_scales(norms_of(decoded), [1] * members, c)) / members
    without = shares[:-1] @ decoded[:-1].astype(np.float64)
    found = mean_of_shard(payloads, [1] * members, INT8_BLOCK, n, mean=mean).numpy().astype(np.float64)
    allowed = c * lower_median(norms_of(decoded), [1] * members) / members
    moved = float(np.linalg.norm(found - without))
    assert moved <= allowed * 1.001 + 1e-3 * float(np.linalg.norm(without))


def test_aligned_leaves_out_those_that_flip_their_signs() -> None:
    n = 5000
    honest = contributions(1, 5, n)
    flipped = [-x for x in contributions(1, 7, n)[5:]]
    payloads, _ = encoded([*honest, *flipped], INT8_BLOCK)
    found = mean_of_shard(payloads, [1] * 7, INT8_BLOCK, n, mean=MEANS["aligned"])
    without = mean_of_shard(payloads[:5], [1] * 5, INT8_BLOCK, n, mean=MEANS["clipped"])
    assert torch.equal(found, without)


# --- what holds for all -------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("weights", [[4], [1, 3], [0, 2, 0, 5], [0, 0, 1]])
def test_one_or_two_contributions_give_the_bits_of_the_mean(name: str, weights: list[int]) -> None:
    payloads, _ = encoded(contributions(2, len(weights), 300), INT8_BLOCK)
    payloads[-1] = INT8_BLOCK.encode(torch.full((300,), 1e20))
    plain = mean_of_shard(payloads, weights, INT8_BLOCK, 300)
    assert torch.equal(mean_of_shard(payloads, weights, INT8_BLOCK, 300, mean=MEANS[name]), plain)


@EACH
def test_a_member_of_weight_zero_is_not_there(name: str) -> None:
    payloads, _ = encoded(contributions(3, 5, 300), INT8_BLOCK)
    huge = INT8_BLOCK.encode(torch.full((300,), 1e30))
    among = mean_of_shard([huge, *payloads], [0, 5, 1, 2, 3, 4], INT8_BLOCK, 300, mean=MEANS[name])
    alone = mean_of_shard(payloads, [5, 1, 2, 3, 4], INT8_BLOCK, 300, mean=MEANS[name])
    assert torch.equal(among, alone)


@EACH
@pytest.mark.parametrize("codec", (INT8_BLOCK, BNB_DYNAMIC8), ids=lambda codec: codec.name)
@pytest.mark.parametrize("weights", [[2] * 5, [3, 1, 2, 9, 4]])
def test_pieces_and_threads_change_no_bit(name: str, codec: Codec, weights: list[int]) -> None:
    n = PIECE + 700
    payloads, _ = encoded(contributions(4, 5, n), codec)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(reduce_shard(payloads, weights, codec, n, mean=MEANS[name]))
    finally:
        torch.set_num_threads(threads)
    whole = mean_of_shard(payloads, weights, codec, n, mean=MEANS[name])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], codec.encode(whole))


@EACH
def test_nobody_sends_anything_and_nothing_moves(name: str) -> None:
    payloads = [INT8_BLOCK.encode(torch.zeros(300))] * 5
    assert torch.equal(mean_of_shard(payloads, [1] * 5, INT8_BLOCK, 300, mean=MEANS[name]), torch.zeros(300))
    assert mean_of_shard(
        [INT8_BLOCK.encode(torch.zeros(0))] * 3, [1] * 3, INT8_BLOCK, 0, mean=MEANS[name]
    ).shape == (0,)


@EACH
def test_weights_larger_than_f64_can_count_are_those_of_their_ratios(name: str) -> None:
    payloads, _ = encoded(contributions(5, 4, 300), INT8_BLOCK)
    small = mean_of_shard(payloads, [1, 2, 4, 8], INT8_BLOCK, 300, mean=MEANS[name])
    large = [w * 10**60 for w in (1, 2, 4, 8)]
    found = mean_of_shard(payloads, large, INT8_BLOCK, 300, mean=MEANS[name])
    assert torch.allclose(found, small, rtol=1e-6, atol=0.0)


@EACH
def test_what_no_mean_takes_is_refused_before_anything_is_added(name: str) -> None:
    payloads, _ = encoded(contributions(6, 3, 300), INT8_BLOCK)
    out = torch.full((300,), 5.0)
    for weights in ([1, -1, 3], [0, 0, 0], [1, 1]):
        with pytest.raises(RefusedWeights):
            mean_of_shard(payloads, weights, INT8_BLOCK, 300, out, MEANS[name])
    for spoilt in (np.nan, np.inf):
        payloads[1] = payloads[1].clone()
        payloads[1][300:304] = torch.from_numpy(np.array([spoilt], "<f4").view(np.uint8))
        with pytest.raises(RefusedPayload, match="payload 1"):
            mean_of_shard(payloads, [1, 1, 1], INT8_BLOCK, 300, out, MEANS[name])
    assert (out == 5).all()


@pytest.mark.parametrize("codec", (INT8_BLOCK, BNB_DYNAMIC8), ids=lambda codec: codec.name)
@pytest.mark.parametrize("magnitude", [1e-35, 1.0, 1e30, 1e37])
def test_a_pieces_square_is_that_of_what_it_decodes_to(codec: Codec, magnitude: float) -> None:
    n = PIECE + 3000
    x = contributions(7, 1, n, magnitude)[0]
    x[:256] *= 1e-3
    payload = codec.encode(x)
    opened, decoded = codec.open(payload, n), codec.decode(payload, n).double()
    for index, (start, stop) in enumerate(codec.pieces(n)):
        exact = float((decoded[start:stop] ** 2).sum())
        assert opened.square_of_piece(index) == pytest.approx(exact, rel=2.0**-16, abs=0.0)
