"""Whose word takes this node from one ballot of a round to a higher one, and whose does so no more.

One elector's word is enough: it is how a round gets away, in one message, from a leader that only some
cannot reach. But whoever opens ballot after ballot, or says so, takes all out of one exchange after the
other, and no round of the run ever ends, not even the one that would remove it. So what a word leads to is
counted. FREE times it may lead to nothing; from then on it is not heeded as long as a quorum may be in our
ballot without it. That costs no liveness: who gives up on a leader by its own clock needs no word, and where
no quorum is left in our ballot every word counts again. Each REPAID records of ballots that someone took us
to, or led, take back one: whoever is struck off for a bad line is in again by leading when it is its turn.

Nor may anybody lead every round, for who leads says what a record carries: each ballot has its leader by lot.
Whoever takes us to a ballot of its own in haste, while the leader before had time left by our clock, gets
nothing back for the record but what leading is worth.

A leader may go on to later ballots of its own: once for each other elector, which it may have to leave out,
and OWN_MORE times where it has named no roster. Beyond that it is not heeded in this round, and that counts.
So does a round in which it went on, and another led the ballot that was decided: perhaps its rosters stalled.

An opinion of this node, by which nothing is decided but its own ballot. Pure.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

FREE = 3  # Guess: where links break at random, several in a row lead to nothing
REPAID = 4  # Guess: as DELIVERED_AGAIN in deliveries.py
OWN_MORE = 4  # Guess: a leader begins anew for who restarted, for a gate, for a promise from before a restart


@dataclass(slots=True)
class Account:
    vain: int = 0  # moves that led to no record
    good: int = 0  # that did, since


class Movers:
    """Mutable; owned by Context."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        # ballot of this round -> who took us there, and whether in haste
        self.moved: dict[int, tuple[str, bool]] = {}
        # leader -> ballots of its own that it left for another of its own in this round
        self.named: dict[str, int] = {}  # with a roster
        self.unnamed: dict[str, int] = {}  # without one
        self.excused: dict[str, bool] = {}  # leaders that gave up an accepted value in this round
        self.spent: dict[str, None] = {}  # leaders that went on more often than that in this round

    def may_go_on(self, leader: str, named: bool, electors: int) -> bool:
        """Whether a leader may leave a ballot of its own for a later one. `named`: it sent us a roster there,
        so that it may have to leave somebody out."""
        ballots = self.named if named else self.unnamed
        ballots[leader] = ballots.get(leader, 0) + 1
        if ballots[leader] <= (electors - 1 if named else OWN_MORE):
            return True
        self.spent[leader] = None
        return False

    def is_heeded(self, peer: str) -> bool:
        account = self.accounts.get(peer)
        return peer not in self.spent and (account is None or account.vain < FREE)

    def is_excused(self, leader: str) -> bool:
        """Whether a leader may give up a value that we accepted, in this round. It is a move in vain."""
        if leader not in self.excused:
            self.excused[leader] = self.is_heeded(leader)
            self._strike(leader)
        return self.excused[leader]

    def count(self, peer: str, ballot: int, hasty: bool) -> None:
        """Its word takes us to `ballot`, or would: in vain, if no record comes of it. Once for a ballot."""
        if self.moved.get(ballot, ("", False))[0] != peer:
            self.moved[ballot] = peer, hasty
            self._strike(peer)

    def end_round(self, ballot: int | None, leader: str, peers: Container[str]) -> None:
        """The round is over: decided in `ballot`, which `leader` led, or left (None). Who is not in the table
        of peers is forgotten."""
        if ballot is not None:
            mover, hasty = self.moved.get(ballot, ("", False))
            if mover in self.accounts and not (hasty and mover == leader):
                self.accounts[mover].vain -= 1
            for peer in self.accounts.keys() & {mover, leader}:
                self._credit(peer)
            for peer in self.named.keys() - {mover, leader}:
                self._strike(peer)
        self.moved.clear()
        self.named.clear()
        self.unnamed.clear()
        self.spent.clear()
        self.excused.clear()
        for peer in [p for p in self.accounts if p not in peers]:
            del self.accounts[peer]

    def _strike(self, peer: str) -> None:
        self.accounts.setdefault(peer, Account()).vain += 1

    def _credit(self, peer: str) -> None:
        account = self.accounts[peer]
        account.good += 1
        if account.good >= REPAID:
            account.vain, account.good = account.vain - 1, 0
        if account.vain <= 0:
            del self.accounts[peer]
