"""Records, heads, weights and fork choice (G6)."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation.world import SimCrypto, digest

from tapestry.node.protocol import members as m
from tapestry.node.protocol.agreement import PPM, Agreement
from tapestry.node.protocol.canon import EPOCH_MAX, WEIGHT_MAX, InvalidRecord, quorum
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.place import Place, Standing, body_fault, check_record, leader_order, next_place
from tapestry.node.protocol.record import (
    BALLOT_MAX,
    VERSION,
    Behind,
    Body,
    Member,
    OtherVersion,
    Record,
    accept_message,
    body_from_dict,
    body_to_dict,
    draw_message,
    found,
    genesis_from_dict,
    genesis_to_dict,
    head_of,
    record_from_dict,
    record_to_dict,
    seat_message,
)
from tapestry.node.protocol.voice import capped_weights

CRYPTO = SimCrypto("a")
PREV = digest(b"prev")
PEERS = ("a", "b", "c", "d", "e")
HEADS = st.text("0123456789abcdef", min_size=64, max_size=64)
TOKENS = st.text("0123456789abcdef", min_size=64, max_size=64)
WEIGHTS = st.integers(1, WEIGHT_MAX)


CHANGES = st.builds(
    m.Change,
    st.sampled_from(["admit", "remove", "rekey"]),
    st.sampled_from(PEERS),
    st.text(max_size=9),
    st.integers(1, 99),
    st.text("0123456789abcdef", min_size=32, max_size=32),
    st.just((("a", "00"),)),
)


@st.composite
def bodies(draw):
    peers = sorted(draw(st.sets(st.sampled_from(PEERS), min_size=1)))
    voters = draw(
        st.lists(st.booleans(), min_size=len(peers), max_size=len(peers)).map(lambda v: [False, *v[1:]])
    )
    members = tuple(
        Member(p, 0, "") if voter else Member(p, draw(WEIGHTS), draw(TOKENS), "", draw(WEIGHTS))
        for p, voter in zip(peers, voters, strict=True)
    )
    epoch = draw(st.integers(1, EPOCH_MAX))
    shares = st.integers(0, PPM)
    agreement = Agreement(draw(st.integers(-PPM, PPM)), draw(shares), draw(shares))
    changes = tuple(draw(st.lists(CHANGES, max_size=2)))
    behind = draw(st.none() | st.builds(Behind, st.integers(0, 9), st.just((("a", "00"),))))
    heads = [draw(HEADS) for _ in range(4)]
    forced = draw(st.booleans())
    return Body(heads[0], epoch, heads[1], heads[2], members, heads[3], forced, agreement, changes, behind)


def signed(body: Body, signers, ballot: int = 0) -> Record:
    head = head_of(body, CRYPTO)
    vote, draw = (
        tuple((p, SimCrypto(p).sign(message)) for p in sorted(signers))
        for message in (accept_message(head, ballot), draw_message(head))
    )
    return Record(body, head, ballot, vote, None, draw)


def seat_of(peer: str, head: str = PREV, life: str = "") -> str:
    return SimCrypto(peer).sign(seat_message(head, life))


def body_of(members, forced=False, weight=1, prev=PREV) -> Body:
    seats = {p: "" if forced else seat_of(p, prev) for p in members}
    named = tuple(Member(p, m.UNIT * weight, "ab" * 32, "", 7, seats[p]) for p in sorted(members))
    return Body(digest(b"run"), 1, prev, digest(b"state"), named, digest(b"result"), forced)


def place(electorate, roll="abcde", prev=PREV) -> Place:
    """Where a record of `electorate` is followed by the next, all of `roll` being members."""
    members = m.first_roll(digest(b"run"), m.Charter(), list(roll))
    full = Standing(0, tuple(electorate), members, (), 0, 0)
    return Place(0, prev, tuple(electorate), members, full)


# --- text -------------------------------------------------------------------------------------------


@given(bodies(), st.integers(0, BALLOT_MAX))
def test_a_record_survives_its_text(body, ballot):
    record = signed(body, [m.peer for m in body.members], ballot)
    assert record_from_dict(record_to_dict(record), CRYPTO) == record


@given(bodies(), st.data())
def test_every_field_of_a_body_is_in_its_head(body, data):
    raw = body_to_dict(body)
    field = data.draw(st.sampled_from(sorted(raw)))
    other = body_to_dict(data.draw(bodies()))
    tampered = {**raw, field: other[field]}
    same = tampered == raw
    assert (head_of(body_from_dict(tampered), CRYPTO) == head_of(body, CRYPTO)) == same


@given(bodies(), st.data())
def test_a_body_with_a_wrong_type_or_key_is_refused(body, data):
    raw = body_to_dict(body)
    field = data.draw(st.sampled_from(sorted(raw)))
    for bad in (
        {**raw, field: data.draw(st.sampled_from([None, -1, 1.0, "x", {}, b"x"]))},
        {k: v for k, v in raw.items() if k != field},
        {**raw, "extra": 1},
    ):
        with pytest.raises(InvalidRecord):
            body_from_dict(bad)


def test_a_tampered_genesis_is_refused():
    genesis = found("spec", "a", digest(b"0"), digest(b"schema"), 10, "0" * 32, CRYPTO)
    raw = genesis_to_dict(genesis)
    assert genesis_from_dict(raw, CRYPTO) == genesis
    other = {"spec": "x", "founder": "b", "state_digest": digest(b"1"), "schema": digest(b"2"), "params": 11}
    for field, value in {**other, "nonce": "1" * 32, "signature": "00"}.items():
        with pytest.raises(InvalidRecord):
            genesis_from_dict({**raw, field: value}, CRYPTO)


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1])
def test_a_genesis_of_another_version_is_told_in_one_line(version):
    genesis = found("spec", "a", digest(b"0"), digest(b"schema"), 10, "0" * 32, CRYPTO)
    raw = {**genesis_to_dict(genesis), "version": version}
    with pytest.raises(
        OtherVersion, match=rf"^the run is of version {version} of the chain, and .* {VERSION} only$"
    ):
        genesis_from_dict(raw, CRYPTO)
    for version in (True, "3", None):
        with pytest.raises(InvalidRecord) as caught:
            genesis_from_dict({**raw, "version": version}, CRYPTO)
        assert caught.value.reason == "malformed"


# --- decisions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "signers", "forced", "reason"),
    [
        ("abc", "abc", False, None),
        ("abcd", "abc", False, None),
        ("abcde", "abe", False, "unsigned"),  # e is a member, but no elector
        ("abc", "ab", False, "unsigned"),
        ("abe", "abc", False, "electorate"),
        ("abc", "abcf", False, "unsigned"),
        ("abcf", "abc", False, "not_member"),
        ("af", "af", True, "not_member"),
        ("a", "a", True, None),
        ("ae", "ae", True, None),
        ("ae", "a", True, "unsigned"),
        ("a", "ab", True, "unsigned"),
        ("e", "e", True, "electorate"),
    ],
)
def test_what_makes_a_record_valid(members, signers, forced, reason):
    record = signed(body_of(members, forced), signers)
    if reason is None:
        check_record(record, place("abcd"), CRYPTO)
    else:
        with pytest.raises(InvalidRecord) as refused:
            check_record(record, place("abcd"), CRYPTO)
        assert refused.value.reason == reason


VOTER, OWN = Member("b", 0, "", "11"), Member("c", m.UNIT, "ab" * 32, "", 7)


@pytest.mark.parametrize(
    ("line", "seats", "is_good"),
    [
        (dataclasses.replace(VOTER, seat=seat_of("b", life="11")), "", True),
        (dataclasses.replace(VOTER, seat=seat_of("b", life="11")), "11", True),  # a voter's each time
        (VOTER, "11", False),
        (dataclasses.replace(VOTER, seat=seat_of("a", life="11")), "", False),
        (dataclasses.replace(VOTER, seat=seat_of("b", life="22")), "", False),
        (dataclasses.replace(VOTER, seat=seat_of("b", digest(b"other"), "11")), "", False),
        (dataclasses.replace(OWN, seat=seat_of("c")), None, True),
        (OWN, None, False),
        (OWN, "", True),
        (dataclasses.replace(OWN, seat=seat_of("c")), "", False),  # one text for one value
        (OWN, "11", False),  # another disk than the record before says
    ],
)
def test_nobody_is_named_on_a_disk_without_its_own_word(line, seats, is_good):
    """`seats`: the life under which the record before names it; None: it does not."""
    lines = {p.peer: p for p in (*body_of("abc").members, line)}
    body = dataclasses.replace(body_of("abc"), members=tuple(lines[p] for p in "abc"))
    known = frozenset() if seats is None else frozenset({(line.peer, seats)})
    at = place("abc")._replace(seats=known)
    assert body_fault(body, at, 1.0, CRYPTO) == (None if is_good else "seat")
    bare = tuple(dataclasses.replace(one, seat="") for one in body.members)
    forced = dataclasses.replace(body, members=bare, forced=True)
    assert body_fault(forced, at, 1.0, CRYPTO) is None
    if line.seat:
        assert body_fault(dataclasses.replace(body, forced=True), at, 1.0, CRYPTO) == "seat"


def test_a_place_knows_whom_its_record_names_and_on_which_disk():
    at = place("abc")
    members = (*body_of("ab").members, Member("d", 0, "", "11", seat="any"))
    record = signed(dataclasses.replace(body_of("ab"), members=members), "abc")
    assert next_place(at, record).seats == {("a", ""), ("b", ""), ("d", "11")}


def test_signatures_of_another_ballot_or_head_are_none():
    record = signed(body_of("abc"), "abc")
    for bad in (dataclasses.replace(record, ballot=1), dataclasses.replace(record, head=digest(b"x"))):
        with pytest.raises(InvalidRecord) as refused:
            check_record(bad, place("abc"), CRYPTO)
        assert refused.value.reason == "signature"
    with pytest.raises(InvalidRecord) as refused:
        check_record(record, place("abc", prev=digest(b"other")), CRYPTO)
    assert refused.value.reason == "unlinked"


@given(st.integers(1, 1000))
def test_two_quorums_always_share_a_member(count):
    assert 2 * quorum(count) > count >= quorum(count)


@given(st.sets(st.sampled_from(PEERS), min_size=1), HEADS)
def test_every_elector_leads_once_in_n_ballots(electorate, head):
    order = leader_order(electorate, head, CRYPTO)
    assert sorted(order) == sorted(electorate)
    assert order == leader_order(sorted(electorate, reverse=True), head, CRYPTO)


def test_leadership_moves_with_the_head():
    first = [leader_order(PEERS, digest(b"%d" % i), CRYPTO)[0] for i in range(200)]
    assert all(first.count(p) >= 20 for p in PEERS)


# --- weights ----------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.floats(0.05, 1.0))
def test_no_weight_is_above_its_share_where_a_share_exists(weights, influence):
    capped = capped_weights(weights, influence)
    assert all(0 <= x <= w and (x > 0) == (w > 0) for x, w in zip(capped, weights, strict=True))
    positive = [x for x in capped if x]
    if len(positive) * influence > 1 + 1e-9:
        # rounding a cap down by less than 1 takes less than n * influence from the allowance
        assert max(positive) <= influence * sum(positive) + len(positive)
    elif len(positive) * influence < 1 - 1e-9:
        assert len(set(positive)) <= 1


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.floats(0.05, 1.0), st.randoms())
def test_a_weight_does_not_depend_on_the_order(weights, influence, rng):
    places = list(range(len(weights)))
    rng.shuffle(places)
    shuffled = capped_weights([weights[i] for i in places], influence)
    assert shuffled == [capped_weights(weights, influence)[i] for i in places]


# --- fork choice ------------------------------------------------------------------------------------


def grown(at: Place, forced, named, behind=None) -> Place:
    """The place after one more record."""
    members = tuple(Member(p, m.UNIT, "ab" * 32, "", 7) for p in sorted(named))
    state = digest(b"state")
    body = Body(
        digest(b"run"), at.epoch + 1, at.head, state, members, digest(b"result"), forced, behind=behind
    )
    return next_place(at, signed(body, named))


def test_a_full_electorates_record_beats_an_island_however_long():
    start = place("abcde")
    island = start
    for _ in range(50):
        island = grown(island, True, "ab")
    assert island.tip.beats(start.tip)
    assert grown(start, False, "abc").tip.beats(island.tip)


def test_islands_are_compared_by_the_voices_behind_them():
    start = place("abcde")
    long = grown(grown(grown(start, True, "a"), False, "a"), False, "a")
    assert grown(start, True, "bc").tip.beats(long.tip)


def test_an_island_is_full_again_once_a_majority_of_the_last_full_electorate_signed():
    start = place("abcde")
    island = grown(grown(start, True, "ab"), False, "abc")
    assert island.standing.since == 2 and island.standing.electorate == start.electorate
    for told, full in (("ab", 0), ("abc", 2)):
        behind = Behind(0, tuple((p, "00") for p in told))
        after = grown(island, False, "abc", behind)
        assert (after.standing.full, after.standing.since > 0) == (full, not full)


@given(st.lists(st.tuples(st.booleans(), st.sets(st.sampled_from(PEERS), min_size=1)), max_size=8))
def test_every_record_makes_a_better_tip(records):
    at = place("abc")
    for forced, named in records:
        after = grown(at, forced, named)
        assert after.tip.beats(at.tip) and not at.tip.beats(after.tip)
        at = after


def test_heads_that_we_do_not_have_equal_nobodys():
    chain = Chain(found("spec", "a", digest(b"0"), digest(b"schema"), 10, "0" * 32, CRYPTO))
    assert chain.head_at(0) == chain.genesis.run_id
    assert [chain.head_at(e) for e in (-(2**60), -1, 1, 2**60)] == [""] * 4
