"""Who is in and who may average, given who does not hear whom."""

from itertools import combinations

import pytest

from tapestry.node.protocol.reach import REDUCED_PER_REDUCER_MAX, seat


def ready(count: int, *pairs: tuple[int, int]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Peers "a", "b", ...; of each pair the first does not hear the second. Their lots are their names."""
    names = [chr(ord("a") + i) for i in range(count)]
    return {n: [names[b] for a, b in pairs if names[a] == n] for n in names}, {n: n for n in names}


def test_where_all_hear_all_everybody_averages():
    assert seat(*ready(5)) == (list("abcde"), list("abcde"))


@pytest.mark.parametrize("pairs", [[(0, 1)], [(1, 0)], [(0, 1), (1, 0)]])
def test_of_a_pair_that_does_not_hear_each_other_both_are_in_and_neither_averages(pairs):
    assert seat(*ready(5, *pairs)) == (list("abcde"), list("cde"))


def test_in_a_star_the_middle_averages_for_all():
    assert seat(*ready(8, *combinations(range(1, 8), 2))) == (list("abcdefgh"), ["a"])


def test_a_larger_star_is_cut_down_by_lot_to_what_one_can_average():
    peers, lots = ready(12, *combinations(range(1, 12), 2))
    seated, reducers = seat(peers, lots)
    assert seated == list("abcdefghijkl")[:REDUCED_PER_REDUCER_MAX] and reducers == ["a"]
    lots["b"] = "z"
    assert "b" not in seat(peers, lots)[0]


def test_one_that_hears_hardly_anybody_of_many_is_out_rather_than_all_the_others_reducers_no_more():
    seated, reducers = seat(*ready(12, *[(0, i) for i in range(1, 11)]))
    assert seated == reducers == list("bcdefghijkl")


def test_who_is_not_ready_and_oneself_do_not_count():
    unheard, lots = ready(3)
    unheard["a"] = ["a", "nobody", "gone"]
    assert seat(unheard, lots) == (list("abc"), list("abc"))


def test_of_a_ring_in_which_each_misses_its_opposites_a_connected_part_is_in():
    seated, reducers = seat(*ready(5, (0, 2), (0, 3), (1, 3), (1, 4), (2, 4)))
    assert len(seated) == 3 and len(reducers) == 1


def test_nobody_is_seated_of_nobody():
    assert seat({}, {}) == ([], [])
