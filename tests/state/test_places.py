"""Who is served when a donor's places are all taken."""

from __future__ import annotations

import pytest

from tapestry.node.net.places import NoPlace, ServedPlaces


def full(*peers: str, members: bool = True) -> ServedPlaces[str]:
    """Each took one, in this order."""
    places: ServedPlaces[str] = ServedPlaces(len(peers))
    for number, peer in enumerate(peers):
        assert places.enter(peer, f"{peer}{number}", members) is None
    return places


def test_who_has_far_fewer_than_another_takes_the_place_of_that_ones_oldest() -> None:
    places = full(*"aaaaabbbbb")
    assert [places.enter("c", f"c{number}", True) for number in range(3)] == ["a0", "b5", "a1"]
    with pytest.raises(NoPlace):
        places.enter("c", "c3", True)  # 3, 4 and 3: to go on would be to take them from each other in turn
    with pytest.raises(NoPlace):
        places.enter("a", "a9", True)


def test_of_many_with_one_each_nobody_has_to_go() -> None:
    with pytest.raises(NoPlace):
        full(*"abcd").enter("e", "e0", True)


def test_a_member_comes_before_newcomers_however_many_there_are_and_they_displace_none() -> None:
    places = full(*"abcd", members=False)
    assert places.enter("m", "m0", True) == "a0"
    assert [places.enter("m", f"m{number}", True) for number in range(1, 4)] == ["b1", "c2", "d3"]
    with pytest.raises(NoPlace):
        places.enter("a", "a9", False)


def test_a_stream_that_had_to_go_leaves_no_place_when_it_ends() -> None:
    places = full(*"aaa")
    assert places.enter("b", "b0", True) == "a0"
    places.leave("a0")
    with pytest.raises(NoPlace):
        places.enter("c", "c0", False)
