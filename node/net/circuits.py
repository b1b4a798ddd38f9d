"""Who may have one more circuit at a relay: members before newcomers, and who has few before who has many.

A *circuit* is a connection that a relay carries from a caller to its guest (relay.py). A member is one by the
roll; a *newcomer* belongs to an open run, where anybody can be as many newcomers as they like; a *stranger*
belongs to no run yet. There is a bound for all circuits, for those of each kind and of one caller, for those
to one guest, and for those of one pair. Where a bound is met somebody makes room, if somebody should:

- a pair gives its own oldest: who links again after a break keeps nothing of its peer from it;
- a member takes the place of who is none: of the one that has most, the oldest;
- of equals who has two more gives its oldest, so that two that want the same do not take it in turn;
- who is no member and has none takes the oldest: many names that hold one each keep nobody out for good.

Pure: knows neither sockets nor time.
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


@dataclass(frozen=True, slots=True)
class _Ends:
    caller: str
    guest: str
    kind: Kind


class Circuits(Generic[C]):
    """Of one relay; a circuit is whatever stands for it there."""

    def __init__(self) -> None:
        self._ends: dict[C, _Ends] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._ends)

    def enter(self, circuit: C, caller: str, guest: str, kind: Kind) -> C | None:
        """Take a place; the circuit that must end for it, if one must: it has left. Raises NoPlace."""
        gone = self._room_for(_Ends(caller, guest, kind))
        if gone is not None:
            self.leave(gone)
        self._ends[circuit] = _Ends(caller, guest, kind)
        return gone

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
        if not equals:
            raise NoPlace
        own = sum(self._ends[c].caller == new.caller for c in equals)
        oldest, most = self._oldest_of_most(equals)
        if most >= own + 2:
            return oldest
        if own == 0 and new.kind is not Kind.MEMBER:
            return equals[0]
        raise NoPlace

    def _oldest_of_most(self, among: list[C]) -> tuple[C, int]:
        """The oldest circuit of the caller that has most of these, and how many it has."""
        caller, most = Counter(self._ends[c].caller for c in among).most_common(1)[0]  # the first of equals
        return next(c for c in among if self._ends[c].caller == caller), most
