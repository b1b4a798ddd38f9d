"""The auditor's desk: averages again what the head of a record draws, and gives others what they need for it.

    do_audit   the core's draw: drawn shards are kept for the auditors, and those that we are to look at are
               asked of their contributors, averaged and compared. Who does not answer is asked again, for it
               may not have heard of the record yet, and the reducer in its place; then another auditor is
               told, which does the same. Who did not even answer the last time has a moment to do so, and
               the reducer is asked at once: it shall not take the time that all audits have
    requests   of peers (audit_streams.py): `input` (head, shard, peer) gives a member of that record a kept
               shard with its path, or nothing; `second` (head, shard) has us look at a shard of which the
               first auditor did not get all

A lie that it finds is the affair of another desk (accusation_desk.py). Who gives an auditor nothing, though
there is a link to it, is named and counted. That proves nothing: it may have restarted. A pattern of it is
for people to judge.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgpack
from torch import Tensor

from tapestry.dht.p2pd import SwarmError
from tapestry.node.daemon.audit_streams import (
    OPEN_S,
    SILENCE_S,
    STREAMS_MAX,
    Auditor,
    AuditStreams,
    Request,
    no_such_request,
    values,
)
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.daemon.desk import Loop, Outputs
from tapestry.node.daemon.members_desk import MembersDesk
from tapestry.node.daemon.views import Reporter
from tapestry.node.disk.accusations import Accusation
from tapestry.node.net.network import Network
from tapestry.node.net.waiting import WaitingPlaces
from tapestry.node.net.wire import RemoteProtocolError, StreamEnded, read_frame
from tapestry.node.protocol import events as ev
from tapestry.node.protocol import strict
from tapestry.node.protocol.audit import Input, Order, second_auditor
from tapestry.node.protocol.commitment import PATH_MAX, is_committed
from tapestry.node.protocol.record import Member, Record
from tapestry.node.state.means import payload_digest, payload_of

KEPT_RECORDS = 4  # at least, however large: an auditor asks at once for most
KEPT_S = 180.0  # as long as both auditors may ask, where rounds are short: 2 * (sum of AGAIN_S and answers)
KEPT_BYTES_MAX = 256 << 20  # Guess: of copies beyond KEPT_RECORDS
KEPT_MAX = 4096  # records. G7
GIVEN_S = 30.0  # then who gets an input makes room for who waits. Guess
ASKED_OF_REDUCER_MAX = 2  # streams of an audit to its reducer at a time: AUDITS_AT_ONCE may have the same one
AUDITS_AT_ONCE = 2  # Guess: each holds all members' bytes of a shard
AUDITS_MAX = 64  # under way, those that wait to ask again among them: they hold what came. G7
WAITING_MAX = 16384  # audits that wait for one of those places: 5 MB. 70 billion parameters draw 4,500. G7
AGAIN_S = (
    2.0,
    10.0,
    30.0,
)  # Guess: a member that is late for the record; one that catches up; a line that is full
ANSWER_S = 60.0  # Guess: behind other auditors
SILENT_S = 2.0  # Guess: who did not answer the last time; else it holds up the audits of all others

_Given = tuple[tuple[str, ...], Tensor]  # a path, and encoded bytes

_log = logging.getLogger("tapestry.audit")


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
        streams: AuditStreams,
        accuse: Callable[[Accusation, str], Awaitable[None]],  # what is proven, and who found it
    ) -> None:
        self._loop = loop
        self._network = network
        self._averaging = averaging
        self._reporter = reporter
        self._crypto = auditor.crypto
        self._own = auditor.own
        self._streams = streams
        self._accuse = accuse
        # Head of a record -> (peer, shard) -> path and encoded bytes, of contributions to it.
        self._kept: OrderedDict[str, dict[tuple[str, int], tuple[tuple[str, ...], Tensor]]] = OrderedDict()
        self._kept_at: dict[str, float] = {}  # since when
        self._records: dict[str, Record] = {}  # those
        # Of those, what we look at if we are asked, by first auditor and shard.
        self._seconds: dict[str, dict[tuple[str, int], Order]] = {}
        self._auditing = 0
        self._waiting: list[tuple[Record, Order, bool]] = []  # for a place
        self._turn = asyncio.Semaphore(AUDITS_AT_ONCE)
        self._giving = WaitingPlaces(STREAMS_MAX, GIVEN_S, members.is_member)
        self._silent: dict[str, None] = {}  # of the newest record's members, who did not answer the last time
        self.outputs: Outputs = {ev.Audit: self.do_audit}
        streams.requests |= {"input": self.on_input, "second": self.on_second}

    # --- our own audits ------------------------------------------------------------------------

    def do_audit(self, out: ev.Audit) -> None:
        head = out.record.head
        # Copies: the trainer's memory, where ours lie, is written again in the next epoch.
        self._kept[head] = {
            (one.peer, one.shard): (self._path_of(one), one.blob.clone())  # type: ignore[attr-defined]  # a tensor
            for one in out.kept
        }
        self._records[head] = out.record
        self._seconds[head] = {(order.first, order.shard): order for order in out.seconds}
        self._kept_at[head] = self._loop.now()
        self._silent = {m.peer: None for m in out.record.body.members if m.peer in self._silent}
        self._drop_old()
        self._begin_audits(out.record, out.orders, first=True)

    def _drop_old(self) -> None:
        """Of short rounds many are kept, for auditors ask again; of long ones a few."""
        held = sum(payload.nbytes for kept in self._kept.values() for _, payload in kept.values())
        while len(self._kept) > KEPT_RECORDS:
            old, kept = next(iter(self._kept.items()))
            is_old = self._loop.now() - self._kept_at[old] > KEPT_S
            if not is_old and held <= KEPT_BYTES_MAX and len(self._kept) <= KEPT_MAX:
                return
            held -= sum(payload.nbytes for _, payload in kept.values())
            del self._kept[old], self._kept_at[old], self._records[old], self._seconds[old]

    def _path_of(self, one: Input) -> tuple[str, ...]:
        return one.path if one.peer != self._own else self._averaging.path(one.contribution, one.shard)

    def _begin_audits(self, record: Record, orders: Sequence[Order], first: bool) -> None:
        """Now or when there is a place. A lot says which of them waits, or is left out if too many do: nobody
        can foresee a shard that we do not look at."""
        self._waiting += [(record, order, first) for order in orders]
        while len(self._waiting) > WAITING_MAX:
            self._skip(*self._by_lot()[:2])
        self._begin_waiting()

    def _begin_waiting(self) -> None:
        while self._waiting and self._auditing < AUDITS_MAX:
            record, order, first = self._by_lot()
            if record.head not in self._kept:  # the others have dropped what they kept for it as well
                self._skip(record, order)
                continue
            self._auditing += 1
            self._loop.spawn(self._audit(record, order, first))

    def _by_lot(self) -> tuple[Record, Order, bool]:
        """One of those that wait, and it waits no more."""
        waiting, index = self._waiting, random.randrange(len(self._waiting))
        waiting[index], waiting[-1] = waiting[-1], waiting[index]
        return waiting.pop()

    def _skip(self, record: Record, order: Order) -> None:
        self._reporter.audited("skipped")
        _log.info("audit=skipped epoch=%d shard=%d: too many wait", record.body.epoch, order.shard)

    async def _audit(self, record: Record, order: Order, first: bool) -> None:
        """One shard of one record. `first`: another auditor is told if we do not get all of it."""
        members = tuple(m for m in record.body.members if m.weight)
        given: dict[str, _Given] = {}
        try:
            for pause_s in (0.0, *AGAIN_S):
                await asyncio.sleep(pause_s)
                async with self._turn:
                    await self._gather(record, order, members, given, ask_reducer=pause_s > 0)
                    if len(given) == len(members):
                        await self._compare(record, order, members, [given[m.peer] for m in members])
                        return
        finally:
            self._auditing -= 1
            self._begin_waiting()
        await self._give_up(record, order, [m.peer for m in members if m.peer not in given], first)

    async def _gather(
        self,
        record: Record,
        order: Order,
        members: Sequence[Member],
        given: dict[str, _Given],
        ask_reducer: bool,
    ) -> None:
        """What is not in `given` yet, of everybody at once."""
        missing = [m for m in members if m.peer not in given]
        line = asyncio.Semaphore(ASKED_OF_REDUCER_MAX)
        found = await asyncio.gather(*(self._input(record, order, m, line, ask_reducer) for m in missing))
        given.update({m.peer: one for m, one in zip(missing, found, strict=True) if one is not None})

    async def _give_up(self, record: Record, order: Order, missing: list[str], first: bool) -> None:
        """Nobody gave what these contributed. Those that we are linked to withheld it, or lost it."""
        linked = [peer for peer in missing if peer in self._network.linked]
        epoch, shard = record.body.epoch, order.shard
        self._reporter.audited("incomplete")
        self._reporter.withheld(linked, epoch, shard)
        short = [peer[-6:] for peer in missing]
        _log.info("audit=incomplete epoch=%d shard=%d no_input_of=%s", epoch, shard, short)
        peers = [m.peer for m in record.body.members]
        second = second_auditor(record.head, shard, order.reducer, self._own, peers, self._crypto)
        if first and second is not None:
            await self._streams.say(second, ["second", record.head, shard])

    async def _compare(
        self, record: Record, order: Order, members: tuple[Member, ...], inputs: list[_Given]
    ) -> None:
        weights = [m.weight for m in members]
        payloads = [payload for _, payload in inputs]
        digest = await self._loop.compute(self._averaging.mean_digest, order.shard, payloads, weights)
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
        self, record: Record, order: Order, member: Member, to_reducer: asyncio.Semaphore, ask_reducer: bool
    ) -> _Given | None:
        """A member's shard, and the path that proves it; None if neither it nor the reducer gave it.

        `to_reducer`: how many ask that at a time. `ask_reducer`: for others too, not only who did not answer.
        """
        peer, linked = member.peer, self._network.linked
        kept = self._kept.get(record.head, {}).get((peer, order.shard))
        if kept is None and peer in linked and peer != order.reducer:
            kept = await self._given_by(peer, record, order.shard, member)
        is_asked = peer == order.reducer or ask_reducer or peer in self._silent
        if kept is None and is_asked and order.reducer in linked:
            async with to_reducer:
                kept = await self._given_by(order.reducer, record, order.shard, member)
        return kept

    async def _given_by(self, source: str, record: Record, shard: int, member: Member) -> _Given | None:
        try:
            header, payload = await self._ask(source, ["input", record.head, shard, member.peer])
            path = _path(header)
        except (SwarmError, StreamEnded, TimeoutError, ConnectionError):
            self._silent[source] = None
            return None
        except RemoteProtocolError as error:
            if error.reason != "missing":
                self._reporter.refused(source, error.reason, str(error))
            return None
        tensor = payload_of(payload)
        if not self._is_of(member, record.body.epoch - 1, shard, payload_digest(tensor), path):
            self._reporter.refused(source, "commitment", "an input that is not of the contribution")
            return None
        return path, tensor

    def _is_of(self, member: Member, epoch: int, shard: int, digest: str, path: tuple[str, ...]) -> bool:
        count = len(self._averaging.shards)
        name = member.contribution
        return is_committed(name, member.peer, epoch, count, shard, digest, path, self._crypto.digest)

    async def _ask(self, peer: str, said: list[Any]) -> tuple[bytes, bytearray]:
        open_s, answer_s = (SILENT_S, SILENT_S) if peer in self._silent else (OPEN_S, ANSWER_S)
        reader, writer = await self._streams.open(peer, open_s)
        try:
            await self._streams.write(peer, writer, msgpack.packb(said))
            header, payload = await read_frame(
                reader, self._streams.limits, answer_s, SILENCE_S, self._streams.came
            )
            self._silent.pop(peer, None)
            if not payload and header == msgpack.packb([]):  # a path, of one of several shards, is not empty
                raise RemoteProtocolError("missing", "it has not kept this")
            return header, payload
        finally:
            writer.close()

    # --- other members' streams ----------------------------------------------------------------

    async def on_input(self, request: Request) -> None:
        """Of all together so many are given inputs at a time: the others wait. Raises as serve."""
        peer = request.peer
        match request.said:
            case [head, shard, of]:
                turn = self._streams.turn_of(peer, "input")
                async with turn, self._giving.place(peer, request.writer):
                    await self._give(peer, request.writer, head, shard, of)
            case _:
                raise no_such_request()

    async def on_second(self, request: Request) -> None:
        """Raises RemoteProtocolError."""
        match request.said:
            case [head, shard]:
                self._audit_as_second(request.peer, head, shard)
            case _:
                raise no_such_request()

    def _audit_as_second(self, peer: str, head: Any, shard: Any) -> None:
        """Once for a shard of the first auditor's: who asks has drawn it."""
        if not isinstance(head, str) or type(shard) is not int:
            return
        order = self._seconds.get(head, {}).pop((peer, shard), None)
        if order is not None:
            self._begin_audits(self._records[head], [order], first=False)

    async def _give(self, peer: str, writer: asyncio.StreamWriter, head: Any, shard: Any, of: Any) -> None:
        asked = isinstance(head, str) and type(shard) is int and isinstance(of, str)
        found = self._kept.get(head, {}).get((of, shard)) if asked else None
        body = self._records[head].body if found is not None else None
        if found is None or body is None or all(m.peer != peer for m in body.members):
            await self._streams.write(peer, writer, msgpack.packb([]))
            return
        path, payload = found
        self._reporter.egress.part("audit", body.epoch, head)
        await self._streams.write(peer, writer, msgpack.packb(list(path)), [memoryview(payload.numpy())])  # type: ignore[arg-type]


def _path(header: bytes) -> tuple[str, ...]:
    """Raises RemoteProtocolError."""
    try:
        return tuple([strict.hexadecimal(d, (64,), "path") for d in values(header, PATH_MAX, "path")])
    except strict.Malformed as error:
        raise RemoteProtocolError("malformed", str(error)) from None
