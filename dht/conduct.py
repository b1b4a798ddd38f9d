"""How peers have behaved at the door: what costs them, who is turned away, and for how long.

Only what no honest node does counts here: frames that are none, more streams, calls or bytes than a node has
use for. What a message says is judged elsewhere (node/protocol), and a fault there bans nobody: an honest
member may be late, or at another head.

Points are paid off with time (a leaky bucket); above POINTS_MAX a peer is banned, for twice as long as the
time before. A ban ends by itself: the guess that a peer is hostile may be wrong. Pure: `now` comes in. The
memory is bounded: of more than PEERS_MAX the one with the fewest points is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

POINTS_MAX = 100.0
POINTS_PER_S = 1.0  # that are paid off
BAN_S_MIN, BAN_S_MAX = 10.0, 600.0  # Guess: a bug that is restarted; a presence's longest life
FORGIVEN_S = 3600.0  # after so long without a fault the next ban is short again. Guess
PEERS_MAX = 4096
COSTS = {
    "busy": 0.0,
    "streams": 2.0,
    "calls": 2.0,
    "oversized": 20.0,
    "malformed": 10.0,
}  # Guess: ten torn frames ban
COST = 10.0  # of every other fault


@dataclass(frozen=True, slots=True)
class Ban:
    """Who is turned away at this moment, and why."""

    peer: str
    reason: str
    left_s: float


@dataclass(slots=True)
class _Account:
    points: float = 0.0
    at: float = 0.0  # when `points` was right
    banned_until: float = 0.0
    bans: int = 0
    reason: str = ""


class Conduct:
    """Of all peers, for as long as the process lives."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def fault(self, peer: str, reason: str, now: float) -> float:
        """Count it; how long the peer is banned, if that is the news, else 0."""
        account = self._account(peer, now)
        account.points += COSTS.get(reason, COST)
        if account.points <= POINTS_MAX or now < account.banned_until:
            return 0.0
        ban_s = min(BAN_S_MIN * 2.0**account.bans, BAN_S_MAX)
        account.points, account.reason = 0.0, reason
        account.bans = min(account.bans + 1, 16)
        account.banned_until = now + ban_s
        return ban_s

    def is_banned(self, peer: str, now: float) -> bool:
        account = self._accounts.get(peer)
        return account is not None and now < account.banned_until

    def bans(self, now: float) -> tuple[Ban, ...]:
        """Those who are banned now, sorted by peer id."""
        banned = [(p, a) for p, a in sorted(self._accounts.items()) if now < a.banned_until]
        return tuple(Ban(peer, a.reason, a.banned_until - now) for peer, a in banned)

    def _account(self, peer: str, now: float) -> _Account:
        account = self._accounts.get(peer)
        if account is None:
            if len(self._accounts) >= PEERS_MAX:
                self._forget_one(now)
            account = self._accounts[peer] = _Account(at=now)
        account.points = max(0.0, account.points - POINTS_PER_S * (now - account.at))
        if now - max(account.at, account.banned_until) >= FORGIVEN_S:
            account.bans = 0
        account.at = now
        return account

    def _forget_one(self, now: float) -> None:
        def weight(peer: str) -> tuple[float, float]:
            account = self._accounts[peer]
            return max(account.banned_until - now, 0.0), account.points

        del self._accounts[min(self._accounts, key=weight)]
