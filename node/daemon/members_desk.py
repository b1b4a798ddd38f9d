"""The members' desk: who may reach this node, who waits to, and what the operator asks the members for.

What it knows is the core's membership: the roll of our newest record, and the changes that wait for others.
What it does is one input, ChangeAsked. `do` answers the commands that come by HOME/control.sock (control.py).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from blake3 import blake3

from tapestry.dht.identity import public_key_of
from tapestry.node.daemon.desk import Loop
from tapestry.node.net.admission import Reception, who_admits
from tapestry.node.protocol import events as ev
from tapestry.node.protocol import strict
from tapestry.node.protocol.canon import Crypto, peer_field
from tapestry.node.protocol.members import (
    HEAD_DIGITS,
    KINDS,
    OF_NOBODY,
    WHY_CHARS_MAX,
    Change,
    Roll,
    authorities,
    change_fault,
    change_id,
    enough_signed,
    has_expired,
    needed,
    read_invite,
    read_rollback,
    rollback_value,
    why_no_rollback,
)
from tapestry.node.protocol.proposals import OF_ONE_MAX, PROPOSALS_MAX, may_ask
from tapestry.node.protocol.settings import Settings, read_setting
from tapestry.node.surface.control import roll_table

VALID_EPOCHS = 100_000  # Guess: what nobody approved by then is void
TAKEN_BACK_MAX = 4  # Guess: invitations that have expired, in one record; it has room for 8 changes
DONE_SHOWN = 256  # of the newest changes: a command looks there for its own
FAULTS = {
    "member": "it is a member already",
    "no_member": "it is no member",
    "invites": "it is taken, or there are too many invitations: take one back with `tapestry remove`",
    "done": "that was done already",
    "void": "it is too old",
    "signature": "a signature in it is wrong",
    "charter": "these are no rules that the founders could keep",
    "malformed": "it is not of the right form",
}
LAST_AUTHORITY = (
    "nobody could admit or remove any more: first `tapestry propose charter admit_by majority`, "
    "or `tapestry propose rekey` to another key"
)
TOO_MANY = (
    f"{OF_ONE_MAX} changes that it asked for, or {PROPOSALS_MAX} of all members, wait for a record: "
    "ask again after the next"
)
EXPIRED = "it has expired: `tapestry invite` makes another"
NOT_HELD = (
    "this node's disk no longer leads to state {epoch}: checkpoints_kept, checkpoint_every_epochs and "
    "updates_kept_* of [limits] say how far back it does"
)

_log = logging.getLogger("tapestry.node")


class MembersDesk:
    """Asked by links and streams whether to talk, and by the operator."""

    def __init__(
        self,
        loop: Loop,
        me: str,
        crypto: Crypto,
        given: Iterable[str],
        why_no_change: Callable[
            [Settings, str], str
        ],  # what is wrong with a setting, of those that would be in force then; or ""
        held_back_to: Callable[[int], str] = lambda epoch: "",  # an epoch's head, if our disk has its state
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._loop = loop
        self._held_back_to = held_back_to
        self._me = me
        self._crypto = crypto
        self._why_no_change = why_no_change
        self._given = frozenset(given)  # peers that the operator named: who joins knows no roll yet
        self._clock = clock
        self.reception = Reception(lambda: self.roll, self._epoch, self.submit, self._coming, clock)

    @property
    def roll(self) -> Roll:
        return self._loop.membership().roll

    def _epoch(self) -> int:
        return self._loop.membership().epoch

    def admits(self, peer: str) -> bool:
        """Whether we talk with it at all. Of who is removed nothing is heard, whoever named it."""
        roll = self.roll
        return roll.may_contribute(peer) or (peer in self._given and peer not in roll.removed)

    def is_member(self, peer: str) -> bool:
        """Whether it comes before those that anybody can be: in an open run we talk with all the world."""
        roll = self.roll
        return peer in roll.members or (peer in self._given and peer not in roll.removed)

    def _coming(self) -> tuple[str, ...]:
        return tuple([c.peer for c in self._loop.membership().pending if c.kind == "invite"])

    def submit(self, change: Change) -> str:
        """What an applicant brings; returns what is wrong with it, or ""."""
        fault = self._fault(change)
        if fault or self._signers(change):
            return fault
        self._loop.feed(ev.ChangeAsked(change, sign=False))
        return "" if self._signers(change) else TOO_MANY

    def _fault(self, change: Change) -> str:
        run = self._loop.membership()
        fault = change_fault(run.roll, run.epoch + 1, change, self._crypto)
        if fault == "rollback":
            to, head, _ = read_rollback(change.value)
            return why_no_rollback(run.roll, run.epoch + 1, to, head) or ""
        return FAULTS.get(fault, fault) if fault is not None else ""

    # --- invitations that have expired ---------------------------------------------------------
    # A record is not judged by a clock. So they are kept from the pool here, and taken off the roll.

    def _expired(self) -> list[str]:
        """Their keys, sorted."""
        now = self._clock()
        return sorted(key for key, invite in self.roll.invites.items() if has_expired(invite.expires_at, now))

    def in_time(self, changes: Sequence[Change]) -> tuple[Change, ...]:
        """Of what a peer tells of, all but the admissions that rest on an invitation that has expired. What
        came in time waits for its record already, and stays."""
        expired, roll = set(self._expired()), self.roll
        without = replace(roll, invites={k: i for k, i in roll.invites.items() if k not in expired})

        def rests_on_one(change: Change) -> bool:
            if change.kind != "admit" or expired.isdisjoint(peer for peer, _ in change.signatures):
                return False
            return not enough_signed(without, roll, change) and expired.isdisjoint(self._signers(change))

        return tuple([change for change in changes if not rests_on_one(change)])

    def take_back(self) -> None:
        """After each record: ask for the removal of those that have expired, if this node may. The change is
        the same at everybody who asks for it; a few at a time, for of one node so many wait for a record."""
        roll = self.roll
        until = (self._epoch() // VALID_EPOCHS + 2) * VALID_EPOCHS
        for key in self._expired()[:TAKEN_BACK_MAX]:
            nonce = blake3(f"{key} expired".encode()).hexdigest()[:32]
            change = Change("remove", key, "it has expired", until, nonce)
            if may_ask(roll, change, self._me) and self._me not in self._signers(change):
                self._loop.feed(ev.ChangeAsked(change))

    # --- the operator --------------------------------------------------------------------------

    def do(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """A command: {"do": members | ask | approve, ...}. Raises Malformed."""
        match request:
            case {"do": "members", **rest} if not rest:
                return self.table()
            case {"do": "ask", "kind": kind, "peer": peer, "value": value, **rest} if not rest:
                return self._ask(kind, peer, value)
            case {"do": "approve", "id": name, **rest} if not rest:
                return self._approve(name)
            case _:
                raise strict.Malformed("no command that a node knows")

    def _ask(self, kind: object, peer: object, value: object) -> dict[str, Any]:
        if kind not in KINDS:
            raise strict.Malformed(f"a change must be one of {', '.join(KINDS)}")
        until = self._loop.membership().epoch + VALID_EPOCHS
        name = "" if kind in OF_NOBODY else peer_field(peer, "a peer id")
        words = strict.text(value, WHY_CHARS_MAX, "a value")
        if kind == "set" and (why := self._why_not_set(words)):
            return {"fault": why}
        if kind == "rollback":
            return self._ask_back(words, until)
        for one in (name, words if kind == "rekey" else name):
            if kind not in OF_NOBODY and one not in self.roll.members and public_key_of(one) is None:
                raise strict.Malformed(f"{one[:64]} is no peer id")
        if kind == "remove" and self.roll.charter.admit_by != "majority" and self.roll.council == (name,):
            return {"fault": LAST_AUTHORITY}
        return self._sign(Change(str(kind), name, words, until, secrets.token_hex(16)))

    def _why_not_set(self, words: str) -> str:
        """Judged here by the whole spec; what comes of a peer, by its bounds. Raises Malformed."""
        key, value = read_setting(words)
        return self._why_no_change({**self.roll.settings, key: value}, key)

    def _ask_back(self, words: str, until: int) -> dict[str, Any]:
        """`epoch why`: of a state that our disk has, so that somebody does."""
        epoch, _, why = words.partition(" ")
        if not (epoch.isascii() and epoch.isdecimal() and len(epoch) < 16):
            raise strict.Malformed("the epoch must be a number")
        head = self._held_back_to(int(epoch))
        if not head:
            return {"fault": NOT_HELD.format(epoch=int(epoch))}
        value = rollback_value(int(epoch), head, why)[:WHY_CHARS_MAX]
        return self._sign(Change("rollback", "", value, until, secrets.token_hex(16)))

    def roll_back(self, epoch: int, head: str, why: str) -> None:
        """Ask that the state be that of `epoch` again, if this node may. Our chain has what is to be undone.
        The change is the same at everybody who asks for it."""
        nonce = blake3(f"{epoch} {head} {why}".encode()).hexdigest()[:32]
        value = rollback_value(epoch, head, why)
        change = Change("rollback", "", value, epoch + VALID_EPOCHS, nonce)
        if not may_ask(self.roll, change, self._me):
            return
        fault = self._fault(change)
        if not fault and not self._held_back_to(epoch):
            fault = NOT_HELD.format(epoch=epoch)
        if fault:
            _log.warning(
                "rollback=not_asked epoch=%d %s; the liar's removal stands. A member that can may ask: "
                "tapestry propose rollback",
                epoch,
                fault,
            )
        else:
            self._loop.feed(ev.ChangeAsked(change))

    def may_be_undone(self, epoch: int, head: str) -> bool:
        """Whether what was made of that state stands, and is not too far back to be undone."""
        run = self._loop.membership()
        return why_no_rollback(run.roll, run.epoch + 1, epoch, head[:HEAD_DIGITS]) is None

    def expel(self, peer: str, why: str, epoch: int) -> None:
        """Ask for the removal of who did what is proven, of round `epoch`, if this node may.

        The change is the same at everybody who asks for it, so that their signatures are of one.
        """
        roll = self.roll
        nonce = blake3(f"{peer} {why}".encode()).hexdigest()[:32]
        change = Change("remove", peer, why, epoch + VALID_EPOCHS, nonce)
        if peer in roll.members and peer != self._me and may_ask(roll, change, self._me):
            self._loop.feed(ev.ChangeAsked(change))

    def admit(self, peer: str, name: str) -> str:
        """From the page; returns what is wrong, or ""."""
        return str(self._ask("admit", peer, name).get("fault", ""))

    def _approve(self, name: object) -> dict[str, Any]:
        run = self._loop.membership()
        found = [c for c in run.pending if isinstance(name, str) and change_id(run.roll.run_id, c) == name]
        if not found:
            return {"fault": "nothing of that name waits for signatures"}
        if found[0].kind == "rollback":
            epoch = read_rollback(found[0].value)[0]
            if not self._held_back_to(epoch):
                return {"fault": NOT_HELD.format(epoch=epoch)}
        if found[0].kind == "set" and (why := self._why_not_set(found[0].value)):
            return {"fault": why}
        if found[0].kind == "invite" and has_expired(read_invite(found[0].value).expires_at, self._clock()):
            return {"fault": EXPIRED}
        return self._sign(found[0])

    def _sign(self, change: Change) -> dict[str, Any]:
        roll = self.roll
        fault = self._fault(change)
        if not fault and not may_ask(roll, change, self._me):
            fault = f"this node may not ask for that: {who_admits(roll)} may"
        if fault:
            return {"fault": fault}
        self._loop.feed(ev.ChangeAsked(change))
        if self._me not in self._signers(change):
            return {"fault": TOO_MANY}
        return {"id": change_id(roll.run_id, change), "needs": needed(roll)}

    def _signers(self, change: Change) -> list[str]:
        """Those whose signature of it waits for a record; nobody's, where it does not."""
        run = self._loop.membership()
        name = change_id(run.roll.run_id, change)
        found = [c for c in run.pending if change_id(run.roll.run_id, c) == name]
        return [peer for one in found for peer, _ in one.signatures]

    def table(self) -> dict[str, Any]:
        """All that people are shown."""
        core = self._loop.snapshot()
        roll = core.roll
        phases = {p.peer_id: p.phase for p in core.peers} | {self._me: core.phase}
        return {
            **roll_table(roll, phases),
            "me": self._me,
            "epoch": core.chain_epoch,
            "applicants": [asdict(applicant) for applicant in self.reception.applicants],
            "pending": [
                {
                    "id": change_id(core.run_id, c),
                    "kind": c.kind,
                    "peer": c.peer,
                    "value": c.value,
                    "signed": len(authorities(roll, [p for p, _ in c.signatures])),
                    "needs": needed(roll),
                    "enough": enough_signed(roll, roll, c),
                }
                for c in core.pending
            ],
            "done": list(roll.done)[-DONE_SHOWN:],
        }
