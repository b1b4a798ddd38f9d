"""Peer exchange: linked peers tell each other where they, and those linked with them, can be reached.

Presence in the DHT is judged by clocks: a node whose clock is wrong is not seen there and sees nobody. If
some of a run met it and others did not, every round with all of them would stall. Here no clock counts.

An answer is only a list of addresses to try. What a peer says of itself is kept for its link; whom it names
is asked in turn, so that libp2p proves who is there, and that it is of our run, before it gets a link. A liar
can make us dial a few addresses more, and can keep nobody from being met: what counts as tried is an address.
So are those asked, now and then, whom we were linked with before: after a partition nobody else knows them.

The protocol: opening a stream is the question. The answer is one frame without payload, its header a msgpack
array of multiaddrs, each with `/p2p/<peer id>`, then the stream's end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

from tapestry.dht.addresses import usable_addresses
from tapestry.dht.p2pd import SwarmError
from tapestry.dht.presence import ADDRESS_BYTES_MAX, ADDRESSES_MAX
from tapestry.dht.swarm import Swarm
from tapestry.node.net.known_peers import Addresses, KnownPeers
from tapestry.node.net.links import Links, Listener
from tapestry.node.net.throttle import Throttles
from tapestry.node.net.wire import (
    FrameLimits,
    RemoteProtocolError,
    StreamEnded,
    WriteLimits,
    frame_parts,
    read_frame,
    unpack,
    write_frame,
)

LOOK_S = 1.0  # who is newly linked is asked within so long
ASK_EVERY_S = 5.0  # Guess: nobody is asked more often, and after the first time the linked are asked in turn
ASK_S = 5.0  # Guess: for an answer, dialling included: about 7 round trips, of 300 ms on a long line
PEERS_MAX = 64  # told of in one answer
DIALS_MAX = 8  # Guess: of those that one answer names, and of all that were named in one LOOK_S
DIAL_AGAIN_S = 30.0  # Guess: after an address was tried
NAMED_MAX = 256  # Guess: that wait to be dialled
ANSWERS_MAX = 3  # in ASK_EVERY_S, to one peer: it may have restarted
STRANGERS_MAX = 64  # Guess: in ASK_EVERY_S, to all that are not linked: a swarm that starts at once
_ANSWER_BYTES_MAX = (PEERS_MAX + 1) * ADDRESSES_MAX * (ADDRESS_BYTES_MAX + 8)
_PEER = re.compile(r"/p2p/([1-9A-HJ-NP-Za-km-z]{52})\Z")

_log = logging.getLogger("tapestry.network")


class Turns:
    """Whom of the linked to ask now: who is new, or did not answer, soon; the others one at a time. Pure."""

    def __init__(self) -> None:
        self._linked: set[str] = set()
        self._soon: set[str] = set()
        self._asked_at: dict[str, float] = {}
        self._turn_at = -math.inf

    def due(self, linked: Sequence[str], now: float) -> list[str]:
        """They count as asked."""
        self._soon |= set(linked) - self._linked
        self._linked = set(linked)
        self._soon &= self._linked
        recent = {p: at for p, at in self._asked_at.items() if now - at < ASK_EVERY_S}
        may = [p for p in linked if p not in recent]
        ask = [p for p in may if p in self._soon]
        others = [p for p in may if p not in self._soon]
        if others and now >= self._turn_at:
            self._turn_at = now + ASK_EVERY_S
            ask.append(min(others, key=lambda p: self._asked_at.get(p, -math.inf)))
        self._asked_at = {p: at for p, at in self._asked_at.items() if p in recent or p in self._linked}
        self._asked_at |= dict.fromkeys(ask, now)
        self._soon -= set(ask)
        return ask

    def failed(self, peer: str) -> None:
        self._soon.add(peer)


class Named:
    """Where those are said to be whom others named, until it was tried. Pure."""

    def __init__(self) -> None:
        self._addresses: dict[str, dict[str, None]] = {}
        self._tried_at: dict[str, float] = {}  # by address, so that a false one spoils no other

    def add(self, told: Addresses, is_wanted: Callable[[str], bool]) -> None:
        """What one answer names."""
        strangers = [p for p in told if is_wanted(p)]
        for peer in random.sample(strangers, min(DIALS_MAX, len(strangers))):
            fresh = [a for a in usable_addresses(told[peer], peer) if a not in self._tried_at]
            if fresh:
                self._addresses.setdefault(peer, {}).update(dict.fromkeys(fresh))
        while len(self._addresses) > NAMED_MAX:
            del self._addresses[random.choice(list(self._addresses))]

    def take(self, is_wanted: Callable[[str], bool], now: float) -> Addresses:
        """Some of those that are still wanted, to be dialled now."""
        self._tried_at = {a: at for a, at in self._tried_at.items() if now - at < DIAL_AGAIN_S}
        self._addresses = {p: addresses for p, addresses in self._addresses.items() if is_wanted(p)}
        taken: Addresses = {}
        for peer in random.sample(list(self._addresses), min(DIALS_MAX, len(self._addresses))):
            addresses = list(self._addresses.pop(peer))
            taken[peer] = tuple(random.sample(addresses, min(ADDRESSES_MAX, len(addresses))))
            self._tried_at |= dict.fromkeys(taken[peer], now)
        return taken


class PeerExchange:
    """One node's side of it, on one swarm: `serve` is the protocol's handler, `run` asks."""

    def __init__(
        self,
        swarm: Swarm,
        links: Links,
        run_id: str,
        own_addresses: Callable[[], Sequence[str]],
        known: KnownPeers,
        listener: Listener,
        throttles: Throttles,
    ) -> None:
        self.protocol = f"/tapestry/{run_id}/peers/1"
        self._swarm = swarm
        self._links = links
        self._own_addresses = own_addresses
        self._known = known
        self._listener = listener
        self._throttles = throttles
        self._turns = Turns()
        self._named = Named()
        self._asking: set[str] = set()
        self._answered: Counter[str] = Counter()  # since `_answered_since`
        self._strangers = 0  # of these, to who is not linked
        self._answered_since = -math.inf

    # --- answering -----------------------------------------------------------------------------

    async def serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer `peer`: we come first. Raises TimeoutError and OSError."""
        if not self._listener.admits(peer):
            return
        if not self._may_ask(peer):
            self._listener.on_refused(peer, "streams", "it asks for peers all the time")
            self._swarm.blame(peer, "streams")
            return
        others = [addresses for other, addresses in self._links.addresses.items() if other != peer]
        others = random.sample(others, min(PEERS_MAX, len(others)))
        told = [address for one in (self._own_addresses(), *others) for address in one[:ADDRESSES_MAX]]
        limits = WriteLimits(self._throttles.upload, False, ASK_S, whole_frame=True)
        with contextlib.suppress(ConnectionResetError):  # it asked and did not wait for the answer
            await write_frame(
                writer,
                frame_parts(msgpack.packb(told)),
                limits,
                lambda count: self._listener.on_bytes("sent", "control", count, peer),
            )

    def _may_ask(self, peer: str) -> bool:
        now = asyncio.get_running_loop().time()
        if now - self._answered_since >= ASK_EVERY_S:
            self._answered.clear()
            self._strangers = 0
            self._answered_since = now
        stranger = peer not in self._links.linked
        if self._answered[peer] >= ANSWERS_MAX or (stranger and self._strangers >= STRANGERS_MAX):
            return False
        self._answered[peer] += 1
        self._strangers += stranger
        return True

    # --- asking --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Ask until cancelled. Nobody waits for who does not answer."""
        now = asyncio.get_running_loop().time
        lost_at = -math.inf
        async with asyncio.TaskGroup() as tasks:
            while True:
                if now() - lost_at >= ASK_EVERY_S:
                    lost_at = now()
                    self._named.add(self._known.lost(self._links.linked), self._is_wanted)
                for peer in self._turns.due(self._links.linked, now()):
                    tasks.create_task(self._ask(peer))
                for peer, addresses in self._named.take(self._is_wanted, now()).items():
                    tasks.create_task(self._ask(peer, addresses))
                await asyncio.sleep(LOOK_S)

    def _is_wanted(self, peer: str) -> bool:
        """Whether to dial it if others name it: not linked, and we have room for it or want it anyway."""
        links = self._links
        if peer == self._swarm.peer_id or peer in self._asking or peer in links.linked:
            return False
        if not self._listener.admits(peer):
            return False
        return not links.full or peer in links.wanted

    async def _ask(self, peer: str, addresses: Sequence[str] = ()) -> None:
        """A link, by its own word, for who answers; whom it names is dialled later."""
        if peer in self._asking:
            return
        self._asking.add(peer)
        try:
            async with asyncio.timeout(ASK_S):
                if addresses:
                    now, linked = asyncio.get_running_loop().time(), self._links.linked
                    addresses = self._links.dials.take(addresses, now, linked)
                    if not addresses:
                        return  # named too often; they may be named again
                    await self._swarm.connect_any(peer, addresses, ASK_S)
                answer = await self._read_answer(peer)
            told = _by_peer(answer)
            own = usable_addresses(told.get(peer, ()), peer)
            if peer in told and not own:
                raise RemoteProtocolError("malformed", "it cannot be dialled where it says it is")
            self._links.want(peer, own)
            self._named.add(told, self._is_wanted)
            return
        except RemoteProtocolError as error:
            self._listener.on_refused(peer, error.reason, str(error))
            self._swarm.blame(peer, error.reason)
        except (SwarmError, StreamEnded, TimeoutError, OSError) as error:
            _log.debug("peers=not_told peer=%s reason=%r", peer[-6:], error)
        except Exception as error:  # an answer ends one question, never the loop
            _log.exception("peers=not_told peer=%s", peer[-6:])
            self._listener.on_refused(peer, "other", repr(error))
        finally:
            self._asking.discard(peer)
        self._turns.failed(peer)

    async def _read_answer(self, peer: str) -> bytes:
        reader, writer = await self._swarm.open_stream(peer, self.protocol, ASK_S)
        try:
            limits = FrameLimits(_ANSWER_BYTES_MAX, 0, throttle=self._throttles.download)
            answer, _ = await read_frame(reader, limits, ASK_S, ASK_S)
        finally:
            writer.close()
        self._listener.on_bytes("received", "control", len(answer), peer)
        return answer


def _by_peer(answer: bytes) -> Addresses:
    """Sorted by whom they name, and no more: few of them will be dialled. Raises RemoteProtocolError."""
    listed: Any = unpack(answer)
    if not isinstance(listed, tuple) or len(listed) > (PEERS_MAX + 1) * ADDRESSES_MAX:
        raise RemoteProtocolError("malformed", "its peers are not a list, or too long a one")
    told: Addresses = {}
    for address in listed:
        peer = _PEER.search(address) if isinstance(address, str) else None
        if peer is None:
            raise RemoteProtocolError("malformed", "its peers are not all addresses of peers")
        told[peer[1]] = (*told.get(peer[1], ()), address)
    return told
