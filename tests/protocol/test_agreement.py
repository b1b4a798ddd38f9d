"""The figures of a round: made of what reducers send, the same for everybody, bounded whatever comes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapestry.node.protocol.agreement import (
    COUNT_MAX,
    PPM,
    SUM_MAX,
    Agreement,
    ShardSums,
    agreement,
    agreement_from,
    agreement_to_list,
    lengthening,
    sums_from,
    sums_to_list,
)
from tapestry.node.protocol.strict import Malformed

POSITIVE = st.floats(0.0, SUM_MAX)
ANY = st.floats(-SUM_MAX, SUM_MAX)


@st.composite
def shards(draw):
    """Of one round, whatever numbers may come: (sums of each shard, weights)."""
    members = draw(st.integers(1, 4))

    def each(values):
        return tuple(draw(st.lists(values, min_size=members, max_size=members)))

    counts = st.integers(0, COUNT_MAX)
    sums = [
        ShardSums(
            each(POSITIVE),
            draw(POSITIVE),
            each(POSITIVE),
            each(ANY),
            draw(POSITIVE),
            draw(counts),
            draw(counts),
        )
        for _ in range(draw(st.integers(1, 4)))
    ]
    return sums, list(each(st.integers(1, 2**53)))


def of_vectors(vectors: list[list[float]], mean: list[float]) -> ShardSums:
    squares = tuple(sum(x * x for x in vector) for vector in vectors)
    products = [[x * m for x, m in zip(vector, mean, strict=True)] for vector in vectors]
    square = sum(m * m for m in mean)
    same = sum(p > 0 for row in products for p in row)
    other = sum(p < 0 for row in products for p in row)
    return ShardSums(squares, square, squares, tuple(map(sum, products)), square, same, other)


def test_three_of_a_kind_agree_wholly_and_opposites_in_nothing():
    alike = of_vectors([[3.0, -4.0]] * 3, [3.0, -4.0])
    assert agreement([alike], [1, 1, 1]) == Agreement(PPM, PPM, PPM)
    opposed = of_vectors([[3.0, -4.0], [-3.0, 4.0]], [0.0, 0.0])
    assert agreement([opposed], [1, 1]) == Agreement(0, 0, 0)


def test_unrelated_members_keep_one_over_the_root_of_their_number():
    apart = of_vectors([[2.0, 0.0], [0.0, 2.0]], [1.0, 1.0])
    root = round(PPM / math.sqrt(2))
    assert agreement([apart], [7, 7]) == Agreement(root, PPM, root)


def test_the_norm_kept_is_of_the_weighted_mean():
    """By weights 3 and 1 the mean is (3, 1), and both members are 4 long."""
    apart = of_vectors([[4.0, 0.0], [0.0, 4.0]], [3.0, 1.0])
    assert agreement([apart], [3, 1]).norm_kept_ppm == round(PPM * math.sqrt(10) / 4)


@pytest.mark.parametrize(
    ("lengths", "weights", "middle"),
    [
        ([1.0, 2.0, 1e30], [1, 1, 1], 2.0),
        ([1e30, 2.0, 1.0, 3.0], [1, 1, 1, 1], 2.5),
        ([1.0, 4.0, 5.0], [5, 1, 1], 1.0),
        ([1.0, 3.0], [4, 4], 2.0),
        ([7.0], [3], 7.0),
    ],
)
def test_one_that_is_endlessly_long_does_not_say_how_long_members_are(lengths, weights, middle):
    sums = of_vectors([[length] for length in lengths], [0.5])
    assert agreement([sums], weights).norm_kept_ppm == round(PPM * 0.5 / middle)


@given(shards(), st.randoms())
def test_figures_of_any_sums_are_in_range_and_do_not_depend_on_the_order_of_shards(drawn, random):
    sums, weights = drawn
    figures = agreement(sums, weights)
    random.shuffle(sums)
    assert agreement(sums, weights) == figures
    assert agreement_from(agreement_to_list(figures), "agreement") == figures
    assert 1 / math.sqrt(len(weights)) <= lengthening(figures, len(weights)) <= 1.0


@given(shards())
def test_sums_survive_the_wire(drawn):
    for sums in drawn[0]:
        assert sums_from(sums_to_list(sums), 4, "sums") == sums


@pytest.mark.parametrize(
    "wrong",
    [(PPM + 1, 0, 0), (0, -1, 0), (0, 0, PPM + 1), (0, 0), (0.5, 0, 0), (True, 0, 0), None],
)
def test_figures_out_of_range_are_refused(wrong):
    with pytest.raises(Malformed):
        agreement_from(wrong, "agreement")


@pytest.mark.parametrize("place", range(7))
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1, 2.0 * SUM_MAX, True, "x", (), (1.0,) * 9])
def test_sums_that_are_none_are_refused(place, wrong):
    raw = sums_to_list(of_vectors([[1.0]], [1.0]))
    for value in (wrong, (wrong,)):
        bad = [*raw[:place], value, *raw[place + 1 :]]
        with pytest.raises(Malformed):
            sums_from(bad, 8, "sums")
