"""Who averages what, what of it is kept, and who is to blame."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from simulation.shell import SimCrypto, sums_of
from simulation.world import Faults, World

from tapestry.node.protocol.blame import culprit, debts, silent
from tapestry.node.protocol.exchange import Exchange, assign_reducers, check_roster
from tapestry.node.protocol.messages import Result, Roster, Shard
from tapestry.node.protocol.record import Member
from tapestry.node.protocol.rules import Rules

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


def mute(waiting_on, reducers: str, me: str = "", owing_me=()) -> list[str]:
    return silent(debts(waiting_on, reducers, owing_me), reducers, me)


def test_contributors_that_most_reducers_wait_for_are_left_out_together():
    waiting = {"r": ("x", "y", "z"), "s": ("x", "y", "z"), "t": ("x",), "x": tuple("rst"), "y": tuple("rst")}
    assert mute(waiting, "rst") == ["x", "y", "z"]
    assert mute({**waiting, "s": ("x",)}, "rst") == ["x"]


def test_one_reducer_alone_leaves_nobody_out_unless_it_leads():
    assert mute({"r": ("a", "b"), "a": ("r",), "b": ("r",)}, "r") == []
    assert mute({"r": ("a", "b"), "a": ("r",), "b": ("r",)}, "r", me="r") == ["a", "b"]


def test_a_reducer_that_others_wait_for_owes_them_a_mean_unless_the_leader_knows_better():
    waiting = {"r": ("s",), "t": ("s",), "s": ("c",)}
    assert mute(waiting, "rst", me="r") == []
    assert mute(waiting, "rst", me="r", owing_me=("s",)) == ["s"]


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.lists(st.sampled_from("abcdef"), unique=True).map(tuple))
)
def test_blame_ends_and_names_somebody_accused(waiting):
    accused = {p for named in waiting.values() for p in named}
    who = culprit(waiting)
    assert (who is None) == (not accused)
    assert who is None or who in accused
    assert culprit(dict(reversed(waiting.items()))) == who


# --- what is kept -----------------------------------------------------------------------------------


def exchange_of(electors: int, shard_count: int) -> Exchange:
    world = World(7, peers=1, faults=Faults(), rules=Rules("", shard_count)).start_all()
    return Exchange(world.nodes["p0"].core.ctx, 3, "ab" * 32, electors)


@given(st.data())
def test_who_has_what_we_lack_is_told_as_the_whole_table_tells_it(data):
    shard_count = data.draw(st.integers(1, 6))
    exchange = exchange_of(electors=4, shard_count=shard_count)
    peers = ("p0", "p1", "p2", "p3")
    assert not any(exchange.lacks_of(peer) for peer in peers)
    for ballot in range(1, 4):
        members = tuple(
            Member(p, weight, TOKEN if weight else "")
            for p in peers[: data.draw(st.integers(1, 4))]
            for weight in (data.draw(st.integers(0, 1)),)
        )
        reducers = [data.draw(st.integers(0, len(members) - 1)) for _ in range(shard_count)]
        exchange.start(replace(roster_of(members, reducers), ballot=ballot))
        for _ in range(data.draw(st.integers(0, 12))):
            shard, peer = data.draw(st.integers(0, shard_count - 1)), data.draw(st.sampled_from(peers))
            if data.draw(st.booleans()):
                exchange.on_shard(peer, Shard(3, TOKEN, shard, None, ()))
            else:
                said = exchange._says(shard, "cd" * 32)
                sums, signature = sums_of("cd" * 32, len(exchange._weights())), SimCrypto(peer).sign(said)
                exchange.on_result(
                    peer, Result(3, "ab" * 32, ballot, shard, "cd" * 32, None, sums, signature)
                )
            for each in peers:
                useful = each not in exchange.refused  # of another roster than ours
                assert exchange.lacks_of(each) == (useful and each in exchange._missing())


def test_pieces_of_a_large_model_cost_no_look_at_all_its_shards(monkeypatch):
    """Each bulk stream asks four times a second: 15 ms each with 26,700 shards left no time for anything."""
    shard_count = 600
    exchange = exchange_of(electors=2, shard_count=shard_count)
    members = tuple(Member(peer, 1, TOKEN) for peer in ("p0", "p1", "p2"))
    exchange.start(roster_of(members, [shard % 2 for shard in range(shard_count)]))
    looked = 0
    reducer = Exchange._reducer

    def counting(self, shard):
        nonlocal looked
        looked += 1
        return reducer(self, shard)

    monkeypatch.setattr(Exchange, "_reducer", counting)
    for shard in range(0, shard_count, 2):  # those that p0 averages
        for peer in ("p1", "p2"):
            assert exchange.lacks_of(peer)
            exchange.on_shard(peer, Shard(3, TOKEN, shard, None, ()))
    assert not exchange.lacks_of("p2") and exchange.lacks_of("p1")
    assert looked < 20 * shard_count


def test_a_mean_that_another_reducer_made_is_made_anew_when_the_roster_moves_its_shard():
    """Kept under the new one's name, its signature was nobody's: the result that was made of it could be
    given to no one, and its holder was named for it."""
    exchange = exchange_of(electors=3, shard_count=2)
    members = tuple(Member(peer, 1, TOKEN) for peer in ("p0", "p1", "p2"))
    exchange.start(roster_of(members, (1, 0)))
    signature = SimCrypto("p1").sign(exchange._says(0, "cd" * 32))
    result = Result(3, "ab" * 32, 1, 0, "cd" * 32, None, sums_of("cd" * 32, 3), signature)
    assert exchange.on_result("p1", result) is None and set(exchange.results) == {0}
    exchange.start(replace(roster_of(members, (1, 2)), ballot=2))
    assert set(exchange.results) == {0}, "by the same reducer it stands"
    exchange.start(replace(roster_of(members, (0, 2)), ballot=3))
    assert not exchange.results


def held(exchange: Exchange, peer: str) -> list[int]:
    return sorted(exchange.inputs[peer].blobs) if peer in exchange.inputs else []


def test_without_a_roster_a_few_shards_of_each_are_kept_and_of_all_no_more_than_one_contribution():
    exchange = exchange_of(electors=5, shard_count=40)
    for liar in ("p1", "p2", "p3", "p4"):
        for shard in range(40):
            assert exchange.on_shard(liar, Shard(3, TOKEN, shard, b"")) is None
    assert [len(held(exchange, p)) for p in ("p1", "p2", "p3", "p4")] == [16, 16, 8, 0]
    assert exchange.progress == 0


def test_with_a_roster_what_is_ours_is_kept_and_counted_and_what_is_not_ours_goes():
    exchange = exchange_of(electors=5, shard_count=40)
    members = members_of(4)  # p00 to p03
    exchange.on_shard("p01", Shard(3, TOKEN, 39, b""))
    exchange.on_shard("p02", Shard(3, "cd" * 16, 0, b""))
    exchange.on_shard("p03", Shard(3, TOKEN, 1, b""))
    exchange.ctx.me = "p00"
    exchange.start(roster_of(members, [0] * 8 + [1] * 32))
    assert [held(exchange, m.peer) for m in members] == [[], [], [], [1]]
    for shard in range(40):
        exchange.on_shard("p01", Shard(3, TOKEN, shard, b""))
        exchange.on_shard("p99", Shard(3, TOKEN, shard, b""))
    assert held(exchange, "p01")[:8] == list(range(8)) and exchange.progress == 8
    assert len(held(exchange, "p01")) == 8 + 16 and len(held(exchange, "p99")) == 16
    exchange.start(roster_of(members[:3], [0] * 8 + [1] * 32))
    assert held(exchange, "p01") == list(range(8)) and held(exchange, "p99") == []
    assert held(exchange, "p03") == [1]  # it was ours, and may be again
