"""A home that was restored from a backup looks for its run before anything else.

The others may have gone on. This node goes the way of a member that lost its disk: it does not know what it
promised since the backup, so `restore` leaves the vote away, and it counts again when a record names the new
disk (docs/decisions/003-lost-disk.md). Alone, it waits as long as the run says that a quorum is lost after,
and goes on by itself from the backup's newest record, although that names the disk of before: an island,
which gives way when the others are met. From then on it is as above. Had it decided alone since the backup,
it may decide otherwise. So nobody may be overlooked.

A home is no longer taken for a restored one when its run was found, or when its newest record names the new
disk. Until then each start looks again. A home on an island does not look before the island has ended, and
stays a restored one: found, the run would have it wait for a record that names it anew, which nobody else can
make on an island; and what its records name is undone by the way back.

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
from tapestry.dht.swarm import Swarm
from tapestry.node.disk.chain_file import ChainFile
from tapestry.node.disk.home_mark import Mark, write_mark
from tapestry.node.disk.store import read_vote
from tapestry.node.home import Home
from tapestry.node.net.join import genesis_of
from tapestry.node.net.known_peers import KnownPeers
from tapestry.node.protocol.canon import Crypto
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.place import Place
from tapestry.node.protocol.record import Genesis
from tapestry.node.protocol.waits import Wait

LOOK_S = 5.0  # between two looks
CONNECT_S = 5.0
ENTRIES_MAX = 32  # Guess: addresses by which the DHT is entered
LISTED_MAX = 64  # Guess: who is listed there may be made up; electors come first
RESTORED_WAIT_S = 120.0  # Guess: of a run that says "auto". A network may come up after the node does

_log = logging.getLogger("tapestry.node")

Say = Callable[[Wait | None], None]


async def find_run(
    home: Home,
    mark: Mark,
    genesis: Genesis,
    chain: Chain,
    wait_s: float,
    swarm: Swarm,
    peers: Sequence[PeerAddress],
    crypto: Crypto,
    say: Say,
) -> None:
    """Returns when somebody was met, and then the home is an ordinary one, or `wait_s` are over. Raises
    UserError, OSError."""
    vote = read_vote(home)
    named = {life for peer, life in chain.place.seats if peer == swarm.peer_id}
    if vote is not None and vote.life in named:
        write_mark(home, replace(mark, restored_at=""))
        return
    _log.warning(
        "home=restored at=%s; it looks for its run before it trains: give --peer if it finds nobody",
        mark.restored_at,
    )
    end_s = time.monotonic() + wait_s
    met = ""
    while not met and time.monotonic() < end_s:
        left_s = end_s - time.monotonic()
        what = f"restored from a backup ({mark.restored_at}): looks for its run before it trains"
        ends = (
            f"ends when it finds another elector; if it stays alone, it goes on by itself in {left_s:.0f} s"
        )
        say(Wait("run", what, ends))
        began_s = time.monotonic()
        met = await _meet(swarm, genesis.run_id, _known(home, peers), chain.place, crypto)
        if not met:
            await asyncio.sleep(min(LOOK_S, max(0.0, LOOK_S - (time.monotonic() - began_s))))
    if met:
        _log.info("home=restored found=%s; its vote counts again when a record names it anew", met[-6:])
        write_mark(home, replace(mark, restored_at=""))
    else:
        _log.warning(
            "home=restored alone after_s=%g; goes on by itself; give --peer if the others are elsewhere",
            wait_s,
        )
    say(None)


def chain_of(home: Home, genesis: Genesis, crypto: Crypto) -> Chain:
    """Of a home. Raises OSError."""
    return Chain(genesis, past=ChainFile(home, genesis, crypto))


def _known(home: Home, peers: Sequence[PeerAddress]) -> list[PeerAddress]:
    """Those given, then where others were when the backup was made."""
    known = [parse_peer(a) for addresses in KnownPeers(home.peers).addresses.values() for a in addresses]
    return list(dict.fromkeys([*peers, *known]))


async def _meet(swarm: Swarm, run_id: str, known: Sequence[PeerAddress], place: Place, crypto: Crypto) -> str:
    """The peer id of somebody who counts as found, or "", when all have answered or had their time.

    All are asked at once, and the DHT beside them: who is gone takes the time of nobody who is there.
    """
    electors = {*place.electorate, *place.standing.electorate} - {swarm.peer_id}
    addresses: dict[str, list[str]] = {}
    for peer in known:
        if peer.peer_id in electors:
            addresses.setdefault(peer.peer_id, []).append(peer.maddr)
    asked = [_ask(swarm, peer, where, run_id, crypto) for peer, where in addresses.items()]
    listed = _meet_listed(swarm, run_id, known, electors, place.epoch, crypto)
    return next(filter(None, await asyncio.gather(*asked, listed)), "")


async def _ask(swarm: Swarm, peer: str, addresses: Sequence[str], run_id: str, crypto: Crypto) -> str:
    """Its peer id, if it can be reached and is of the run."""
    with contextlib.suppress(SwarmError):
        await swarm.connect_any(peer, addresses, CONNECT_S)
        if await _is_member(swarm, peer, run_id, crypto):
            return peer
    return ""


async def _meet_listed(
    swarm: Swarm,
    run_id: str,
    known: Sequence[PeerAddress],
    electors: set[str],
    epoch: int,  # of the newest record here
    crypto: Crypto,
) -> str:
    """As `_meet`, of those that the DHT knows."""
    try:
        await swarm.join_dht(run_id, known[:ENTRIES_MAX], timeout_s=CONNECT_S)
        listed = await swarm.list_presence(time.time())
    except SwarmError:
        return ""
    there = [one for one in listed if one.peer_id != swarm.peer_id and one.phase != "stopping"]
    counting = [one for one in there if one.peer_id in electors or one.epoch > epoch]
    counting.sort(key=lambda one: one.peer_id not in electors)
    asked = [_ask(swarm, one.peer_id, one.addresses, run_id, crypto) for one in counting[:LISTED_MAX]]
    return next(filter(None, await asyncio.gather(*asked)), "")


async def _is_member(swarm: Swarm, peer_id: str, run_id: str, crypto: Crypto) -> bool:
    genesis = await genesis_of(swarm, peer_id, crypto)
    return isinstance(genesis, Genesis) and genesis.run_id == run_id
