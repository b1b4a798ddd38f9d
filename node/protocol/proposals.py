"""Changes of the roll on their way into a record: collected outside of rounds, carried by whoever leads next.

A pool of what is signed by somebody who may ask; bounded, and of each asker so many. Where it is full, who
asks for little displaces who has asked for most: a few who ask for much keep nobody out. Members tell each
other what they know (CHANGES), signatures add up, and a change with enough of them goes into the next record.
What a record applied, or what can no longer apply, leaves the pool. It is in memory only: who asked asks
again.

Pure; no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tapestry.node.protocol.canon import Crypto
from tapestry.node.protocol.members import (
    Change,
    Roll,
    authorities,
    change_fault,
    change_id,
    changes_fault,
    enough_signed,
    fewest_signatures,
)

PROPOSALS_MAX = 64  # G7
OF_ONE_MAX = 16  # that one key was the first to sign


class Proposals:
    """Mutable; owned by the core."""

    def __init__(self) -> None:
        self.pending: dict[str, Change] = {}  # change id -> with all signatures that we know of
        self.asked_by: dict[str, str] = {}  # change id -> who was first seen to sign it

    def add(self, roll: Roll, epoch: int, change: Change, crypto: Crypto) -> str | None:
        """Take one in, or its new signatures. `epoch`: of the next record. Returns why not, in a word."""
        fault = change_fault(roll, epoch, change, crypto)
        if fault is not None:
            return fault
        name = change_id(roll.run_id, change)
        known = self.pending.get(name)
        askers = [p for p, _ in change.signatures if may_ask(roll, change, p)]
        if known is None:
            if not askers:
                return "unsigned_change"
            if self._of(askers[0]) >= OF_ONE_MAX or not self._room_for(askers[0]):
                return "proposals"
            self.asked_by[name] = askers[0]
            known = Change(change.kind, change.peer, change.value, change.until, change.nonce)
        for peer, signature in change.signatures:
            if peer in askers:
                known = known.signed(peer, signature)
        self.pending[name] = known
        return None

    def known(self, roll: Roll, change: Change) -> Change:
        """One of the pool, with all signatures that we know of."""
        return self.pending[change_id(roll.run_id, change)]

    def signers(self, roll: Roll, change: Change) -> set[str]:
        """Who signed it, as far as we know and the roll lets them count."""
        known = self.pending.get(change_id(roll.run_id, change))
        return {peer for peer, _ in known.signatures} if known is not None else set()

    def _room_for(self, asker: str) -> bool:
        """Made, if need be, by forgetting what came last of who asked for most, if that is more."""
        if len(self.pending) < PROPOSALS_MAX:
            return True
        greediest, count = Counter(self.asked_by.values()).most_common(1)[0]
        if count <= self._of(asker) + 1:
            return False
        last = [name for name, by in self.asked_by.items() if by == greediest][-1]
        del self.pending[last], self.asked_by[last]
        return True

    def _of(self, asker: str) -> int:
        return sum(by == asker for by in self.asked_by.values())

    def knows(self, roll: Roll, change: Change) -> bool:
        """Whether it tells us nothing new."""
        known = self.pending.get(change_id(roll.run_id, change))
        return known is not None and {p for p, _ in change.signatures} <= {p for p, _ in known.signatures}

    def ready(self, roll: Roll, epoch: int, named: Sequence[str], crypto: Crypto) -> tuple[Change, ...]:
        """Those that record `epoch`, whose members are `named`, may carry."""
        taken: list[Change] = []
        for name in sorted(self.pending):
            change = fewest_signatures(roll, self.pending[name])
            if changes_fault(roll, epoch, [*taken, change], named, crypto) is None:
                taken.append(change)
        return tuple(taken)

    def any_signed(self, roll: Roll) -> bool:
        """Whether one has all the signatures that it needs."""
        return any(enough_signed(roll, roll, change) for change in self.pending.values())

    def prune(self, roll: Roll, epoch: int, crypto: Crypto) -> None:
        """After the chain has moved: forget what was applied, and what cannot be any more."""
        for name, change in list(self.pending.items()):
            if change_fault(roll, epoch, change, crypto) is not None:
                del self.pending[name], self.asked_by[name]


def may_ask(roll: Roll, change: Change, peer: str) -> bool:
    """Whether this signature may count under the charter: of a council, a member, an invite, or one's own."""
    if change.kind == "admit" and peer in roll.invites:
        return True
    return bool(authorities(roll, [peer])) or (change.kind == "remove" and change.peer == peer)
