"""Where we may dial on the word of somebody who has proven nothing: a budget per target, and one in all.

A presence record proves who wrote it, not that its addresses are the writer's: 300 records that named a third
party had three members open 161 connections a second to it, for ten minutes. Addresses that a peer was
reached at, that the operator gave, or that a peer itself told us are not counted here.

What a relayed address costs depends on the relay: one that we are linked with is dialled no more than it is
already, and its guest counts as itself; any other is a host and port like the rest.

Pure: `now` comes in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tapestry.dht.addresses import relay_of

ENDPOINT_PER_S, ENDPOINT_BURST = 0.1, 3.0  # one host and port. Guess: a member that is there answers at once
HOST_PER_S, HOST_BURST = 2.0, 64.0  # Guess: a machine that runs a whole swarm
ALL_PER_S, ALL_BURST = 16.0, 256.0  # Guess: a swarm of 64 that starts at once, four addresses each
TARGETS_KEPT = 4096
AGAIN_S_MIN, AGAIN_S_MAX = 5.0, 60.0  # Guess: after so long a hint that failed may be tried again


class Dials:
    """Of one node."""

    def __init__(self) -> None:
        self._left: dict[str, tuple[float, float]] = {}  # target -> dials left, and when that was right
        self._failed: dict[str, tuple[float, float]] = {}  # peer -> not before, and the next wait

    def take(self, addresses: Sequence[str], now: float, linked: Collection[str] = ()) -> tuple[str, ...]:
        """Those of the addresses that may be dialled now; they count as dialled."""
        return tuple(address for address in addresses if self._take_one(address, now, linked))

    def may_try(self, peer: str, now: float) -> bool:
        """Whether a hint at this peer is worth a dial: not if one has just failed."""
        return now >= self._failed.get(peer, (now, 0.0))[0]

    def failed(self, peer: str, now: float) -> None:
        wait_s = self._failed.pop(peer, (0.0, AGAIN_S_MIN))[1]
        if len(self._failed) >= TARGETS_KEPT:
            del self._failed[next(iter(self._failed))]
        self._failed[peer] = (now + wait_s, min(2 * wait_s, AGAIN_S_MAX))

    def reached(self, peer: str) -> None:
        self._failed.pop(peer, None)

    def _take_one(self, address: str, now: float, linked: Collection[str]) -> bool:
        parts = address.split("/")
        relay = relay_of(address)
        endpoint, host = "/".join(parts[:5]), "/".join(parts[:3])
        if relay in linked:
            endpoint, host = f"{relay}/{parts[-1]}", relay
        budgets = (
            (endpoint, ENDPOINT_PER_S, ENDPOINT_BURST),
            (host, HOST_PER_S, HOST_BURST),
            ("", ALL_PER_S, ALL_BURST),
        )
        lefts = [self._left_of(target, per_s, burst, now) for target, per_s, burst in budgets]
        if min(lefts) < 1.0:
            return False
        for (target, _, _), left in zip(budgets, lefts, strict=True):
            self._left.pop(target, None)  # the last used stands last
            self._left[target] = (left - 1.0, now)
        while len(self._left) > TARGETS_KEPT:
            del self._left[next(iter(self._left))]
        return True

    def _left_of(self, target: str, per_s: float, burst: float, now: float) -> float:
        left, at = self._left.get(target, (burst, now))
        return min(burst, left + per_s * max(0.0, now - at))
