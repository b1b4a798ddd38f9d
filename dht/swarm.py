"""The swarm: libp2p streams to peers whose identity is proved, and the DHT in which they find each other.

The only module of this package that knows hivemind. It uses hivemind's `P2P` (to start its libp2p daemon,
`p2pd`, and to carry the DHT's calls) and its `DHTNode`, both inside our own event loop; it does not use
`hivemind.DHT`, a forked process behind a pipe. Streams speak p2pd's control protocol directly: hivemind's
client leaves a connection open after each failed request, has no deadlines, and reads through asyncio's
default buffer.

What must hold: Swarm.start is called on the thread whose end may end p2pd (Linux ties a parent-death signal
to the thread that forked), which is the main thread of a node.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import glob
import ipaddress
import logging
import math
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import base58
import msgpack
import multiaddr
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr as HivemindMultiaddr
from multiaddr.exceptions import Error as MultiaddrError

from tapestry.dht.addresses import PeerAddress, full_addresses
from tapestry.dht.identity import Identity, verify
from tapestry.dht.presence import CLOCK_SKEW_S, RECORD_BYTES_MAX, Presence, PresenceError, decode

_log = logging.getLogger("tapestry.swarm")
_p2pd_log = logging.getLogger("tapestry.p2pd")

StreamHandler = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

# Each open stream may hold twice as much. Measured on loopback, 2 cores: 420-530 MB/s under uvloop for 64 kB,
# 256 kB, 1 MB and 4 MB alike; asyncio's own loop loses up to a quarter at its default of 64 kB.
STREAM_BUFFER_BYTES = 1 << 18
# A DHT answer breaks above 4 MiB (hivemind, control.py); so many records of the largest size are half of it.
PEERS_MAX = 1024
# p2pd answers its own control socket in milliseconds; this is for a machine that swaps.
_CONTROL_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 3.0
_CHILD_END_S = 1.0
_CLOCK_WARNING_S = 600.0  # between two warnings. Guess


class SwarmError(Exception):
    """The swarm cannot do what was asked; the message is one line that says why."""


class Unreachable(SwarmError):
    """A peer cannot be reached. `reason` is one word: see _DIAL_FAILURES; the text names the address."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SwarmConfig:
    """How this node takes part. Addresses are what `addresses.parse_listen` and `parse_announce` return."""

    identity_path: str | os.PathLike[str]  # made by Identity.load_or_create
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce: tuple[str, ...] = ()  # () = what p2pd finds out by itself
    # hivemind's 15 s is too short on slow machines, the commonest complaint of its users.
    startup_timeout_s: float = 60.0
    use_relay: bool = True  # reach peers behind NAT through relays
    use_auto_relay: bool = False  # be reached through relays
    nat_port_map: bool = True
    streams_max: int = 1024  # inbound, over all protocols; what is above is closed at once


class Swarm:
    """A running p2pd, its streams and, once the run is known, its DHT. Make one with `Swarm.start`."""

    def __init__(self, p2p: P2P, folder: str, config: SwarmConfig, on_refused: Callable[[str], None]) -> None:
        self.peer_id: str = p2p.peer_id.to_base58()
        self._p2p = p2p
        self._config = config
        self._on_refused = on_refused
        self._control_path = p2p.daemon_listen_maddr["unix"]
        self._streams_path = os.path.join(folder, "streams.sock")
        self._handlers: dict[str, StreamHandler] = {}
        self._inbound: dict[asyncio.Task[Any], None] = {}
        self._run_id = ""
        self._dht: DHTNode | None = None
        self._cleanup = contextlib.AsyncExitStack()

    @classmethod
    async def start(
        cls, config: SwarmConfig, *, on_refused: Callable[[str], None] = lambda reason: None
    ) -> Swarm:
        """Start p2pd and listen. `on_refused(reason)` is called for each presence record that is refused.

        Raises IdentityError; SwarmError when an address cannot be listened on or p2pd does not start. A
        cancelled or failed start leaves no process and no file.
        """
        _quiet_hivemind()
        Identity.load(config.identity_path)  # where there is no file, hivemind would write an RSA key
        for address in config.listen:
            _require_free(address)
        async with contextlib.AsyncExitStack() as cleanup:
            folder = _make_socket_folder()
            cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
            p2p = await _launch_p2pd(config, folder, cleanup)
            swarm = cls(p2p, folder, config, on_refused)
            server = await asyncio.start_unix_server(
                swarm._on_inbound, path=swarm._streams_path, limit=STREAM_BUFFER_BYTES
            )
            cleanup.callback(server.close)
            cleanup.push_async_callback(swarm._end_inbound)
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
        response = await self._control(_request("IDENTIFY"))
        return full_addresses(_texts_of(response.identify.addrs), self.peer_id)

    async def connected_peers(self) -> tuple[str, ...]:
        """The peer ids that p2pd has a connection with, sorted."""
        response = await self._control(_request("LIST_PEERS"))
        peer_ids: list[str] = [base58.b58encode(peer.id).decode() for peer in response.peers]
        return tuple(sorted(peer_ids))

    async def known_addresses(self, peer_id: str) -> tuple[str, ...]:
        """The remote ends of the open connections with a peer, with `/p2p/<peer id>`; () when there is none.

        Where the peer dialled us, its port is not one it listens on: to reach it again, use its presence.
        """
        response = await self._control(_request("LIST_PEERS"))
        wanted = base58.b58decode(peer_id)
        found = [_texts_of(peer.addrs) for peer in response.peers if peer.id == wanted]
        return full_addresses([text for texts in found for text in texts], peer_id)

    async def connect(self, peer: PeerAddress, timeout_s: float) -> None:
        """Connect to a peer; nothing to do when there is a connection. Raises Unreachable."""
        await self._dial(peer.peer_id, (peer.maddr,), timeout_s)

    async def connect_any(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        """Connect to a peer at any of `addresses`, as its presence gives them. Raises Unreachable."""
        await self._dial(peer_id, addresses, timeout_s)

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Call `handler(peer_id, reader, writer)` for each stream that a peer opens to `protocol`.

        `peer_id` is what libp2p's handshake proved. The stream is closed when the handler ends; what it
        raises is logged and stays its own affair.
        """
        assert protocol not in self._handlers, f"{protocol} is served already"
        self._handlers[protocol] = handler
        # hivemind's Multiaddr: py-multiaddr 0.2 drops the leading '/' of a path, and p2pd finds no socket.
        listener = HivemindMultiaddr(f"/unix{self._streams_path}").to_bytes()
        request = _request("STREAM_HANDLER")
        request.streamHandler.CopyFrom(
            p2pd_pb2.StreamHandlerRequest(addr=listener, proto=[protocol], balanced=False)
        )
        await self._control(request)

    async def open_stream(
        self, peer_id: str, protocol: str, timeout_s: float
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a stream to a peer, connecting first if p2pd knows where it is. Raises Unreachable.

        The caller closes the writer. There is no half-close: after `write_eof` p2pd ends both directions, and
        an answer is lost. The end of the stream looks the same whether the peer closed it, died, or our p2pd
        died: the protocol on it must say what is complete.
        """
        request = _request("STREAM_OPEN")
        request.streamOpen.CopyFrom(
            p2pd_pb2.StreamOpenRequest(
                peer=base58.b58decode(peer_id), proto=[protocol], timeout=math.ceil(timeout_s)
            )
        )
        try:
            async with asyncio.timeout(timeout_s):
                _, reader, writer = await self._exchange(request)
        except TimeoutError:
            raise Unreachable("timeout", f"peer {_short(peer_id)}: no answer in {timeout_s:g} s") from None
        except _Refused as error:
            raise _unreachable(f"peer {_short(peer_id)}", str(error), timeout_s) from None
        return reader, writer

    async def join_dht(
        self, run_id: str, peers: Sequence[PeerAddress] = (), *, timeout_s: float = 30.0
    ) -> int:
        """Take part in the run's DHT, entering it through `peers`; how many of them answered.

        Zero is no error: the first node of a run has nobody to ask, and a node whose peers are away can
        `meet` them later. Each peer may be a member or a stock `hivemind-dht` process. Raises SwarmError when
        p2pd does not answer. Called again for the same run, it only enters through the peers once more.
        """
        assert self._dht is None or self._run_id == run_id, "a swarm is of one run"
        reached = await self._reach(peers, timeout_s)
        if self._dht is not None:
            return await self.meet(reached, timeout_s=timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                self._dht = await _create_dht_node(self._p2p, run_id, self._on_refused)
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
                presences.append(decode(record, verify, run_id=self._run_id, now=now))
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
                _log.warning("dht entry failed peer=%s error=%s", _short(peer.peer_id), failure)
            else:
                raise failure
        return list(reached)

    async def _dial(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        where = ", ".join(addresses)
        request = _request("CONNECT")
        request.connect.CopyFrom(
            p2pd_pb2.ConnectRequest(
                peer=base58.b58decode(peer_id),
                addrs=_transports_of(peer_id, addresses),
                timeout=math.ceil(timeout_s),
            )
        )
        if not request.connect.addrs:
            raise Unreachable("unroutable", f"peer {_short(peer_id)} gives no address that can be dialled")
        try:
            await self._ask(request, timeout_s)
        except TimeoutError:
            raise Unreachable("timeout", f"{where}: no answer in {timeout_s:g} s") from None
        except _Refused as error:
            raise _unreachable(where, str(error), timeout_s) from None

    async def _control(self, request: p2pd_pb2.Request) -> p2pd_pb2.Response:
        """A question about p2pd itself, which it can answer at once. Raises SwarmError."""
        try:
            return await self._ask(request, _CONTROL_TIMEOUT_S)
        except TimeoutError:
            raise SwarmError(f"p2pd does not answer in {_CONTROL_TIMEOUT_S:g} s") from None
        except _Refused as error:
            raise SwarmError(f"p2pd refused: {error}") from None

    async def _ask(self, request: p2pd_pb2.Request, timeout_s: float) -> p2pd_pb2.Response:
        """One question to p2pd. Raises TimeoutError, SwarmError, _Refused."""
        async with asyncio.timeout(timeout_s):
            response, _, writer = await self._exchange(request)
        writer.close()
        return response

    async def _exchange(
        self, request: p2pd_pb2.Request
    ) -> tuple[p2pd_pb2.Response, asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request on a new control connection, which an opened stream then goes on to use."""
        with contextlib.ExitStack() as on_failure:
            try:
                reader, writer = await asyncio.open_unix_connection(
                    self._control_path, limit=STREAM_BUFFER_BYTES
                )
                on_failure.callback(writer.close)
                await write_pbmsg(writer, request)
                response = p2pd_pb2.Response()
                await read_pbmsg_safe(reader, response)
            except (OSError, asyncio.IncompleteReadError) as error:
                raise SwarmError("p2pd does not answer: it has ended or is ending") from error
            if response.type == p2pd_pb2.Response.ERROR:
                raise _Refused(response.error.msg)
            on_failure.pop_all()
        return response, reader, writer

    async def _on_inbound(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection from p2pd: a stream that a peer has opened."""
        task = asyncio.current_task()
        assert task is not None
        self._inbound[task] = None
        try:
            if len(self._inbound) > self._config.streams_max:
                _log.debug("stream refused reason=too_many limit=%d", self._config.streams_max)
                self._on_refused("streams")
                return
            await self._handle_inbound(reader, writer)
        except asyncio.CancelledError:
            return  # by close(): asyncio's server would report a cancelled handler as a crash
        finally:
            del self._inbound[task]
            writer.close()

    async def _handle_inbound(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = p2pd_pb2.StreamInfo()
        try:
            async with asyncio.timeout(_CONTROL_TIMEOUT_S):
                await read_pbmsg_safe(reader, info)
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            return
        peer_id = base58.b58encode(info.peer).decode()
        try:
            await self._handlers[info.proto](peer_id, reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            _log.debug("stream broke proto=%s peer=%s error=%r", info.proto, _short(peer_id), error)
        except Exception:  # the edge: nobody awaits this task, and one stream must not end a node
            _log.exception("stream handler failed proto=%s peer=%s", info.proto, _short(peer_id))

    async def _end_inbound(self) -> None:
        tasks = list(self._inbound)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_STOP_TIMEOUT_S)


def presence_key(run_id: str) -> str:
    """The DHT key under which the members of a run keep their presence, one subkey per peer id."""
    return f"tapestry/{run_id}/presence"


class PresenceValidator(RecordValidatorBase):  # type: ignore[misc]  # hivemind is untyped
    """Lets into our DHT storage, and out of answers, only genuine presence records of our run.

    hivemind asks it for every record that a peer stores here and for every record in a peer's answer. It
    covers the presence key whole: a plain value, which hivemind would let replace all records at once, is
    refused, and so is a record under another peer's name or with another lifetime than its signed one.

    Every other key is refused as foreign. Keys arrive hashed, so a presence of another run cannot be told
    from rubbish, and whoever may store under any key can fill our memory. The price: runs must not share one
    DHT (a stock `hivemind-dht` may serve as entry to one run, not to several).

    hivemind refuses a peer's whole answer for one bad record in it. So times are judged with twice the usual
    tolerance: a record that an honest peer, whose clock is off, has accepted must not make us deaf to it.
    """

    def __init__(
        self, run_id: str, on_refused: Callable[[str], None], clock: Callable[[], float] = time.time
    ) -> None:
        self._run_id = run_id
        self._key = DHTID.generate(source=presence_key(run_id)).to_bytes()
        self._on_refused = on_refused
        self._clock = clock
        # Each reading brings the same records from several nodes: check a signature once.
        self._verify = functools.lru_cache(maxsize=2 * PEERS_MAX)(verify)
        self._expiry_by_peer: dict[str, float] = {}
        self._warned_at = -math.inf

    def validate(self, record: DHTRecord) -> bool:
        try:
            self._check(record)
        except PresenceError as error:
            _log.debug("presence refused reason=%s error=%s", error.reason, error)
            self._on_refused(error.reason)
            if error.reason == "future":
                self._warn_of_clocks(str(error))
            return False
        return True

    def _warn_of_clocks(self, why: str) -> None:
        """Of two peers whose clocks differ, one is told so: the one whose clock is behind."""
        now = self._clock()
        if abs(now - self._warned_at) >= _CLOCK_WARNING_S:
            self._warned_at = now
            _log.warning("clock=differs %s: set this machine's clock, or have that peer's set", why)

    def _check(self, record: DHTRecord) -> None:
        if record.key != self._key:
            raise PresenceError("foreign", "a record under a key that is not this run's presence")
        now = self._clock()
        presence = decode(
            _unwrap(record.value), self._verify, run_id=self._run_id, now=now, clock_skew_s=2 * CLOCK_SKEW_S
        )
        # hivemind serialises a subkey with msgpack; that of a plain value is msgpack's nil.
        if record.subkey != msgpack.packb(presence.peer_id):
            raise PresenceError("forged", f"peer {_short(presence.peer_id)}'s record under another subkey")
        if record.expiration_time != presence.expires_at:
            raise PresenceError("forged", f"peer {_short(presence.peer_id)}'s record with another expiry")
        self._admit(presence, now)

    def _admit(self, presence: Presence, now: float) -> None:
        """Anyone can make peer ids: bound how many are kept at a time."""
        known = self._expiry_by_peer
        if presence.peer_id not in known and len(known) >= PEERS_MAX:
            known = {peer_id: expiry for peer_id, expiry in known.items() if expiry > now}
            self._expiry_by_peer = known
            if len(known) >= PEERS_MAX:
                raise PresenceError("oversized", f"there are {PEERS_MAX} peers already")
        known[presence.peer_id] = presence.expires_at


def _unwrap(value: bytes) -> bytes:
    """The bytes in the msgpack in which hivemind wraps every value."""
    if len(value) > RECORD_BYTES_MAX + 3:  # msgpack's longest header of so few bytes
        raise PresenceError("oversized", f"a value of {len(value)} bytes, the limit is {RECORD_BYTES_MAX}")
    try:
        record = msgpack.unpackb(value)
    except ValueError as error:
        raise PresenceError("malformed", "the value is not msgpack") from error
    if not isinstance(record, bytes) or msgpack.packb(record) != value:
        raise PresenceError("malformed", "the value is not a record in bytes")
    return record


async def _create_dht_node(p2p: P2P, run_id: str, on_refused: Callable[[str], None]) -> DHTNode:
    return await DHTNode.create(
        p2p=p2p,
        # The same after a restart: the peer takes the place of its own stale contact.
        node_id=DHTID.generate(source=p2p.peer_id.to_bytes()),
        record_validator=PresenceValidator(run_id, on_refused),
        # A presence lives a minute or two; a cached one only delays the news of the next.
        cache_locally=False,
        cache_nearest=0,
        cache_on_store=False,
        cache_refresh_before_expiry=0,
        # hivemind doubles the ban of a peer with every failure, without end: after a day's partition it would
        # not be asked for another day.
        backoff_rate=1.0,
    )


class _P2pd(P2P):  # type: ignore[misc]  # hivemind is untyped
    """hivemind's P2P, with a daemon that cannot outlive us and does not write on the user's screen."""

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        daemon_args = P2P._make_process_args(*args, **kwargs)
        return [sys.executable, "-I", "-S", "-c", _BOUND_TO_PARENT, str(os.getpid()), *daemon_args]

    async def _read_outputs(self, ready: asyncio.Future[None]) -> None:
        """As in hivemind, but a line longer than the buffer does not end the reading, and so block p2pd."""
        last_line = "no output"
        while line := await _read_line(self._child.stdout):
            last_line = line.decode(errors="replace").rstrip()
            _p2pd_log.debug("%s", last_line)
            if last_line.startswith("Peer ID:") and not ready.done():
                ready.set_result(None)
        if not ready.done():
            ready.set_exception(P2PDaemonError(last_line))


# Run by a Python that then becomes p2pd. It asks the kernel to kill p2pd when our thread ends (1 is
# PR_SET_PDEATHSIG), gives up if we are gone already, and takes p2pd out of the terminal's process group: a
# Ctrl-C is for the node, which still needs p2pd to take its leave.
_BOUND_TO_PARENT = """
import ctypes, os, signal, sys
if ctypes.CDLL(None).prctl(1, ctypes.c_ulong(signal.SIGKILL)) != 0 or os.getppid() != int(sys.argv[1]):
    sys.exit("cannot bind p2pd to its parent")
os.setsid()
os.execv(sys.argv[2], sys.argv[2:])
"""


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    try:
        return await stream.readline()
    except ValueError:  # longer than the buffer; readline has dropped what it had
        return b"(a line too long to show)\n"


def _quiet_hivemind() -> None:
    """hivemind logs to the screen by a handler of its own, and renames a level for the whole process."""
    use_hivemind_log_handler("nowhere")
    logging.getLogger("hivemind").setLevel(logging.ERROR)
    logging.addLevelName(logging.WARNING, "WARNING")
    logging.getLogger("multiaddr").setLevel(logging.INFO)  # py-multiaddr: a dozen debug lines per address


def _require_free(address: str) -> None:
    """p2pd shares a port that is taken (SO_REUSEPORT), and each of the two loses peers to the other."""
    values = {protocol.name: value for protocol, value in multiaddr.Multiaddr(address).items()}
    ip = ipaddress.ip_address(values.get("ip4") or values["ip6"])
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    kind = socket.SOCK_STREAM if "tcp" in values else socket.SOCK_DGRAM
    port = int(values.get("tcp") or values["udp"])
    with socket.socket(family, kind) as probe:
        if kind == socket.SOCK_STREAM:  # only then connections that linger from before do not count
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((str(ip), port))
        except OSError as error:
            raise SwarmError(f"cannot listen on {address}: {error.strerror}") from error


def _make_socket_folder() -> str:
    """A folder that only this user can enter, for the sockets between us and p2pd.

    Not in $TMPDIR: the path of a Unix socket has at most 107 characters. Named after our process, so that
    what a killed one left is swept up by the next.
    """
    for left in glob.glob("/tmp/tapestry-*-*"):
        pid = left.split("-")[1]
        with contextlib.suppress(FileNotFoundError):  # another node sweeps too
            if pid.isdigit() and not os.path.exists(f"/proc/{pid}") and os.stat(left).st_uid == os.getuid():
                shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"tapestry-{os.getpid()}-", dir="/tmp")


async def _launch_p2pd(config: SwarmConfig, folder: str, cleanup: contextlib.AsyncExitStack) -> P2P:
    class Launched(_P2pd):
        _UNIX_SOCKET_PREFIX = f"/unix{folder}/"

        def __init__(self) -> None:  # create() keeps to itself a daemon whose start then fails
            super().__init__()
            cleanup.push_async_callback(_stop_p2pd, self)

    try:
        return await Launched.create(
            identity_path=os.fspath(config.identity_path),
            host_maddrs=config.listen,
            announce_maddrs=config.announce or None,
            startup_timeout=config.startup_timeout_s,
            use_relay=config.use_relay,
            use_auto_relay=config.use_auto_relay,
            nat_port_map=config.nat_port_map,
            check_if_identity_free=False,
        )
    except P2PDaemonError as error:
        raise SwarmError(f"p2pd did not start: {error}") from error


async def _stop_p2pd(p2p: P2P) -> None:
    try:
        async with asyncio.timeout(_STOP_TIMEOUT_S):
            await p2p.shutdown()
    except TimeoutError:
        p2p._child.kill()
        await p2p._child.wait()
    if p2p._client is not None:  # its tasks were cancelled, or broke when p2pd died: nobody else awaits them
        control = p2p._client.control
        await asyncio.gather(control._read_task, control._write_task, return_exceptions=True)


class _Refused(Exception):
    """p2pd answered a request with an error; the message is its own."""


def _request(kind: str) -> p2pd_pb2.Request:
    return p2pd_pb2.Request(type=p2pd_pb2.Request.Type.Value(kind))


def _texts_of(packed_addresses: Iterable[bytes]) -> list[str]:
    """The addresses in text; one that py-multiaddr does not know is left out."""
    texts: list[str] = []
    for packed in packed_addresses:
        with contextlib.suppress(MultiaddrError):
            texts.append(str(multiaddr.Multiaddr(packed)))
    return texts


def _transports_of(peer_id: str, addresses: Iterable[str]) -> list[bytes]:
    """The addresses as p2pd wants them: packed, without the peer id at the end. Bad ones are left out."""
    packed: list[bytes] = []
    for address in addresses:
        with contextlib.suppress(MultiaddrError):
            packed.append(multiaddr.Multiaddr(address.removesuffix(f"/p2p/{peer_id}")).to_bytes())
    return packed


# What p2pd says, the word for it, and what to tell the user; the most telling first.
_DIAL_FAILURES = (
    ("dial to self", "self", "that is this node itself"),
    ("peer id mismatch", "wrong_peer", "another peer answers there"),
    ("protocols not supported", "unsupported", "the peer does not serve this protocol"),
    ("failed to negotiate security protocol", "not_libp2p", "what answers there is no libp2p peer"),
    ("connection refused", "refused", "refused, nothing listens there"),
    ("network is unreachable", "unroutable", "there is no route to it"),
    ("no route to host", "unroutable", "there is no route to it"),
    ("no addresses", "unroutable", "no address of it is known"),
    ("routing: not found", "unroutable", "no address of it is known"),
    (
        "no good addresses",
        "unroutable",
        "its name does not resolve, or its address cannot be dialled from here",
    ),
    ("dial backoff", "backoff", "failed a moment ago, p2pd waits before it tries again"),
    ("deadline exceeded", "timeout", "no answer"),
    ("i/o timeout", "timeout", "no answer"),
)


def _unreachable(where: str, message: str, timeout_s: float) -> Unreachable:
    known = (failure[1:] for failure in _DIAL_FAILURES if failure[0] in message)
    reason, text = next(known, ("failed", " ".join(message.split())))
    if reason == "wrong_peer":
        text += f" ({message.rsplit('remote key matches ', 1)[-1].split()[0]})"
    if reason == "timeout":
        text += f" in {timeout_s:g} s"
    return Unreachable(reason, f"{where}: {text}")


def _short(peer_id: str) -> str:
    return peer_id[-8:]
