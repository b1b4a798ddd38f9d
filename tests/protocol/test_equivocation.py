"""Two votes in one ballot are a proof; whatever an honest member may come to sign is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from simulation.world import SimCrypto, World

from tapestry.node.protocol.equivocation import Equivocation, fault_of, found_in
from tapestry.node.protocol.record import Body, Member, Record, accept_message, head_of

LIFE, RUN, PREV = "11" * 16, "ab" * 32, "cd" * 32
CRYPTO = SimCrypto("p1")
MEMBERS = (Member("p0", 1, "aa" * 32, "00" * 16, 1), Member("p1", 1, "bb" * 32, LIFE, 1))
FIRST = Body(RUN, 7, PREV, "ee" * 32, MEMBERS, "01" * 32)
SECOND = replace(FIRST, result="02" * 32)


def signed(body: Body, ballot: int = 3, by: str = "p1") -> str:
    return SimCrypto(by).sign(accept_message(head_of(body, CRYPTO), ballot))


def proof(first: Body = FIRST, second: Body = SECOND, **changed: object) -> Equivocation:
    one = Equivocation("p1", 3, (first, second), (signed(first), signed(second)))
    return replace(one, **changed)


def with_life(body: Body, life: str) -> Body:
    return replace(body, members=(MEMBERS[0], replace(MEMBERS[1], life=life)))


def test_two_values_that_one_member_signed_in_one_ballot_are_a_proof() -> None:
    assert fault_of(proof(), CRYPTO) is None


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (proof(FIRST, FIRST), "one"),  # a vote that was sent again
        (proof(FIRST, replace(SECOND, prev="ce" * 32)), "round"),  # the next round, or another side of a fork
        (proof(FIRST, replace(SECOND, epoch=8)), "round"),
        (proof(FIRST, replace(SECOND, run_id="ac" * 32)), "round"),
        (proof(FIRST, replace(SECOND, forced=True)), "forced"),
        (proof(FIRST, with_life(SECOND, "22" * 16)), "disk"),  # it has lost its disk, and voted again
        (proof(with_life(FIRST, ""), with_life(SECOND, "")), "disk"),
        (proof(FIRST, replace(SECOND, members=MEMBERS[:1])), "disk"),  # it is not named
        (proof(signatures=(signed(FIRST), signed(SECOND, ballot=4))), "sign"),  # in a later ballot
        (proof(signatures=(signed(FIRST), signed(SECOND, by="p0"))), "sign"),
        (proof(peer="p0"), "sign"),
    ],
)
def test_what_an_honest_member_signs_proves_nothing(one: Equivocation, why: str) -> None:
    fault = fault_of(one, CRYPTO)
    assert fault is not None and why in fault


def test_who_signed_two_records_of_one_ballot_is_found_and_who_signed_one_is_not() -> None:
    def record(body: Body, signers: tuple[str, ...], ballot: int = 3) -> Record:
        signatures = tuple((p, signed(body, ballot, p)) for p in signers)
        return Record(body, head_of(body, CRYPTO), ballot, signatures)

    ours, theirs = record(FIRST, ("p0", "p1")), record(SECOND, ("p1",))
    assert [one.peer for one in found_in(ours, theirs, CRYPTO)] == ["p1"]
    assert not found_in(ours, ours, CRYPTO)
    assert not found_in(ours, record(SECOND, ("p1",), ballot=4), CRYPTO)
    false = replace(theirs, signatures=(("p0", "forged"), *theirs.signatures))
    assert [one.peer for one in found_in(ours, false, CRYPTO)] == ["p1"]


@pytest.mark.parametrize("find", [lambda world: world.equivocators.name])
def test_in_the_simulator_who_votes_twice_is_proven_and_nobody_else_is(find: Callable[[World], str]) -> None:
    worlds = [world for world in map(World, range(60)) if find(world)][:3]
    assert sum(world.run().equivocators.proven for world in worlds) > 0
