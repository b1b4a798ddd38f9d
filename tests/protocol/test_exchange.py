"""Who averages what, and who is to blame."""

from hypothesis import given
from hypothesis import strategies as st

from tapestry.node.protocol.blame import culprit
from tapestry.node.protocol.chain import Member
from tapestry.node.protocol.exchange import assign_reducers, check_roster
from tapestry.node.protocol.messages import Roster

TOKEN = "ab" * 32


def members_of(count: int) -> tuple[Member, ...]:
    return tuple(Member(f"p{i:02}", 1, TOKEN) for i in range(count))


def roster_of(members, reducers, forced=False) -> Roster:
    return Roster(3, "ab" * 32, 1, forced, "cd" * 32, tuple(members), tuple(reducers))


# --- reducers ---------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 64), st.data())
def test_shares_are_within_one(count, shard_count, data):
    members = members_of(count)
    alive = data.draw(st.lists(st.sampled_from([m.peer for m in members]), unique=True))
    reducers = assign_reducers(members, shard_count, None, alive)
    able = alive or [m.peer for m in members]
    loads = [sum(members[r].peer == p for r in reducers) for p in able]
    assert len(reducers) == shard_count == sum(loads)
    assert max(loads) - min(loads) <= 1


@given(st.integers(2, 12), st.integers(1, 64), st.data())
def test_only_the_lost_reducers_shards_move(count, shard_count, data):
    members = members_of(count)
    peers = [m.peer for m in members]
    before = roster_of(members, assign_reducers(members, shard_count, None, peers))
    lost = data.draw(st.sets(st.sampled_from(peers), min_size=1, max_size=count - 1))
    alive = [p for p in peers if p not in lost]
    left = tuple(m for m in members if m.peer in alive or data.draw(st.booleans()))
    after = assign_reducers(left, shard_count, before, alive)
    loads = dict.fromkeys(alive, 0)
    for old, new in zip(before.reducers, after, strict=True):
        was, now = members[old].peer, left[new].peer
        assert now == was if was in alive else now in alive
        loads[now] += 1
    assert max(loads.values()) - min(loads.values()) <= 1


# --- rosters ----------------------------------------------------------------------------------------


def test_what_makes_a_roster_followable():
    members, electorate = members_of(3), ("p00", "p01", "p02", "p03")
    good = roster_of(members, (0, 1))
    assert check_roster(good, electorate, 2) is None
    assert check_roster(good, electorate, 3) == "2 shards, the run has 3"
    for reducers in ((0, 3), (0, -1)):
        assert check_roster(roster_of(members, reducers), electorate, 2) == "a reducer that is no member"
    for named in (members[::-1], (*members, members[2])):
        why = check_roster(roster_of(named, (0, 1)), electorate, 2)
        assert why == "members are not sorted, or named twice"
    voters = tuple(Member(m.peer, 0, "") for m in members)
    assert check_roster(roster_of(voters, (0, 1)), electorate, 2) == "nobody contributes"
    few = roster_of(members[:2], (0, 1))
    assert check_roster(few, electorate, 2) == "it names 2 of the electorate's 4"
    assert check_roster(roster_of(members[:2], (0, 1), forced=True), electorate, 2) is None
    assert check_roster(roster_of(members, (0, 1), forced=True), ("x",), 2) is not None


# --- blame ------------------------------------------------------------------------------------------


def test_nobody_waits_and_nobody_is_blamed():
    assert culprit({}) is None
    assert culprit({"a": (), "b": ()}) is None


def test_a_contributor_that_keeps_its_reducer_waiting_is_blamed_not_the_reducer():
    assert culprit({"a": ("r",), "b": ("r",), "r": ("c",), "c": ()}) == "c"
    assert culprit({"a": ("r",), "b": ("r",), "r": ("c",)}) == "c"  # c says nothing at all


def test_a_one_way_cut_leaves_out_the_contributor():
    assert culprit({"a": ("r",), "b": ("r",), "c": ("r",), "r": ("a",)}) == "a"


def test_a_reducer_that_two_cannot_reach_is_left_out_itself():
    assert culprit({"a": ("r",), "b": ("r",), "c": ("r",), "r": ("a", "b")}) == "r"


def test_who_was_spared_once_goes_next_time():
    waiting = {"b": ("r",), "c": ("r",), "r": ("b",)}
    assert culprit(waiting) == "b"
    assert culprit(waiting, {"r": None}) == "r"


def test_who_withholds_and_accuses_everybody_is_left_out():
    assert culprit({"a": ("x",), "b": ("x",), "c": ("x",), "x": ("a", "b", "c")}) == "x"


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.lists(st.sampled_from("abcdef"), unique=True).map(tuple))
)
def test_blame_ends_and_names_somebody_accused(waiting):
    accused = {p for named in waiting.values() for p in named}
    who = culprit(waiting)
    assert (who is None) == (not accused)
    assert who is None or who in accused
    assert culprit(dict(reversed(waiting.items()))) == who
