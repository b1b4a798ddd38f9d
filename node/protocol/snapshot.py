"""What the core shows of itself: `Core.snapshot(now)`, for status pages, metrics, logs and the shell; and of
that `Core.membership()` alone, which is asked more often.

Plain values, copied when they are asked for: whoever holds a snapshot can neither change the core nor see it
change. What the shell must *act* on comes as an output (events.py); a snapshot is for looking.

Imports nothing but the messages' stages, the records' agreement, the roll, and the form of a wait.
"""

from __future__ import annotations

from dataclasses import dataclass

from tapestry.node.protocol.agreement import Agreement
from tapestry.node.protocol.members import NO_ROLL, Change, Roll
from tapestry.node.protocol.messages import Stage
from tapestry.node.protocol.waits import Wait


@dataclass(frozen=True, slots=True)
class PeerSnapshot:
    """A peer whose link is up, as last heard."""

    peer_id: str
    phase: str  # its own word, as in /status; "" before its first STATUS
    epoch: int | None  # of its round; None before its first STATUS
    head: str
    same_head: bool  # it is at our head and holds the state of it
    taking_part: bool  # in a round, whichever
    heard_s: float  # seconds since


@dataclass(frozen=True, slots=True)
class Membership:
    """Who belongs to the run: asked for every stream that anybody opens, so it costs no look at the round."""

    epoch: int  # of the newest record
    roll: Roll  # of that record; never changed
    pending: tuple[Change, ...]  # changes that collect signatures, or wait for a record


@dataclass(frozen=True, slots=True)
class RoundSnapshot:
    """The round that this node is in."""

    epoch: int
    ballot: int
    leader: str
    stage: Stage
    forced: bool
    electorate: int  # count
    members: int  # count; 0 before there is a roster
    waiting_on: tuple[str, ...]  # peers that hold this node up


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A node at one moment."""

    peer_id: str
    run_id: str
    phase: str  # as in /status
    wait: Wait | None  # what the node waits for; None if for nothing but its own work
    at_head: bool  # it holds the state of its newest record
    chain_epoch: int  # of the newest record
    chain_head: str
    state_epoch: int  # of the state that the node holds; -1 if none
    state_head: str  # the record that made it; "" if none, or if it lies on a fork that was just left
    state_digest: str
    params: int  # count
    round: RoundSnapshot | None
    peers: tuple[PeerSnapshot, ...]  # sorted by peer id
    agreement: Agreement | None = None  # of the contributions that the newest record names; None at epoch 0
    roll: Roll = NO_ROLL  # of our newest record; never changed
    pending: tuple[Change, ...] = ()  # changes that collect signatures, or wait for a record

    @property
    def reason(self) -> str:
        """The phase, or what it waits for, in words."""
        return self.phase if self.wait is None else self.wait.text
