"""Who was named in a roster and did not deliver, and for how long this node names it no more when it leads.

Whoever says READY and gives nothing costs a round a stall. The first time is free: links break. From then on
it is left out of 1, 3, 7, 15, 31, then 63 rounds, and tried again: a peer that never delivers costs ever
fewer rounds, and one whose line is mended is back by delivering. DELIVERED_AGAIN contributions take back one
failure. Newcomers of an open run that have never delivered have one account together: else each new name
would cost two stalls. Who of them delivers when they are tried has its own from then on.

An opinion of this node, by which nothing is decided but its own rosters. It goes by what it saw: a roster
named the peer, and the record does not. That may be the leader's doing, who told the peer nothing: so what
happens under one leader again and again counts once, unless that leader is this node.

Pure.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

FAILURES_MAX = 7  # Guess: left out of 63 rounds at the most
DELIVERED_AGAIN = 4  # Guess: who fails in more than every fifth of its rounds is left out of ever more
NEWCOMERS = ""  # the account of all that belong to nobody's run yet and have never delivered


@dataclass(slots=True)
class Account:
    failures: int = 0
    under: str = ""  # who led when it failed last
    until_epoch: int = -1  # the last round that it is left out of
    delivered: int = 0  # times in a row since


class Deliveries:
    """Mutable; owned by Context. Peers, or NEWCOMERS, are its keys."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}

    def left_out(self, key: str, epoch: int) -> bool:
        account = self.accounts.get(key)
        return account is not None and epoch <= account.until_epoch

    def failed(self, key: str, epoch: int, leader: str, me: str) -> None:
        """In the round of `epoch`, whose `leader` had named it."""
        account = self.accounts.setdefault(key, Account())
        account.delivered = 0
        if leader == account.under and leader != me:
            return
        account.failures = min(account.failures + 1, FAILURES_MAX)
        account.under = leader
        account.until_epoch = epoch + 2 ** (account.failures - 1) - 1

    def succeeded(self, key: str) -> None:
        account = self.accounts.get(key)
        if account is None:
            return
        account.delivered += 1
        if account.delivered >= DELIVERED_AGAIN:
            account.delivered = 0
            account.failures -= 1
            if not account.failures:
                del self.accounts[key]

    def keep_only(self, peers: Container[str], me: str) -> None:
        """Forget who has left the table of peers."""
        for key in [k for k in self.accounts if k not in peers and k not in (me, NEWCOMERS)]:
            del self.accounts[key]
