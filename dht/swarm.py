"""The swarm: libp2p streams to peers whose identity is proved, and the DHT in which they find each other.

It uses hivemind's `P2P` (to start its libp2p daemon, `p2pd`, and to carry the DHT's calls) and its `DHTNode`,
both inside our own event loop; it does not use `hivemind.DHT`, a forked process behind a pipe. What is asked
of p2pd goes through control.py.

What must hold: Swarm.start is called on the thread whose end may end p2pd (Linux ties a parent-death signal
to the thread that forked), which is the main thread of a node.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence

from hivemind.dht.node import DHTNode
from hivemind.p2p import P2P, PeerID

from tapestry.dht.addresses import PeerAddress, full_addresses, short
from tapestry.dht.conduct import Ban, Conduct
from tapestry.dht.control import Control, Unreachable
from tapestry.dht.directory import PEERS_MAX, create_dht_node, presence_key
from tapestry.dht.door import Door, StreamHandler
from tapestry.dht.guard import Guard
from tapestry.dht.identity import Identity, verify
from tapestry.dht.p2pd import (
    SwarmConfig,
    SwarmError,
    hold_folder,
    launch_p2pd,
    make_socket_folder,
    quiet_hivemind,
    require_free,
)
from tapestry.dht.presence import Presence, PresenceError, decode
from tapestry.dht.reachability import HOP
from tapestry.dht.streams import STREAM_BUFFER_BYTES, end_stream

_log = logging.getLogger("tapestry.swarm")

_CHILD_END_S = 1.0
_LACKS_KEPT = 256  # Guess: a peer lacks a few, and nobody has so many peers of another version


class Swarm:
    """A running p2pd, its streams and, once the run is known, its DHT. Make one with `Swarm.start`."""

    def __init__(
        self,
        p2p: P2P,
        folder: str,
        config: SwarmConfig,
        on_refused: Callable[[str], None],
        conduct: Conduct,
        guard: Guard,
    ) -> None:
        self.peer_id: str = p2p.peer_id.to_base58()
        self.conduct = conduct
        self._guard = guard
        self._p2p = p2p
        self._on_refused = on_refused
        self._control = Control(p2p.daemon_listen_maddr["unix"])
        self._streams_path = os.path.join(folder, "streams.sock")
        self.is_member: Callable[[str], bool] = lambda peer: True  # until it is known who is
        guard.is_member = lambda peer: self.is_member(peer)
        self._door = Door(
            config, conduct, self._control.disconnect, lambda peer: self.is_member(peer), on_refused
        )
        self._lacks: dict[tuple[str, str], float] = {}
        self._verify = functools.lru_cache(maxsize=2 * PEERS_MAX)(verify)  # the same records come each time
        self._run_id = ""
        self._dht: DHTNode | None = None
        self._cleanup = contextlib.AsyncExitStack()

    @classmethod
    async def start(
        cls,
        config: SwarmConfig,
        *,
        on_refused: Callable[[str], None] = lambda reason: None,
        conduct: Conduct | None = None,
    ) -> Swarm:
        """Start p2pd and listen. `on_refused(reason)` is called for each presence record, DHT call and stream
        that is refused. `conduct` remembers who was banned, from the swarm before this one.

        Raises IdentityError; SwarmError when an address cannot be listened on or p2pd does not start. A
        cancelled or failed start leaves no process and no file.
        """
        quiet_hivemind()
        Identity.load(config.identity_path)  # where there is no file, hivemind would write an RSA key
        for address in config.listen:
            require_free(address)
        async with contextlib.AsyncExitStack() as cleanup:
            folder = make_socket_folder()
            cleanup.enter_context(hold_folder(folder))
            cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
            swarm: Swarm | None = None

            def on_call_refused(peer: str, reason: str) -> None:
                on_refused(reason)
                if swarm is not None:
                    swarm.blame(peer, reason)

            guard = Guard(on_call_refused)
            p2p = await launch_p2pd(config, folder, guard, cleanup)
            swarm = cls(p2p, folder, config, on_refused, conduct or Conduct(), guard)
            server = await asyncio.start_unix_server(
                swarm._door.on_stream, path=swarm._streams_path, limit=STREAM_BUFFER_BYTES
            )
            cleanup.callback(server.close)
            cleanup.push_async_callback(swarm._door.close)
            await swarm.serve(HOP, _carry_nobody)
            swarm._cleanup = cleanup.pop_all()
        return swarm

    async def close(self) -> None:
        """Stop everything; safe to call again. No process, socket or task of this swarm is left."""
        if self._dht is not None:
            # DHTNode.shutdown would ask p2pd to forget each handler, and hang if it is dead.
            self._dht.is_alive = False
        await self._cleanup.aclose()

    async def wait_p2pd_death(self) -> str:
        """Wait till p2pd is of no use any more, for whatever cause, close() included; say how it ended.

        That is when its process has ended, or one of hivemind's two tasks that talk to it: hivemind does not
        notice that itself, and all that the DHT does then fails without a word.
        """
        control = self._p2p._client.control
        ended = asyncio.create_task(self._p2p._child.wait())
        try:
            await asyncio.wait(
                [ended, control._read_task, control._write_task], return_when=asyncio.FIRST_COMPLETED
            )
            if not ended.done():  # it closes its sockets a moment before it is gone
                await asyncio.wait([ended], timeout=_CHILD_END_S)
            if not ended.done():
                return "hivemind's connection with p2pd has ended"
            code = ended.result()
        finally:
            ended.cancel()
        return f"p2pd was killed by signal {-code}" if code < 0 else f"p2pd exited with status {code}"

    async def addresses(self) -> tuple[str, ...]:
        """Where this node listens (or what it announces), each with `/p2p/<peer id>`."""
        return full_addresses(await self._control.addresses(), self.peer_id)

    async def hosts_of(self, peer_id: str) -> tuple[str, ...]:
        """The IP addresses from or to which there are connections with a peer; not those by a relay."""
        hosts: dict[str, None] = {}
        for text in (await self._control.connections()).get(peer_id, ()):
            parts = text.split("/")
            if len(parts) > 2 and parts[1] in ("ip4", "ip6") and "p2p-circuit" not in parts:
                hosts[parts[2]] = None
        return tuple(hosts)

    def blame(self, peer_id: str, reason: str) -> None:
        """A peer did what no honest one does at the door. Who does so again and again is turned away."""
        self._door.blame(peer_id, reason)

    def is_banned(self, peer_id: str) -> bool:
        return self._door.is_banned(peer_id)

    def bans(self) -> tuple[Ban, ...]:
        """Those who are turned away at this moment."""
        return self._door.bans()

    async def connected_peers(self) -> tuple[str, ...]:
        """The peer ids that p2pd has a connection with, sorted."""
        return tuple(sorted(await self._control.connections()))

    async def known_addresses(self, peer_id: str) -> tuple[str, ...]:
        """The remote ends of the open connections with a peer, with `/p2p/<peer id>`; () when there is none.

        Where the peer dialled us, its port is not one it listens on: to reach it again, use its presence.
        """
        return (await self.connections()).get(peer_id, ())

    async def connections(self) -> dict[str, tuple[str, ...]]:
        """The same of every peer that p2pd has a connection with."""
        connections = await self._control.connections()
        return {peer_id: full_addresses(ends, peer_id) for peer_id, ends in connections.items()}

    async def connect(self, peer: PeerAddress, timeout_s: float) -> None:
        """Connect to a peer; nothing to do when there is a connection. Raises Unreachable."""
        await self._control.connect(peer.peer_id, (peer.maddr,), timeout_s)

    async def connect_any(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        """Connect to a peer at any of `addresses`, as its presence gives them. Raises Unreachable."""
        await self._control.connect(peer_id, addresses, timeout_s)

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Call `handler(peer_id, reader, writer)` for each stream that a peer opens to `protocol`.

        `peer_id` is what libp2p's handshake proved. The stream is closed when the handler ends; what it
        raises is logged and stays its own affair.
        """
        known = self._door.handlers.get(protocol)
        assert known is None or known is _carry_nobody, f"{protocol} is served already"
        self._door.handlers[protocol] = handler
        if known is not None:  # p2pd hands these streams to us already
            return
        await self._control.hand_over(protocol, self._streams_path)

    async def open_stream(
        self, peer_id: str, protocol: str, timeout_s: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a stream to a peer, connecting first if p2pd knows where it is. Raises Unreachable.

        The caller closes the writer, by `end_stream` where it has written more than a question. There is no
        half-close: after `write_eof` p2pd ends both directions, and an answer is lost. The end of the stream
        looks the same whether the peer closed it, died, or our p2pd died: the protocol on it must say what is
        complete.
        """
        try:
            reader, writer = await self._control.open_stream(peer_id, protocol, timeout_s)
        except Unreachable as failure:
            if failure.reason == "unsupported":
                self._lacks[peer_id, protocol] = asyncio.get_running_loop().time()
                if len(self._lacks) > _LACKS_KEPT:
                    del self._lacks[next(iter(self._lacks))]
            raise
        self._lacks.pop((peer_id, protocol), None)
        return reader, writer

    def end_stream(self, peer_id: str, writer: asyncio.StreamWriter) -> None:
        """Close a stream that we opened. What was written goes out; who does not take it is disconnected at
        last."""
        end_stream(writer, functools.partial(self._door.count_stuck, peer_id))

    def lacks(self) -> dict[tuple[str, str], float]:
        """Peer and protocol that it did not serve when a stream was last opened to it -> when that was, by
        the loop's clock. A node that is starting serves little, for a while."""
        return dict(self._lacks)

    async def join_dht(
        self, run_id: str, peers: Sequence[PeerAddress] = (), *, timeout_s: float = 30.0
    ) -> int:
        """Take part in the run's DHT, entering it through `peers`; how many of them answered.

        Zero is no error: the first node of a run has nobody to ask, and a node whose peers are away can
        `meet` them later. Each peer may be a member or a stock `hivemind-dht` process. Raises SwarmError when
        p2pd does not answer. Called again for the same run, it only enters through the peers once more.
        """
        assert self._dht is None or self._run_id == run_id, "a swarm is of one run"
        for peer in peers:
            self._guard.trust_id_of(peer.peer_id)
        reached = await self._reach(peers, timeout_s)
        if self._dht is not None:
            return await self.meet(reached, timeout_s=timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                self._dht = await create_dht_node(
                    self._p2p, run_id, self._guard, self._on_refused, lambda peer: self.is_member(peer)
                )
        except TimeoutError:
            raise SwarmError(f"the DHT did not start in {timeout_s:g} s") from None
        self._run_id = run_id
        answered = await self.meet(reached, timeout_s=timeout_s)
        await self._make_known(timeout_s)
        return answered

    async def meet(self, peer_ids: Iterable[str], *, timeout_s: float = 10.0) -> int:
        """Exchange contacts with the DHT nodes of these peers; how many answered.

        This is how two DHTs of one run become one: peers that meet in any other way should `meet` here too.
        """
        dht = self._require_dht()
        others = [PeerID.from_base58(peer_id) for peer_id in peer_ids if peer_id != self.peer_id]
        pings = [asyncio.create_task(dht.protocol.call_ping(other)) for other in others]
        try:
            if pings:
                await asyncio.wait(pings, timeout=timeout_s)
            return sum(ping.done() and ping.result() is not None for ping in pings)
        finally:
            for ping in pings:
                ping.cancel()

    async def _make_known(self, timeout_s: float) -> None:
        """Look for ourselves: the nodes near us hear of us on the way (Kademlia, section 2.3)."""
        dht = self._require_dht()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await dht.find_nearest_nodes([dht.node_id])

    async def publish(self, record: bytes, expires_at: float, *, timeout_s: float = 10.0) -> bool:
        """Store our presence record (from `presence.encode`) in the DHT.

        `expires_at` is that of the record. False: it was not stored anywhere, for instance because a record
        that expires later is there already. True proves only that one node, perhaps this one, keeps it.
        Raises SwarmError when the DHT does not answer in time.
        """
        dht = self._require_dht()
        try:
            async with asyncio.timeout(timeout_s):
                stored = await dht.store(presence_key(self._run_id), record, expires_at, subkey=self.peer_id)
        except TimeoutError:
            raise SwarmError(f"the DHT did not take our presence in {timeout_s:g} s") from None
        return bool(stored)

    async def list_presence(self, now: float, *, timeout_s: float = 10.0) -> list[Presence]:
        """The verified records of the run, ours too, one per peer, sorted by peer id.

        `now` is seconds since 1970. Raises SwarmError when the DHT does not answer in time.
        """
        dht = self._require_dht()
        try:
            async with asyncio.timeout(timeout_s):
                found = await dht.get(presence_key(self._run_id), latest=True)
        except TimeoutError:
            raise SwarmError(f"the DHT did not answer in {timeout_s:g} s") from None
        if found is None or not isinstance(found.value, dict):
            return []
        return self._decode_all([item.value for item in found.value.values()], now)

    def _decode_all(self, records: Iterable[bytes], now: float) -> list[Presence]:
        """Once more in full: the validator allows for the clocks of those who passed the records on."""
        presences: list[Presence] = []
        for record in records:
            try:
                presences.append(decode(record, self._verify, run_id=self._run_id, now=now))
            except PresenceError as error:
                self._on_refused(error.reason)
        return sorted(presences, key=lambda presence: presence.peer_id)

    def _require_dht(self) -> DHTNode:
        assert self._dht is not None, "join_dht comes first"
        return self._dht

    async def _reach(self, peers: Sequence[PeerAddress], timeout_s: float) -> list[str]:
        """Connect to all of `peers` at once; the peer ids of those that could be reached."""
        attempts = await asyncio.gather(
            *(self.connect(peer, timeout_s) for peer in peers), return_exceptions=True
        )
        reached: dict[str, None] = {}
        for peer, failure in zip(peers, attempts, strict=True):
            if failure is None:
                reached[peer.peer_id] = None
            elif isinstance(failure, Unreachable):
                _log.warning(
                    "dht entry failed peer=%s error=%s; see that this peer runs, and that its address "
                    "is right",
                    *(short(peer.peer_id), failure),
                )
            else:
                raise failure
        return list(reached)


async def _carry_nobody(peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """In the place of p2pd's own relay, which carries all the world whatever it is told, until the node's
    relay takes it: who waits to be admitted may wait for days."""
