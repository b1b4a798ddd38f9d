"""Who belongs to a run, what each voice weighs, and who may change that (G8, G9).

docs/decisions/010-members.md says why it is so.

The genesis names the founders and the charter. Everything after is a `Change`: collected outside of rounds,
signed by as many as the charter asks, and carried in the body of a record, so that the consensus that decides
the record decides the change. It is in force from the state that the record makes, at every member alike:
`Roll.after` folds the changes of one record into the roll of the next, and a roll is a function of the chain.

A change is good for one chain position in time: it names the run, has a nonce that the roll remembers once it
was applied, and an epoch after which it is void. So nobody can repeat an old admission after a removal.

An invitation is a key pair. The chain holds the public half; who has the line has the private half and signs
its own admission with it. No secret crosses the network, and no member has to keep or compare one.

Standard library only.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from tapestry.node.protocol.canon import (
    EPOCH_MAX,
    MEMBERS_MAX,
    Crypto,
    InvalidRecord,
    canonical,
    peer_field,
    quorum,
)
from tapestry.node.protocol.path import leads
from tapestry.node.protocol.settings import Settings, read_setting
from tapestry.node.protocol.strict import Malformed, hexadecimal, integer, sequence, table, text

KINDS: Final = ("admit", "remove", "rekey", "voice", "invite", "charter", "set", "rollback")
OF_NOBODY: Final = ("charter", "set", "rollback")  # kinds that are about no peer

CHANGES_MAX = 8  # in one record: more wait for the next
SIGNATURES_MANY = 64  # of one change: with more, a record carries no more than it needs. Guess
CHANGES_BYTES_MAX = 65_536  # Guess: of one record's changes, so that a record fits into a frame
LIFETIME_EPOCHS_MAX = 1_000_000  # of a change: how long the roll must remember it
INVITES_MAX = 256  # open ones, of a run
NAME_CHARS_MAX = 64
WHY_CHARS_MAX = 256
USES_MAX = 1_000
VOICE_MAX = 1_000_000
NEWCOMERS_MAX = 256  # of an open run, whose contributions are counted
UNIT = 1 << 20  # what one equal voice weighs: large, so that a share of it is exact enough
ROLLBACK_EPOCHS_MAX = 64  # that a rollback goes back: the roll has so many heads. Guess
ROLLBACKS_MAX = 256  # in one run. G7
HEAD_DIGITS = 32  # of a head, hexadecimal, that a rollback names
SHARE = 1_000_000  # open_share and the like are integers: millionths
UNIX_MAX = 2**40


@dataclass(frozen=True, slots=True)
class Charter:
    """The run's rules of membership, as the genesis and later changes have them."""

    admission: str = "members"  # members | open
    admit_by: str = "founder"  # founder | council K/N | majority
    voice: str = "equal"  # equal | tokens | fixed
    open_share: int = 200_000  # millionths of the weight that all newcomers of an open run may have together
    open_votes_after: int = 0  # committed contributions after which one becomes a member; 0: never


@dataclass(frozen=True, slots=True)
class Seat:
    """A member."""

    name: str  # for people
    voice: int  # of fixed shares
    since: int  # epoch of the record that admitted it; 0: by the genesis


@dataclass(frozen=True, slots=True)
class Invite:
    """An invitation that the chain holds, under its public key."""

    name: str  # that its guest gets; "": the guest's own
    uses: int  # left
    expires_at: int  # Unix time; 0: never. Judged when it is used, not when a record is read


def has_expired(expires_at: int, now: float) -> bool:
    """Of an invitation. `now`: Unix time."""
    return 0 < expires_at < now


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the roll, with the signatures that ask for it."""

    kind: str  # of KINDS
    peer: str  # whom it is about; the public key of an invite; "" of charter and set
    value: str  # admit: name; remove: why; rekey: the new peer id; others: see _read_*, read_*
    until: int  # void in records of a later epoch
    nonce: str  # 32 hex digits
    signatures: tuple[tuple[str, str], ...] = ()  # (peer, signature), sorted by peer

    def signed(self, peer: str, signature: str) -> Change:
        """With one more signature."""
        pairs = dict(self.signatures) | {peer: signature}
        return replace(self, signatures=tuple(sorted(pairs.items())))


@functools.lru_cache(maxsize=256)  # asked for at each message that tells of it
def change_message(run_id: str, change: Change) -> bytes:
    """What those who ask for a change sign."""
    core = [run_id, change.kind, change.peer, change.value, change.until, change.nonce]
    return b"tapestry change v1\0" + canonical(core)


@functools.lru_cache(maxsize=256)
def change_id(run_id: str, change: Change) -> str:
    """Its name: 32 hex digits."""
    return hashlib.blake2b(change_message(run_id, change), digest_size=16).hexdigest()


def change_bytes(change: Change) -> int:
    """No change takes more in msgpack or JSON."""
    return 256 + len(change.peer) + 6 * len(change.value) + 400 * len(change.signatures)


# --- the roll ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Roll:
    """Who belongs to the run at one epoch. Never changed: `after` makes the next one."""

    run_id: str
    charter: Charter
    members: Mapping[str, Seat]  # sorted by peer
    council: tuple[str, ...]  # the founders, by their present keys
    invites: Mapping[str, Invite]
    done: Mapping[str, int]  # changes that were applied -> the epoch after which they are void anyway
    counted: Mapping[str, int]  # newcomers of an open run -> their committed contributions
    removed: Mapping[str, str]  # the last ones -> why
    settings: Settings  # those that a record has changed: settings.py
    heads: tuple[str, ...] = ()  # HEAD_DIGITS of each of the last epochs before the newest, oldest first
    rolled: Mapping[int, int] = field(default_factory=dict)  # records that roll back -> to which epoch

    @property
    def is_open(self) -> bool:
        return self.charter.admission == "open"

    def may_contribute(self, peer: str) -> bool:
        return peer in self.members or (self.is_open and self.is_newcomer(peer))

    def after(
        self, epoch: int, prev: str, changes: Sequence[Change], named: Sequence[tuple[str, int]]
    ) -> Roll:
        """The roll of the state that record `epoch` makes. `prev`: the head before it; `named`: its members
        with their weights.

        The changes were checked by `changes_fault`.
        """
        roll = replace(self, heads=(*self.heads, prev[:HEAD_DIGITS])[-ROLLBACK_EPOCHS_MAX:])
        for change in changes:
            roll = _applied(roll, change, epoch)
        if roll.is_open and any(w and roll.is_newcomer(p) for p, w in named):
            return _counted(roll, epoch, named)
        return roll

    def is_newcomer(self, peer: str) -> bool:
        """Who may contribute to an open run and is no member: nobody who was removed, no invitation's key."""
        return peer not in self.members and peer not in self.removed and peer not in self.invites

    def voters(self, named: Iterable[str]) -> tuple[str, ...]:
        """Those of `named` who may vote: the electorate of the next round."""
        members = self.members
        return tuple([p for p in named if p in members])

    def voice_of(self, peer: str) -> int:
        """What stands behind a side of a fork when `peer` does."""
        seat = self.members.get(peer)
        if seat is None:
            return 0
        return seat.voice if self.charter.voice == "fixed" else 1


def first_roll(run_id: str, charter: Charter, founders: Sequence[str]) -> Roll:
    """Of the genesis."""
    members = {p: Seat("", 1, 0) for p in sorted(founders)}
    return Roll(run_id, charter, members, tuple(founders), {}, {}, {}, {}, {})


NO_ROLL: Final = first_roll("", Charter(), ())  # of nobody

REMOVED_KEPT = 64  # that can still be told why


def _applied(roll: Roll, change: Change, epoch: int) -> Roll:
    """One change, checked before."""
    done = {i: until for i, until in roll.done.items() if until >= epoch}
    done[change_id(roll.run_id, change)] = change.until
    roll = replace(roll, done=done)
    kind, peer, value = change.kind, change.peer, change.value
    members = dict(roll.members)
    if kind == "admit":
        removed = {p: why for p, why in roll.removed.items() if p != peer}
        counted = {p: n for p, n in roll.counted.items() if p != peer}
        name, invites = value, dict(roll.invites)
        for key, _ in change.signatures:
            invite = invites.get(key)
            if invite is not None:
                name = invite.name or value
                invites[key] = replace(invite, uses=invite.uses - 1)
                if invite.uses == 1:
                    del invites[key]
        members[peer] = Seat(name, 1, epoch)
        return replace(roll, members=_sorted(members), removed=removed, counted=counted, invites=invites)
    if kind == "remove":
        if peer in roll.invites:
            return replace(roll, invites={k: i for k, i in roll.invites.items() if k != peer})
        del members[peer]
        removed = dict(
            [*((p, w) for p, w in roll.removed.items() if p != peer), (peer, value)][-REMOVED_KEPT:]
        )
        council = tuple([p for p in roll.council if p != peer])
        return replace(roll, members=members, removed=removed, council=council)
    if kind == "rekey":
        seat = members.pop(peer)
        members[value] = replace(seat, since=epoch)
        council = tuple([value if p == peer else p for p in roll.council])
        removed = {p: why for p, why in roll.removed.items() if p != value}
        removed = dict([*removed.items(), (peer, "its key was replaced")][-REMOVED_KEPT:])
        counted = {p: n for p, n in roll.counted.items() if p != value}
        return replace(roll, members=_sorted(members), council=council, removed=removed, counted=counted)
    if kind == "voice":
        members[peer] = replace(members[peer], voice=int(value))
        return replace(roll, members=members)
    if kind == "invite":
        return replace(roll, invites={**roll.invites, peer: read_invite(value)})
    if kind == "set":
        key, setting = read_setting(value)
        return replace(roll, settings={**roll.settings, key: setting})
    if kind == "rollback":
        return replace(roll, rolled={**roll.rolled, epoch: read_rollback(value)[0]})
    return replace(roll, charter=_read_charter(roll.charter, value))


def _counted(roll: Roll, epoch: int, named: Sequence[tuple[str, int]]) -> Roll:
    """Contributions of an open run's newcomers; where the charter has it so, enough of them make a member.

    In the order of their last contribution. Where there are too many, who has the fewest is forgotten, of
    these whose last is oldest: keys that contribute once keep nobody from being counted.
    """
    counted, members, enough = dict(roll.counted), dict(roll.members), roll.charter.open_votes_after
    for peer, weight in named:
        if not weight or not roll.is_newcomer(peer):
            continue
        count = counted.pop(peer, 0) + 1
        if len(counted) >= NEWCOMERS_MAX:
            del counted[min(counted, key=counted.__getitem__)]
        counted[peer] = count
        if enough and counted[peer] >= enough and len(members) < MEMBERS_MAX:
            del counted[peer]
            members[peer] = Seat("", 1, epoch)
    return replace(roll, counted=counted, members=_sorted(members))


def _sorted(members: dict[str, Seat]) -> dict[str, Seat]:
    return dict(sorted(members.items(), key=lambda entry: entry[0]))


# --- what makes a change valid ----------------------------------------------------------------------


def changes_fault(
    roll: Roll, epoch: int, changes: Sequence[Change], named: Iterable[str], crypto: Crypto
) -> str | None:
    """Why record `epoch` may not carry these changes; None if it may. `named`: the record's members.

    They apply one after the other, and somebody of the record must be left to decide the next round.
    """
    if not changes:
        return None
    if len(changes) > CHANGES_MAX or sum(change_bytes(c) for c in changes) > CHANGES_BYTES_MAX:
        return "changes"
    before = roll
    for change in changes:
        fault = change_fault(roll, epoch, change, crypto)
        if fault is None and not enough_signed(before, roll, change):
            fault = "unsigned_change"
        if fault is not None:
            return fault
        roll = _applied(roll, change, epoch)
    return None if roll.voters(named) else "electorate"


def change_fault(roll: Roll, epoch: int, change: Change, crypto: Crypto) -> str | None:
    """Why `change` cannot be in record `epoch`, whoever signs it; None if it can."""
    if not epoch <= change.until <= epoch + LIFETIME_EPOCHS_MAX:
        return "void"
    if change_id(roll.run_id, change) in roll.done:
        return "done"
    message = change_message(roll.run_id, change)
    if not all(crypto.verify(peer, signature, message) for peer, signature in change.signatures):
        return "signature"
    if change.kind == "rollback":
        return _rollback_fault(roll, epoch, change.value)
    return _meaning_fault(roll, change)


def _rollback_fault(roll: Roll, epoch: int, value: str) -> str | None:
    try:
        to, head, _ = read_rollback(value)
    except Malformed:
        return "malformed"
    return "rollback" if why_no_rollback(roll, epoch, to, head) is not None else None


def why_no_rollback(roll: Roll, epoch: int, to: int, head: str) -> str | None:
    """Why record `epoch` cannot say that its state is that of epoch `to`, whose head begins so; or None.

    Only what stands is undone, and once: `to` and the epoch after it lie on the path to the state before. So
    no abandoned state comes back, and a second proof of one lie takes nothing back that was made since.
    """
    if to > epoch - 2:
        return f"nothing has been made of epoch {to} yet"
    if to < epoch - 1 - len(roll.heads):
        return f"epoch {to} is more than {ROLLBACK_EPOCHS_MAX} epochs back"
    if roll.heads[to - epoch + 1] != head:
        return f"epoch {to} has another head here"
    if len(roll.rolled) >= ROLLBACKS_MAX:
        return f"this run was rolled back {ROLLBACKS_MAX} times, and cannot be again"
    before = epoch if epoch in roll.rolled else epoch - 1  # by a change of the same record
    if not (leads(roll.rolled, to, before) and leads(roll.rolled, to + 1, before)):
        return f"what was made of epoch {to} is undone already"
    return None


def _meaning_fault(roll: Roll, change: Change) -> str | None:
    kind, peer, value, members = change.kind, change.peer, change.value, roll.members
    if kind == "admit":
        if peer in roll.invites:
            return "invites"
        return "member" if peer in members or len(members) >= MEMBERS_MAX else None
    if kind == "remove":
        return None if peer in members or peer in roll.invites else "no_member"
    try:
        if kind == "rekey":
            if peer_field(value, "the new peer id") in roll.invites:
                return "invites"
            return None if peer in members and value not in members else "no_member"
        if kind == "voice":
            _read_voice(value)
            return None if peer in members else "no_member"
        if kind == "invite":
            read_invite(value)
            taken = peer in members or peer in roll.invites or len(roll.invites) >= INVITES_MAX
            return "invites" if taken else None
        if kind == "set":
            read_setting(value)
            return None
        return _rule_fault(roll, _read_charter(roll.charter, value))
    except Malformed:
        return "malformed"


def _rule_fault(roll: Roll, charter: Charter) -> str | None:
    """A council that has shrunk since does not keep other rules from being changed: see `needed`."""
    kept = charter.admit_by == roll.charter.admit_by
    return charter_fault(replace(charter, admit_by="majority") if kept else charter, len(roll.council))


def enough_signed(before: Roll, roll: Roll, change: Change) -> bool:
    """Whether as many ask for it as the charter says, by the roll before the record's first change.

    Leaving is always possible: one's own signature is enough. An invite that is still good admits, but nobody
    who was removed.
    """
    signers = [p for p, _ in change.signatures]
    if change.kind == "remove" and change.peer in signers:
        return True
    if admits_guest(roll, change) and any(p in before.invites and p in roll.invites for p in signers):
        return True
    return len(authorities(before, signers)) >= needed(before)


def admits_guest(roll: Roll, change: Change) -> bool:
    """Whether it is an admission that an invitation is enough for."""
    return change.kind == "admit" and change.peer not in roll.removed


def fewest_signatures(roll: Roll, change: Change) -> Change:
    """It with all signatures, or, where these are many, with as many as it needs: a record has room for so
    many. What one signature is enough for keeps that one."""
    signers = [p for p, _ in change.signatures]
    if len(signers) <= SIGNATURES_MANY:
        return change
    kept = authorities(roll, signers)[: needed(roll)]
    if len(kept) < needed(roll):
        kept = [p for p in signers if p == change.peer or p in roll.invites]
    return replace(change, signatures=tuple([pair for pair in change.signatures if pair[0] in kept]))


def authorities(roll: Roll, signers: Iterable[str]) -> list[str]:
    """Those of `signers` whose signature counts under the charter."""
    if roll.charter.admit_by == "majority":
        return [p for p in signers if p in roll.members]
    return [p for p in signers if p in roll.council]


def needed(roll: Roll) -> int:
    """How many signatures a change needs. Of a council that has shrunk below its number: all who are left."""
    rule = roll.charter.admit_by
    if rule == "majority":
        return quorum(len(roll.members))
    if rule == "founder":
        return 1
    return max(1, min(int(rule.removeprefix("council ").split("/")[0]), len(roll.council)))


def charter_fault(charter: Charter, council_count: int) -> str | None:
    """Why these are no rules for a run with so many founders; None if they are."""
    if charter.admission not in ("members", "open") or charter.voice not in ("equal", "tokens", "fixed"):
        return "charter"
    if not (0 < charter.open_share < SHARE and 0 <= charter.open_votes_after <= LIFETIME_EPOCHS_MAX):
        return "charter"
    if charter.admit_by == "majority":
        return None
    if charter.admit_by == "founder":
        return None if council_count else "charter"
    words = charter.admit_by.removeprefix("council ").split("/")
    if (
        not charter.admit_by.startswith("council ")
        or len(words) != 2
        or not all(w.isdecimal() and len(w) < 5 for w in words)
    ):
        return "charter"
    k, n = int(words[0]), int(words[1])
    return None if 1 <= k <= n == council_count and charter.admit_by == f"council {k}/{n}" else "charter"


# --- text -------------------------------------------------------------------------------------------


def change_to_list(change: Change) -> list[Any]:
    signatures = [list(pair) for pair in change.signatures]
    return [change.kind, change.peer, change.value, change.until, change.nonce, signatures]


def change_from(raw: Any) -> Change:
    """Strict. Raises Malformed."""
    kind, peer, value, until, nonce, signatures = sequence(raw, 6, "a change", 6)
    if kind not in KINDS:
        raise Malformed(f"a change must be one of {', '.join(KINDS)}")
    return Change(
        kind=kind,
        peer=peer_field(peer, "peer") if kind not in OF_NOBODY else text(peer, 0, "peer"),
        value=text(value, WHY_CHARS_MAX, "value"),
        until=integer(until, 1, EPOCH_MAX, "until"),
        nonce=hexadecimal(nonce, (32,), "nonce"),
        signatures=pairs_from(signatures, "signatures"),
    )


def pairs_from(raw: Any, what: str, count_max: int = MEMBERS_MAX) -> tuple[tuple[str, str], ...]:
    """(peer, signature), sorted by peer, each once. Raises Malformed."""
    pairs = []
    for pair in sequence(raw, count_max, what):
        signer, signature = sequence(pair, 2, "a signature", 2)
        pairs.append((peer_field(signer, "signer"), text(signature, 256, "signature", 1)))
    if [p[0] for p in pairs] != sorted({p[0] for p in pairs}):
        raise Malformed(f"{what} must be sorted by peer, each once")
    return tuple(pairs)


def charter_to_dict(charter: Charter) -> dict[str, Any]:
    return {
        "admission": charter.admission,
        "admit_by": charter.admit_by,
        "voice": charter.voice,
        "open_share": charter.open_share,
        "open_votes_after": charter.open_votes_after,
    }


def charter_from(raw: Any, council_count: int) -> Charter:
    """Strict. Raises Malformed."""
    names = ("admission", "admit_by", "voice", "open_share", "open_votes_after")
    fields = table(raw, names, "charter")
    charter = Charter(
        admission=text(fields["admission"], 16, "admission"),
        admit_by=text(fields["admit_by"], 32, "admit_by"),
        voice=text(fields["voice"], 16, "voice"),
        open_share=integer(fields["open_share"], 1, SHARE - 1, "open_share"),
        open_votes_after=integer(fields["open_votes_after"], 0, LIFETIME_EPOCHS_MAX, "open_votes_after"),
    )
    if charter_fault(charter, council_count) is not None:
        raise Malformed("charter must be rules that its founders can keep")
    return charter


def invite_value(name: str, uses: int, expires_at: int) -> str:
    """The value of an invite change."""
    return f"{uses} {expires_at} {name}"


def read_invite(value: str) -> Invite:
    """Of an invite change. Raises Malformed."""
    uses, expires_at, name = _words(value, 3)
    if len(name) > NAME_CHARS_MAX:
        raise Malformed("an invite's name must be short")
    return Invite(name, _number(uses, 1, USES_MAX), _number(expires_at, 0, UNIX_MAX))


def _read_voice(value: str) -> int:
    return _number(value, 1, VOICE_MAX)


def _read_charter(charter: Charter, value: str) -> Charter:
    """`key value`: one rule changed."""
    key, word = _words(value, 2)
    if key == "open_share":
        return replace(charter, open_share=_number(word, 1, SHARE - 1))
    if key == "open_votes_after":
        return replace(charter, open_votes_after=_number(word, 0, LIFETIME_EPOCHS_MAX))
    if key == "admission":
        return replace(charter, admission=word)
    if key == "admit_by":
        return replace(charter, admit_by=word)
    if key == "voice":
        return replace(charter, voice=word)
    raise Malformed("no such rule")


def rollback_value(to: int, head: str, why: str) -> str:
    """The value of a rollback: `epoch head why`."""
    return f"{to} {head[:HEAD_DIGITS]} {why}"


def read_rollback(value: str) -> tuple[int, str, str]:
    """Of `rollback_value`: the epoch, how its head begins, and why. Raises Malformed."""
    to, head, why = _words(value, 3)
    return _number(to, 0, EPOCH_MAX), hexadecimal(head, (HEAD_DIGITS,), "head"), why


def rollback_of(changes: Sequence[Change]) -> tuple[int, str] | None:
    """The epoch whose state these changes of a record bring back, and why; None if they do not."""
    for change in reversed(changes):
        if change.kind == "rollback":
            to, _, why = read_rollback(change.value)
            return to, why
    return None


def _words(value: str, count: int) -> list[str]:
    words = value.split(" ", count - 1)
    if len(words) != count:
        raise Malformed(f"a value must have {count} parts")
    return words


def _number(value: str, low: int, high: int) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) < 16) or (
        len(value) > 1 and value[0] == "0"
    ):
        raise Malformed("a value must be a number")
    return integer(int(value), low, high, "a value")


def charter_of(raw: Any, council_count: int) -> Charter:
    """As `charter_from`. Raises InvalidRecord."""
    try:
        return charter_from(raw, council_count)
    except Malformed as error:
        raise InvalidRecord("malformed", str(error)) from None
