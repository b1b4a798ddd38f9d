"""What people call the members of a run: by the names that the roll has of them (`tapestry admit --name`).

A name is a word of others: of who admits, or of a guest itself. So it is shown on one line, without control
characters, and cut; and where two members bear the same one, or one that looks like the end of a peer id,
the end of the peer id stands beside it: nobody passes for another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tapestry.node.errors import printable
from tapestry.node.protocol.members import NAME_CHARS_MAX, Roll, Seat

FORMER_MAX = 256  # members of before that are still called by their names. G7
THIS_NODE = "this node"


def short(peer: str) -> str:
    """The end of a peer id: all begin alike."""
    return f"…{peer[-6:]}"


class Names:
    """Of the newest roll that was learnt, and of who was in one before."""

    def __init__(self) -> None:
        self._me = ""
        self._members: Mapping[str, Seat] = {}
        self._names: dict[str, str] = {}  # peer -> name, "" if it has none; former members first
        self._bearers: Counter[str] = Counter()  # name -> how many of the members have it

    def learn(self, me: str, roll: Roll) -> None:
        """Names are of `roll` from now on. Cheap where nothing has changed."""
        self._me = me
        if roll.members is self._members:
            return
        self._members = roll.members
        former = [(peer, name) for peer, name in self._names.items() if peer not in roll.members]
        self._names = dict(former[-FORMER_MAX:])
        self._names |= {peer: _clean(seat.name) for peer, seat in roll.members.items()}
        self._bearers = Counter(self._names[peer] for peer in roll.members)

    def has(self, peer: str) -> bool:
        """Whether it is a member."""
        return peer in self._members

    def knows(self, peer: str) -> bool:
        """Whether it is a member, or was one of late."""
        return peer in self._names

    def name(self, peer: str) -> str:
        """As the roll has it, fit to be shown; "" if it has none."""
        return self._names.get(peer, "")

    def call(self, peer: str) -> str:
        """In a sentence."""
        if peer == self._me:
            return THIS_NODE
        name = self.name(peer)
        if not name:
            return short(peer)
        others = self._bearers[name] - (peer in self._members)
        unclear = others or name.startswith("…") or name == THIS_NODE
        return f"{name} ({short(peer)})" if unclear else name


def _clean(name: str) -> str:
    return printable(name)[:NAME_CHARS_MAX].strip()
