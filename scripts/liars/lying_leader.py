"""leads, and tells half of the members another roster: other reducers, or a contribution less

It signs both, or nobody would follow the second.

Promise: every honest member has a proof that it signed two rosters of one ballot, and it is removed; nobody
else is accused. No two members take two results, and the run goes on, at one head. A ballot that it leads is
lost after a stall of 5 s; the others go on with it once for each of them, and give up on it after two stalls
more: that is how much longer a round is.
"""

from __future__ import annotations

from dataclasses import replace

from liars import lying
from liars.seen import Seen, proof_fault
from tapestry.node.protocol.context import Context
from tapestry.node.protocol.leader import Leader
from tapestry.node.protocol.messages import Control, Ready, Roster
from tapestry.node.protocol.receipts import signed
from tapestry.node.protocol.record import Member

STALL_S = 5.0
NOTICED_S = 2.0  # what it takes to see that a stall is over, to be ready again, and to hear so


def lie() -> None:
    honest, add_ready = Context.send, Leader.add_ready
    seats: dict[str, str] = {}  # what the others have signed in this round

    def remember(self: Leader, peer: str, ready: Ready, now: float) -> None:
        seats[peer] = ready.seat
        add_ready(self, peer, ready, now)

    def send(self: Context, peer: str, message: Control) -> None:
        if isinstance(message, Roster) and lying.now():
            others = [m.peer for m in message.members if m.peer != self.me]
            if peer in others[::2]:
                another = _another(message, peer, seats)
                message = signed(another, self.rules.run_id, self.me, self.crypto)
        honest(self, peer, message)

    Context.send = send  # type: ignore[method-assign]
    Leader.add_ready = remember  # type: ignore[method-assign]


def _another(roster: Roster, to: str, seats: dict[str, str]) -> Roster:
    if roster.epoch % 2:
        count = len(roster.members)
        return replace(roster, reducers=tuple((index + 1) % count for index in roster.reducers))
    able = [m for m in roster.members if m.weight and m.peer != to and m.peer in seats]
    dropped = able[0] if able else None
    members = tuple(
        Member(m.peer, 0, "", m.life, seat=seats[m.peer]) if m is dropped else m for m in roster.members
    )
    return replace(roster, members=members)


def broken(seen: Seen) -> list[str]:
    faults = proof_fault(seen, "signed two rosters")
    ballots = seen.honest + 3  # the first, one more for each of the others, and two stalls
    if seen.longest_s > seen.quiet_round_s + ballots * (STALL_S + NOTICED_S):
        faults.append(f"a round took {seen.longest_s:.0f} s, before it {seen.quiet_round_s:.0f} s")
    return faults
