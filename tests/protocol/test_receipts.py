"""Rosters that a leader signed: what two of them prove, and that an honest one's prove nothing."""

from dataclasses import replace

import pytest
from simulation.shell import SimCrypto
from simulation.world import Faults, World

from tapestry.node.protocol import events as ev
from tapestry.node.protocol.messages import RECEIPTS_MAX, Receipt, Roster, Stage
from tapestry.node.protocol.receipts import (
    OWN_MAX,
    Receipts,
    TwoRosters,
    fault_of_rosters,
    receipt_of,
    signed,
)
from tapestry.node.protocol.record import Member
from tapestry.node.protocol.validity import signed_fault

RUN, HEAD, LIFE = "ab" * 32, "cd" * 32, "ef" * 16
LEADER = SimCrypto("p1")
ROSTER = Roster(
    *(3, HEAD, 2, False, "12" * 32),
    members=(Member("p0", 5, "34" * 32, "56" * 16, 5), Member("p1", 7, "78" * 32, LIFE, 7)),
    reducers=(0, 1),
)
OTHER = replace(ROSTER, reducers=(1, 0))


def receipt(roster: Roster = ROSTER, crypto: SimCrypto = LEADER) -> Receipt:
    return receipt_of("p1", signed(roster, RUN, "p1", crypto), crypto)


def on_disk(roster: Roster, life: str) -> Roster:
    return replace(roster, members=(roster.members[0], replace(roster.members[1], life=life)))


# --- the proof --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        OTHER,
        replace(ROSTER, forced=True),
        replace(ROSTER, state_digest="13" * 32),
        replace(ROSTER, members=(replace(ROSTER.members[0], weight=4), ROSTER.members[1])),
    ],
)
def test_two_rosters_of_one_ballot_prove_it_whatever_differs(other):
    assert fault_of_rosters(TwoRosters(receipt(), receipt(other)), RUN, SimCrypto("anybody")) is None


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (receipt(), "are one"),
        (receipt(replace(OTHER, ballot=3)), "one ballot"),
        (receipt(replace(OTHER, head="ce" * 32)), "one ballot"),
        (receipt(replace(OTHER, epoch=4)), "one ballot"),
        (receipt(on_disk(OTHER, "e0" * 16)), "one disk"),
        (receipt(OTHER, SimCrypto("p0")), "did not sign both"),
        (replace(receipt(OTHER), digest="99" * 32), "did not sign both"),
        (replace(receipt(replace(OTHER, ballot=3)), ballot=2), "did not sign both"),
        (replace(receipt(on_disk(OTHER, "e0" * 16)), life=LIFE), "did not sign both"),
        (replace(receipt(replace(OTHER, epoch=4)), epoch=3), "did not sign both"),
    ],
)
def test_what_an_honest_leader_signs_proves_nothing(other, why):
    fault = fault_of_rosters(TwoRosters(receipt(), other), RUN, LEADER)
    assert fault is not None and why in fault


def test_rosters_of_another_run_prove_nothing():
    assert fault_of_rosters(TwoRosters(receipt(), receipt(OTHER)), "ba" * 32, LEADER) is not None


# --- who compares -----------------------------------------------------------------------------------


def test_what_two_members_show_is_compared():
    known, crypto = Receipts(), SimCrypto("p2")
    assert known.shown("p0", (receipt(),), RUN, crypto) == ([], None)
    assert known.shown("p3", (receipt(),), RUN, crypto) == ([], None), "the same is no news"
    assert known.shown("p4", (receipt(OTHER),), RUN, crypto) == (
        [TwoRosters(receipt(), receipt(OTHER))],
        None,
    )


def test_what_a_member_shows_is_compared_with_our_own():
    known, crypto = Receipts(), SimCrypto("p2")
    assert known.hear(receipt()) is None and known.hear(receipt()) is None
    two = TwoRosters(receipt(), receipt(OTHER))
    assert known.shown("p0", (receipt(OTHER),), RUN, crypto) == ([two], None)
    assert known.hear(receipt(OTHER)) == two, "as if the leader had told it to us"
    assert known.newest == (receipt(),)


def test_a_receipt_that_its_leader_did_not_sign_is_refused_and_forgotten():
    known, crypto = Receipts(), SimCrypto("p2")
    false = receipt(OTHER, SimCrypto("p0"))
    assert known.shown("p0", (false,), RUN, crypto) == ([], "roster_signature")
    assert known.hear(receipt()) is None


def test_receipts_are_bounded():
    known = Receipts()
    for ballot in range(2 * OWN_MAX):
        known.hear(receipt(replace(ROSTER, ballot=ballot)))
    assert len(known.own) == OWN_MAX
    assert [r.ballot for r in known.newest] == list(range(2 * OWN_MAX))[-RECEIPTS_MAX:]


# --- in a round -------------------------------------------------------------------------------------


def exchanging() -> World:
    world = World(1, peers=4, faults=Faults(), epochs=10**9).start_all()

    def all_follow() -> bool:
        rounds = [n.core.round for n in world.nodes.values()]
        if world.epoch() < 2:
            return False
        return all(r is not None and r.stage == Stage.EXCHANGING for r in rounds)

    world.until(all_follow, 60)
    return world


def next_roster(world: World, leader: str) -> Roster:
    """As `leader` would sign it in its next ballot: the one under way."""
    round_ = world.nodes[leader].core.round
    ballot = next(b for b in range(round_.ballot + 1, 99) if round_.state.leader_of(b) == leader)
    return replace(round_.exchange.roster, ballot=ballot)


def test_a_roster_with_a_false_signature_is_not_followed():
    world = exchanging()
    leader, other = list(world.nodes)[1:3]
    node = world.nodes[other]
    roster = next_roster(world, leader)
    for signature in ("", roster.signature, world.nodes[other].crypto.sign(b"?")):
        node.feed(ev.Received(leader, replace(roster, signature=signature)))
    assert world.refused["roster_signature"] == 3 and node.core.round.exchange.roster != roster


def test_a_leader_on_another_disk_than_the_record_names_is_not_followed():
    """Else it could sign one roster for each disk that it makes up."""
    world = exchanging()
    state = world.nodes["p0"].core.round.state
    leader = state.electorate[0]
    life = dict(state.at.seats)[leader]
    crypto, run_id = world.nodes[leader].crypto, world.rules.run_id
    for named, fault in ((life, None), ("e0" * 16, "seat"), ("", "seat")):
        roster = replace(ROSTER, members=(Member(leader, 7, "78" * 32, named, 7),))
        one = receipt_of(leader, signed(roster, run_id, leader, crypto), crypto)
        assert signed_fault(state, one) == fault


def test_a_member_that_hears_both_rosters_itself_has_the_proof_at_once():
    world = exchanging()
    leader = world.nodes["p0"].core.round.leader
    node = next(n for n in world.nodes.values() if n.name != leader)
    told = node.core.round.exchange.roster
    other = replace(told, reducers=tuple(reversed(told.reducers)), state_digest="99" * 32)
    world.splitters.name = leader
    node.feed(ev.Received(leader, signed(other, world.rules.run_id, leader, world.nodes[leader].crypto)))
    assert world.splitters.proven == 1 and world.refused["equivocation"] == 1
