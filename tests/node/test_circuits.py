"""Circuits at a relay: what many names take of them, and who makes room for whom."""

from __future__ import annotations

import itertools

import pytest

from tapestry.node.net.circuits import (
    CALLER_CIRCUITS_MAX,
    CIRCUITS_MAX,
    FIRST_S,
    GUEST_CIRCUITS_MAX,
    KIND_CIRCUITS_MAX,
    PAIR_CIRCUITS_MAX,
    QUIET_S,
    TENURE_S,
    Circuits,
    Kind,
)
from tapestry.node.net.places import NoPlace


class Bench:
    """Circuits are named by caller, guest and number."""

    def __init__(self) -> None:
        self.circuits: Circuits[str] = Circuits()
        self.numbers = itertools.count()
        self.now = 0.0

    def call(self, caller: str, guest: str, kind: Kind = Kind.MEMBER) -> str:
        """Whose circuit ended for it; "refused"; or ""."""
        circuit = f"{caller}>{guest} {next(self.numbers)}"
        try:
            gone = self.circuits.enter(circuit, caller, guest, kind, self.now)
        except NoPlace:
            return "refused"
        return gone.split(" ")[0] if gone is not None else ""

    def fill(self, callers: int, guests: int, kind: Kind) -> None:
        """Each holds as many as a pair may, to as many guests of its side, till nothing more is free."""
        for caller, guest, _ in itertools.product(range(callers), range(guests), range(PAIR_CIRCUITS_MAX)):
            if self.call(f"{kind.name}{caller}", f"accomplice{guest}", kind):
                return


def test_free_keys_of_an_open_run_take_half_of_a_relay_and_members_take_it_back():
    """They were taken for members: eight held all 256 circuits, to accomplices, for as long as they liked."""
    bench = Bench()
    bench.fill(16, 8, Kind.NEWCOMER)
    assert len(bench.circuits) == KIND_CIRCUITS_MAX[Kind.NEWCOMER] == CIRCUITS_MAX // 2
    assert not bench.call("member", "guest")
    bench.fill(16, 8, Kind.MEMBER)
    assert len(bench.circuits) == CIRCUITS_MAX
    assert bench.call("member", "another guest").startswith("NEWCOMER")


def test_a_newcomer_gets_its_circuits_however_many_keys_hold_the_others():
    bench = Bench()
    bench.fill(16, 8, Kind.NEWCOMER)
    bench.now += FIRST_S
    honest = [bench.call("honest", f"guest{n}", Kind.NEWCOMER) for n in range(3)]
    assert all(gone.startswith("NEWCOMER") for gone in honest)
    bench = Bench()
    for n in range(KIND_CIRCUITS_MAX[Kind.NEWCOMER]):
        assert not bench.call(f"key{n}", f"accomplice{n % 8}", Kind.NEWCOMER)
    bench.now += FIRST_S
    assert bench.call("honest", "guest", Kind.NEWCOMER) == "key0>accomplice0"
    assert bench.call("honest", "guest", Kind.NEWCOMER) == "refused", "one is enough to be heard"


def test_ever_new_keys_cut_no_circuit_that_is_in_use_and_keep_nobody_out():
    """At ten keys a second the circuits of an honest newcomer lived for three seconds."""
    bench, asked, got, kind = Bench(), 0, 0, Kind.NEWCOMER
    for guest in ("guest", "another"):
        assert not bench.call("honest", guest, kind)
    circuits = [*bench.circuits._ends]
    for tick in range(10 * 600):
        bench.now = tick / 10
        if tick % 10 == 0:
            for circuit in circuits:
                bench.circuits.heard(circuit, bench.now)
        bench.call(f"key{tick}", "guest", kind)
        if tick % 37 == 0:
            asked += 1
            got += bench.call(f"late{tick}", "guest", kind) != "refused"
    assert all(circuit in bench.circuits._ends for circuit in circuits)
    assert got >= asked / 2


def test_who_is_carried_has_its_time_and_then_makes_room_for_who_has_nothing():
    bench = Bench()
    for number in range(GUEST_CIRCUITS_MAX):
        bench.now = number / 10
        assert not bench.call(f"key{number}", "guest", Kind.NEWCOMER)
    circuits = [*bench.circuits._ends]
    while bench.now < TENURE_S - 1:
        bench.now += 1
        for circuit in circuits:
            bench.circuits.heard(circuit, bench.now)
        assert bench.call("late", "guest", Kind.NEWCOMER) == "refused"
    assert bench.call("member", "guest").startswith("key"), "members do not wait"
    bench.now = TENURE_S + 0.1
    assert bench.call("late", "guest", Kind.NEWCOMER) == "key1>guest"


def test_of_those_that_are_quiet_the_oldest_makes_room_first():
    bench = Bench()
    for number in range(GUEST_CIRCUITS_MAX):
        assert not bench.call(f"key{number}", "guest", Kind.NEWCOMER)
    circuits = [*bench.circuits._ends]
    for second in range(int(2 * TENURE_S)):
        bench.now = float(second)
        for circuit in circuits[:5] + circuits[7:]:
            bench.circuits.heard(circuit, bench.now)
    assert [bench.call(f"late{n}", "guest", Kind.NEWCOMER) for n in range(3)] == [
        "key5>guest",
        "key6>guest",
        "key0>guest",
    ]
    bench.now += QUIET_S
    assert bench.call("late", "guest", Kind.NEWCOMER) == "key1>guest"


def test_a_few_members_do_not_cut_a_guest_off_from_the_others():
    """One held all 32 of a guest: everybody else was told that there are too many."""
    bench = Bench()
    for _ in range(PAIR_CIRCUITS_MAX):
        assert not bench.call("hostile", "guest")
    assert bench.call("hostile", "guest") == "hostile>guest", "its own oldest ends"
    for n in range(1, GUEST_CIRCUITS_MAX // PAIR_CIRCUITS_MAX):
        for _ in range(PAIR_CIRCUITS_MAX):
            assert not bench.call(f"hostile{n}", "guest")
    assert [bench.call("honest", "guest") for _ in range(2)] == ["hostile>guest", "hostile1>guest"]
    assert len(bench.circuits) == GUEST_CIRCUITS_MAX
    assert bench.call("stranger", "guest", Kind.STRANGER) == "refused"


def test_a_pair_counts_from_both_ends_and_who_has_as_many_as_others_displaces_nobody():
    bench = Bench()
    for n in range(PAIR_CIRCUITS_MAX):
        assert not bench.call(*(("a", "b") if n % 2 else ("b", "a")))
    assert bench.call("a", "b") == "b>a"
    for n in range(GUEST_CIRCUITS_MAX):
        assert not bench.call(f"member{n}", "guest")
    assert bench.call("one more", "guest") == "refused"


@pytest.mark.parametrize("kind", Kind)
def test_one_caller_has_so_many_and_no_more(kind: Kind):
    bench = Bench()
    for n in range(CALLER_CIRCUITS_MAX[kind]):
        assert not bench.call("caller", f"guest{n}", kind)
    assert bench.call("caller", "one more", kind) == "refused"
    bench.circuits.leave("caller>guest0 0")
    bench.circuits.leave("caller>guest0 0")  # one that had to go ends later
    assert not bench.call("caller", "one more", kind)
