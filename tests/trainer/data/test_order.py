"""The order of windows: a permutation each pass, whatever the sizes; sources mixed by their weights."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapestry.node.trainer.data.order import Course, Permutation, WindowOrder, shares_of


def _order(counts: list[int], weights: list[float] | None = None) -> WindowOrder:
    weights = weights or [1.0] * len(counts)
    shares = shares_of(counts, weights, [False] * len(counts), 0.0)
    return WindowOrder(
        tuple(Course.of(b"key %d" % index, count) for index, count in enumerate(counts)), shares
    )


@settings(deadline=None)
@given(st.integers(1, 3000), st.binary(max_size=8))
def test_every_number_comes_once(count: int, key: bytes) -> None:
    permuted = Permutation(count, key)(np.arange(count))
    assert sorted(permuted.tolist()) == list(range(count))


def test_large_domains_stay_inside_and_look_like_chance() -> None:
    count = 10**12 + 39
    permuted = Permutation(count, b"key")(np.arange(100_000, dtype=np.int64))
    assert len(set(permuted.tolist())) == len(permuted)
    assert permuted.min() >= 0 and permuted.max() < count
    in_tenths = np.bincount(permuted * 10 // count, minlength=10)
    assert abs(in_tenths - 10_000).max() < 500  # 5 standard deviations
    assert abs(np.corrcoef(permuted[:-1], permuted[1:])[0, 1]) < 0.02


def test_the_order_does_not_change_between_versions() -> None:
    """Members restart with newer software; an epoch that begins again must draw the same windows."""
    drawn, _ = _order([1000, 10]).draw(_order([1000, 10]).start(), 8)
    assert list(drawn) == PINNED


def test_another_key_and_another_pass_give_another_order() -> None:
    numbers = np.arange(1000)
    orders = [Permutation(1000, key)(numbers).tolist() for key in (b"a", b"b", b"a/0", b"a/1")]
    assert len({tuple(order) for order in orders}) == 4


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 2), st.data())
def test_no_window_comes_twice_before_all_came_once_in_whatever_steps_they_are_drawn(
    counts: list[int], passes: int, data: st.DataObject
) -> None:
    order = _order(counts)
    every = Counter((source, window) for source, count in enumerate(counts) for window in range(count))
    position = order.start()
    for _ in range(passes):
        seen: Counter[tuple[int, int]] = Counter()
        while (left := sum(counts) - seen.total()) > 0:
            drawn, after = order.draw(position, data.draw(st.integers(1, left)))
            assert order.advance(position, len(drawn)) == after
            seen.update(drawn)
            position = after
        assert seen == every
    assert order.passes(position) == passes


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4), st.lists(st.floats(0.1, 9), min_size=4, max_size=4)
)
def test_with_weights_each_source_is_still_seen_whole_before_any_of_it_twice(
    counts: list[int], weights: list[float]
) -> None:
    order = _order(counts, weights[: len(counts)])
    drawn, _ = order.draw(order.start(), 4 * sum(counts))
    for source, count in enumerate(counts):
        of_source = [window for one, window in drawn if one == source]
        for start in range(0, len(of_source) - count + 1, count):
            assert len(set(of_source[start : start + count])) == count


def test_weights_say_how_often_and_rehearsal_how_large_a_share() -> None:
    counts = [100, 100, 1000]
    assert shares_of(counts, [1.0, 1.0, 1.0], [False] * 3, 0.0) == tuple(counts)
    order = WindowOrder(_order(counts).courses, shares_of(counts, [1.0, 2.0, 1.0], [False, False, True], 0.1))
    drawn, _ = order.draw(order.start(), 1000)
    assert Counter(source for source, _ in drawn) == {0: 300, 1: 600, 2: 100}


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.lists(st.tuples(st.integers(0, 90), st.integers(0, 40)), max_size=6))
def test_in_a_pass_each_window_comes_once_however_often_the_source_grows(
    count: int, growths: list[tuple[int | None, int]]
) -> None:
    course, seen = Course.of(b"key", count), 0
    passes: dict[int, list[int]] = {}
    for drawn, more in [*growths, (None, 0)]:
        if drawn is None:
            drawn = -(seen - course.start) % course.count  # to the end of a pass
        numbers = np.arange(seen, seen + drawn)
        for number, window in zip(numbers.tolist(), course.windows(numbers).tolist(), strict=True):
            passes.setdefault(course.number + (number - course.start) // course.count, []).append(window)
        seen += drawn
        course = course.grown(seen, course.count + more)
    assert list(passes) == list(range(len(passes)))
    assert all(len(set(windows)) == len(windows) for windows in passes.values())
    assert all(sorted(windows) == list(range(len(windows))) for windows in passes.values())


def test_a_source_that_grew_gives_in_the_pass_just_what_had_not_come() -> None:
    course = Course.of(b"key", 1000)
    first = course.windows(np.arange(400)).tolist()
    course = course.grown(400, 1050)
    second = course.windows(np.arange(400, 500)).tolist()
    course = course.grown(500, 1300)
    third = course.windows(np.arange(500, 1300)).tolist()
    assert sorted([*first, *second, *third]) == list(range(1300))
    assert 2 <= sum(window >= 1000 for window in second) <= 30  # mixed in: 100 * 50 / 650 are to be expected
    assert course.windows(np.arange(500, 1300)[300:310]).tolist() == third[300:310]


def test_an_order_that_begins_anew_is_another_one() -> None:
    course = Course.of(b"key", 100)
    orders = [course.windows(np.arange(20)).tolist()]
    for seen in (20, 40):
        course = course.anew(seen, 100)
        orders.append(course.windows(np.arange(seen, seen + 20)).tolist())
    assert len({tuple(order) for order in orders}) == 3


def test_nothing_cannot_be_permuted() -> None:
    with pytest.raises(ValueError, match="nothing to permute"):
        Permutation(0, b"")


PINNED: list[tuple[int, int]] = [
    (0, 819),
    (0, 457),
    (0, 767),
    (0, 250),
    (0, 207),
    (0, 436),
    (0, 835),
    (0, 959),
]
