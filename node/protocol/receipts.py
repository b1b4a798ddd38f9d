"""Rosters that a leader has signed: two of one ballot are a proof that it told members different ones.

A leader signs the roster that it names: the run, epoch, head and ballot, its own disk, and the digest of all
that the roster says. Nobody follows one whose signature is missing or false. Who is told a roster keeps the
signature as a `Receipt`, without the roster, and shows its newest receipts to each leader in its READY. So
where members were told different rosters, the next leader that is honest has a receipt of each, often one of
its own among them. The two together are the proof (`TwoRosters`): anybody can check it, years later and
without a network, and nobody needs the rosters for it.

    Leader._send_roster -> signed            the leader signs
    Round.on_roster     -> signature_fault   a follower refuses, or keeps: Receipts.hear
    Acceptor.send_ready -> Receipts.newest   it shows what it was told
    Round.on_ready      -> Receipts.shown    the next leader compares
                        -> Equivocated       the proof goes to the desk of accusations

**An honest leader is never accused.** It names one roster in a ballot (leader.py), and the ballot is written
down as promised before the roster is sent (acceptor.py, `promise`). After a restart it leads no ballot that
it had promised (round_state.py, `lead_from`). If it loses that disk, it takes no part in the round
(core.py, `_forgot_votes`), or goes on alone on a disk of another name, which is a part of what is signed
(docs/decisions/003). A liar cannot hide behind that: the disk must be the one that the record before names,
where it names one.

Receipts are in memory only, and bounded: a member that restarts has forgotten its own. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from tapestry.node.protocol import strict
from tapestry.node.protocol.canon import EPOCH_MAX, Crypto, canonical, peer_field
from tapestry.node.protocol.members import change_to_list
from tapestry.node.protocol.messages import RECEIPTS_MAX, Receipt, Roster
from tapestry.node.protocol.record import BALLOT_MAX, SIGNATURE_CHARS_MAX, behind_to_list, member_to_list

OWN_MAX = 16  # of the rosters that we were told ourselves. Guess: ballots of a few rounds
TELLERS_MAX = 1024  # G7

Key = tuple[str, int, str, int, str]  # of which an honest leader signs one digest


@dataclass(frozen=True, slots=True)
class TwoRosters:
    """Two receipts of one leader and one ballot. `fault_of` says whether they prove anything."""

    first: Receipt
    second: Receipt

    @property
    def peer(self) -> str:
        return self.first.leader


def roster_message(run_id: str, receipt: Receipt) -> bytes:
    """What a ROSTER signs. Of one run, epoch, head, ballot and disk an honest leader signs one digest."""
    r = receipt
    said = (run_id.encode(), r.epoch, r.head.encode(), r.ballot, r.life.encode(), r.digest.encode())
    return b"tapestry roster v1\0%s\0%d\0%s\0%d\0%s\0%s" % said


def receipt_of(leader: str, roster: Roster, crypto: Crypto) -> Receipt:
    """What the leader's signature of this roster says, good or not. It names itself, with its disk."""
    life = next((m.life for m in roster.members if m.peer == leader), "")
    digest = crypto.digest(_text(roster))
    return Receipt(leader, roster.epoch, roster.head, roster.ballot, life, digest, roster.signature)


def signed(roster: Roster, run_id: str, leader: str, crypto: Crypto) -> Roster:
    """By `leader`, whose `crypto` it is."""
    return replace(roster, signature=crypto.sign(roster_message(run_id, receipt_of(leader, roster, crypto))))


def is_signed(receipt: Receipt, run_id: str, crypto: Crypto) -> bool:
    return crypto.verify(receipt.leader, receipt.signature, roster_message(run_id, receipt))


def fault_of_rosters(two: TwoRosters, run_id: str, crypto: Crypto) -> str | None:
    """Why they prove nothing in this run, in a few words; None if it is proven. Anybody can ask."""
    if _key(two.first) != _key(two.second):
        return "the two rosters are not of one ballot, and of one disk of their leader"
    if two.first.digest == two.second.digest:
        return "the two rosters are one"
    if not all(is_signed(receipt, run_id, crypto) for receipt in (two.first, two.second)):
        return "it did not sign both in this run"
    return None


def receipt_to_list(receipt: Receipt) -> list[Any]:
    """As it travels, and lies on disk."""
    r = receipt
    return [r.leader, r.epoch, r.head, r.ballot, r.life, r.digest, r.signature]


def receipt_from(raw: Any, what: str) -> Receipt:
    """Strict. Raises Malformed."""
    leader, epoch, head, ballot, life, digest, signature = strict.sequence(raw, 7, what, 7)
    return Receipt(
        peer_field(leader, "leader"),
        strict.integer(epoch, 0, EPOCH_MAX, "epoch"),
        strict.hexadecimal(head, (64,), "head"),
        strict.integer(ballot, 0, BALLOT_MAX, "ballot"),
        strict.hexadecimal(life, (0, 32), "life"),
        strict.hexadecimal(digest, (64,), "digest"),
        strict.text(signature, SIGNATURE_CHARS_MAX, "signature", 1),
    )


class Receipts:
    """Of one node: what leaders told it, and what others show of theirs. Mutable; a part of the context."""

    def __init__(self) -> None:
        self.own: dict[Key, Receipt] = {}  # verified, the newest last
        self.others: dict[str, dict[Key, Receipt]] = {}  # peer -> what its last READY showed; verified

    @property
    def newest(self) -> tuple[Receipt, ...]:
        """For READY."""
        return tuple(self.own.values())[-RECEIPTS_MAX:]

    def hear(self, receipt: Receipt) -> TwoRosters | None:
        """One that its leader has sent us, verified. The proof, if we know of another."""
        key = _key(receipt)
        known = self.own.setdefault(key, receipt)
        while len(self.own) > OWN_MAX:
            del self.own[next(iter(self.own))]
        return _two(known, receipt) or self._against_others(key, receipt)

    def shown(
        self, peer: str, receipts: tuple[Receipt, ...], run_id: str, crypto: Crypto
    ) -> tuple[list[TwoRosters], str | None]:
        """What `peer` shows: the proofs that come of it, and why it is refused, in a word. What we know of is
        not verified again."""
        last = self.others.get(peer, {})
        seen: dict[Key, Receipt] = {}
        proofs: list[TwoRosters] = []
        for receipt in receipts:
            key = _key(receipt)
            known = self.own.get(key) or last.get(key)
            if known is not None and known.digest == receipt.digest:
                seen[key] = known
                continue
            if not is_signed(receipt, run_id, crypto):
                return proofs, "roster_signature"
            seen[key] = receipt
            two = _two(known, receipt) or self._against_others(key, receipt)
            if two is not None:
                proofs.append(two)
        self.others.pop(peer, None)
        self.others[peer] = seen
        while len(self.others) > TELLERS_MAX:
            del self.others[next(iter(self.others))]
        return proofs, None

    def _against_others(self, key: Key, receipt: Receipt) -> TwoRosters | None:
        for shown in self.others.values():
            two = _two(shown.get(key), receipt)
            if two is not None:
                return two
        return None


def _two(known: Receipt | None, receipt: Receipt) -> TwoRosters | None:
    return None if known is None or known.digest == receipt.digest else TwoRosters(known, receipt)


def _key(receipt: Receipt) -> Key:
    return receipt.leader, receipt.epoch, receipt.head, receipt.ballot, receipt.life


@lru_cache(maxsize=32)  # one roster is asked for by its leader and, in the simulator, by all who are told it
def _text(roster: Roster) -> bytes:
    """All that it says, but for the signature."""
    return canonical(
        {
            "epoch": roster.epoch,
            "head": roster.head,
            "ballot": roster.ballot,
            "forced": roster.forced,
            "state_digest": roster.state_digest,
            "members": [member_to_list(m) for m in roster.members],
            "reducers": list(roster.reducers),
            "changes": [change_to_list(c) for c in roster.changes],
            "behind": behind_to_list(roster.behind),
        }
    )
