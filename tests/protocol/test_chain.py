"""Records, heads, weights and fork choice (G6)."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation.world import SimCrypto, digest

from tapestry.node.protocol import chain as c
from tapestry.node.protocol.agreement import PPM, Agreement

CRYPTO = SimCrypto("a")
PREV = digest(b"prev")
PEERS = ("a", "b", "c", "d", "e")
HEADS = st.text("0123456789abcdef", min_size=64, max_size=64)
TOKENS = st.text("0123456789abcdef", min_size=32, max_size=32)
WEIGHTS = st.integers(1, c.WEIGHT_MAX)


@st.composite
def bodies(draw):
    peers = sorted(draw(st.sets(st.sampled_from(PEERS), min_size=1)))
    voters = draw(
        st.lists(st.booleans(), min_size=len(peers), max_size=len(peers)).map(lambda v: [False, *v[1:]])
    )
    members = tuple(
        c.Member(p, 0, "") if voter else c.Member(p, draw(WEIGHTS), draw(TOKENS))
        for p, voter in zip(peers, voters, strict=True)
    )
    epoch = draw(st.integers(1, c.EPOCH_MAX))
    shares = st.integers(0, PPM)
    agreement = Agreement(draw(st.integers(-PPM, PPM)), draw(shares), draw(shares))
    heads = [draw(HEADS) for _ in range(4)]
    return c.Body(heads[0], epoch, heads[1], heads[2], members, heads[3], draw(st.booleans()), agreement)


def signed(body: c.Body, signers, ballot: int = 0) -> c.Record:
    head = c.head_of(body, CRYPTO)
    message = c.accept_message(head, ballot)
    return c.Record(body, head, ballot, tuple((p, SimCrypto(p).sign(message)) for p in sorted(signers)))


def body_of(members, forced=False, weight=1, prev=PREV) -> c.Body:
    named = tuple(c.Member(p, weight, "ab" * 16) for p in sorted(members))
    return c.Body(digest(b"run"), 1, prev, digest(b"state"), named, digest(b"result"), forced)


# --- text -------------------------------------------------------------------------------------------


@given(bodies(), st.integers(0, c.BALLOT_MAX))
def test_a_record_survives_its_text(body, ballot):
    record = signed(body, [m.peer for m in body.members], ballot)
    assert c.record_from_dict(c.record_to_dict(record), CRYPTO) == record


@given(bodies(), st.data())
def test_every_field_of_a_body_is_in_its_head(body, data):
    raw = c.body_to_dict(body)
    field = data.draw(st.sampled_from(sorted(raw)))
    other = c.body_to_dict(data.draw(bodies()))
    tampered = {**raw, field: other[field]}
    same = tampered == raw
    assert (c.head_of(c.body_from_dict(tampered), CRYPTO) == c.head_of(body, CRYPTO)) == same


@given(bodies(), st.data())
def test_a_body_with_a_wrong_type_or_key_is_refused(body, data):
    raw = c.body_to_dict(body)
    field = data.draw(st.sampled_from(sorted(raw)))
    for bad in (
        {**raw, field: data.draw(st.sampled_from([None, -1, 1.0, "x", [], {}, b"x"]))},
        {k: v for k, v in raw.items() if k != field},
        {**raw, "extra": 1},
    ):
        with pytest.raises(c.InvalidRecord):
            c.body_from_dict(bad)


def test_a_tampered_genesis_is_refused():
    genesis = c.found("spec", "a", digest(b"0"), digest(b"schema"), 10, "0" * 32, CRYPTO)
    raw = c.genesis_to_dict(genesis)
    assert c.genesis_from_dict(raw, CRYPTO) == genesis
    other = {"spec": "x", "founder": "b", "state_digest": digest(b"1"), "schema": digest(b"2"), "params": 11}
    for field, value in {**other, "nonce": "1" * 32, "signature": "00"}.items():
        with pytest.raises(c.InvalidRecord):
            c.genesis_from_dict({**raw, field: value}, CRYPTO)


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
        c.check_record(record, record.body.prev, tuple("abcd"), CRYPTO)
    else:
        with pytest.raises(c.InvalidRecord) as refused:
            c.check_record(record, record.body.prev, tuple("abcd"), CRYPTO)
        assert refused.value.reason == reason


def test_signatures_of_another_ballot_or_head_are_none():
    record = signed(body_of("abc"), "abc")
    for bad in (dataclasses.replace(record, ballot=1), dataclasses.replace(record, head=digest(b"x"))):
        with pytest.raises(c.InvalidRecord) as refused:
            c.check_record(bad, record.body.prev, tuple("abc"), CRYPTO)
        assert refused.value.reason == "signature"
    with pytest.raises(c.InvalidRecord) as refused:
        c.check_record(record, digest(b"other"), tuple("abc"), CRYPTO)
    assert refused.value.reason == "unlinked"


@given(st.integers(1, 1000))
def test_two_quorums_always_share_a_member(count):
    assert 2 * c.quorum(count) > count >= c.quorum(count)


@given(st.sets(st.sampled_from(PEERS), min_size=1), HEADS)
def test_every_elector_leads_once_in_n_ballots(electorate, head):
    order = c.leader_order(electorate, head, CRYPTO)
    assert sorted(order) == sorted(electorate)
    assert order == c.leader_order(sorted(electorate, reverse=True), head, CRYPTO)


def test_leadership_moves_with_the_head():
    first = [c.leader_order(PEERS, digest(b"%d" % i), CRYPTO)[0] for i in range(200)]
    assert all(first.count(p) >= 20 for p in PEERS)


# --- weights ----------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.floats(0.05, 1.0))
def test_no_weight_is_above_its_share_where_a_share_exists(weights, influence):
    capped = c.capped_weights(weights, influence)
    assert all(0 <= x <= w and (x > 0) == (w > 0) for x, w in zip(capped, weights, strict=True))
    positive = [x for x in capped if x]
    if len(positive) * influence > 1 + 1e-9:
        # rounding a cap down by less than 1 takes less than n * influence from the allowance
        assert max(positive) <= influence * sum(positive) + len(positive)
    elif len(positive) * influence < 1 - 1e-9:
        assert len(set(positive)) <= 1
    assert not c.exceeds_influence(capped, influence)


@pytest.mark.parametrize(
    ("weights", "influence", "exceeds"),
    [
        ([209, 116, 15, 6], 0.6, True),
        ([208, 116, 15, 6], 0.6, False),
        ([5, 5], 0.3, False),
        ([5, 4], 0.3, True),
    ],
)
def test_weights_that_nobody_has_capped_are_seen(weights, influence, exceeds):
    assert c.exceeds_influence([0, *weights], influence) == exceeds
    assert not c.exceeds_influence(weights, 1.0)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.floats(0.05, 1.0), st.randoms())
def test_a_weight_does_not_depend_on_the_order(weights, influence, rng):
    places = list(range(len(weights)))
    rng.shuffle(places)
    shuffled = c.capped_weights([weights[i] for i in places], influence)
    assert shuffled == [c.capped_weights(weights, influence)[i] for i in places]


# --- fork choice ------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), max_size=4), st.lists(st.integers(1, 5), max_size=4))
def test_of_two_branches_exactly_one_is_better(ours, theirs):
    a = [signed(body_of("a", True, w, digest(b"a%d" % i)), "a") for i, w in enumerate(ours)]
    b = [signed(body_of("b", True, w, digest(b"b%d" % i)), "b") for i, w in enumerate(theirs)]
    assert not c.better(a, a)
    if a or b:
        assert c.better(a, b) != c.better(b, a)
    if sum(theirs) > sum(ours):
        assert c.better(a, b)


def test_heads_that_we_do_not_have_equal_nobodys():
    chain = c.Chain(c.found("spec", "a", digest(b"0"), digest(b"schema"), 10, "0" * 32, CRYPTO))
    assert chain.head_at(0) == chain.genesis.run_id
    assert [chain.head_at(e) for e in (-(2**60), -1, 1, 2**60)] == [""] * 4
