"""Another node with our key: a copied home, or one restored while the first still runs.

The run shows it. In the DHT a presence record of our own peer id names addresses that are not ours. Whether
somebody is there is no question of clocks: a connection is opened to such an address under a key made for
the purpose, and libp2p's handshake proves that whoever answers has ours. It may be this node itself: the
record is of before a crash, and a router leads its own public address back. Then the purpose-made key is
among those that are connected here. The node that starts is the one that gives way.

What cannot be asked (the other is behind a router) is watched: a record of ours, newer than this process,
that this process did not write.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable
from pathlib import Path

from tapestry.dht.addresses import PeerAddress, parse_peer
from tapestry.dht.identity import Identity
from tapestry.dht.p2pd import SwarmConfig, SwarmError
from tapestry.dht.presence import Presence
from tapestry.dht.swarm import Swarm
from tapestry.node.errors import ExitCode, UserError

ASKED_MAX = 4  # Guess: a node has two or three addresses
OPEN_S = 1.5  # for a TCP handshake
PROVE_S = 8.0  # a p2pd that starts, and libp2p's handshake
ARRIVALS_S = (0.0, 0.1, 0.4)  # Guess: when to look for a probe that came to us
PUBLISHED_KEPT = 64
YOUNG_S = 120.0  # Guess: the DHT knows of the other within half a minute
_TCP = re.compile(r"/(?:ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/([0-9]{1,5})(?:/|\Z)")

Connected = Callable[[], Awaitable[Collection[str]]]  # the peer ids that our own p2pd has connections with
Prove = Callable[[PeerAddress, Connected], Awaitable[bool]]


async def refuse_twin(
    peer_id: str,
    listed: Iterable[Presence],
    ours: Iterable[str],
    connected: Connected,
    prove: Prove | None = None,
) -> None:
    """Raises UserError if a node with our key answers where our presence record says that we are."""
    own = {_bare(address) for address in ours}
    record = next((one for one in listed if one.peer_id == peer_id and one.phase != "stopping"), None)
    foreign = [a for a in record.addresses if _bare(a) not in own] if record is not None else []
    for address in foreign[:ASKED_MAX]:
        there = parse_peer(f"{_bare(address)}/p2p/{peer_id}")
        if await _is_open(address) and await (prove or _prove)(there, connected):
            raise UserError(
                f"a node with this home's key (…{peer_id[-6:]}) runs already, at {_bare(address)}",
                exit_code=ExitCode.REFUSED,
                hint="stop one of the two; to have both, give this one a key of its own: remove "
                "identity.key, "
                "vote.json and home.json from its home",
            )


class TwinWatch:
    """What this process has published, to tell it from what another with our key did."""

    def __init__(self, started_at: float) -> None:
        self._started_at = started_at
        self._published: deque[float] = deque(maxlen=PUBLISHED_KEPT)

    def may_give_way(self, now: float) -> bool:
        """Whether we are the younger one, most likely: the other need not end for us."""
        return now - self._started_at < YOUNG_S

    def publishes(self, issued_at: float) -> None:
        self._published.append(issued_at)

    def look(self, peer_id: str, listed: Iterable[Presence]) -> str:
        """Where the other says that it is; "" if there is none."""
        for record in listed:
            if record.peer_id != peer_id or record.issued_at in self._published:
                continue
            if self._published and record.issued_at > self._started_at:
                return ", ".join(map(_bare, record.addresses[:2])) or "an unknown address"
        return ""


def _bare(address: str) -> str:
    return address.partition("/p2p/")[0]


async def _is_open(address: str) -> bool:
    """Whether anything listens there."""
    match = _TCP.match(address)
    if match is None:
        return False
    try:
        async with asyncio.timeout(OPEN_S):
            _, writer = await asyncio.open_connection(match[1], int(match[2]))
    except (OSError, TimeoutError, ValueError, OverflowError):
        return False
    writer.close()
    return True


async def _prove(address: PeerAddress, connected: Connected) -> bool:
    """Connect under another key; with our own, p2pd would take it for a call to itself. False if it is."""
    with tempfile.TemporaryDirectory(prefix="tapestry-probe-") as folder:
        key = Path(folder) / "key"
        Identity.load_or_create(key)
        config = SwarmConfig(identity_path=key, listen=("/ip4/127.0.0.1/tcp/0",), nat_port_map=False)
        is_another = False
        with contextlib.suppress(SwarmError, TimeoutError):
            async with asyncio.timeout(PROVE_S):
                probe = await Swarm.start(config)
                try:
                    await probe.connect(address, PROVE_S / 2)
                    is_another = not await _has_come(probe.peer_id, connected)
                finally:
                    await probe.close()
        return is_another  # whether or not the probe's own end takes too long


async def _has_come(probe: str, connected: Connected) -> bool:
    """Whether it is we whom the probe reached: our end of a connection may be there a moment later."""
    for pause_s in ARRIVALS_S:
        await asyncio.sleep(pause_s)
        if probe in await connected():
            return True
    return False
