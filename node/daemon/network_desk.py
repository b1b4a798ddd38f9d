"""The network's desk: what peers send goes to the core, what the core says goes to peers.

It is what net/network.py hears as its node: it unpacks payloads, says the news for presence, and serves the
streams of joiners and of those who catch up. Means are computed here, in threads, since inputs come from
peers and the mean goes to them.
"""

from __future__ import annotations

import asyncio
import logging
from importlib.metadata import version
from typing import Any

from tapestry.compression.refusals import Refused
from tapestry.node.daemon.accusation_desk import AccusationDesk
from tapestry.node.daemon.audit_streams import AuditStreams
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.daemon.descriptions_desk import DescriptionsDesk
from tapestry.node.daemon.desk import Loop, Outputs
from tapestry.node.daemon.egress import Egress
from tapestry.node.daemon.keeper import Keeper
from tapestry.node.daemon.members_desk import MembersDesk
from tapestry.node.daemon.versions_desk import VersionsDesk
from tapestry.node.daemon.views import Reporter
from tapestry.node.net.admission import Answer, admission_protocol, ask_once
from tapestry.node.net.checkup import CHECKUP_PROTOCOL, Checkup
from tapestry.node.net.donor import Donor
from tapestry.node.net.join import GENESIS_PROTOCOL, state_protocol
from tapestry.node.net.network import Handler, Network, News, Streams
from tapestry.node.net.transfer import OnBytes, OpenStream
from tapestry.node.net.wire import RemoteProtocolError, StreamEnded
from tapestry.node.protocol import events as ev
from tapestry.node.protocol.messages import Changes, Commit, Control, Records, Result, Shard
from tapestry.node.protocol.sync import FETCHES_MAX

FETCH_OPEN_S = 10.0  # to open a stream to a donor
STATE_STREAMS_MAX = FETCHES_MAX + 1  # of one peer: to catch up, and for the round
GENESIS_STREAMS_MAX = 1
GENESIS_STREAM_S = 10.0  # as long as a joiner waits: net/join.py

_log = logging.getLogger("tapestry.node")


class NetworkDesk:
    """Speaks with peers; net/network.py, Resident."""

    def __init__(
        self,
        loop: Loop,
        network: Network,
        averaging: Averaging,
        keeper: Keeper,
        reporter: Reporter,
        audits: AuditStreams,
        accusations: AccusationDesk,
        members: MembersDesk,
    ) -> None:
        self._loop = loop
        self._network = network
        self._members = members
        self._admission_protocol = admission_protocol(keeper.run_id)
        self._averaging = averaging
        self._audits = audits
        self._accusations = accusations
        self._reporter = reporter
        self._state_protocol = state_protocol(keeper.run_id)
        own_version = version("tapestry-node")
        self._checkup = Checkup(keeper.run_id, own_version, network.hosts_of)
        self.versions = VersionsDesk(own_version, keeper.run_id)
        self.words: DescriptionsDesk | None = None  # where members' descriptions are passed on
        self._epoch_told = -2
        self._means: dict[tuple[str, int, int], str] = {}  # digests of this round's means, for the ledger
        # Two: a joiner learns what the run is while all that give state are busy, and a stranger only that.
        genesis_donor = keeper.donor(self._on_served_bytes, genesis_only=True)
        state_donor = keeper.donor(self._on_served_bytes)
        state_donor.is_member = members.is_member
        egress = reporter.egress
        self._genesis_door = Door(genesis_donor, egress, GENESIS_STREAMS_MAX, GENESIS_STREAM_S)
        self._state_door = Door(state_donor, egress, STATE_STREAMS_MAX, None)
        self.outputs: Outputs = {
            ev.Send: self.do_send,
            ev.Broadcast: self.do_broadcast,
            ev.SendShard: self.do_send_shard,
            ev.SendResult: self.do_send_result,
            ev.Reduce: self.do_reduce,
            ev.EndRound: self.do_end_round,
            ev.Moved: self.do_moved,
        }

    # --- what the links tell (Listener) --------------------------------------------------------

    def admits(self, peer: str) -> bool:
        return self._members.admits(peer)

    def is_member(self, peer: str) -> bool:
        return self._members.is_member(peer)

    def on_up(self, peer: str) -> None:
        self.versions.forget(peer)
        self._loop.feed(ev.PeerUp(peer))
        self._accusations.on_up(peer)

    def on_down(self, peer: str) -> None:
        self.versions.forget(peer)
        self._loop.feed(ev.PeerDown(peer))

    def on_message(self, peer: str, message: Control | Shard | Result) -> None:
        if isinstance(message, Changes):
            kept = self._members.in_time(message.changes)
            if len(kept) < len(message.changes):
                text = "it told of an admission by an invitation that has expired"
                self._reporter.refused(peer, "expired", text)
            message = Changes(kept)
        self._loop.feed(ev.Received(peer, message))

    def on_bulk_progress(self, peer: str) -> None:
        self._loop.feed(ev.BulkProgress(peer))

    def on_unusable(self, peer: str, reason: str, text: str) -> None:
        self._reporter.log_refusal(peer, reason, text + self.versions.beside(peer))
        self._loop.feed(ev.PeerRefused(peer, reason))

    def on_refused(self, peer: str, reason: str, text: str) -> None:
        self._reporter.refused(peer, reason, text + self.versions.beside(peer))

    def on_bytes(self, direction: str, kind: str, count: int, peer: str) -> None:
        self._reporter.metrics.network_bytes(direction, kind, count)
        if direction == "sent":
            self._reporter.egress.sent(kind, peer, count)

    # --- what the network asks (Resident) ------------------------------------------------------

    def on_record_refused(self, reason: str) -> None:
        self._reporter.metrics.refused(reason)

    def unpack(self, peer: str, message: Shard | Result, frame: bytearray) -> tuple[object, str]:
        return self._averaging.unpack(peer, message, frame)

    def news(self) -> News:
        core = self._loop.snapshot()
        return News(core.chain_epoch, core.chain_head, core.phase)

    def handlers(self) -> dict[str, Handler]:
        handlers: dict[str, Handler] = {
            GENESIS_PROTOCOL: self.serve_genesis,
            CHECKUP_PROTOCOL: self.serve_checkup,
            self._admission_protocol: self.serve_admission,
            self._state_protocol: self.serve_state,
            self._audits.protocol: self.serve_audit,
        }
        if self.words is not None:
            handlers[self.words.protocol] = self.serve_words
        return handlers

    async def serve_checkup(
        self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """The handler of the checkup protocol."""
        await self._serve_by(self._checkup.serve, peer, reader, writer)

    async def serve_audit(
        self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """The handler of the audit protocol: for members."""
        if self.admits(peer):
            await self._serve_by(self._audits.serve, peer, reader, writer)
        else:
            self._reporter.refused(peer, "not_member", "it asked for an audit and is no member")

    async def serve_words(
        self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """The handler of the descriptions' protocol: for members."""
        words = self.words
        assert words is not None
        if not self.admits(peer):
            self._reporter.refused(peer, "not_member", "it asked for descriptions and is no member")
            return

        async def handler(peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await words.serve(peer, reader, writer, self.on_words(peer))

        await self._serve_by(handler, peer, reader, writer)

    async def serve_genesis(
        self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """The handler of the genesis protocol."""
        await self._serve_by(self._genesis_door.serve, peer, reader, writer)

    async def serve_state(
        self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """The handler of the state protocol: for members."""
        if self.admits(peer):
            await self._serve_by(self._state_door.serve, peer, reader, writer)
        else:
            self._reporter.refused(peer, "not_member", "it asked for state and is no member")

    async def serve_admission(
        self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """The handler of the admission protocol: the one for who is no member."""
        await self._serve_by(self._members.reception.serve, peer, reader, writer)

    async def _serve_by(
        self, handler: Handler, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            await handler(peer, reader, writer)
        except RemoteProtocolError as error:
            self._reporter.refused(peer, error.reason, str(error))
            self._network.blame(peer, error.reason)
        except (StreamEnded, TimeoutError, ConnectionError) as error:
            _log.debug("serving peer=%s ended reason=%r", peer[-6:], error)

    # --- for the disk desk ---------------------------------------------------------------------

    def opener(self, donor: str) -> OpenStream:
        """What opens a stream to `donor`. It raises SwarmError while there is no swarm."""

        async def open_stream() -> Streams:
            return await self._network.open_stream(donor, self._state_protocol, FETCH_OPEN_S)

        return open_stream

    def linked_opener(self, peer: str, protocol: str) -> OpenStream:
        """What opens a stream of another protocol."""

        async def open_stream() -> Streams:
            return await self._network.open_stream(peer, protocol, FETCH_OPEN_S)

        return open_stream

    async def standing_at(self, peer: str) -> Answer:
        """What this peer says of our membership. Raises as `ask_once`, and SwarmError."""
        return await ask_once(self.linked_opener(peer, self._admission_protocol), name="")

    def on_words(self, peer: str) -> OnBytes:
        """Counts descriptions, both ways: they are control."""

        def on_bytes(direction: str, count: int) -> None:
            self.on_bytes("sent" if direction == "out" else "received", "control", count, peer)

        return on_bytes

    def on_state_bytes(self, direction: str, count: int) -> None:
        """Of what this node asks donors for."""
        self._on_served_bytes(direction, count)
        if direction == "out":
            self._reporter.egress.sent("state", "", count)

    def _on_served_bytes(self, direction: str, count: int) -> None:
        self._reporter.metrics.network_bytes("sent" if direction == "out" else "received", "state", count)

    # --- outputs -------------------------------------------------------------------------------

    def do_send(self, out: ev.Send) -> None:
        self._name_records(out.message)
        self._network.send_control(out.peer, out.message)

    def _name_records(self, message: Control) -> None:
        if isinstance(message, Records | Commit):
            for record in message.records if isinstance(message, Records) else (message.record,):
                self._reporter.egress.part("control", record.body.epoch, record.head)

    def do_broadcast(self, out: ev.Broadcast) -> None:
        self._name_records(out.message)
        for peer in out.peers:
            self._network.send_control(peer, out.message)

    def do_send_shard(self, out: ev.SendShard) -> None:
        path = self._averaging.path(out.contribution, out.shard)
        message = Shard(out.epoch, out.contribution, out.shard, None, path)
        self._reporter.egress.part("contribution", out.epoch, out.contribution)
        self._send_bulk(out.peer, message, "contribution", out.blob)

    def do_send_result(self, out: ev.SendResult) -> None:
        message = Result(out.epoch, out.head, out.ballot, out.shard, "", None, out.sums, out.signature)
        self._reporter.egress.part(
            "result", out.epoch, self._means.get((out.head, out.ballot, out.shard), "")
        )
        self._send_bulk(out.peer, message, "result", out.blob)

    def _send_bulk(self, peer: str, message: Shard | Result, kind: str, blob: Any) -> None:
        self._network.send_bulk(peer, message, kind, self._averaging.frame(message.shard, blob))

    def do_reduce(self, out: ev.Reduce) -> None:
        self._loop.spawn(self._reduce(out))

    async def _reduce(self, out: ev.Reduce) -> None:
        reduce = self._averaging.reduce
        try:
            mean, digest, sums = await self._loop.compute(reduce, out.shard, out.blobs, out.weights)
        except Refused as refused:
            _log.error(
                "reduce=refused shard=%d %s; nothing to do here: the round goes on without it",
                out.shard,
                refused,
            )
            # All were checked when they came, so it is their size: finite values whose sum is not.
            index = await self._loop.compute(self._averaging.longest, out.shard, out.blobs)
            self._loop.feed(ev.PeerRefused(out.peers[index], refused.reason))
            return
        self._means[out.head, out.ballot, out.shard] = digest
        self._loop.feed(ev.Reduced(out.epoch, out.head, out.ballot, out.shard, digest, mean, sums))

    def do_end_round(self, out: ev.EndRound) -> None:
        self._means.clear()
        self._network.drop_bulk()

    def do_moved(self, out: ev.Moved) -> None:
        """Presence follows the epoch at once."""
        if out.epoch != self._epoch_told:
            self._epoch_told = out.epoch
            self._network.tell_moved()


class _Served:
    """What a donor serves one peer, for the ledger."""

    def __init__(self, egress: Egress, peer: str) -> None:
        self._egress = egress
        self._peer = peer

    def sent(self, count: int) -> None:
        self._egress.sent("state", self._peer, count)

    def part(self, epoch: int, digest: str) -> None:
        self._egress.part("state", epoch, digest)


class Door:
    """A donor's streams: of each peer so many at a time, and if they must be short, so long."""

    def __init__(self, donor: Donor, egress: Egress, streams_max: int, stream_s: float | None) -> None:
        self._donor = donor
        self._egress = egress
        self._streams_max = streams_max
        self._stream_s = stream_s
        self._streams: dict[str, int] = {}

    @property
    def open(self) -> int:
        """Streams that are being served."""
        return sum(self._streams.values())

    async def serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """As Donor.serve. Without this one peer could take all the streams that a donor serves at once."""
        count = self._streams.get(peer, 0)
        if count >= self._streams_max:
            raise RemoteProtocolError("streams", f"more than {self._streams_max} streams at a time")
        self._streams[peer] = count + 1
        try:
            async with asyncio.timeout(self._stream_s):
                await self._donor.serve(reader, writer, _Served(self._egress, peer), peer)
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]
