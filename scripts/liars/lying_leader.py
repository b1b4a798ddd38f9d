"""leads, and tells half of the members another roster: other reducers, or a contribution less

Promise: no two members take two results. The run goes on, at one head; a round that it leads costs a ballot.
Nobody is named: rosters are not signed.
"""

from __future__ import annotations

from dataclasses import replace

from liars import lying
from liars.seen import Seen
from tapestry.node.protocol.chain import Member
from tapestry.node.protocol.context import Context
from tapestry.node.protocol.messages import Control, Roster


def lie() -> None:
    honest = Context.send

    def send(self: Context, peer: str, message: Control) -> None:
        if isinstance(message, Roster) and lying.now():
            names = [m.peer for m in message.members]
            if peer in names and names.index(peer) % 2:
                message = _another(message, peer)
        honest(self, peer, message)

    Context.send = send  # type: ignore[method-assign]


def _another(roster: Roster, to: str) -> Roster:
    if roster.epoch % 2:
        count = len(roster.members)
        return replace(roster, reducers=tuple((index + 1) % count for index in roster.reducers))
    dropped = next((m for m in roster.members if m.weight and m.peer != to), None)
    members = tuple(Member(m.peer, 0, "", m.life) if m is dropped else m for m in roster.members)
    return replace(roster, members=members)


def broken(seen: Seen) -> list[str]:
    return []
