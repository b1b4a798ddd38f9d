"""Who may contribute and who averages, given who does not hear whom."""

import time
from itertools import combinations

import pytest

from tapestry.node.protocol.reach import LOAD_MAX, at_odds, choose_reducers, seat

MANY_SHARDS = 64


def names(count: int) -> list[str]:
    return [chr(ord("a") + i) for i in range(count)]


def odds(count: int, *pairs: tuple[int, int]):
    """Of peers "a", "b", ...; of each pair the first does not hear the second."""
    n = names(count)
    return at_odds({one: [n[b] for a, b in pairs if n[a] == one] for one in n})


def seated(between, lots: dict[str, str] | None = None, shard_count: int = MANY_SHARDS):
    """With the names as lots."""
    return seat(list(between), between, lots or {p: p for p in between}, shard_count)


def test_where_all_hear_all_everybody_averages():
    assert seated(odds(5)) == (names(5), names(5))


@pytest.mark.parametrize("pairs", [[(0, 1)], [(1, 0)], [(0, 1), (1, 0)]])
def test_of_a_pair_that_does_not_hear_each_other_both_are_in_and_neither_averages(pairs):
    assert seated(odds(5, *pairs)) == (names(5), list("cde"))


def test_in_a_star_the_middle_averages_for_all():
    assert seated(odds(8, *combinations(range(1, 8), 2))) == (names(8), ["a"])


def test_a_larger_star_is_cut_down_by_lot_to_what_one_can_average():
    star = odds(12, *combinations(range(1, 12), 2))
    assert seated(star) == (names(LOAD_MAX), ["a"])
    lots = {p: p for p in star} | {"b": "z"}
    assert "b" not in seated(star, lots)[0]


def test_a_larger_star_of_few_shards_is_in_whole():
    """One reducer for each shard is all there can be: with one shard there is nothing to be gained."""
    star = odds(12, *combinations(range(1, 12), 2))
    assert seated(star, shard_count=1) == (names(12), ["a"])
    assert seated(star, shard_count=LOAD_MAX) == (names(12), ["a"])


def test_one_that_hears_hardly_anybody_of_many_is_out_rather_than_all_the_others_reducers_no_more():
    assert seated(odds(12, *[(0, i) for i in range(1, 11)])) == (list("bcdefghijkl"), list("bcdefghijkl"))


def test_who_names_all_is_out_rather_than_those_it_names():
    assert seated(odds(5, (0, 1), (0, 2), (0, 3), (0, 4))) == (list("bcde"), list("bcde"))


def test_a_pair_counts_once_whoever_tells_of_it_and_how_often():
    """Else two that do not hear each other would go before one that is at odds with as many."""
    told = {"a": ["b", "b", "b"], "b": ["a"], "c": ["d"], "d": []}
    between = at_odds(told)
    assert between == {"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"c"}}
    assert seat(list("abcd"), between, {p: p for p in "abcd"}, MANY_SHARDS) == (list("abc"), ["c"])


def test_who_is_not_in_and_oneself_do_not_count():
    between = at_odds({"a": ["a", "nobody", "gone"], "b": [], "c": ["d"], "d": []})
    assert seat(list("abc"), between, {p: p for p in "abcd"}, MANY_SHARDS) == (list("abc"), list("abc"))


def test_of_a_ring_in_which_each_misses_its_opposites_a_connected_part_is_in():
    in_it, able = seated(odds(5, (0, 2), (0, 3), (1, 3), (1, 4), (2, 4)))
    assert len(in_it) == 3 and len(able) == 1


def test_nobody_is_seated_of_nobody():
    assert seat([], {}, {}, MANY_SHARDS) == ([], [])


def test_a_thousand_that_name_each_other_hold_no_leader_up():
    peers = [f"p{i:04}" for i in range(1000)]
    began_at = time.process_time()
    between = at_odds(dict.fromkeys(peers, peers))
    in_it, able = seat(peers, between, {p: p for p in peers}, MANY_SHARDS)
    assert in_it == able and len(in_it) == 1
    assert time.process_time() - began_at < 3.0


def choose(between, able, contributors=4, electors="", quorum=0, shard_count=MANY_SHARDS):
    return choose_reducers(list(able), contributors, set(electors), quorum, between, shard_count)


def test_electors_average_rather_than_newcomers_whom_nobody_can_name():
    assert choose(odds(4), "abcd", electors="ab", quorum=2) == list("ab")


def test_newcomers_average_where_the_electors_would_have_too_much_to_do():
    assert choose(odds(12), names(12), contributors=12, electors="a", quorum=1) == names(12)
    assert choose(odds(12), names(12), contributors=12, electors="a", quorum=1, shard_count=1) == ["a"]


def test_where_the_only_elector_cannot_average_the_others_do():
    assert choose(odds(3, (0, 1)), "c", contributors=3, electors="a", quorum=1) == ["c"]


def test_who_averages_is_heard_by_a_quorum_of_those_that_vote():
    """d and e contribute nothing: b, whom they do not hear, averages only if the others are a quorum."""
    between = odds(5, (1, 3), (1, 4))
    assert choose(between, "abc", electors="abcde", quorum=3) == list("abc")
    assert choose(between, "abc", electors="abcde", quorum=4) == list("ac")


def test_where_nobody_is_heard_by_a_quorum_all_that_can_try():
    assert choose(odds(3, (0, 1), (0, 2)), "a", electors="abc", quorum=2) == ["a"]
