"""Peer exchange: linked peers tell each other where they, and those linked with them, can be reached.

Presence in the DHT is judged by clocks: a node whose clock is wrong is not seen there and sees nobody. If
some of a run met it and others did not, every round with all of them would stall. Here no clock counts.

An answer is only a list of addresses to try. What a peer says of itself is kept for its link; whom it names
is asked in turn, so that libp2p proves who is there, and that it is of our run, before it gets a link.

The protocol: opening a stream is the question. The answer is one frame without payload, its header a msgpack
array of multiaddrs, each with `/p2p/<peer id>`, then the stream's end.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import re
from collections.abc import Sequence
from typing import Any

import msgpack

from tapestry.dht.addresses import AddressError, parse_peer
from tapestry.dht.presence import ADDRESS_BYTES_MAX, ADDRESSES_MAX
from tapestry.dht.swarm import Swarm, SwarmError
from tapestry.node.links import Links, Listener
from tapestry.node.throttle import Throttles
from tapestry.node.wire import (
    FrameLimits,
    RemoteProtocolError,
    StreamEnded,
    frame_parts,
    read_frame,
    unpack,
)

LOOK_S = 1.0  # who is newly linked is asked within so long
ASK_EVERY_S = 5.0  # Guess: one of the others, in turn
ASK_S = 3.0  # Guess: for an answer, dialling included
PEERS_MAX = 64  # told of in one answer
DIALS_MAX = 8  # Guess: of those that one answer names
DIAL_AGAIN_S = 30.0  # Guess: after a peer could not be reached where another said
_ANSWER_BYTES_MAX = (PEERS_MAX + 1) * ADDRESSES_MAX * (ADDRESS_BYTES_MAX + 8)
_ADDRESS = re.compile(r"/[!-~]+/p2p/([1-9A-HJ-NP-Za-km-z]{52})")

Addresses = dict[str, tuple[str, ...]]  # peer id -> where it is said to be

_log = logging.getLogger("tapestry.network")


class PeerExchange:
    """One node's side of it, on one swarm: `serve` is the protocol's handler, `run` asks."""

    def __init__(
        self,
        swarm: Swarm,
        links: Links,
        run_id: str,
        own_addresses: Sequence[str],
        listener: Listener,
        throttles: Throttles,
    ) -> None:
        self.protocol = f"/tapestry/{run_id}/peers/1"
        self._swarm = swarm
        self._links = links
        self._own_addresses = tuple(own_addresses)
        self._listener = listener
        self._throttles = throttles
        self._tried_at: dict[str, float] = {}  # peers that others named, and we could not reach

    async def serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer `peer`: we come first. Raises TimeoutError and OSError."""
        others = [addresses for other, addresses in self._links.addresses.items() if other != peer]
        others = random.sample(others, min(PEERS_MAX, len(others)))
        told = [address for one in (self._own_addresses, *others) for address in one[:ADDRESSES_MAX]]
        answer = memoryview(*frame_parts(msgpack.packb(told)))
        self._throttles.upload.spend(answer.nbytes)
        self._listener.on_bytes("sent", "control", answer.nbytes)
        writer.write(answer)
        async with asyncio.timeout(ASK_S):
            await writer.drain()

    async def run(self) -> None:
        """Ask until cancelled: who is newly linked soon, of the others one at a time."""
        now = asyncio.get_running_loop().time
        asked: dict[str, None] = {}  # in the order in which they were
        turn_at = -math.inf
        while True:
            linked = self._links.linked
            asked = {peer: None for peer in asked if peer in linked}
            ask = [peer for peer in linked if peer not in asked]
            if not ask and asked and now() >= turn_at:
                ask = [next(iter(asked))]
            if ask:
                turn_at = now() + ASK_EVERY_S
            for peer in ask:
                asked.pop(peer, None)
                asked[peer] = None
            named: Addresses = {}
            for found in await asyncio.gather(*(self._ask(peer) for peer in ask)):
                named |= found
            await self._meet(named)
            await asyncio.sleep(LOOK_S)

    async def _meet(self, named: Addresses) -> None:
        """Ask those whom others named: who answers gets a link."""
        now = asyncio.get_running_loop().time()
        self._tried_at = {p: at for p, at in self._tried_at.items() if now - at < DIAL_AGAIN_S}
        self._tried_at |= dict.fromkeys(named, now)
        await asyncio.gather(*(self._ask(peer, addresses) for peer, addresses in named.items()))

    async def _ask(self, peer: str, addresses: Sequence[str] = ()) -> Addresses:
        """Keep what `peer` says of itself; those whom it names, and whom we should meet."""
        try:
            async with asyncio.timeout(ASK_S):
                if addresses:
                    await self._swarm.connect_any(peer, addresses, ASK_S)
                answer = await self._read_answer(peer)
            told = _by_peer(answer)
            own = _parsed(told.pop(peer, ()))
            strangers = [p for p in told if self._is_stranger(p)]
            strangers = random.sample(strangers, min(DIALS_MAX, len(strangers)))
            named = {p: _parsed(told[p]) for p in strangers}
        except RemoteProtocolError as error:
            self._listener.on_refused(peer, error.reason, str(error))
            return {}
        except (SwarmError, StreamEnded, TimeoutError, OSError) as error:
            _log.debug("peers=not_told peer=%s reason=%r", peer[-6:], error)
            return {}
        self._links.want(peer, own)
        return named

    async def _read_answer(self, peer: str) -> bytes:
        reader, writer = await self._swarm.open_stream(peer, self.protocol, ASK_S)
        try:
            limits = FrameLimits(_ANSWER_BYTES_MAX, 0, throttle=self._throttles.download)
            answer, _ = await read_frame(reader, limits, ASK_S, ASK_S)
        finally:
            writer.close()
        self._listener.on_bytes("received", "control", len(answer))
        return answer

    def _is_stranger(self, peer: str) -> bool:
        known = (self._swarm.peer_id, *self._links.linked, *self._tried_at)
        return peer not in known


def _by_peer(answer: bytes) -> Addresses:
    """Raises RemoteProtocolError."""
    listed: Any = unpack(answer)
    if not isinstance(listed, tuple) or len(listed) > (PEERS_MAX + 1) * ADDRESSES_MAX:
        raise RemoteProtocolError("malformed", "its peers are not a list, or too long a one")
    told: Addresses = {}
    for address in listed:
        match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
        if match is None:
            raise RemoteProtocolError("malformed", f"not the address of a peer: {address!r:.80}")
        told[match[1]] = (*told.get(match[1], ()), address)
    return told


def _parsed(addresses: Sequence[str]) -> tuple[str, ...]:
    """A third of a millisecond each: for those that will be dialled. Raises RemoteProtocolError."""
    try:
        return tuple(parse_peer(address).maddr for address in addresses[:ADDRESSES_MAX])
    except AddressError as error:
        raise RemoteProtocolError("malformed", str(error)) from None
