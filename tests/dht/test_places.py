"""Places of streams at the door: strangers take nothing of the members', and the greedy make room."""

from __future__ import annotations

import pytest

from tapestry.dht.places import NoPlace, StreamPlaces


def full(keys: int, of_each: int, streams_max: int = 64) -> StreamPlaces[str]:
    """Strangers hold so many silent streams each."""
    places: StreamPlaces[str] = StreamPlaces(streams_max, 16)
    for key in range(keys):
        for number in range(of_each):
            places.enter(f"stranger{key}", f"{key}/{number}", False)
    return places


def test_strangers_take_none_of_the_half_that_is_for_members():
    """16 keys of 64 silent streams closed a node to everybody, members too."""
    places = full(keys=2, of_each=16)
    for number in range(32):
        assert places.enter(f"member{number % 4}", f"m{number}", True) is None
    assert places.enter("one more", "x", False) == "0/0"


def test_who_has_less_than_another_takes_the_place_of_that_ones_oldest_stream():
    places = full(keys=2, of_each=16)
    assert [places.enter("joiner", str(number), False) for number in range(3)] == ["0/0", "1/0", "0/1"]
    with pytest.raises(NoPlace) as caught:
        full(keys=16, of_each=2).enter("stranger3", "3/2", False)
    assert not caught.value.own, "who has as many as anybody, and enough for a link, displaces nobody"
    places = full(keys=32, of_each=1)
    assert [places.enter("new", str(number), False) for number in range(2)] == ["0/0", "1/0"], "it has a link"
    with pytest.raises(NoPlace):
        places.enter("new", "a third", False)


def test_one_peer_has_so_many_whoever_it_is_and_a_place_is_free_when_its_stream_ends():
    places: StreamPlaces[str] = StreamPlaces(64, 2)
    for is_member in (False, True):  # it was admitted meanwhile
        places.enter("peer", f"{is_member}", is_member)
    with pytest.raises(NoPlace) as caught:
        places.enter("peer", "third", True)
    assert caught.value.own
    places.leave("peer", "False")
    places.leave("peer", "False")  # one that had to go ends later
    assert places.enter("peer", "third", True) is None


def test_a_stream_that_had_to_go_leaves_no_place_when_it_ends():
    places = full(keys=2, of_each=16)
    gone = places.enter("joiner", "x", False)
    assert gone == "0/0"
    places.leave("stranger0", gone)
    assert places.enter("another", "y", False) is not None, "there is still no room"
