"""Forks that a few members make together with all the true keys that they have; colluders.py tells them.

A fork goes on from a record of the run's. It is forced, as an island's is; or ordinary, and names whom it
takes for a quorum: absent members too, who contribute on the disk that they are known by, or vote by a seat
that they once signed. What its makers' keys cannot sign is left out, copied from elsewhere, or made up. Of
some forks they have the updates and states, and give them to whoever asks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from simulation.draws import choice, hex_digits, randint

from tapestry.node.protocol.agreement import ALIKE, agreement
from tapestry.node.protocol.audit import result_digest
from tapestry.node.protocol.members import Change, change_message
from tapestry.node.protocol.place import Place, behind_of, next_place
from tapestry.node.protocol.record import (
    Behind,
    Body,
    Member,
    Record,
    accept_message,
    draw_message,
    head_of,
    seat_message,
)
from tapestry.node.protocol.voice import voice_weights

if TYPE_CHECKING:
    from simulation.shell import Mean, Node, SimCrypto

FORCED = ("island", "named", "behind", "change")
KINDS = (*FORCED, *FORCED, "alone", "absent", "absent", "copied")
TOKENS: Final = (1, 1000, 2**53)
AGAIN_FORCED = 0.2  # of the records after the first are forced as well


@dataclass
class Fork:
    """What is made of it so far."""

    kind: str
    base: list[Record]  # of the run, up to where it leaves
    at: Place
    state: str  # digest of the state at its end
    gives: bool  # whether its makers have what it says was made
    last: Record | None  # of the run's record here, or of its own: what the next one follows
    records: list[Record]

    @property
    def chain(self) -> list[Record]:
        return [*self.base, *self.records]


class Forgery:
    """The makers: their keys, and what they have heard of others."""

    def __init__(self, rng: random.Random, keys: dict[str, SimCrypto], lives: dict[str, str]) -> None:
        self.rng = rng
        self.keys = keys
        self.lives = lives
        self.seats: dict[tuple[str, str], tuple[str, str]] = {}  # peer and head -> life, and its signature

    def extend(self, fork: Fork, max_influence: float, shard_count: int, disks: list[Node]) -> Record:
        """One more record. Of a fork whose numbers they have, they lie on `disks`."""
        at, rng = fork.at, self.rng
        first = not fork.records
        mine = [p for p in self.keys if p in at.roll.members]
        forced = fork.kind in FORCED and (first or rng.random() < AGAIN_FORCED)
        named = self._named(fork, mine, forced)
        members = self._weighed(at, named, forced, max_influence)
        result, figures = hex_digits(rng, 64), ALIKE
        means: list[Mean] = []
        key = next(iter(self.keys.values()))
        if fork.gives:
            means, weights = self._means(members, shard_count)
            digests = [mean.digest for mean in means]
            result, figures = result_digest(digests, key), agreement([m.sums for m in means], weights)
        body = Body(
            at.roll.run_id,
            at.epoch + 1,
            at.head,
            fork.state,
            members,
            result,
            forced,
            figures,
            self._changes(fork, mine) if first else (),
            self._behind(fork),
        )
        record = self._signed(fork, body)
        fork.state = key.digest("".join([fork.state, *[m.digest for m in means]]).encode())
        fork.at, fork.last = next_place(at, record), record
        fork.records.append(record)
        for node in disks if fork.gives else []:
            node.disk.updates[record.head] = (body.epoch, tuple(means))
            node.disk.states[record.head] = (body.epoch, fork.state)
            node.world.invariants.state_of[record.head] = fork.state
        return record

    def _named(self, fork: Fork, mine: list[str], forced: bool) -> list[str]:
        """Who takes part, as it says."""
        absent = [p for p in fork.at.electorate if p not in mine]
        if fork.kind in ("absent", "copied") or (fork.kind == "named" and forced):
            return sorted({*mine, *absent})
        return sorted(mine)

    def _weighed(self, at: Place, named: list[str], forced: bool, max_influence: float) -> tuple[Member, ...]:
        rng, lives = self.rng, dict(at.seats)
        lines = []
        for peer in named:
            life, seat = lives.get(peer, self.lives.get(peer, "")), ""
            contributes = peer in self.keys or (peer in lives and rng.random() < 0.7)
            if peer in self.keys:
                life = self.lives.setdefault(peer, hex_digits(rng, 32))
                seat = self.keys[peer].sign(seat_message(at.head, life))
            elif not contributes:
                life, seat = self.seats.get(
                    (peer, at.head), (life or hex_digits(rng, 32), hex_digits(rng, 64))
                )
            if forced or (contributes and (peer, life) in at.seats):
                seat = ""
            tokens = choice(rng, TOKENS) if contributes else 0
            lines.append(Member(peer, 0, 2 * hex_digits(rng, 32) if contributes else "", life, tokens, seat))
        contributors = [m for m in lines if m.contribution]
        weights = iter(voice_weights(at.roll, [(m.peer, m.tokens) for m in contributors], max_influence))
        return tuple(
            [
                Member(
                    m.peer, next(weights) if m.contribution else 0, m.contribution, m.life, m.tokens, m.seat
                )
                for m in lines
            ]
        )

    def _means(self, members: tuple[Member, ...], shard_count: int) -> tuple[list[Mean], list[int]]:
        """The numbers that this record would have been made of."""
        from simulation.shell import Mean, Part  # that module asks this one's friends

        counted = [m for m in members if m.weight]
        weights = [m.weight for m in counted]
        means = []
        for shard in range(shard_count):
            parts = tuple([Part(m.peer, m.contribution, shard) for m in counted])
            means.append(Mean(shard, parts, tuple(weights)))
        return means, weights

    def _changes(self, fork: Fork, mine: list[str]) -> tuple[Change, ...]:
        """One more member that is theirs, or one less that is not, signed by them alone."""
        if fork.kind != "change":
            return ()
        rng, at = self.rng, fork.at
        others = sorted(p for p in at.roll.members if p not in self.keys)
        kind, peer = "admit", f"accomplice{rng.getrandbits(2)}"
        if others and (rng.random() < 0.5 or peer in at.roll.members):
            kind, peer = "remove", choice(rng, others)
        change = Change(kind, peer, "", at.epoch + 1 + randint(rng, 0, 9), hex_digits(rng, 32))
        message = change_message(at.roll.run_id, change)
        for name in sorted(mine):
            change = change.signed(name, self.keys[name].sign(message))
        return (change,)

    def _behind(self, fork: Fork) -> Behind | None:
        """Who stands behind the record before: as it is, or all of the last full electorate."""
        at, last = fork.at, fork.last
        if not at.standing.since or last is None:
            return None
        if fork.kind != "behind" or not fork.records:
            return behind_of(at, last)
        message = accept_message(at.head, last.ballot)
        pairs = [(p, self._signature(fork, p, message)) for p in at.standing.electorate]
        return Behind(last.ballot, tuple([pair for pair in pairs if pair[1]]))

    def _signed(self, fork: Fork, body: Body) -> Record:
        rng = self.rng
        head = head_of(body, next(iter(self.keys.values())))
        ballot = 0 if rng.random() < 0.7 else randint(rng, 0, 50)
        message = accept_message(head, ballot)
        signers = [m.peer for m in body.members]
        if fork.kind == "copied":
            signers = sorted({*signers, *fork.at.electorate})
        signatures = [(p, self._signature(fork, p, message)) for p in signers]
        if fork.kind != "copied":
            signatures = [(p, s) for p, s in signatures if p in self.keys]
        draws = tuple([(p, self._signature(fork, p, draw_message(head))) for p, _ in signatures])
        return Record(body, head, ballot, tuple(signatures), None, draws)

    def _signature(self, fork: Fork, peer: str, message: bytes) -> str:
        """Its own; of another's the newest that is known, of another message."""
        if peer in self.keys:
            return self.keys[peer].sign(message)
        for record in reversed(fork.base):
            known = dict(record.signatures)
            if peer in known:
                return known[peer]
        return hex_digits(self.rng, 64)
