"""What contributions weigh where members and newcomers of an open run share the voice."""

from hypothesis import given, settings
from hypothesis import strategies as st
from simulation.voices import agree, weights_of

from tapestry.node.protocol.members import SHARE, Charter, Roll, first_roll
from tapestry.node.protocol.voice import voice_weights

SHARES = st.integers(1, 99).map(lambda percent: percent * SHARE // 100)
INFLUENCE = st.integers(1, 100).map(lambda percent: percent / 100)
ANY = st.lists(st.integers(0, 2**53), max_size=8)
TOKENS = st.lists(st.integers(10**6, 10**9) | st.just(10**7), min_size=1, max_size=8)


def open_run(members: int, share: int, voice: str = "tokens") -> Roll:
    return first_roll("run", Charter("open", "founder", voice, share), [f"m{i}" for i in range(members)])


def named(members: list[int], newcomers: list[int]) -> list[tuple[str, int]]:
    return [*((f"m{i}", t) for i, t in enumerate(members)), *((f"n{i}", t) for i, t in enumerate(newcomers))]


@settings(max_examples=300, deadline=None)
@given(TOKENS, TOKENS, SHARES, INFLUENCE)
def test_both_rules_hold_where_they_can_and_that_of_newcomers_always(members, newcomers, share, influence):
    roll = open_run(len(members), share)
    weights = voice_weights(roll, named(members, newcomers), influence)
    old, new = weights[: len(members)], weights[len(members) :]
    assert sum(new) * (SHARE - share) <= sum(old) * share
    assert all(0 < w <= tokens for w, tokens in zip(weights, [*members, *newcomers], strict=True))
    voices = [*((t, True) for t in members), *((t, False) for t in newcomers)]
    expected = weights_of(voices, influence, share / SHARE)
    assert agree(weights, expected)
    if max(expected) > influence * sum(expected) * (1 + 1e-5):  # impossible
        assert len(set(old)) == 1 and max(new) <= old[0]
    else:
        assert max(weights) <= influence * sum(weights) * (1 + 1e-5) + len(weights)


@settings(max_examples=200, deadline=None)
@given(ANY, ANY, SHARES, INFLUENCE)
def test_whatever_they_trained_newcomers_have_no_more_than_their_share(members, newcomers, share, influence):
    weights = voice_weights(open_run(len(members), share), named(members, newcomers), influence)
    old, new = weights[: len(members)], weights[len(members) :]
    assert sum(new) * (SHARE - share) <= sum(old) * share
    assert [w > 0 for w in old] == [tokens > 0 for tokens in members]


@settings(max_examples=200, deadline=None)
@given(TOKENS, TOKENS, SHARES, INFLUENCE, st.randoms())
def test_what_each_weighs_does_not_depend_on_the_order(members, newcomers, share, influence, rng):
    roll, those = open_run(len(members), share), named(members, newcomers)
    weight_of = dict(zip(those, voice_weights(roll, those, influence), strict=True))
    rng.shuffle(those)
    assert voice_weights(roll, those, influence) == [weight_of[one] for one in those]


def test_the_cap_of_members_does_not_hand_a_run_to_strangers():
    """A founder set 0.1 for twelve members; three are there today, with twenty strangers."""
    roll = open_run(12, SHARE // 5, "equal")
    for present, influence in ((3, 0.1), (3, 0.25), (1, 0.5)):
        weights = voice_weights(roll, named([1] * present, [1] * 20), influence)
        assert 0.199 < sum(weights[present:]) / sum(weights) <= 0.2


def test_without_a_cap_members_weigh_their_voice():
    assert voice_weights(open_run(2, SHARE // 5), named([300, 100], [500, 500]), 1.0) == [300, 100, 50, 50]
