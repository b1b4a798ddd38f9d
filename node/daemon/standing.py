"""Whether the others still take this node for a member: who was removed while it was off, or cut off, asks.

Members end its links without a word, and the record that removes it never reaches it. So while no member that
is linked talks with it, a node that is a member by its own records asks one of the others every ASK_EVERY_S,
by the stream of those who are none (net/admission.py): first those who decide, then the rest, then all again.

"removed" is believed of as many of those who decide, by our own records, as a removal needs, and only while
nobody linked takes us for a member. They could sign the removal at any moment, so a lie gains them nothing.
Anybody else's lie ends no member's node: it is told in the log, once. Who talks with us makes it all void: a
removal may lie on a fork that the others do not follow.

Where others decide since our records, by a new key or another charter, nobody's word may be enough: then the
log is all there is. Two who were removed, and are linked with each other, do not ask.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from tapestry.dht.p2pd import SwarmError
from tapestry.node.daemon.admitted import removed
from tapestry.node.daemon.desk import Loop
from tapestry.node.errors import UserError
from tapestry.node.net.admission import Answer
from tapestry.node.net.wire import RemoteProtocolError, StreamEnded
from tapestry.node.protocol.members import Roll, authorities, needed

ASK_EVERY_S = 15.0  # Guess: links that were lost for a moment are back by then

_log = logging.getLogger("tapestry.node")


class Standing:
    """Asks, and keeps what was said."""

    def __init__(self, loop: Loop, me: str, ask: Callable[[str], Awaitable[Answer]]) -> None:
        self._loop = loop
        self._me = me
        self._ask = ask  # one question to this member, and its answer
        self._turn: list[str] = []  # whom to ask yet, this time round
        self._said: dict[str, str] = {}  # who says that we were removed -> why
        self._told: set[str] = set()  # of them, whom the log has

    async def watch(self) -> UserError:
        """Returns what is to end this node, once it is known to be removed."""
        while True:
            await asyncio.sleep(ASK_EVERY_S)
            ends = await self.look()
            if ends is not None:
                return ends

    async def look(self) -> UserError | None:
        """Ask one member, if nobody linked takes us for one; what is to end this node, if anything is."""
        if not self._is_cut_off():
            return None
        roll = self._loop.membership().roll
        self._turn = [peer for peer in self._turn if peer in roll.members] or self._all(roll)
        if not self._turn:
            return None
        peer = self._turn.pop(0)
        try:
            answer = await self._ask(peer)
        except (SwarmError, RemoteProtocolError, StreamEnded, TimeoutError, OSError) as error:
            _log.debug("standing=not_asked peer=%s reason=%r", peer[-6:], str(error))
            return None
        if not self._is_cut_off():  # by now
            return None
        if answer.standing != "removed":
            self._said.pop(peer, None)
            return None
        self._said[peer] = answer.why
        if len(authorities(roll, self._said)) >= needed(roll):
            return removed(answer.why)
        self._tell(peer, answer.why)
        return None

    def _is_cut_off(self) -> bool:
        """Whether we take ourselves for a member, and no member that is linked says what it does."""
        core = self._loop.snapshot()
        roll = core.roll
        if roll.may_contribute(self._me) and not any(
            peer.epoch is not None and peer.peer_id in roll.members for peer in core.peers
        ):
            return True
        self._turn.clear()
        self._said.clear()
        return False

    def _all(self, roll: Roll) -> list[str]:
        """The other members, those first who decide."""
        first = set(authorities(roll, roll.members))
        return sorted(roll.members.keys() - {self._me}, key=lambda peer: (peer not in first, peer))

    def _tell(self, peer: str, why: str) -> None:
        if peer not in self._told:
            self._told.add(peer)
            _log.warning(
                "removed=said peer=%s reason=%r next=go_on; it cannot decide that alone. Ask those who admit "
                "whether this node was removed",
                peer[-6:],
                why,
            )
