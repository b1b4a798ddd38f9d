"""Places of streams at the door: strangers take nothing of the members', and the greedy make room."""

from __future__ import annotations

import pytest

from tapestry.dht.places import MEMBER_STREAMS_MIN, NoPlace, StreamPlaces


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


def hoarders(members: int, streams_max: int = 128, strangers: bool = True) -> StreamPlaces[str]:
    """Members that hold all places they can get, beside strangers that hold their half."""
    places: StreamPlaces[str] = StreamPlaces(streams_max, 64)
    for key in range(streams_max // 2 if strangers else 0):
        places.enter(f"stranger{key}", f"s{key}", False)
    for number in range(streams_max // 2 if strangers else streams_max):
        assert (
            places.enter(f"hoarder{number % members}", f"{number % members}/{number // members}", True)
            is None
        )
    return places


@pytest.mark.parametrize("strangers", [True, False])
def test_members_that_hold_all_streams_make_room_for_one_that_has_less(strangers: bool):
    """Eight of 64 streams beside strangers, or sixteen alone, closed a node to every other member."""
    places = hoarders(4, strangers=strangers)
    most = 16 if strangers else 32
    gone = [places.enter("honest", str(number), True) for number in range(MEMBER_STREAMS_MIN)]
    assert gone[:5] == [f"{n % 4}/{most - 1 - n // 4}" for n in range(5)], (
        "the newest: the oldest are a link's"
    )
    with pytest.raises(NoPlace) as caught:
        places.enter("hoarder0", "one more", True)
    assert not caught.value.own


def test_no_member_gives_of_the_few_streams_that_a_link_needs():
    places = hoarders(8, streams_max=2 * 8 * MEMBER_STREAMS_MIN)
    with pytest.raises(NoPlace) as caught:
        places.enter("one more", "x", True)
    assert not caught.value.own
    places.leave("hoarder0", "0/0")
    assert places.enter("one more", "x", True) is None, "of members as of strangers, who leaves makes room"


def test_two_members_that_want_the_same_place_do_not_take_it_from_each_other_in_turn():
    places = hoarders(2, streams_max=64, strangers=False)
    for number in range(40):
        try:
            places.enter("third", str(number), True)
        except NoPlace:
            break
    assert number == 21, "each has a third"
    for peer in ("hoarder0", "hoarder1", "third"):
        with pytest.raises(NoPlace):
            places.enter(peer, "one more", True)


def test_members_that_hold_all_streams_leave_strangers_their_half():
    """Sixteen members kept every joiner out."""
    places = hoarders(16, streams_max=256, strangers=False)
    assert [places.enter(f"joiner{number}", "x", False) for number in range(3)] == ["0/15", "1/15", "2/15"]
