"""Heads, electorates and fork choice: what may follow what, and where a run stands (G6).

State e is what e committed updates made of the genesis. Record e+1 says which contributions made state
e+1 out of state e, and is signed by a quorum of the electorate that record e named. Records themselves, their
digests and their text: record.py.

What a record is worth when two chains meet (`Tip`) and who belongs to the run (`Roll`) are functions of the
bodies alone: see docs/decisions/010-members.md.

`Chain` keeps the newest records in memory. Older ones lie in a `Past`, the store's files for a node
(disk/chain_file.py), and are read when they are asked for; without a Past all of them stay in memory, as in
the simulator (docs/decisions/017-chain-on-disk.md).

Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, overload

from tapestry.node.protocol.canon import EPOCH_MAX as EPOCH_MAX
from tapestry.node.protocol.canon import MEMBERS_MAX as MEMBERS_MAX
from tapestry.node.protocol.canon import WEIGHT_MAX as WEIGHT_MAX
from tapestry.node.protocol.canon import Crypto as Crypto
from tapestry.node.protocol.canon import InvalidRecord as InvalidRecord
from tapestry.node.protocol.canon import canonical as canonical
from tapestry.node.protocol.canon import quorum as quorum
from tapestry.node.protocol.handover import handover_fault, seats_needed
from tapestry.node.protocol.members import Roll, changes_fault, first_roll, voice_weights
from tapestry.node.protocol.path import last_before, leads, step_from, stretches, updates_from
from tapestry.node.protocol.record import BALLOT_MAX as BALLOT_MAX
from tapestry.node.protocol.record import VERSION as VERSION
from tapestry.node.protocol.record import Behind as Behind
from tapestry.node.protocol.record import Body as Body
from tapestry.node.protocol.record import Genesis as Genesis
from tapestry.node.protocol.record import Member as Member
from tapestry.node.protocol.record import OtherVersion as OtherVersion
from tapestry.node.protocol.record import Record as Record
from tapestry.node.protocol.record import accept_message as accept_message
from tapestry.node.protocol.record import behind_from as behind_from
from tapestry.node.protocol.record import behind_to_list as behind_to_list
from tapestry.node.protocol.record import body_from_dict as body_from_dict
from tapestry.node.protocol.record import body_to_dict as body_to_dict
from tapestry.node.protocol.record import changes_from as changes_from
from tapestry.node.protocol.record import draw_message as draw_message
from tapestry.node.protocol.record import found as found
from tapestry.node.protocol.record import genesis_from_dict as genesis_from_dict
from tapestry.node.protocol.record import genesis_to_dict as genesis_to_dict
from tapestry.node.protocol.record import head_of as head_of
from tapestry.node.protocol.record import member_from as member_from
from tapestry.node.protocol.record import member_to_list as member_to_list
from tapestry.node.protocol.record import record_bytes as record_bytes
from tapestry.node.protocol.record import record_from_dict as record_from_dict
from tapestry.node.protocol.record import record_to_dict as record_to_dict
from tapestry.node.protocol.record import seat_message as seat_message
from tapestry.node.protocol.record import wire_bytes as wire_bytes
from tapestry.node.protocol.settings import Settings

ELECTORATE_MIN = 3  # two of three go on without the third, whoever that is
UNNAMED_MAX = 64  # records in a row that need not name one that stays. Guess: enough to mend a machine
RECENT = 256  # records of a chain with a past that stay in memory. Guess: 7 MB of 64 members
PAGE = 256  # records that are read at a time


class Standing(NamedTuple):
    """What stands behind a record: a function of the bodies up to it, and so of its head."""

    full: int  # records so far that a majority of the last full electorate signed
    electorate: tuple[str, ...]  # the last full one
    roll: Roll  # of that moment: whose voices count behind what came after
    signers: tuple[str, ...]  # of that roll, who signed records since; sorted
    voice: int  # theirs
    since: int  # records since; 0: this one is full


class Tip(NamedTuple):
    """Where a chain ends, as fork choice sees it. A node only ever moves to a tip that beats its own."""

    full: int
    voice: int
    since: int
    head: str

    def beats(self, other: Tip) -> bool:
        """What full electorates signed comes first, then the voices behind what smaller sets made, then its
        length, then the lower head. Every record that is appended makes a tip that beats the one before."""
        mine, theirs = (self.full, self.voice, self.since), (other.full, other.voice, other.since)
        return mine > theirs or (mine == theirs and self.head < other.head)


def why_lost(ours: Tip, theirs: Tip) -> str:
    """Why fork choice leaves `ours` for `theirs`, in words: the first in which they differ of what `beats`
    compares."""
    if ours.full != theirs.full:
        return f"{ours.full} records by most of the last full electorate, against {theirs.full}"
    if ours.voice != theirs.voice:
        return f"{ours.voice} voices of the last full electorate's members, against {theirs.voice}"
    if ours.since != theirs.since:
        return f"as many voices ({ours.voice}), and {ours.since} records since, against {theirs.since}"
    return "as many voices and records, and the other head is the lower one"


class Place(NamedTuple):
    """Where a chain is after a record: all that it takes to judge the next one."""

    epoch: int
    head: str
    electorate: tuple[str, ...]
    roll: Roll
    standing: Standing
    unnamed: tuple[tuple[str, int], ...] = ()  # electors that stay, and how many records did not name them
    seats: frozenset[tuple[str, str]] = frozenset()  # (peer, life) of all that the record names

    @property
    def heads(self) -> tuple[str, ...]:
        """Ours, and as much as the roll has of the one before."""
        return (self.head, *self.roll.heads[-1:])

    @property
    def tip(self) -> Tip:
        s = self.standing
        return Tip(s.full, s.voice, s.since, self.head)


def leader_order(electorate: Iterable[str], head: str, crypto: Crypto) -> tuple[str, ...]:
    """Who leads ballot b: entry b mod n. Another order after every head, so nobody leads by right."""
    return tuple(sorted(electorate, key=lambda peer: (crypto.digest(f"{head}|{peer}".encode()), peer)))


def genesis_place(genesis: Genesis) -> Place:
    """Where a run begins: its founder decides the first round, and all founders belong to it."""
    founders = genesis.founders or (genesis.founder,)
    roll = first_roll(genesis.run_id, genesis.charter, founders)
    electorate = (genesis.founder,)
    return Place(0, genesis.run_id, electorate, roll, Standing(0, electorate, roll, (), 0, 0))


def next_place(at: Place, record: Record) -> Place:
    """Where the chain is after a checked record."""
    body = record.body
    roll = at.roll.after(body.epoch, at.head, body.changes, [(m.peer, m.weight) for m in body.members])
    electorate, unnamed = _next_electorate(at, body, roll)
    stay = {peer for peer, _ in unnamed}
    seats = frozenset([(m.peer, m.life) for m in body.members]) | {s for s in at.seats if s[0] in stay}
    standing = _next_standing(at, body, electorate, roll)
    return Place(body.epoch, record.head, electorate, roll, standing, unnamed, seats)


def _next_electorate(
    at: Place, body: Body, roll: Roll
) -> tuple[tuple[str, ...], tuple[tuple[str, int], ...]]:
    """Who decides what follows `body`, sorted: its members that may vote, and who else stays, `unnamed`.

    An electorate of ELECTORATE_MIN or more does not fall below it by who is named: electors that are members
    still stay beside them, named or not. So in a run that had three no one elector is ever needed, or enough,
    whoever leads; and the vote of one that is back counts. Who is gone for UNNAMED_MAX records is no elector.
    An island, whose record is forced, is decided by those who are on it.
    docs/decisions/024-three-electors.md
    """
    named = roll.voters([m.peer for m in body.members])
    lacking = ELECTORATE_MIN - len(named)
    if body.forced or lacking <= 0 or len(at.electorate) < ELECTORATE_MIN:
        return named, ()
    so_far = dict(at.unnamed)
    left_out = [(p, so_far.get(p, 0) + 1) for p in roll.voters(at.electorate) if p not in named]
    unnamed = tuple([(p, count) for p, count in left_out if count <= UNNAMED_MAX][:lacking])
    return tuple(sorted({*named, *[p for p, _ in unnamed]})), unnamed


def _next_standing(at: Place, body: Body, electorate: tuple[str, ...], roll: Roll) -> Standing:
    """What stands behind the state that `body` makes.

    An ordinary record after a full one is full: a majority of that electorate signed it. After a forced one
    it is not, whatever quorum of the island it has, until a body shows that a majority of the last full
    electorate signed one record of this side: then that record is full, and its electorate the last full one.
    """
    before = at.standing
    full, last, last_roll, signers, count = (
        before.full,
        before.electorate,
        before.roll,
        before.signers,
        before.since,
    )
    if count and body.behind is not None:
        told = [p for p, _ in body.behind.signatures]
        if is_majority(told, last):
            full, last, last_roll, signers, count = full + 1, at.electorate, at.roll, (), 0
        else:
            signers = tuple(sorted({*signers, *told}))
    if not count and not body.forced:
        return Standing(full + 1, electorate, roll, (), 0, 0)
    if body.forced:
        signers = tuple(sorted({*signers, *[m.peer for m in body.members if m.peer in last_roll.members]}))
    voice = sum(last_roll.voice_of(p) for p in signers)
    return Standing(full, last, last_roll, signers, voice, count + 1)


def is_majority(peers: Iterable[str], electorate: Sequence[str]) -> bool:
    named = set(peers)
    return sum(p in named for p in electorate) >= quorum(len(electorate))


def waits(at: Place, on_quorum_loss: str) -> bool:
    """Whether nobody may go on after `at` without a quorum. `auto`: where three or more decide, or did."""
    if on_quorum_loss == "auto":
        return len(at.electorate) >= ELECTORATE_MIN or len(at.standing.electorate) >= ELECTORATE_MIN
    return on_quorum_loss == "wait"


def behind_of(at: Place, record: Record | None) -> Behind | None:
    """What a body after `record` has to tell of it; None if it stands by itself, or nobody's voice is new."""
    if not at.standing.since or record is None:
        return None
    known = at.standing.roll.members
    signatures = tuple([pair for pair in record.signatures if pair[0] in known])
    told = [p for p, _ in signatures]
    if not told or (set(told) <= set(at.standing.signers) and not is_majority(told, at.standing.electorate)):
        return None
    return Behind(record.ballot, signatures)


def body_fault(body: Body, at: Place, max_influence: float, crypto: Crypto) -> str | None:
    """Why `body` cannot follow `at`, whoever signs it, in a word; None if it can."""
    roll = at.roll
    if body.run_id != roll.run_id:
        return "foreign"
    if body.epoch != at.epoch + 1 or body.prev != at.head:
        return "unlinked"
    for member in body.members:
        if not roll.may_contribute(member.peer) or (member.peer not in roll.members and not member.weight):
            return "not_member"
    named = {m.peer for m in body.members}.intersection(at.electorate)
    if not body.forced and len(named) < seats_needed(len(at.electorate)):
        return "electorate"
    contributors = [m for m in body.members if m.contribution]
    weights = voice_weights(roll, [(m.peer, m.tokens) for m in contributors], max_influence)
    if weights != [m.weight for m in contributors]:
        return "weights"
    named_fault = _seats_fault(body, at, crypto) or _behind_fault(body.behind, at, crypto)
    return named_fault or changes_fault(
        roll, body.epoch, body.changes, [m.peer for m in body.members], crypto
    )


def seat_of(at: Place, member: Member, forced: bool, signature: str) -> str:
    """What stands in its line of an ordinary record after `at`: its seat's signature, unless a contribution
    says that it takes part and the record before that it has this disk. Of a forced one all members sign."""
    known = member.weight > 0 and (member.peer, member.life) in at.seats
    return "" if forced or known else signature


def _seats_fault(body: Body, at: Place, crypto: Crypto) -> str | None:
    """Nobody is named as a voter, or on another disk than in the record before, without its own word."""
    for member in body.members:
        if not seat_of(at, member, body.forced, "needed"):
            if member.seat:
                return "seat"
        elif not crypto.verify(member.peer, member.seat, seat_message(at.head, member.life)):
            return "seat"
    return None


def _behind_fault(behind: Behind | None, at: Place, crypto: Crypto) -> str | None:
    if behind is None:
        return None
    if not at.standing.since:
        return "behind"
    message = accept_message(at.head, behind.ballot)
    for peer, signature in behind.signatures:
        if peer not in at.standing.roll.members or not crypto.verify(peer, signature, message):
            return "behind"
    return None


def check_record(
    record: Record, at: Place, crypto: Crypto, max_influence: float = 1.0, on_quorum_loss: str = "continue"
) -> None:
    """Whether `record` follows `at` by a decision of its electorate. Raises InvalidRecord.

    An ordinary record needs one ballot's signatures of a quorum, and its members must hold a quorum too, so
    that electorates overlap from round to round; of two electors one may have left (handover.py). A forced
    one needs the signature of every member it names, one of the electorate among them, and a run that lets an
    island go on. Only members sign anything. Of the draws only the form is checked: who audits the record
    checks their signatures (`false_draws`), so that history costs one signature a voter.
    """
    body, electorate = record.body, at.electorate
    fault = body_fault(body, at, max_influence, crypto)
    if fault is not None:
        raise InvalidRecord(fault, f"record {body.epoch} cannot follow {at.head[:12]}: {fault}")
    members = {m.peer for m in body.members}
    signers = {peer for peer, _ in record.signatures}
    if body.forced:
        if waits(at, on_quorum_loss):
            raise InvalidRecord("forced", f"record {body.epoch} is forced, in a run that waits")
        if signers != members:
            raise InvalidRecord("unsigned", f"forced record {body.epoch} lacks a member's signature")
        if members.isdisjoint(electorate):
            raise InvalidRecord("electorate", f"forced record {body.epoch} by strangers to the electorate")
        if record.handover is not None:
            raise InvalidRecord("handover", f"forced record {body.epoch} bears a leave")
    else:
        count, need = sum(p in signers for p in electorate), quorum(len(electorate))
        if record.handover is not None:
            fault = handover_fault(record.handover, at.heads, electorate, signers, crypto)
            if fault is not None:
                raise InvalidRecord(fault, f"record {body.epoch}: the leave that it bears stands for no vote")
            count += 1
        if count < need:
            raise InvalidRecord("unsigned", f"record {body.epoch}: {count} signed, need {need}")
    if not signers <= members.union(electorate):
        raise InvalidRecord("unsigned", f"record {body.epoch} is signed by a stranger")
    if [peer for peer, _ in record.draws] != [peer for peer, _ in record.signatures]:
        raise InvalidRecord("draw", f"record {body.epoch} has not one draw for each of its signatures")
    message = accept_message(record.head, record.ballot)
    for peer, signature in record.signatures:
        if not crypto.verify(peer, signature, message):
            raise InvalidRecord("signature", f"record {body.epoch}: bad signature of {peer}")


def false_draws(record: Record, crypto: Crypto) -> tuple[str, ...]:
    """Whose draw in `record` is not theirs: none in one that an honest leader made."""
    message = draw_message(record.head)
    return tuple([p for p, signature in record.draws if not crypto.verify(p, signature, message)])


class Past(Protocol):
    """Records that lie elsewhere, from the first on: what is read of them is what was appended.

    It may lag behind the chain that reads it, by what was decided and is not written yet, and lose its end
    when a fork is left; `switches` says how often that was.
    """

    @property
    def switches(self) -> int: ...

    def __len__(self) -> int: ...

    def head_at(self, epoch: int) -> str:
        """Of record `epoch`, from 1 on; "" where there is none."""
        ...

    def read(self, epoch: int, count_max: int) -> tuple[Record, ...]:
        """Records after `epoch`, in order."""
        ...

    def kept(self, epoch: int) -> Point | None:
        """The last place up to `epoch` that is kept, so that not all records before must be read again."""
        ...


class Point(NamedTuple):
    """What the records up to an epoch come to."""

    place: Place
    tokens: int  # that members say they trained on


def walk(at: Point, past: Past, epoch: int) -> Point:
    """From `at` to `epoch`, by the records between. Raises LookupError where they are gone."""
    place, tokens = at
    while place.epoch < epoch:
        page = past.read(place.epoch, min(PAGE, epoch - place.epoch))
        if not page:
            raise LookupError(f"record {place.epoch + 1} is gone")
        for record in page:
            place = next_place(place, record)
        tokens += tokens_of(page)
    return Point(place, tokens)


def point_at(genesis: Genesis, past: Past, epoch: int, known: Point | None = None) -> Point:
    """Of one of the past's epochs. `known`: one from where to go, if it is of no later epoch."""
    start = past.kept(epoch) or Point(genesis_place(genesis), 0)
    if known is not None and start.place.epoch < known.place.epoch <= epoch:
        start = known
    return walk(start, past, epoch)


class Chain:
    """The records from the genesis to the head, each checked when it was added.

    Of `past`, records up to `_base` are ours; those after them, which it may have too, are in `_tail`. The
    tail is cut when the past has them, but not while it lags behind a fork that we left: what lies there then
    may be of the other side.
    """

    def __init__(
        self,
        genesis: Genesis,
        records: Iterable[Record] = (),  # that follow `past`; from our own disk: checked before
        past: Past | None = None,
        recent: int = RECENT,  # records that stay in memory at least
    ) -> None:
        self.genesis = genesis
        self._past = past
        self._recent = recent
        self._switches = 0  # as the past will count them when it has caught up
        self._base = 0
        self._tail: list[Record] = []  # of epochs _base + 1 and on
        self._places = [genesis_place(genesis)]  # after epochs _base and on
        self._walked: Point | None = None  # the last that was asked for before _base
        self.tokens = 0  # that members say they trained on, up to the head
        if past is not None:
            self._open(past)
        for record in records:
            self.append(record)

    def _open(self, past: Past) -> None:
        count = len(past)
        self._switches, self._base = past.switches, max(0, count - self._recent)
        place, self.tokens = point_at(self.genesis, past, self._base)
        self._places = [place]
        for record in past.read(self._base, count - self._base):
            self.append(record)

    @property
    def epoch(self) -> int:
        return self._base + len(self._tail)

    @property
    def head(self) -> str:
        return self._places[-1].head

    @property
    def place(self) -> Place:
        return self._places[-1]

    @property
    def tip(self) -> Tip:
        return self._places[-1].tip

    @property
    def roll(self) -> Roll:
        """Who belongs to the run now."""
        return self._places[-1].roll

    @property
    def records(self) -> Sequence[Record]:
        """records[i].body.epoch == i + 1; those before the newest are read when they are asked for."""
        return self._tail if self._past is None else _Records(self)

    def head_at(self, epoch: int) -> str:
        """The head of `epoch`; "" where we have none, so that it equals nobody's."""
        if self._base <= epoch <= self.epoch:
            return self._places[epoch - self._base].head
        if not epoch:
            return self.genesis.run_id
        return self._past.head_at(epoch) if self._past is not None and 0 < epoch < self._base else ""

    def place_at(self, epoch: int) -> Place:
        """Where the chain was after record `epoch`."""
        if epoch >= self._base:
            return self._places[epoch - self._base]
        return self._before(epoch).place

    def electorate_at(self, epoch: int) -> tuple[str, ...]:
        return self.place_at(epoch).electorate

    @property
    def rolled(self) -> Mapping[int, int]:
        """As in Roll, of the head's: what path.py asks for."""
        return self.roll.rolled

    def leads(self, at: int, epoch: int | None = None) -> bool:
        """Whether state `at` lies on the path to state `epoch`, or the head's."""
        return leads(self.rolled, at, self.epoch if epoch is None else epoch)

    def step_from(self, at: int, epoch: int | None = None) -> int:
        """The next epoch on the way from state `at` to state `epoch`, or the head's."""
        return step_from(self.rolled, at, self.epoch if epoch is None else epoch)

    def last_before(self, at: int) -> int:
        """The newest epoch on the path to the head's state that is not after `at`."""
        return last_before(self.rolled, at, self.epoch)

    def updates_after(self, at: int, count_max: int) -> tuple[Record, ...]:
        """Records whose updates lead on from state `at` to the head's, so many at most, and not beyond where
        the state is an earlier one again."""
        if self.rolled:
            count_max = min(count_max, updates_from(self.rolled, at, self.epoch))
        return self.after(at, count_max)

    def state_digest_at(self, epoch: int) -> str | None:
        """The digest of state `epoch` as signed: by the genesis or by the record after. None at the head,
        unless that is an earlier state again."""
        if epoch == 0:
            return self.genesis.state_digest
        if epoch in self.rolled:
            return self.state_digest_at(self.rolled[epoch])
        after = self.after(epoch, 1)
        return after[0].body.state_digest if after else None

    def append(self, record: Record) -> None:
        """A checked record. Our bug if it does not follow."""
        assert record.body.epoch == self.epoch + 1 and record.body.prev == self.head
        self._places.append(next_place(self._places[-1], record))
        self._tail.append(record)
        self.tokens += tokens_of((record,))
        if self._past is not None and len(self._tail) >= 2 * self._recent:
            self._let_go(self._past)

    def _let_go(self, past: Past) -> None:
        """Of what the past has by now, keep only the newest in memory."""
        if past.switches != self._switches:
            return
        count = min(len(self._tail) - self._recent, len(past) - self._base)
        if count > 0:
            assert past.head_at(self._base + count) == self._tail[count - 1].head
            del self._tail[:count], self._places[:count]
            self._base += count

    def switch(self, epoch: int, records: Sequence[Record]) -> tuple[int, int]:
        """Leave a fork: checked records take the place of those after `epoch`. How many were dropped, and how
        many tokens are behind those."""
        count, tokens = self.epoch - epoch, self.tokens
        if epoch >= self._base:
            self.tokens -= tokens_of(self._tail[epoch - self._base :])
            del self._tail[epoch - self._base :], self._places[epoch + 1 - self._base :]
        else:
            place, self.tokens = self._before(epoch)
            self._base, self._tail, self._places, self._walked = epoch, [], [place], None
        self._switches += 1
        tokens -= self.tokens
        for record in records:
            self.append(record)
        return count, tokens

    def _before(self, epoch: int) -> Point:
        """What the past says of an epoch before the tail."""
        assert self._past is not None and epoch >= 0
        self._walked = point_at(self.genesis, self._past, epoch, self._walked)
        return self._walked

    def after(self, epoch: int, count_max: int) -> tuple[Record, ...]:
        """Records after `epoch`, so many at most."""
        if epoch >= self._base:
            return tuple(self._tail[epoch - self._base : epoch - self._base + count_max])
        assert self._past is not None
        count = min(count_max, self._base - epoch)
        found = self._past.read(epoch, count)
        if len(found) < count:  # a fork was left since this copy was made: nothing later follows
            return found
        return found + self.after(self._base, count_max - len(found))

    def settings_of(self, record: Record) -> Settings:
        """What records before it have changed of the spec: it is a record of this chain."""
        return self.place_at(record.body.epoch - 1).roll.settings

    def check(
        self,
        record: Record,
        crypto: Crypto,
        max_influence: float = 1.0,
        on_quorum_loss: str = "continue",
    ) -> None:
        """Whether `record` may be appended. Raises InvalidRecord."""
        check_record(record, self.place, crypto, max_influence, on_quorum_loss)


class _Records(Sequence[Record]):
    """Of a chain with a past. A slice is read whole; to go over all of them reads a page at a time."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain

    def __len__(self) -> int:
        return self._chain.epoch

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Record, ...]: ...

    def __getitem__(self, index: int | slice) -> Record | tuple[Record, ...]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1
            return self._chain.after(start, max(0, stop - start))
        epoch = index if index >= 0 else len(self) + index
        found = self._chain.after(epoch, 1) if 0 <= epoch < len(self) else ()
        if not found:
            raise IndexError(f"no record {epoch + 1}")
        return found[0]

    def __iter__(self) -> Iterator[Record]:
        return records_from(self._chain, 0, self._chain.epoch)


def records_from(chain: Chain, epoch: int, end: int) -> Iterator[Record]:
    """Those after `epoch` up to `end`, however many, a page at a time."""
    while epoch < end:
        page = chain.after(epoch, min(PAGE, end - epoch))
        if not page:
            raise LookupError(f"record {epoch + 1} is gone")
        yield from page
        epoch += len(page)


def makers(chain: Chain, epoch: int) -> Iterator[Record]:
    """The records whose updates made state `epoch`: without those that were undone."""
    for stretch in stretches(chain.rolled, epoch):
        yield from records_from(chain, stretch.start, stretch.stop - 1)


def tokens_of(records: Iterable[Record]) -> int:
    """That their members say they trained on."""
    return sum(m.tokens for r in records for m in r.body.members)
