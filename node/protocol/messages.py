"""What peers say to each other, as typed values. `net/vocabulary.py` and `net/wire.py` turn them into frames.

Every message of a round names epoch and head (the state that the round starts from), so that nothing said
in one round, or on one side of a fork, is ever heard in another. All of them may be lost, doubled, delayed
or reordered without harm: they are repeated until their effect is seen, and repeating is idempotent.

Data messages carry a `blob`: a reference to bytes that the shell keeps. The core never sees a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from tapestry.node.protocol.agreement import Agreement, ShardSums
from tapestry.node.protocol.members import Change
from tapestry.node.protocol.record import Behind, Body, Member, Record

Blob = object  # opaque to the core: a key of the shell's store, or a value in the simulator

RECORDS_MAX = 64  # per RECORDS message
WAITING_MAX = 8  # peers named in a STATUS
RECEIPTS_MAX = 4  # in a READY. Guess: of the last ballots, should one leader have led them all


class Stage(IntEnum):
    """How far a peer is in its round."""

    AWAY = 0  # not at any head: starting, joining, stopping
    TRAINING = 1
    READY = 2
    EXCHANGING = 3
    ACCEPTED = 4


@dataclass(frozen=True, slots=True)
class Status:
    """The heartbeat, and the news: sent every heartbeat_s, and at once when head, state or ballot change."""

    epoch: int  # of its round's head; of its newest record while it is in none
    head: str
    state_epoch: int  # of the state on that chain that it holds, -1 if none; behind epoch while it catches up
    phase: str  # as in /status; for people
    stage: Stage
    ballot: int
    progress: int  # shards and accepts seen in this round; grows while the sender gets on
    waiting_on: tuple[str, ...]  # peers that hold the sender up, at most WAITING_MAX


@dataclass(frozen=True, slots=True)
class Call:
    """A leader asks for READY in its ballot (Paxos phase 1a)."""

    epoch: int
    head: str
    ballot: int
    forced: bool


@dataclass(frozen=True, slots=True)
class Receipt:
    """That this leader signed a roster with this digest: receipts.py."""

    leader: str
    epoch: int
    head: str
    ballot: int
    life: str  # of the leader's disk, as the roster names it
    digest: str  # of all that the roster says
    signature: str  # as in ROSTER


@dataclass(frozen=True, slots=True)
class Ready:
    """A promise to accept nothing of a lower ballot (phase 1b), and a contribution if there is one."""

    epoch: int
    head: str
    ballot: int
    forced: bool
    state_digest: str
    contribution: str  # "" if none
    weight: int  # tokens; 0 if none
    norm: float
    accepted_ballot: int  # -1 if nothing was accepted in this round
    accepted: Body | None
    life: str = ""  # as in Member
    unheard: tuple[str, ...] = ()  # electors and linked peers that the sender does not hear now
    refused: str = ""  # head of the body that the sender refused last in this round (gate.py)
    seat: str = (
        ""  # signature of seat_message(head, life): so a leader can prove who takes part, on which disk
    )
    receipts: tuple[Receipt, ...] = ()  # of the rosters that the sender was told last; at most RECEIPTS_MAX


@dataclass(frozen=True, slots=True)
class Closing:
    """The round is closing: end the inner steps and contribute what there is."""

    epoch: int
    head: str
    ballot: int


@dataclass(frozen=True, slots=True)
class Roster:
    """Who is averaged in this ballot, and who averages what (phase 2a)."""

    epoch: int
    head: str
    ballot: int
    forced: bool
    state_digest: str
    members: tuple[Member, ...]  # sorted by peer
    reducers: tuple[int, ...]  # shard index -> index in members
    changes: tuple[Change, ...] = ()  # as in Body
    behind: Behind | None = None  # as in Body
    signature: str = ""  # the leader's, of receipts.roster_message


@dataclass(frozen=True, slots=True)
class Propose:
    """The result that some member accepted in an earlier ballot, proposed again (phase 2a)."""

    epoch: int
    head: str
    ballot: int
    body: Body
    holders: tuple[str, ...]  # who has the result


@dataclass(frozen=True, slots=True)
class Accept:
    """A vote: the sender has every shard of the result, and its vote, on disk (phase 2b)."""

    epoch: int
    head: str
    ballot: int
    body_head: str  # of the body that is accepted: record epoch + 1
    result: str  # its result digest and
    agreement: Agreement  # figures, so that a leader who lacks the result can name the body
    signature: str  # of record.accept_message
    draw: str  # of record.draw_message: the same in every ballot


@dataclass(frozen=True, slots=True)
class Refuse:
    """No vote for this result: on the sender's own held-out data the state is worse for it (gate.py)."""

    epoch: int
    head: str
    ballot: int
    body_head: str  # as in Accept
    worse: float  # loss after less loss before; what the sender says, and nobody can check


@dataclass(frozen=True, slots=True)
class Leave:
    """The sender stops in good order and has left the round from `head`, and the next: see handover.py."""

    epoch: int
    head: str
    signature: str


@dataclass(frozen=True, slots=True)
class Seat:
    """The sender's disk was lost, and it takes no part in the round from `head`: it may have voted there. It
    asks to be named with the disk that it has now, to vote in the next one."""

    epoch: int
    head: str
    life: str
    signature: str  # as `seat` in READY


@dataclass(frozen=True, slots=True)
class Commit:
    record: Record


@dataclass(frozen=True, slots=True)
class Need:
    """Asks a peer for shards that did not come. `contribution` names its own; "" asks for the result."""

    epoch: int
    head: str  # of the state the round starts from
    ballot: int
    contribution: str
    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GetRecords:
    """Asks for the records after the newest of `known` that the receiver has too."""

    known: tuple[tuple[int, str], ...]  # (epoch, head), newest first


@dataclass(frozen=True, slots=True)
class Records:
    """Answers GetRecords: the consecutive records after the common one."""

    epoch: int  # of the common record
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Changes:
    """Changes of the roll that are not in a record yet, with the signatures that the sender knows of."""

    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """A contributor's encoded shard, on its way to the reducer. The contributor is the sender.

    That it is a shard of the contribution with this name is checked before the core hears of it.
    """

    epoch: int
    contribution: str
    shard: int
    blob: Blob
    path: tuple[str, ...] = ()  # that proves it: commitment.py


@dataclass(frozen=True, slots=True)
class Result:
    """A reduced shard, on its way to all."""

    epoch: int
    head: str  # of the state the round starts from
    ballot: int
    shard: int
    digest: str  # of the encoded bytes, computed by the receiver
    blob: Blob
    sums: ShardSums
    signature: str  # of the reducer: audit.mean_message


Control = (
    Status
    | Call
    | Ready
    | Closing
    | Roster
    | Propose
    | Accept
    | Refuse
    | Leave
    | Seat
    | Commit
    | Need
    | GetRecords
    | Records
    | Changes
)
Message = Control | Shard | Result
