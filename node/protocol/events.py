"""The core's alphabet: what goes in, what comes out.

The shell executes the outputs of one `handle` call in their order, and those of an earlier call before those
of a later one. In particular a `Send` waits for the `PersistVote` before it. Jobs (Reduce, Apply, Fetch...)
are started in order but answer later, as inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from tapestry.node.protocol.agreement import ShardSums
from tapestry.node.protocol.audit import Input as Kept
from tapestry.node.protocol.audit import Order, SignedMean
from tapestry.node.protocol.equivocation import Equivocation
from tapestry.node.protocol.members import Change
from tapestry.node.protocol.messages import Blob, Control, Message, Stage
from tapestry.node.protocol.receipts import TwoRosters
from tapestry.node.protocol.record import Body, Record

# --- inputs -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeerUp:
    peer: str


@dataclass(frozen=True, slots=True)
class PeerDown:
    """A hint: every stream to the peer is gone. It may be back in a moment, or frozen without this."""

    peer: str


@dataclass(frozen=True, slots=True)
class Received:
    peer: str
    message: Message


@dataclass(frozen=True, slots=True)
class BulkProgress:
    """Bytes of a shard came in from `peer`; the shard is not complete yet."""

    peer: str


@dataclass(frozen=True, slots=True)
class PeerRefused:
    """The shell refused what `peer` sent (not finite, wrong length...): its contribution cannot be used."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; sent at `Core.wakeup_at`."""


@dataclass(frozen=True, slots=True)
class Contributed:
    """The trainer finished: its contribution lies encoded in the shell."""

    epoch: int
    base: str  # head of the state that it was made from, as in Train
    contribution: str  # its name: commitment.py
    weight: int
    norm: float
    blobs: tuple[Blob, ...]  # one per shard


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Whether a contribution can be expected. While it is down this node votes and does not contribute."""

    up: bool
    reason: str
    ends: str = ""  # what would end that it is down, and what a person can do


@dataclass(frozen=True, slots=True)
class Reduced:
    epoch: int
    head: str  # as in Reduce
    ballot: int
    shard: int
    digest: str
    blob: Blob
    sums: ShardSums


@dataclass(frozen=True, slots=True)
class Judged:
    """By how much the held-out loss is worse after the step of this body; None if it was not measured."""

    epoch: int
    head: str  # of the state the round starts from
    body_head: str
    worse: float | None


@dataclass(frozen=True, slots=True)
class Applied:
    """State `epoch` is reached; also the answer to Rollback and FetchState."""

    epoch: int
    state_digest: str


@dataclass(frozen=True, slots=True)
class UpdateFetched:
    """The update of `head` lies in the update log, its digest checked; of a value that was accepted, its
    signatures too."""

    head: str
    means: tuple[SignedMean, ...] = ()  # of a value that was accepted


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """The job could not be done with this donor. `donor` is "" when our own disk failed us."""

    donor: str
    head: str  # of the update that was asked for; "" for a state
    reason: str  # "missing" if the donor does not keep it (any more)
    others: tuple[str, ...] = ()  # of a state: further donors that failed


@dataclass(frozen=True, slots=True)
class Stopping:
    """This node leaves: tell the others, so that nobody waits for it."""


@dataclass(frozen=True, slots=True)
class ChangeAsked:
    """Whoever runs this node, or an applicant with an invitation, asks for a change of the roll.

    `sign`: with this node's signature. One that is known already gets it too: that is how it is approved.
    """

    change: Change
    sign: bool = True


Input = (
    PeerUp
    | PeerDown
    | Received
    | BulkProgress
    | PeerRefused
    | Tick
    | Contributed
    | TrainerState
    | Reduced
    | Judged
    | Applied
    | UpdateFetched
    | FetchFailed
    | ChangeAsked
    | Stopping
)

# --- outputs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Vote:
    """What an acceptor must never forget within one round.

    And a name for the disk that it is on. Rounds after a record that names a member with this life are newer
    than the disk; in any other whose electorate has the member, it may have voted and lost the disk since.
    """

    epoch: int
    head: str  # of the state the round starts from
    promised: int
    accepted_ballot: int  # -1: none
    accepted: Body | None
    life: str = ""
    standing: tuple[int, int, int] = (0, 0, 0)  # of `head`, as in Tip: where this round is among all others
    left: str = ""  # the head from which we left: then nobody else's leave counts for us (handover.py)


@dataclass(frozen=True, slots=True)
class Send:
    peer: str
    message: Control


@dataclass(frozen=True, slots=True)
class Broadcast:
    """The same to each of `peers`."""

    peers: tuple[str, ...]
    message: Control


@dataclass(frozen=True, slots=True)
class SendShard:
    peer: str
    epoch: int
    contribution: str
    shard: int
    blob: Blob


@dataclass(frozen=True, slots=True)
class SendResult:
    peer: str
    epoch: int
    head: str  # of the state the round starts from
    ballot: int
    shard: int
    blob: Blob
    sums: ShardSums
    signature: str  # ours


@dataclass(frozen=True, slots=True)
class Reduce:
    epoch: int
    head: str  # of the state the round starts from; comes back in Reduced
    ballot: int  # that last changed the members; comes back in Reduced
    shard: int
    blobs: tuple[Blob, ...]  # in roster order, of those with weight
    weights: tuple[int, ...]
    peers: tuple[str, ...]  # whose they are; to name who sent what cannot be used


@dataclass(frozen=True, slots=True)
class KeepResult:
    """A shard of the round's result has come, or was reduced here: it can be written before all are there.

    Another one of the same shard takes its place. PersistResult says what the result is in the end.
    """

    shard: int
    digest: str
    blob: Blob


@dataclass(frozen=True, slots=True)
class PersistVote:
    vote: Vote


@dataclass(frozen=True, slots=True)
class PersistResult:
    """Write the encoded result of the body with this head to the update log, before the vote for it, and
    beside it who made it: whoever lacks the result asks for both."""

    epoch: int  # of the state it makes
    head: str
    blobs: tuple[Blob, ...]
    means: tuple[SignedMean, ...]


@dataclass(frozen=True, slots=True)
class Judge:
    """Take the step of `body` aside and measure it on held-out data. Answer: Judged."""

    body: Body
    head: str  # of the body
    blobs: tuple[Blob, ...]  # the encoded result


@dataclass(frozen=True, slots=True)
class Gated:
    """What the gate made of a result of the round that started from `epoch`: for people.

    passed | unmeasured | refused | went_on (too bad, and accepted all the same), by this node's own data, or
    again: we led a ballot that a majority refused, and the next one is without `peer`.
    """

    epoch: int
    outcome: str
    worse: float  # loss after less before; NaN if unknown
    peer: str  # whose contribution differs most from the others, if that matters


@dataclass(frozen=True, slots=True)
class AppendRecord:
    record: Record
    newest: bool = True  # False if another that follows it has come with it


@dataclass(frozen=True, slots=True)
class SwitchChain:
    """Leave a fork: these records take the place of those after `epoch`. In one write, so that a crash
    leaves the one chain or the other, and never a head that we have left before (docs/decisions/007).

    No records: those after `epoch` are left for what was before them (docs/decisions/025)."""

    epoch: int
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Apply:
    """Advance state epoch - 1 by the update of this record, from the update log. Answer: Applied."""

    record: Record


@dataclass(frozen=True, slots=True)
class Rollback:
    """Bring about state `epoch`, from a checkpoint and updates of our own, by the path to it: after a fork
    was left, or where a record has rolled the run back. Answer: Applied, perhaps of an earlier epoch on that
    path, or FetchFailed("")."""

    epoch: int


@dataclass(frozen=True, slots=True)
class FetchUpdate:
    """Get an update into the update log. Answer: UpdateFetched or FetchFailed.

    Of a value that somebody says to have accepted nobody has signed a record yet: its donor must have the
    signatures of those who made it as well (audit.means_fault), and they are kept beside it.
    """

    epoch: int  # of the state it makes
    head: str  # of its record
    result: str  # digest that the bytes must have
    donor: str
    accepted: Body | None = None  # of a value that was accepted


@dataclass(frozen=True, slots=True)
class FetchState:
    """Get a checkpoint from donors: one on the path to the head, whose digest the chain has signed.

    Answer: Applied, or FetchFailed of the first of them.
    """

    donors: tuple[str, ...]
    epoch_max: int
    epoch_min: int = 0  # one before it takes us back: it is as good as none


@dataclass(frozen=True, slots=True)
class Train:
    """Make a contribution from state `epoch`. Whatever an earlier Train was to give is void: not even a late
    answer may come, since the state of an epoch is another on another side of a fork."""

    epoch: int
    base: str  # head of that state
    before: str  # head of the state before it; "" at the genesis


@dataclass(frozen=True, slots=True)
class CloseTraining:
    """End the inner steps of `epoch` early."""

    epoch: int


@dataclass(frozen=True, slots=True)
class ExchangeBegan:
    """Phase 2 of a ballot begins. A trainer that has contributed to `epoch` may go on meanwhile."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Audit:
    """A record was made: what it draws of what we have (drawn.py). Before EndRound."""

    record: Record
    digests: tuple[str, ...]  # of the result's shards; () if we do not have it, and then there are no orders
    orders: tuple[Order, ...]  # what this node is to average again
    seconds: tuple[Order, ...]  # what it is to if it is asked
    kept: tuple[Kept, ...]  # what auditors may ask for


@dataclass(frozen=True, slots=True)
class Equivocated:
    """A peer has signed two values in one ballot (equivocation.py), or two rosters (receipts.py): proven."""

    proof: Equivocation | TwoRosters


@dataclass(frozen=True, slots=True)
class EndRound:
    """Nothing of the round that started from `epoch` is needed in memory any more."""

    epoch: int
    outcome: str  # committed | aborted | missed | forced
    counted: str  # our contribution that the record names; "" if none
    likeness: tuple[tuple[str, float], ...] = ()  # of its contributors, if we have the result: likeness.py


@dataclass(frozen=True, slots=True)
class Moved:
    """What people are shown has changed: how far this node's state is, or what the node is doing."""

    epoch: int  # of the state that the node holds; -1 if none
    phase: str  # as in /status
    stage: Stage  # of its round; AWAY if it is in none


@dataclass(frozen=True, slots=True)
class Verdict:
    """Something of `peer` was refused: count it, name it."""

    peer: str
    reason: str
    text: str


@dataclass(frozen=True, slots=True)
class Note:
    """A change of state, for the log."""

    text: str


Output = (
    Send
    | Broadcast
    | SendShard
    | SendResult
    | Reduce
    | KeepResult
    | PersistVote
    | PersistResult
    | Judge
    | Gated
    | AppendRecord
    | SwitchChain
    | Apply
    | Rollback
    | FetchUpdate
    | FetchState
    | Train
    | CloseTraining
    | ExchangeBegan
    | Audit
    | Equivocated
    | EndRound
    | Moved
    | Verdict
    | Note
)
