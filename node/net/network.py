"""One node's place in the swarm: p2pd, links, presence, and the streams that serve genesis and state.

A p2pd that dies takes every link with it. It is noticed within a second, the core is told that its peers are
down, and a new one is started on the same addresses; after RESTARTS_MAX deaths within RESTARTS_WINDOW_S the
node gives up with an error, since something kills p2pd for a reason.

Peers are found five ways: the addresses that the operator gave, presence records in the DHT, what linked
peers say (peer_exchange.py), those of before (known_peers.py: a node finds its run again when the peer it
first joined by is gone), and peers that open a stream to us. Who cannot be dialled is found through a relay
(reach.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from typing_extensions import Buffer

from tapestry.dht.addresses import PeerAddress, is_usable, parse_listen, parse_peer, ranked, usable_addresses
from tapestry.dht.conduct import Ban, Conduct
from tapestry.dht.identity import Identity
from tapestry.dht.p2pd import SwarmConfig, SwarmError
from tapestry.dht.presence import ADDRESSES_MAX, LIFETIME_S_MAX, Presence, PresenceError, encode
from tapestry.dht.reachability import HOP
from tapestry.dht.swarm import Swarm
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.net.circuits import Kind
from tapestry.node.net.known_peers import KnownPeers
from tapestry.node.net.links import LinkLimits, Links, Listener
from tapestry.node.net.peer_exchange import PeerExchange
from tapestry.node.net.reach import Reach
from tapestry.node.net.relay import Relay
from tapestry.node.net.twins import TwinWatch, refuse_twin
from tapestry.node.net.vocabulary import Reader
from tapestry.node.protocol.messages import Control, Result, Shard
from tapestry.node.spec.listen import read_listening

PRESENCE_TTL_S = 60.0  # Guess: a dead node is dialled in vain for so long
PRESENCE_REFRESH_S = 20.0  # well before it expires
PRESENCE_LOOK_S = 5.0
PRESENCE_MIN_S = 1.0  # between two publications when the epoch moves fast
PROBE_S = 30.0  # Guess: p2pd is asked where it listens
PROBES_MISSED_MAX = 3  # in a row: then it is replaced
MEET_AGAIN_S = 60.0  # Guess: of the linked; the DHT forgets who was unreachable for some seconds
RESTART_PAUSE_MAX_S = 60.0
KNOWN_AT_START = 16  # Guess: dialled before the DHT answers; they know the others
RESTARTS_MAX = 5
RESTARTS_WINDOW_S = 300.0

_PORT = re.compile(r"/(?P<ip>ip[46])/(?P<host>[^/]+)/(?P<transport>tcp|udp)/(?P<port>\d+)(?P<rest>.*)")

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Handler = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

_log = logging.getLogger("tapestry.network")


@dataclass(frozen=True, slots=True)
class News:
    """What presence says of this node."""

    epoch: int
    head: str
    phase: str


@dataclass(frozen=True, slots=True)
class Where:
    """A node and its peers in the network, as it knows at this moment."""

    addresses: tuple[str, ...]
    reachable: bool | None = None  # whether peers can dial it; None: none of them could say
    relays: tuple[str, ...] = ()  # the peers that carry it
    routes: Mapping[str, str] = field(default_factory=dict)  # linked peer -> "direct" or "relayed"


class Resident(Listener, Protocol):
    """The node that a network carries: it hears what the links tell, and answers these questions."""

    def news(self) -> News:
        """What presence is to say."""
        ...

    def handlers(self) -> dict[str, Handler]:
        """What serves the streams that peers open: protocol -> handler."""
        ...

    def unpack(self, peer: str, message: Shard | Result, frame: bytearray) -> tuple[object, str]:
        """A payload of a peer, checked, and its digest. Raises Refused."""
        ...

    def on_record_refused(self, reason: str) -> None:
        """A presence record in the DHT was refused."""
        ...


class _P2pdDied(Exception):
    pass


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Who this node is, in which run, and whom it knows."""

    swarm: SwarmConfig
    identity: Identity
    run_id: str
    peers: tuple[PeerAddress, ...]  # that the operator gave
    limits: LinkLimits
    reader: Reader
    relay: bool = True  # carry connections of members that cannot be dialled


class Network:
    """Use: `run(swarm, node)` in a task; the rest from the same loop. Without a swarm, sending is losing."""

    def __init__(self, config: NetworkConfig, known: KnownPeers) -> None:
        self._config = config
        self._known = known
        self._swarm: Swarm | None = None
        self._conduct: Conduct | None = None  # outlives a p2pd
        self._links: Links | None = None
        self.up = asyncio.Event()  # we serve, and are in the DHT
        self._moved = asyncio.Event()
        self._expires_at = 0.0
        self._reach: Reach | None = None
        self._direct: tuple[str, ...] = ()  # where p2pd listens, or what is announced
        self.addresses: tuple[str, ...] = ()  # and where we are through relays
        self._twins = TwinWatch(time.time())

    @property
    def given(self) -> tuple[str, ...]:
        """Peers that the operator named."""
        return tuple(peer.peer_id for peer in self._config.peers)

    # --- life ----------------------------------------------------------------------------------

    async def run(self, swarm: Swarm, node: Resident) -> None:
        """Keep `node` in the swarm until cancelled. Raises UserError if p2pd keeps dying."""
        deaths: deque[float] = deque(maxlen=RESTARTS_MAX)
        config, self._conduct = self._config.swarm, swarm.conduct
        if not config.announce:  # announced addresses are not ours to bind
            config = replace(config, listen=with_ports(config.listen, without_peer(await swarm.addresses())))
        while True:
            try:
                await self._serve(swarm, node)
            except* (_P2pdDied, SwarmError) as group:
                reason = str(group.exceptions[0])
            finally:
                self._swarm = self._links = self._reach = None
                await swarm.close()
            _log.error(
                "p2pd=died reason=%r next=restart; if it goes on, look at memory limits and security policy",
                reason,
            )
            now = time.monotonic()
            if len(deaths) == RESTARTS_MAX and now - deaths[0] < RESTARTS_WINDOW_S:
                raise UserError(
                    f"p2pd died {RESTARTS_MAX + 1} times in {RESTARTS_WINDOW_S:g} s, last: {reason}",
                    exit_code=ExitCode.FAILED,
                    hint="look for what kills it: memory limits, a security policy",
                )
            deaths.append(now)
            swarm = await self._restart(config, node)

    async def _restart(self, config: SwarmConfig, node: Resident) -> Swarm:
        """What killed p2pd, for instance want of memory, may keep it from starting too: for a while."""
        pause_s = 1.0
        while True:
            try:
                swarm = await Swarm.start(config, on_refused=node.on_record_refused, conduct=self._conduct)
            except (SwarmError, OSError) as error:
                _log.error(
                    "p2pd=not_restarted reason=%r next=again in_s=%g; free memory and ports if it stays so",
                    str(error),
                    pause_s,
                )
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RESTART_PAUSE_MAX_S)
            else:
                _log.warning(
                    "p2pd=restarted; the links come back by themselves. If it goes on, look at its lines "
                    "above and at this machine's memory"
                )
                return swarm

    async def _serve(self, swarm: Swarm, node: Resident) -> None:
        config = self._config
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_watch(swarm))
            swarm.is_member = node.is_member
            for protocol, handler in node.handlers().items():
                await swarm.serve(protocol, handler)
            self._direct = self.addresses = await _addresses_of(swarm)
            self._swarm = swarm
            self._links = Links(swarm, config.run_id, config.reader, node.unpack, node, config.limits)
            tasks.create_task(self._links.run())
            await asyncio.sleep(0)  # they run
            self._want_known(self._links)  # before the DHT, which takes its time
            exchange = PeerExchange(
                swarm,
                self._links,
                config.run_id,
                lambda: self.addresses,
                self._known,
                node,
                config.limits.throttles,
            )
            await swarm.serve(exchange.protocol, exchange.serve)
            tasks.create_task(exchange.run())
            throttles = config.limits.throttles
            kind_of = functools.partial(caller_kind, node)
            streams = (swarm.open_stream, swarm.end_stream)
            relay = Relay(*streams, lambda: self.linked, kind_of, throttles, config.relay)
            await swarm.serve(HOP, relay.serve)  # in the place of p2pd's own, also where it refuses
            announced = bool(config.swarm.announce)
            self._reach = Reach(
                swarm, self._links, lambda: self._direct, announced, self._place, node.is_member
            )
            tasks.create_task(self._reach.run())
            await swarm.join_dht(config.run_id, config.peers)
            self.up.set()
            tasks.create_task(self._probe(swarm))
            tasks.create_task(self._publish_presence(swarm, node))
            tasks.create_task(self._look_for_peers(swarm, self._links))
            tasks.create_task(self._meet_peers(swarm, self._links))

    async def _probe(self, swarm: Swarm) -> None:
        """Where we are may change: a network that comes up after us, DHCP, a port mapped on a router."""
        missed = 0
        while missed < PROBES_MISSED_MAX:
            await asyncio.sleep(PROBE_S)
            try:
                self._direct = await _addresses_of(swarm)
            except SwarmError as error:
                missed += 1
                _log.warning(
                    "p2pd=silent reason=%r; it is replaced if it stays so. Look whether this machine is "
                    "overloaded",
                    str(error),
                )
                continue
            missed = 0
            self._place()
        raise _P2pdDied(f"p2pd does not answer, {missed} times in a row")

    def _place(self) -> None:
        """Where we are now; others are told at once."""
        relayed = self._reach.relayed_addresses if self._reach is not None else ()
        addresses = ranked((*self._direct, *relayed))
        if addresses != self.addresses:
            _log.info("addresses=changed now=%s", ",".join(addresses))
            self.addresses = addresses
            self._moved.set()

    # --- for the runtime -----------------------------------------------------------------------

    def send_control(self, peer: str, message: Control) -> None:
        if self._links is not None:
            self._links.send_control(peer, message)

    def send_bulk(self, peer: str, message: Shard | Result, kind: str, payload: list[Buffer]) -> None:
        if self._links is not None:
            self._links.send_bulk(peer, message, kind, payload)

    def check_members(self) -> None:
        """The roll has changed."""
        if self._links is not None:
            self._links.check_members()

    def drop_bulk(self) -> None:
        if self._links is not None:
            self._links.drop_bulk()

    async def open_stream(self, peer: str, protocol: str, timeout_s: float) -> Streams:
        """Raises SwarmError while there is no swarm, and Unreachable."""
        if self._swarm is None:
            raise SwarmError("p2pd is being restarted")
        return await self._swarm.open_stream(peer, protocol, timeout_s)

    def tell_moved(self) -> None:
        """The epoch has moved: publish presence at once."""
        self._moved.set()

    @property
    def linked(self) -> list[str]:
        return self._links.linked if self._links is not None else []

    def blame(self, peer: str, reason: str) -> None:
        """It broke the protocol of a stream of ours."""
        if self._swarm is not None:
            self._swarm.blame(peer, reason)

    async def hosts_of(self, peer: str) -> tuple[str, ...]:
        """Where a peer's connections come from; () while that is not known."""
        try:
            return await self._swarm.hosts_of(peer) if self._swarm is not None else ()
        except SwarmError:
            return ()

    def lacks(self) -> dict[tuple[str, str], float]:
        """As Swarm.lacks; nothing while there is none."""
        return self._swarm.lacks() if self._swarm is not None else {}

    def bans(self) -> tuple[Ban, ...]:
        """Who is turned away at this moment."""
        return self._swarm.bans() if self._swarm is not None else ()

    def addresses_of(self, peer: str) -> tuple[str, ...]:
        """Where a linked peer can be reached, by its own word; () if it has said nothing yet."""
        return self._links.addresses.get(peer, ()) if self._links is not None else ()

    def where(self) -> Where:
        """Where this node is, and how peers reach it and are reached."""
        reach = self._reach
        if reach is None:
            return Where(self.addresses)
        return Where(self.addresses, reach.reachable, reach.relays, reach.routes)

    # --- presence ------------------------------------------------------------------------------

    async def _publish_presence(self, swarm: Swarm, node: Resident) -> None:
        while True:
            self._moved.clear()
            try:
                await self._publish(swarm, node.news())
            except (SwarmError, PresenceError) as error:
                _log.warning(
                    "presence=not_published reason=%r; tried again. If it goes on, look at this "
                    "machine's line: newcomers need this node's address",
                    str(error),
                )
            await asyncio.sleep(PRESENCE_MIN_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PRESENCE_REFRESH_S):
                    await self._moved.wait()

    async def _publish(self, swarm: Swarm, news: News) -> None:
        now = time.time()
        self._expires_at = next_expiry(now, self._expires_at)
        self._twins.publishes(now)
        presence = Presence(
            run_id=self._config.run_id,
            peer_id=swarm.peer_id,
            epoch=news.epoch,
            head=news.head,
            phase=news.phase,
            addresses=self.addresses[:ADDRESSES_MAX],
            issued_at=now,
            expires_at=self._expires_at,
        )
        await swarm.publish(encode(presence, self._config.identity.sign), presence.expires_at)

    async def withdraw(self, news: News) -> None:
        """Say in the DHT that we are stopping."""
        if self._swarm is not None:
            with contextlib.suppress(SwarmError, PresenceError, TimeoutError):
                async with asyncio.timeout(2.0):
                    await self._publish(self._swarm, replace(news, phase="stopping"))

    def _want_known(self, links: Links) -> None:
        for peer in self._config.peers:
            links.keep(peer.peer_id, peer.maddr)
        for peer_id, addresses in list(self._known.addresses.items())[:KNOWN_AT_START]:
            links.want(peer_id, addresses, hint=True)

    async def _look_for_peers(self, swarm: Swarm, links: Links) -> None:
        while True:
            await asyncio.to_thread(self._known.remember, links.addresses)  # it syncs the disk
            try:
                listed = await swarm.list_presence(time.time())
                await self._look_for_twin(swarm, listed)
                for presence in random.sample(listed, len(listed)):  # nobody's id comes first
                    if presence.phase != "stopping":
                        usable = usable_addresses(presence.addresses, presence.peer_id)
                        links.want(presence.peer_id, usable, hint=True)
            except SwarmError as error:
                _log.warning(
                    "presence=not_listed reason=%r; tried again, and members that are linked stay so. If "
                    "it goes on, look at this machine's line",
                    str(error),
                )
            await asyncio.sleep(PRESENCE_LOOK_S)

    async def _look_for_twin(self, swarm: Swarm, listed: Sequence[Presence]) -> None:
        """Raises UserError if another node has our key, answers, and was there before us."""
        if self._twins.may_give_way(time.time()):
            await refuse_twin(swarm.peer_id, listed, self.addresses, swarm.connected_peers)
        where = self._twins.look(swarm.peer_id, listed)
        if where:
            _log.error(
                "key=twice another node uses this home's key at=%s; stop one of the two, or remove "
                "identity.key, vote.json and home.json from the home of one",
                where,
            )

    async def _meet_peers(self, swarm: Swarm, links: Links) -> None:
        """Two DHTs of one run become one where peers meet: who is new, or back, and all now and then."""
        now = asyncio.get_running_loop().time
        met_at: dict[str, float] = {}
        while True:
            linked = links.linked
            met_at = {p: at for p, at in met_at.items() if p in linked and now() - at < MEET_AGAIN_S}
            new = [peer for peer in linked if peer not in met_at]
            if new:
                with contextlib.suppress(SwarmError):
                    await swarm.meet(new)
                met_at |= dict.fromkeys(new, now())
            await asyncio.sleep(PRESENCE_LOOK_S)


def caller_kind(node: Listener, peer: str) -> Kind:
    """What a caller is to the relay: in an open run the node admits all the world."""
    if node.is_member(peer):
        return Kind.MEMBER
    return Kind.NEWCOMER if node.admits(peer) else Kind.STRANGER


def next_expiry(now: float, before: float) -> float:
    """Of our next presence record: later than that of the last, or the DHT keeps that one.

    Unless the clock was set back: the last one is then further ahead than a record may live.
    """
    later = before + 0.001
    return now + PRESENCE_TTL_S if later - now >= LIFETIME_S_MAX else max(now + PRESENCE_TTL_S, later)


async def _addresses_of(swarm: Swarm) -> tuple[str, ...]:
    """The one that reaches farthest first. Raises SwarmError."""
    return ranked(a for a in await swarm.addresses() if is_usable(a, swarm.peer_id))


async def _watch(swarm: Swarm) -> None:
    raise _P2pdDied(await swarm.wait_p2pd_death())


def last_listen(home: Home, listen: tuple[str, ...]) -> tuple[str, ...] | None:
    """These listen addresses with the ports that they had the last time; None if that is not known."""
    last = read_listening(home)
    if last is None or last.listen != listen or not last.bound:
        return None
    return with_ports(listen, last.bound)


def with_ports(asked: tuple[str, ...], bound: tuple[str, ...]) -> tuple[str, ...]:
    """What was asked for, with the port that it was given in place of each port 0.

    Only the port: 0.0.0.0 is every interface of the moment, not those of when `bound` was said.
    """
    ports: dict[tuple[str, ...], str] = {}
    for found in filter(None, map(_PORT.match, bound)):
        ports.setdefault(found.group("ip", "transport", "rest"), found["port"])
        ports.setdefault(found.group("ip", "transport", "rest", "host"), found["port"])
    taken = []
    for address in asked:
        match = _PORT.match(address)
        if match is not None and match["port"] == "0":
            kind = match.group("ip", "transport", "rest")
            port = ports.get((*kind, match["host"])) or ports.get(kind, "0")
            address = f"/{match['ip']}/{match['host']}/{match['transport']}/{port}{match['rest']}"
        taken.append(parse_listen(address))
    return tuple(taken)


def without_peer(addresses: Sequence[str]) -> tuple[str, ...]:
    """The addresses that p2pd is bound to."""
    return tuple(dict.fromkeys(parse_peer(a).maddr.rsplit("/p2p/", 1)[0] for a in addresses))
