"""Who may have one more circuit at a relay: members before newcomers, and who has few before who has many.

A *circuit* is a connection that a relay carries from a caller to its guest (relay.py). A member is one by the
roll; a *newcomer* belongs to an open run, where anybody can be as many newcomers as they like; a *stranger*
belongs to no run yet. There is a bound for all circuits, for those of each kind and of one caller, for those
to one guest, and for those of one pair. Where a bound is met somebody makes room, if somebody should:

- a pair gives its own oldest: who links again after a break keeps nothing of its peer from it;
- a member takes the place of who is none: of the one that has most, the oldest;
- of equals who has two more gives its oldest, so that two that want the same do not take it in turn;
- who is no member and has none takes the oldest: many names that hold one each keep nobody out for good.

Names are free, of all but members: what they take by these last two rules is first a circuit on which the
guest says nothing, and then one that has been there for TENURE_S. So many names cut no circuit that is in use
before that, and as long as they only hold theirs, none at all.

Pure: knows no sockets; `now` comes in.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

from tapestry.node.net.places import NoPlace

C = TypeVar("C")

CIRCUITS_MAX = 256  # Guess: 16 guests that are all linked with each other take 240, one for each end's dial
GUEST_CIRCUITS_MAX = 32  # to one guest. Guess
QUIET_S = 10.0  # Guess: who is linked is told something each second
FIRST_S = 2.0  # Guess: for the guest's first word; a connection begins with some
TENURE_S = 30.0  # Guess: a round of a small model; one that was cut is dialled anew
PAIR_CIRCUITS_MAX = 4  # of two peers, whoever called. Guess: honest ones have two, one for each end's dial


class Kind(IntEnum):
    """Of a caller; who is more comes first."""

    STRANGER = 0
    NEWCOMER = 1
    MEMBER = 2


KIND_CIRCUITS_MAX = {
    Kind.STRANGER: 16,  # enough to ask for admission. Guess
    Kind.NEWCOMER: CIRCUITS_MAX // 2,  # Guess
    Kind.MEMBER: CIRCUITS_MAX,
}
CALLER_CIRCUITS_MAX = {Kind.STRANGER: 1, Kind.NEWCOMER: 32, Kind.MEMBER: 32}  # Guess


@dataclass(slots=True)
class _Ends:
    caller: str
    guest: str
    kind: Kind
    began_at: float
    heard_at: float | None = None  # when the guest said something last

    def is_quiet(self, now: float) -> bool:
        if self.heard_at is None:
            return now - self.began_at >= FIRST_S
        return now - self.heard_at >= QUIET_S


class Circuits(Generic[C]):
    """Of one relay; a circuit is whatever stands for it there."""

    def __init__(self) -> None:
        self._ends: dict[C, _Ends] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._ends)

    def enter(self, circuit: C, caller: str, guest: str, kind: Kind, now: float) -> C | None:
        """Take a place; the circuit that must end for it, if one must: it has left. Raises NoPlace."""
        new = _Ends(caller, guest, kind, now)
        gone = self._room_for(new)
        if gone is not None:
            self.leave(gone)
        self._ends[circuit] = new
        return gone

    def heard(self, circuit: C, now: float) -> None:
        """The guest said something: what the caller says costs it nothing, and proves nothing."""
        if (ends := self._ends.get(circuit)) is not None:
            ends.heard_at = now

    def leave(self, circuit: C) -> None:
        """It has ended, perhaps because it had to."""
        self._ends.pop(circuit, None)

    def _room_for(self, new: _Ends) -> C | None:
        """One that ends is enough: what is within the bounds of a pair, a guest or a kind counts for all."""
        ends = self._ends
        of_pair = [c for c, one in ends.items() if {one.caller, one.guest} == {new.caller, new.guest}]
        if len(of_pair) >= PAIR_CIRCUITS_MAX:
            return of_pair[0]
        if sum(one.caller == new.caller for one in ends.values()) >= CALLER_CIRCUITS_MAX[new.kind]:
            raise NoPlace
        of_guest = [c for c, one in ends.items() if one.guest == new.guest]
        if len(of_guest) >= GUEST_CIRCUITS_MAX:
            return self._who_yields(of_guest, new)
        of_kind = [c for c, one in ends.items() if one.kind is new.kind]
        if len(of_kind) >= KIND_CIRCUITS_MAX[new.kind]:
            return self._who_yields(of_kind, new)
        return self._who_yields([*ends], new) if len(ends) >= CIRCUITS_MAX else None

    def _who_yields(self, among: list[C], new: _Ends) -> C:
        """Raises NoPlace."""
        lower = [c for c in among if self._ends[c].kind < new.kind]
        if lower and new.kind is Kind.MEMBER:
            return self._oldest_of_most(lower)[0]
        equals = [c for c in among if self._ends[c].kind is new.kind]
        own = sum(self._ends[c].caller == new.caller for c in equals)
        if new.kind is not Kind.MEMBER:
            equals = self._to_spare(equals, new.began_at)
        if not equals:
            raise NoPlace
        oldest, most = self._oldest_of_most(equals)
        if most >= own + 2:
            return oldest
        if own == 0 and new.kind is not Kind.MEMBER:
            return equals[0]
        raise NoPlace

    def _to_spare(self, among: list[C], now: float) -> list[C]:
        """The quiet ones, or else those that have had their time."""
        quiet = [c for c in among if self._ends[c].is_quiet(now)]
        return quiet or [c for c in among if now - self._ends[c].began_at >= TENURE_S]

    def _oldest_of_most(self, among: list[C]) -> tuple[C, int]:
        """The oldest circuit of the caller that has most of these, and how many it has."""
        caller, most = Counter(self._ends[c].caller for c in among).most_common(1)[0]  # the first of equals
        return next(c for c in among if self._ends[c].caller == caller), most
