"""A home that was restored from a backup looks for its run before anything else.

The others may have gone on. If one of them is found, this node goes the way of a member that lost its disk:
it does not know what it promised since the backup, so its vote is dropped and counts again when a record
names it anew (docs/decisions/003-lost-disk.md). Alone, it waits as long as the run takes to call a quorum
lost, and goes on by itself with what the backup has: an island, which gives way when the others are met.

Found is another elector of the backup's newest record, or who says that there are records after it. Anybody
can serve the genesis, and who gave up its vote for them, with the other electors gone for good, would wait
for ever for a record that nobody can make. A stranger that makes up a later epoch can do that still.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from tapestry.dht.addresses import PeerAddress, parse_peer
from tapestry.dht.p2pd import SwarmError
from tapestry.dht.swarm import Swarm, Unreachable
from tapestry.node.disk.chain_file import ChainFile
from tapestry.node.disk.home_mark import Mark, write_mark
from tapestry.node.home import Home
from tapestry.node.net.join import genesis_of
from tapestry.node.net.known_peers import KnownPeers
from tapestry.node.protocol.chain import Chain, Crypto, Genesis, Place

LOOK_S = 5.0  # between two looks
CONNECT_S = 5.0
ASKED_MAX = 16  # Guess: of those known, in one look

_log = logging.getLogger("tapestry.node")

Say = Callable[[str], None]


async def find_run(
    home: Home,
    mark: Mark,
    genesis: Genesis,
    place: Place,  # after the newest record here
    wait_s: float,
    swarm: Swarm,
    peers: Sequence[PeerAddress],
    crypto: Crypto,
    say: Say,
) -> None:
    """Returns when somebody was met or `wait_s` are over; then the home is an ordinary one. Raises
    OSError."""
    _log.warning(
        "home=restored at=%s; it looks for its run before it trains: give --peer if it finds nobody",
        mark.restored_at,
    )
    end_s = time.monotonic() + wait_s
    met = ""
    while not met and time.monotonic() < end_s:
        left_s = end_s - time.monotonic()
        say(
            f"restored from a backup ({mark.restored_at}): looks for its run before it trains; if it stays "
            f"alone, it goes on by itself in {left_s:.0f} s"
        )
        began_s = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                met = await _meet(swarm, genesis.run_id, _known(home, peers), place, crypto)
        if not met:
            await asyncio.sleep(min(LOOK_S, max(0.0, LOOK_S - (time.monotonic() - began_s))))
    if met:
        _log.info(
            "home=restored found=%s; the vote of the backup is dropped, it may be out of date", met[-6:]
        )
        home.vote.unlink(missing_ok=True)
    else:
        _log.warning(
            "home=restored alone after_s=%g; goes on by itself; give --peer if the others are elsewhere",
            wait_s,
        )
    say("")
    write_mark(home, replace(mark, restored_at=""))


def place_of(home: Home, genesis: Genesis, crypto: Crypto) -> Place:
    """After the newest record of a home. Raises OSError."""
    return Chain(genesis, past=ChainFile(home, genesis, crypto)).place


def _known(home: Home, peers: Sequence[PeerAddress]) -> list[PeerAddress]:
    """Those given, then where others were when the backup was made."""
    known = [parse_peer(a) for addresses in KnownPeers(home.peers).addresses.values() for a in addresses]
    return list(dict.fromkeys([*peers, *known]))[:ASKED_MAX]


async def _meet(swarm: Swarm, run_id: str, known: Sequence[PeerAddress], place: Place, crypto: Crypto) -> str:
    """The peer id of somebody who counts as found, or ""."""
    electors = {*place.electorate, *place.standing.electorate} - {swarm.peer_id}
    for peer in known:
        if peer.peer_id not in electors:
            continue
        with contextlib.suppress(Unreachable):
            await swarm.connect(peer, CONNECT_S)
            if await _is_member(swarm, peer.peer_id, run_id, crypto):
                return peer.peer_id
    try:
        await swarm.join_dht(run_id, known)
        listed = await swarm.list_presence(time.time())
    except SwarmError:
        return ""
    for member in listed:
        if member.peer_id == swarm.peer_id or member.phase == "stopping":
            continue
        if member.peer_id not in electors and member.epoch <= place.epoch:
            continue
        with contextlib.suppress(Unreachable):
            await swarm.connect_any(member.peer_id, member.addresses, CONNECT_S)
            if await _is_member(swarm, member.peer_id, run_id, crypto):
                return member.peer_id
    return ""


async def _is_member(swarm: Swarm, peer_id: str, run_id: str, crypto: Crypto) -> bool:
    genesis = await genesis_of(swarm, peer_id, crypto)
    return isinstance(genesis, Genesis) and genesis.run_id == run_id
