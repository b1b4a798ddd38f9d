"""Long-lived libp2p streams to every peer of the run: one for control, and for bulk data as many as it takes.

We write on the streams that we opened and read from those that the peer opened. A peer is *up* while all of
ours are open; the end of any is news at once, since a node's p2pd dies with it. Bulk begins with one stream;
while frames wait for long more are opened, for p2pd lets a stream have 16 MiB on the way: on a line of 300 ms
that is 450 Mbit/s. A peer that is frozen
keeps its streams open: that is for the core to notice, which hears no heartbeat.

Every frame is limited before it is read, every queue has an end, and every write has a deadline: a peer that
does not take what we send loses its link, and gets it back when it dials or when we try again. Of the streams
of one kind that a peer opens only the newest is read, and no peer is read faster than its share (shares.py).
Bulk keeps within the node's bandwidth caps (throttle.py); control counts for them and never waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from typing_extensions import Buffer

from tapestry.compression.refusals import Refused
from tapestry.dht.control import Unreachable
from tapestry.dht.p2pd import SwarmError
from tapestry.dht.presence import ADDRESSES_MAX
from tapestry.dht.swarm import Swarm
from tapestry.node.net.dials import Dials
from tapestry.node.net.outbox import Bulk, Outbox, OutboxLimits
from tapestry.node.net.repeats import Repeats
from tapestry.node.net.shares import STREAM_COST_S, Share, Shares
from tapestry.node.net.throttle import Throttles
from tapestry.node.net.vocabulary import Reader, encode_message
from tapestry.node.net.wire import (
    FrameLimits,
    RemoteProtocolError,
    StreamEnded,
    WriteLimits,
    frame_parts,
    read_frame,
    write_frame,
)
from tapestry.node.protocol.messages import Control, Records, Result, Shard

HEADER_BYTES_MAX = 32 * 1024  # of a bulk frame: the sums of MEMBERS_MAX contributors fit
FORM = 2  # of what is said on these streams, in their protocols. 1 had no signed rosters
BULK_STREAMS = ("bulk", "bulk2", "bulk3", "bulk4")  # 1 Gbit/s at 500 ms
PROGRESS_EVERY_S = 0.25  # Guess: far below stall_s
FAREWELL_S = 1.0  # Guess: for what was sent to who is removed before its link ends, above all why
LINK_CURE = "tried again by itself; see that this peer runs, and that its address is right"
TELL_AGAIN_S = 3600.0  # Guess: that a given peer cannot be reached
BYTES_PER_SECOND_MIN = 1024  # of a frame that has begun. Guess: who is slower can be in no round

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]

_log = logging.getLogger("tapestry.links")


class Listener(Protocol):
    """Who hears of peers and their messages. Called on the event loop; must not raise."""

    def admits(self, peer: str) -> bool:
        """Whether to have a link with it at all: it belongs to the run."""

    def is_member(self, peer: str) -> bool:
        """Whether it comes before those that anybody can be: it is a member, or the operator named it."""

    def on_up(self, peer: str) -> None: ...
    def on_down(self, peer: str) -> None: ...
    def on_message(self, peer: str, message: Control | Shard | Result) -> None: ...
    def on_bulk_progress(self, peer: str) -> None: ...
    def on_unusable(self, peer: str, reason: str, text: str) -> None:
        """Its data was refused; the stream goes on."""

    def on_refused(self, peer: str, reason: str, text: str) -> None:
        """It broke the protocol; the stream was closed."""

    def on_bytes(self, direction: str, kind: str, count: int, peer: str) -> None: ...


@dataclass(frozen=True, slots=True)
class LinkLimits:
    control_bytes_max: int
    payload_bytes_max: int
    peers_max: int
    silence_s: float  # in the middle of a frame, or of a write
    queue_frames_max: int = 8192  # of control messages. Guess: far above what one round puts in
    bulk_frames_max: int = 8192  # references to shards, not their bytes. A model's: daemon/assembly.py
    queue_bytes_max: int = 16 << 20  # of control messages, or four of the longest. Guess
    dial_timeout_s: float = 10.0
    backoff_initial_s: float = 0.2
    backoff_max_s: float = 5.0
    give_up_s: float = 120.0  # after this long without a sign of the peer, wait for one
    throttles: Throttles = field(default_factory=Throttles)  # the node's, which its state transfers share


@dataclass(slots=True)
class _Peer:
    """What we know of one peer, and what waits to be sent to it."""

    peer: str
    share: Share
    outbox: Outbox  # another one each time that it is up
    addresses: tuple[str, ...] = ()
    seen_at: float = 0.0
    up: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    broken: asyncio.Event = field(default_factory=asyncio.Event)  # the link is to end, and why
    why_broken: str = ""
    inbound: dict[str, asyncio.Task[None]] = field(default_factory=dict)  # control, bulk ... -> its reader
    proven: bool = False  # it was here or was reached: not only a hint
    hinted: dict[str, None] = field(default_factory=dict)  # of `addresses`, what the last hint added
    held: Records | None = None  # the answer to its next question, till that is due
    is_displaced: bool = False  # a member has its place

    @property
    def is_there(self) -> bool:
        """It takes our streams, or has opened some."""
        return self.up or bool(self.inbound)


class _Jobs:
    """Tasks of one link; `first` is what the first of them that ends returns or raises."""

    def __init__(self) -> None:
        self.first: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[str]] = []

    def start(self, job: Coroutine[None, None, str]) -> None:
        task = asyncio.create_task(job)
        task.add_done_callback(self._done)
        self._tasks.append(task)

    async def end(self) -> None:
        """Cancel what still runs, and wait for it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    def _done(self, task: asyncio.Task[str]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if self.first.done():
            return
        if error is not None:
            self.first.set_exception(error)
        else:
            self.first.set_result(task.result())


class Links:
    """The links of one node on one swarm. Use within `run`."""

    def __init__(
        self,
        swarm: Swarm,
        run_id: str,
        reader: Reader,
        unpack_payload: Callable[[str, Shard | Result, bytearray], tuple[object, str]],
        listener: Listener,
        limits: LinkLimits,
    ) -> None:
        self._swarm = swarm
        self._run_id = run_id
        self._reader = reader
        self._unpack_payload = unpack_payload
        self._listener = listener
        self._limits = limits
        self._outbox_limits = OutboxLimits(
            limits.queue_frames_max,
            max(limits.queue_bytes_max, 4 * limits.control_bytes_max),
            limits.bulk_frames_max,
        )
        self._peers: dict[str, _Peer] = {}
        self._shares = Shares(
            limits.throttles, listener.is_member, self._count_there, limits.control_bytes_max
        )
        self._given: dict[str, tuple[str, ...]] = {}  # by who runs this node: never given up
        self._failures = Repeats(TELL_AGAIN_S)
        self.dials = Dials()
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Serve and link until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                await self._swarm.serve(self._protocol("control"), self._serve_control)
                for name in BULK_STREAMS:
                    await self._swarm.serve(self._protocol(name), functools.partial(self._serve_bulk, name))
                await asyncio.get_running_loop().create_future()
        finally:
            self._tasks = None

    def want(self, peer: str, addresses: Sequence[str] = (), hint: bool = False) -> None:
        """Keep a link to this peer, found at these addresses or wherever p2pd knows it.

        A `hint` is what nobody has proven, such as a presence record: only peers_max of those that are not
        there are tried at a time, once each, and within the budget of dials.py.
        """
        if peer == self._swarm.peer_id or self._tasks is None or self._swarm.is_banned(peer):
            return
        if not self._listener.admits(peer):
            return
        known, now = self._peers.get(peer), asyncio.get_running_loop().time()
        if known is None:
            peers_max = self._limits.peers_max
            if hint and not self.dials.may_try(peer, now):
                return
            if hint and sum(not p.is_there for p in self._peers.values()) >= peers_max:
                return
            if peer not in self._given and not self._has_room_for(peer):
                self._listener.on_refused(peer, "peers_max", f"we have {peers_max} peers")
                return
            known = self._peers[peer] = _Peer(peer, self._shares.begin(peer), Outbox(self._outbox_limits))
            self._tasks.create_task(self._maintain(known), name=f"link {peer[-6:]}")
        if hint and not known.up:
            proven = [a for a in known.addresses if a not in known.hinted] if known.proven else []
            known.hinted = dict.fromkeys(a for a in addresses if a not in proven)
            addresses = (*known.hinted, *proven[:ADDRESSES_MAX])  # what is proven stays
        known.proven |= not hint
        known.addresses = tuple(dict.fromkeys([*(addresses or known.addresses), *self._given.get(peer, ())]))
        known.seen_at = now
        known.wake.set()

    def _has_room_for(self, peer: str) -> bool:
        """Members of the roll have room whatever others hold: they displace them, once they are there."""
        peers_max, is_member = self._limits.peers_max, self._listener.is_member
        if not self.full and len(self._peers) < 2 * peers_max:
            return True
        if not is_member(peer):
            return False
        members = [other for other in self._peers.values() if is_member(other.peer)]
        return sum(m.is_there for m in members) < peers_max and len(members) < 2 * peers_max

    def _displace(self, member: _Peer) -> None:
        """A member is there: who is none, and came last, goes, if there are too many."""
        there = [link for link in self._peers.values() if link.is_there]
        is_member = self._listener.is_member
        if len(there) <= self._limits.peers_max or not is_member(member.peer):
            return
        last = next((link for link in reversed(there) if not is_member(link.peer)), None)
        if last is not None and last.peer not in self._given:
            last.is_displaced = True
            self._end(last, "peers_max", "a member takes its place")

    def _end(self, link: _Peer, reason: str, why: str) -> None:
        """Both ways; who maintains it looks whether to go on."""
        for task in link.inbound.values():
            task.cancel()
        link.wake.set()
        if link.up:
            self._break(link, reason, why)

    def _count_there(self) -> int:
        return sum(link.is_there for link in self._peers.values())

    def keep(self, peer: str, address: str) -> None:
        """As `want`, for good: this address is tried too, whatever the peer says of itself."""
        self._given[peer] = tuple(dict.fromkeys([*self._given.get(peer, ()), address]))
        self.want(peer)

    @property
    def given(self) -> dict[str, tuple[str, ...]]:
        """Where the operator says peers are."""
        return self._given

    def check_members(self) -> None:
        """The roll has changed: end the links of who is a member no more, once they have what was sent to
        them before: the record that removes them."""
        for link in list(self._peers.values()):
            if not link.up:
                self._dismiss(link)
            elif not self._listener.admits(link.peer):
                link.outbox.put_farewell()
                asyncio.get_running_loop().call_later(FAREWELL_S, self._dismiss, link)

    def _dismiss(self, link: _Peer) -> None:
        if not self._listener.admits(link.peer):  # it may be back
            self._end(link, "not_member", "it is a member no more")

    @property
    def wanted(self) -> list[str]:
        """Whom we have a link with, or try to."""
        return list(self._peers)

    @property
    def full(self) -> bool:
        """Whether peers_max are there: whom we only try to reach takes nobody's place."""
        return self._count_there() >= self._limits.peers_max

    @property
    def linked(self) -> list[str]:
        return [p.peer for p in self._peers.values() if p.up]

    @property
    def addresses(self) -> dict[str, tuple[str, ...]]:
        """Of the linked peers, where that is known: who dialled us has not said by it where it listens."""
        return {p.peer: p.addresses for p in self._peers.values() if p.up and p.addresses}

    def send_control(self, peer: str, message: Control) -> None:
        """Queue a message. To a peer that is not up it is lost, as on the way."""
        link = self._peers.get(peer)
        if link is None or not link.up:
            return
        now = asyncio.get_running_loop().time()
        if isinstance(message, Records) and now < link.share.answers_at:
            self._hold(link, message, link.share.answers_at - now)  # it asks faster than it may
            return
        with link.share.control_pace.spending():
            header = encode_message(message)
        if isinstance(message, Records):
            self._shares.answered(link.share, len(header))
        if not link.outbox.put_control(header):
            self._break(link, "slow", "its control queue is full")

    def _hold(self, link: _Peer, answer: Records, wait_s: float) -> None:
        """Until its time has come: who catches up asks on as soon as it has a page. The newest one stays."""
        if link.held is None:
            asyncio.get_running_loop().call_later(wait_s, self._send_held, link)
        link.held = answer

    def _send_held(self, link: _Peer) -> None:
        answer, link.held = link.held, None
        if answer is not None and self._peers.get(link.peer) is link:
            self.send_control(link.peer, answer)

    def send_bulk(self, peer: str, message: Shard | Result, kind: str, payload: list[Buffer]) -> None:
        """Queue a shard, unless the same one waits in the queue already. `kind` is for the metrics."""
        link = self._peers.get(peer)
        if link is None or not link.up:
            return
        header = encode_message(message)
        bulk = Bulk(header, kind, frame_parts(header, payload))
        if not link.outbox.put_bulk(bulk, asyncio.get_running_loop().time()):
            self._break(link, "slow", "its bulk queue is full")

    def drop_bulk(self) -> None:
        """Forget what still waits to be sent: its round is over."""
        for link in self._peers.values():
            link.outbox.drop_bulk()

    # --- outgoing ------------------------------------------------------------------------------

    def _protocol(self, name: str) -> str:
        return f"/tapestry/{self._run_id}/{name}/{FORM}"

    def _may_have(self, peer: str) -> bool:
        return self._listener.admits(peer) and not self._swarm.is_banned(peer)

    def _is_awaited(self, link: _Peer) -> bool:
        since_s = asyncio.get_running_loop().time() - link.seen_at
        if link.is_displaced:
            return False
        return since_s < self._limits.give_up_s or bool(link.inbound) or link.peer in self._given

    async def _maintain(self, link: _Peer) -> None:
        """Link, lose, wait, link again; until there has been no sign of the peer for long."""
        loop, limits = asyncio.get_running_loop(), self._limits
        backoff_s = limits.backoff_initial_s
        try:
            while self._is_awaited(link) and self._may_have(link.peer):
                link.wake.clear()
                pause_s = limits.backoff_initial_s
                try:
                    await self._dial(link)
                    began_at = loop.time()
                    why = await self._linked(link)
                    _log.info("link=down peer=%s reason=%r", link.peer[-6:], why)
                    if loop.time() - began_at >= limits.backoff_max_s:
                        backoff_s = limits.backoff_initial_s
                    else:
                        pause_s = backoff_s  # it comes and goes: its dialling is no reason to hurry
                except (SwarmError, OSError) as error:
                    self._log_failure(link.peer, error)
                    if not link.proven and not link.inbound:
                        self.dials.failed(link.peer, loop.time())
                        return  # it was a hint; its place is for another
                await asyncio.sleep(pause_s)
                try:
                    async with asyncio.timeout(backoff_s):
                        await link.wake.wait()
                except TimeoutError:
                    pass
                backoff_s = min(2 * backoff_s, limits.backoff_max_s)
        finally:
            del self._peers[link.peer]
            self._shares.end(link.peer)

    async def _dial(self, link: _Peer) -> None:
        """Connect where it is said to be; what nobody has proven, within the budget. Raises Unreachable."""
        addresses, now = link.addresses, asyncio.get_running_loop().time()
        if addresses and not link.proven:
            addresses = self.dials.take(addresses, now, self.linked)
            if not addresses and not link.inbound:
                raise Unreachable(
                    "backoff", f"peer {link.peer[-6:]}: too many dials to where it is said to be"
                )
        if addresses:
            await self._swarm.connect_any(link.peer, addresses, self._limits.dial_timeout_s)

    def _log_failure(self, peer: str, error: SwarmError | OSError) -> None:
        """Who runs this node is told of the peers that they named, now and then; of others, if they ask."""
        reason = error.reason if isinstance(error, Unreachable) else "error"
        level, now = logging.DEBUG, asyncio.get_running_loop().time()
        if peer in self._given and reason != "backoff" and self._failures.may_tell((peer, reason), now):
            # One that serves the DHT only is a good entry, and has no links; nor has a member of another run.
            level = logging.INFO if reason == "unsupported" else logging.WARNING
        _log.log(level, "link=failed peer=%s reason=%s %s; %s", peer[-6:], reason, error, LINK_CURE)

    async def _linked(self, link: _Peer) -> str:
        """While all its streams are open. Returns why they no longer are."""
        async with contextlib.AsyncExitStack() as stack:
            jobs = _Jobs()
            control_reader, control = await self._open(link, "control", stack)
            bulk_reader, bulk = await self._open(link, BULK_STREAMS[0], stack)
            if link.is_displaced:
                return "a member has its place"
            stack.callback(self._set_down, link)
            self._set_up(link)
            stack.push_async_callback(jobs.end)
            jobs.start(self._write_control(link, control))
            jobs.start(self._write_bulk(link, bulk))
            jobs.start(_ended(control_reader))
            jobs.start(_ended(bulk_reader))
            jobs.start(_broken(link))
            jobs.start(self._widen(link, jobs, stack))
            return await jobs.first

    async def _open(self, link: _Peer, name: str, stack: contextlib.AsyncExitStack) -> Stream:
        reader, writer = await self._swarm.open_stream(
            link.peer, self._protocol(name), self._limits.dial_timeout_s
        )
        stack.callback(self._swarm.end_stream, link.peer, writer)
        return reader, writer

    async def _widen(self, link: _Peer, jobs: _Jobs, stack: contextlib.AsyncExitStack) -> str:
        """Open further streams for bulk as it waits. Ends only with the link."""
        for name in BULK_STREAMS[1:]:
            await link.outbox.behind.wait()
            try:
                reader, writer = await self._open(link, name, stack)
            except SwarmError as error:  # its end is news by the others; of another version it may have fewer
                _log.debug("link=not_widened peer=%s reason=%r", link.peer[-6:], str(error))
                break
            _log.debug("link=widened peer=%s stream=%s", link.peer[-6:], name)
            jobs.start(self._write_bulk(link, writer))
            jobs.start(_ended(reader))
            link.outbox.widened(asyncio.get_running_loop().time())
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never

    def _set_up(self, link: _Peer) -> None:
        link.outbox = Outbox(self._outbox_limits)
        link.held = None
        link.broken.clear()
        link.up = link.proven = True
        link.hinted.clear()
        self.dials.reached(link.peer)
        _log.info("link=up peer=%s", link.peer[-6:])
        self._listener.on_up(link.peer)
        self._displace(link)

    def _set_down(self, link: _Peer) -> None:
        if link.up:
            link.up = False
            link.seen_at = asyncio.get_running_loop().time()  # till now it was there
            self._listener.on_down(link.peer)

    def _break(self, link: _Peer, reason: str, why: str) -> None:
        """End the link, now: what waits in its queues is lost, as on the way."""
        link.why_broken = why
        link.broken.set()
        self._listener.on_refused(link.peer, reason, why)
        self._set_down(link)

    async def _write_control(self, link: _Peer, writer: asyncio.StreamWriter) -> str:
        while True:
            header = await link.outbox.next_control()
            if header is None:
                self._dismiss(link)
                if not link.up:
                    return link.why_broken
                continue
            why = await self._write(link.peer, writer, frame_parts(header), "control")
            if why:
                return why

    async def _write_bulk(self, link: _Peer, writer: asyncio.StreamWriter) -> str:
        now = asyncio.get_running_loop().time
        while True:
            bulk = await link.outbox.next_bulk()
            link.outbox.begin(now())
            why = await self._write(link.peer, writer, bulk.parts, bulk.kind)
            link.outbox.wrote(bulk)
            del bulk  # of a contribution: where the trainer wrote it it may write again
            if why:
                return why

    async def _write(
        self, peer: str, writer: asyncio.StreamWriter, parts: Sequence[Buffer], kind: str
    ) -> str:
        """Write a frame at the peer's pace and within our cap. Returns why that failed, or ""."""
        waits = kind != "control"
        limits = WriteLimits(self._limits.throttles.upload, waits, self._limits.silence_s)
        try:
            await write_frame(writer, parts, limits, lambda n: self._listener.on_bytes("sent", kind, n, peer))
        except TimeoutError:
            return f"it took nothing for {self._limits.silence_s:g} s"
        except OSError as error:
            return f"write failed: {error}"
        return ""

    # --- incoming ------------------------------------------------------------------------------

    async def _serve_control(
        self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self._serve("control", peer, reader, self._read_control)

    async def _serve_bulk(
        self, name: str, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self._serve(name, peer, reader, self._read_bulk)

    async def _serve(
        self,
        name: str,
        peer: str,
        reader: asyncio.StreamReader,
        read: Callable[[_Peer, asyncio.StreamReader], Awaitable[None]],
    ) -> None:
        """Read a stream that the peer opened, until it ends or the peer opens another of its kind."""
        if not self._listener.admits(peer):
            self._listener.on_refused(peer, "not_member", "it opened a link and is no member")
            return
        self.want(peer)
        link, task = self._peers.get(peer), asyncio.current_task()
        if link is None or link.is_displaced or task is None:
            return  # one peer too many: counted by `want`
        if name in link.inbound:
            link.inbound[name].cancel()
        link.inbound[name] = task
        self._displace(link)
        try:
            link.share.control_pace.spend(STREAM_COST_S)
            await link.share.control_pace.wait()
            await read(link, reader)
        except RemoteProtocolError as error:
            self._listener.on_refused(peer, error.reason, str(error))
            self._swarm.blame(peer, error.reason)
            if self._swarm.is_banned(peer) and link.up:
                self._break(link, "slow", "it is banned")
        except (StreamEnded, TimeoutError, OSError):
            return  # the link back tells the listener what there is to tell
        finally:
            if link.inbound.get(name) is task:
                del link.inbound[name]

    async def _read_control(self, link: _Peer, reader: asyncio.StreamReader) -> None:
        throttle = self._limits.throttles.download  # counts, and makes nobody wait: there is no payload
        limits = FrameLimits(self._limits.control_bytes_max, 0, BYTES_PER_SECOND_MIN, throttle)
        share, clock = link.share, asyncio.get_running_loop().time
        while True:
            await share.control_pace.wait()
            await self._shares.control_is_paid(share)
            header, _ = await self._frame(reader, limits, None)
            share.control_bytes_in.spend(len(header), clock())
            self._listener.on_bytes("received", "control", len(header), link.peer)
            with share.control_pace.spending():
                self._listener.on_message(link.peer, self._reader.control(header))

    async def _read_bulk(self, link: _Peer, reader: asyncio.StreamReader) -> None:
        throttle, payload_bytes_max = self._limits.throttles.download, self._limits.payload_bytes_max
        limits = FrameLimits(HEADER_BYTES_MAX, payload_bytes_max, BYTES_PER_SECOND_MIN, throttle)
        loop = asyncio.get_running_loop()
        told_at = loop.time()
        waiting = 0

        def on_bytes(count: int) -> None:
            nonlocal told_at, waiting
            waiting += count
            if loop.time() - told_at >= PROGRESS_EVERY_S:
                told_at = loop.time()
                self._listener.on_bulk_progress(link.peer)

        while True:
            await link.share.bulk_pace.wait()
            await self._shares.junk_is_paid(link.share)
            header, payload = await self._frame(reader, limits, on_bytes)
            with link.share.bulk_pace.spending():
                usable = self._on_data(link.peer, header, payload, waiting)
            waiting = 0
            if not usable:
                link.share.junk.spend(len(payload), loop.time())

    async def _frame(
        self, reader: asyncio.StreamReader, limits: FrameLimits, on_bytes: Callable[[int], None] | None
    ) -> tuple[bytes, bytearray]:
        """The next frame, however long it takes to begin; once begun it may not fall silent."""
        return await read_frame(reader, limits, None, self._limits.silence_s, on_bytes)

    def _on_data(self, peer: str, header: bytes, payload: bytearray, byte_count: int) -> bool:
        """Whether the payload is one."""
        message = self._reader.data(header, None, "")
        kind = "contribution" if isinstance(message, Shard) else "result"
        self._listener.on_bytes("received", kind, byte_count, peer)
        try:
            blob, digest = self._unpack_payload(peer, message, payload)
        except Refused as refused:
            self._listener.on_unusable(peer, refused.reason, refused.detail)
            return False
        self._listener.on_message(peer, self._reader.data(header, blob, digest))
        return True


async def _ended(reader: asyncio.StreamReader) -> str:
    """The peer never writes on a stream that we opened: its end is all there is to read."""
    try:
        data = await reader.read(1)
    except OSError as error:
        return f"the stream broke: {error}"
    return "it wrote on our stream" if data else "the stream ended"


async def _broken(link: _Peer) -> str:
    await link.broken.wait()
    return link.why_broken
