"""The auditor's desk: averages again what the head of a record draws, and tells everybody of a lie.

    do_audit   the core's draw: our own drawn shards are kept for the auditors, and those that we are to look
               at are asked of their contributors, averaged and compared
    serve      streams of peers: `input` (head, shard) gives a member of that record a kept shard with its
               path, or nothing; `accuse` brings an accusation, which we check ourselves

An accusation is kept in the home, counted, shown, and passed on to all we are linked with: once, since one
that we have is no news. Where the run has it so, who may remove members signs the liar's removal. What does
not prove anything is refused, counted and named.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor
from typing_extensions import Buffer

from tapestry.compression.refusals import Refused
from tapestry.dht.p2pd import SwarmError
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.daemon.desk import Loop, Outputs
from tapestry.node.daemon.members_desk import MembersDesk
from tapestry.node.daemon.views import Reporter
from tapestry.node.disk.accusations import Accusation, FalseAccusation, check, keep, unpack
from tapestry.node.net.network import Network
from tapestry.node.net.throttle import Throttles
from tapestry.node.net.wire import (
    FrameLimits,
    RemoteProtocolError,
    StreamEnded,
    WriteLimits,
    frame_parts,
    read_frame,
    write_frame,
)
from tapestry.node.net.wire import unpack as unpack_header
from tapestry.node.protocol import events as ev
from tapestry.node.protocol import strict
from tapestry.node.protocol.audit import Order
from tapestry.node.protocol.canon import Crypto
from tapestry.node.protocol.chain import Member, Record
from tapestry.node.protocol.commitment import PATH_MAX, is_committed
from tapestry.node.state.means import payload_digest

KEPT_RECORDS = 4  # Guess: an auditor asks within seconds of the commit
STREAMS_MAX = 4  # of all peers at a time
OPEN_S = 10.0
SILENCE_S = 10.0
HEADER_BYTES_MAX = 8192  # a path of PATH_MAX digests fits
ACCUSATION_BYTES_MAX = 64 << 20  # Guess: 128 members' shards of 512 KiB

_log = logging.getLogger("tapestry.audit")


def audit_protocol(run_id: str) -> str:
    return f"/tapestry/{run_id}/audit/1"


@dataclass(frozen=True, slots=True)
class Auditor:
    """Who audits."""

    crypto: Crypto
    own: str  # peer id
    run_id: str
    folder: Path  # HOME/accusations
    throttles: Throttles
    removes: bool = False  # asks for the removal of who is proven to lie, where this node may


class AuditDesk:
    """One node's part in the audits of its run."""

    def __init__(
        self,
        loop: Loop,
        network: Network,
        averaging: Averaging,
        reporter: Reporter,
        auditor: Auditor,
        members: MembersDesk,
    ) -> None:
        self._loop = loop
        self._network = network
        self._averaging = averaging
        self._reporter = reporter
        self._members = members if auditor.removes else None
        self._crypto = auditor.crypto
        self._own = auditor.own
        self._folder = auditor.folder
        self._throttles = auditor.throttles
        self.protocol = audit_protocol(auditor.run_id)
        # Head of a record -> shard -> path and encoded bytes, of our contribution to it.
        self._kept: OrderedDict[str, dict[int, tuple[tuple[str, ...], Tensor]]] = OrderedDict()
        self._records: dict[str, Record] = {}  # those
        self._streams = 0
        self._read = FrameLimits(HEADER_BYTES_MAX, ACCUSATION_BYTES_MAX, throttle=auditor.throttles.download)
        self.outputs: Outputs = {ev.Audit: self.do_audit}

    # --- our own audits ------------------------------------------------------------------------

    def do_audit(self, out: ev.Audit) -> None:
        if out.kept is not None:
            path = self._averaging.path
            name = out.kept.contribution
            # Copies: the trainer's memory, where they lie, is written again in the next epoch.
            self._kept[out.record.head] = {
                shard: (path(name, shard), blob.clone())  # type: ignore[attr-defined]  # a Blob is a tensor here
                for shard, blob in out.kept.blobs
            }
            self._records[out.record.head] = out.record
            while len(self._kept) > KEPT_RECORDS:
                del self._records[self._kept.popitem(last=False)[0]]
        for order in out.orders:
            self._loop.spawn(self._audit(out.record, order))

    async def _audit(self, record: Record, order: Order) -> None:
        """One shard of one record."""
        members = tuple(m for m in record.body.members if m.weight)
        fetched = await asyncio.gather(*(self._input(record, order.shard, m) for m in members))
        inputs = [one for one in fetched if one is not None]
        if len(inputs) < len(members):
            silent = [m.peer[-6:] for m, one in zip(members, fetched, strict=True) if one is None]
            self._reporter.audited("incomplete")
            _log.info(
                "audit=incomplete epoch=%d shard=%d no_input_of=%s", record.body.epoch, order.shard, silent
            )
            return
        weights = [m.weight for m in members]
        payloads = [payload for _, payload in inputs]
        try:
            digest = await self._loop.compute(self._averaging.mean_digest, order.shard, payloads, weights)
        except Refused as refused:
            _log.warning("audit=impossible epoch=%d shard=%d %s", record.body.epoch, order.shard, refused)
            return
        if digest == order.digest:
            self._reporter.audited("agreed")
            return
        given = tuple((path, bytes(payload.numpy().data)) for path, payload in inputs)
        accusation = Accusation(
            record.body.prev,
            record.body.epoch - 1,
            members,
            order.shard,
            order.digest,
            order.reducer,
            order.signature,
            given,
        )
        self._reporter.audited("lie")
        await self._accuse(accusation, self._own)

    async def _input(
        self, record: Record, shard: int, member: Member
    ) -> tuple[tuple[str, ...], Tensor] | None:
        """A member's shard, and the path that proves it; None if it did not give it."""
        if member.peer == self._own:
            return self._kept.get(record.head, {}).get(shard)
        try:
            header, payload = await self._ask(member.peer, ["input", record.head, shard])
            path = _path(header)
        except (SwarmError, StreamEnded, TimeoutError, ConnectionError):
            return None
        except RemoteProtocolError as error:
            if error.reason != "missing":
                self._reporter.refused(member.peer, error.reason, str(error))
            return None
        tensor = torch.frombuffer(payload, dtype=torch.uint8)
        if not self._is_of(member, record.body.epoch - 1, shard, payload_digest(tensor), path):
            self._reporter.refused(member.peer, "commitment", "an input that is not of its contribution")
            return None
        return path, tensor

    def _is_of(self, member: Member, epoch: int, shard: int, digest: str, path: tuple[str, ...]) -> bool:
        count = len(self._averaging.shards)
        name = member.contribution
        return is_committed(name, member.peer, epoch, count, shard, digest, path, self._crypto.digest)

    async def _ask(self, peer: str, said: list[Any]) -> tuple[bytes, bytearray]:
        reader, writer = await self._network.open_stream(peer, self.protocol, OPEN_S)
        try:
            await self._write(peer, writer, msgpack.packb(said))
            header, payload = await read_frame(reader, self._read, SILENCE_S, SILENCE_S, self._came)
            if not payload:
                raise RemoteProtocolError("missing", "it has not kept this")
            return header, payload
        finally:
            writer.close()

    # --- lies ----------------------------------------------------------------------------------

    async def _accuse(self, accusation: Accusation, by: str) -> None:
        """It is proven: keep it, say it, pass it on."""
        try:
            new = await self._loop.compute(keep, self._folder, accusation)
        except OSError as error:
            _log.error("accusation=not_kept reason=%r; make room in the home", str(error))
            return
        if not new:
            return
        a = accusation
        self._reporter.accused(a.reducer, a.epoch + 1, a.shard)
        _log.error(
            "accusation=proven peer=%s epoch=%d shard=%d found_by=%s file=%s; it signed a mean that is not "
            "the mean of what it was sent. Ask its operator; the members may remove it",
            *(a.reducer, a.epoch + 1, a.shard, by[-6:], a.name),
        )
        if self._members is not None:
            why = f"proven to have signed a wrong mean: round {a.epoch + 1}, shard {a.shard}"
            self._members.expel(a.reducer, why, a.epoch + 1)
        packed = a.pack()
        for peer in self._network.linked:
            if peer not in (by, a.reducer):
                self._loop.spawn(self._tell(peer, packed))

    async def _tell(self, peer: str, packed: bytes) -> None:
        try:
            reader, writer = await self._network.open_stream(peer, self.protocol, OPEN_S)
        except SwarmError:
            return
        try:
            await self._write(peer, writer, msgpack.packb(["accuse"]), [packed])
            await asyncio.wait_for(reader.read(1), SILENCE_S)  # its end: it has taken it
        except (TimeoutError, ConnectionError, SwarmError):
            _log.debug("accusation=not_told peer=%s", peer[-6:])
        finally:
            writer.close()

    # --- other members' streams ----------------------------------------------------------------

    async def serve(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request. Raises RemoteProtocolError, StreamEnded, TimeoutError and ConnectionError."""
        if self._streams >= STREAMS_MAX or peer not in self._network.linked:
            return
        self._streams += 1
        try:
            header, payload = await read_frame(reader, self._read, SILENCE_S, SILENCE_S, self._came)
            match _values(header, 3, "request"):
                case ["accuse", *_]:
                    await self._judge(peer, payload)
                case ["input", head, shard]:
                    await self._give(peer, writer, head, shard)
                case _:
                    raise RemoteProtocolError("malformed", "no such request")
        finally:
            self._streams -= 1

    async def _judge(self, peer: str, payload: bytearray) -> None:
        averaging = self._averaging
        try:
            accusation = unpack(payload)
            count, mean_digest = len(averaging.shards), averaging.mean_digest
            await self._loop.compute(check, accusation, count, mean_digest, self._crypto)
        except FalseAccusation as error:
            raise RemoteProtocolError("accusation", str(error)) from None
        await self._accuse(accusation, peer)

    async def _give(self, peer: str, writer: asyncio.StreamWriter, head: Any, shard: Any) -> None:
        found = self._kept.get(head, {}).get(shard) if isinstance(head, str) and type(shard) is int else None
        body = self._records[head].body if found is not None else None
        if found is None or body is None or all(m.peer != peer for m in body.members):
            await self._write(peer, writer, msgpack.packb([]))
            return
        path, payload = found
        self._reporter.egress.part("audit", body.epoch, head)
        await self._write(peer, writer, msgpack.packb(list(path)), [memoryview(payload.numpy())])  # type: ignore[arg-type]

    async def _write(
        self, peer: str, writer: asyncio.StreamWriter, header: bytes, payload: list[Buffer] | None = None
    ) -> None:
        def left(count: int) -> None:
            self._reporter.metrics.network_bytes("sent", "audit", count)
            self._reporter.egress.sent("audit", peer, count)

        limits = WriteLimits(self._throttles.upload, waits=bool(payload), patience_s=SILENCE_S)
        await write_frame(writer, frame_parts(header, payload or []), limits, left)

    def _came(self, count: int) -> None:
        self._reporter.metrics.network_bytes("received", "audit", count)


def _values(header: bytes, count_max: int, what: str) -> list[Any]:
    """Raises RemoteProtocolError."""
    try:
        return [*strict.sequence(unpack_header(header), count_max, what)]
    except strict.Malformed as error:
        raise RemoteProtocolError("malformed", str(error)) from None


def _path(header: bytes) -> tuple[str, ...]:
    """Raises RemoteProtocolError."""
    try:
        return tuple([strict.hexadecimal(d, (64,), "path") for d in _values(header, PATH_MAX, "path")])
    except strict.Malformed as error:
        raise RemoteProtocolError("malformed", str(error)) from None
