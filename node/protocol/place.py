"""Where a run stands after a record, and what may follow: electorates, fork choice, judging a record (G6).

State e is what e committed updates made of the genesis. Record e+1 says which contributions made state
e+1 out of state e, and is signed by a quorum of the electorate that record e named. Records themselves, their
digests and their text: record.py. A whole chain of them: chain.py.

What a record is worth when two chains meet (`Tip`) and who belongs to the run (`Roll`) are functions of the
bodies alone: see docs/decisions/010-members.md.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tapestry.node.protocol.canon import Crypto, InvalidRecord, quorum
from tapestry.node.protocol.handover import handover_fault, seats_needed
from tapestry.node.protocol.members import Roll, changes_fault, first_roll
from tapestry.node.protocol.record import (
    Behind,
    Body,
    Genesis,
    Member,
    Record,
    accept_message,
    draw_message,
    seat_message,
)
from tapestry.node.protocol.voice import voice_weights

ELECTORATE_MIN = 3  # two of three go on without the third, whoever that is
UNNAMED_MAX = 64  # records in a row that need not name one that stays. Guess: enough to mend a machine


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
