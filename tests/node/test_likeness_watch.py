"""A member whose contributions are unlike all others' is named after five records, and nobody else is."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from tapestry.node.daemon.likeness_watch import CURE, LASTING, LikenessWatch
from tapestry.node.surface.history import TEXT_CHARS_MAX

Vector = list[float]
SIZE = 2000


def _cosines(vectors: dict[str, Vector]) -> dict[str, float]:
    """Of each to the mean of all others, by the definition."""
    total = [sum(column) for column in zip(*vectors.values(), strict=True)]

    def cosine(a: Vector, b: Vector) -> float:
        return _dot(a, b) / math.sqrt(_dot(a, a) * _dot(b, b))

    return {
        peer: cosine(v, [whole - own for whole, own in zip(total, v, strict=True)])
        for peer, v in vectors.items()
    }


def _dot(a: Vector, b: Vector) -> float:
    return math.fsum(p * q for p, q in zip(a, b, strict=True))


def _rounds(
    rng: random.Random, honest: int, liar: Callable[[Vector, random.Random], Vector] | None
) -> list[str]:
    """Who is named, in ten records of members that agree by half, and perhaps one other."""
    watch, named = LikenessWatch(), []
    for _ in range(2 * LASTING):
        common = [rng.gauss(0, 1) for _ in range(SIZE)]
        vectors = {f"h{i}": [c + rng.gauss(0, 1) for c in common] for i in range(honest)}
        if liar is not None:
            vectors["liar"] = liar(common, rng)
        named += watch.seen(_cosines(vectors), lambda _: True)[0]
    return named


@pytest.mark.parametrize("honest", [2, 3, 9])
def test_who_trains_on_random_letters_or_flips_its_signs_is_named_once(honest: int) -> None:
    rng = random.Random(honest)
    assert _rounds(rng, honest, lambda _, rng: [rng.gauss(0, 1.5) for _ in range(SIZE)]) == ["liar"]
    assert _rounds(rng, honest, lambda common, rng: [-c - rng.gauss(0, 1) for c in common]) == ["liar"]
    assert _rounds(rng, honest, None) == []


@pytest.mark.parametrize("count", [3, 4, 7])
def test_members_that_each_go_their_own_way_are_not_named(count: int) -> None:
    rng, watch = random.Random(count), LikenessWatch()
    for _ in range(2 * LASTING):
        vectors = {str(i): [rng.gauss(0, 1) for _ in range(SIZE)] for i in range(count)}
        assert watch.seen(_cosines(vectors), lambda _: True) == ([], [])


def test_it_takes_records_in_a_row_and_is_over_with_the_first_that_is_like_the_others() -> None:
    watch = LikenessWatch()
    unlike, alike = {"a": 0.9, "b": 0.9, "c": 0.1}, {"a": 0.9, "b": 0.9, "c": 0.8}
    absent, of_two = {"a": 0.9, "b": 0.9, "d": 0.9}, {"a": 0.9, "c": 0.1}
    for cosines in [unlike] * (LASTING - 1) + [alike] + [unlike] * (LASTING - 1) + [absent, of_two]:
        assert watch.seen(cosines, lambda _: True) == ([], [])
    assert watch.seen(unlike, lambda _: True) == (["c"], [])
    assert watch.seen(unlike, lambda _: True) == ([], []) and watch.unlike["c"].others == 0.9
    assert watch.seen(alike, lambda _: True) == ([], ["c"]) and not watch.unlike


def test_who_has_left_is_told_of_no_more_and_is_not_said_to_be_like_the_others() -> None:
    for after in ({"a": 0.9, "b": 0.9, "d": 0.9}, {"a": 0.9, "b": 0.9}):
        watch = LikenessWatch()
        for _ in range(LASTING):
            watch.seen({"a": 0.9, "b": 0.9, "c": -0.1}, lambda _: True)
        assert watch.unlike
        assert watch.seen(after, lambda peer: peer != "c") == ([], []) and not watch.unlike


def test_the_event_has_room_for_the_cure() -> None:
    assert len(
        "… 12345678's contributions are unlike all others: cosine -0.12 to the mean, others 0.95: " + CURE
    ) <= (TEXT_CHARS_MAX)
