"""Auditors' desks and those of accusations of four members, with real streams between them."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tapestry.compression.codecs import get_codec
from tapestry.compression.reduce import WEIGHTED
from tapestry.dht.identity import Identity
from tapestry.dht.p2pd import SwarmError
from tapestry.node.daemon.accusation_desk import AccusationDesk
from tapestry.node.daemon.audit_desk import AuditDesk
from tapestry.node.daemon.audit_streams import Auditor, AuditStreams
from tapestry.node.daemon.averaging import Averaging
from tapestry.node.disk.accusations import Accusation
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.net.throttle import Throttles
from tapestry.node.net.wire import RemoteProtocolError, StreamEnded
from tapestry.node.protocol import events as ev
from tapestry.node.protocol.audit import Input, Order, second_auditor
from tapestry.node.protocol.record import Body, Member, Record
from tapestry.node.protocol.settings import Settings

N, RUN, HEAD, EPOCH = 600, "ab" * 32, "cd" * 32, 5
PEERS = ("alice", "bob", "carol", "dora")
SHARD = 1
CODEC = get_codec("int8-block")
CRYPTO = NodeCrypto(Identity(Ed25519PrivateKey.from_private_bytes(b"tapestry audit tests ed25519 key")))


class Accusations(AccusationDesk):
    """Which tells nobody a second time, once its owner says so."""

    owner: Desk

    async def _tell_once(self, *args: Any) -> bool:
        return await super()._tell_once(*args) or not self.owner.tells_again


class Desk:
    """One member's two, with all that it tells, and links to the others of its table."""

    def __init__(self, name: str, table: dict[str, Desk], folder: Path, on_lie: Any = "mark") -> None:
        self.told: list[tuple[str, object]] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.clock_s = 0.0
        self.averaging = Averaging(CODEC, N, 256, WEIGHTED)
        self.hides = False  # it ends streams without an answer
        self.holds = False  # it takes them, and gives none
        self.tells_again = True  # who has not heard

        def tell(what: str) -> Callable[..., None]:
            return lambda *args: self.told.append((what, *args))  # type: ignore[arg-type]

        async def compute(function: Callable[..., Any], *args: Any) -> Any:
            return function(*args)

        def spawn(job: Coroutine[Any, Any, None]) -> None:
            self.tasks.append(asyncio.get_running_loop().create_task(job))

        async def open_stream(peer: str, protocol: str, open_s: float) -> Any:
            other = table.get(peer)
            if other is None:
                raise SwarmError("no such peer")
            ours, theirs = socket.socketpair()
            reader, writer = await asyncio.open_connection(sock=theirs)
            spawn(serve(other, reader, writer))
            return await asyncio.open_connection(sock=ours)

        async def serve(other: Desk, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                if other.holds:
                    await reader.read()
                elif not other.hides:
                    await other.streams.serve(name, reader, writer)
            except RemoteProtocolError as error:
                other.told.append(("blamed", error.reason))
            except (StreamEnded, TimeoutError, ConnectionError) as error:
                other.told.append(("ended", type(error).__name__))
            finally:
                writer.close()

        egress = SimpleNamespace(part=tell("part"), sent=lambda *args: None)
        self.received_bytes = 0

        def network_bytes(direction: str, kind: str, count: int) -> None:
            self.received_bytes += count if direction == "received" else 0

        metrics = SimpleNamespace(network_bytes=network_bytes)
        reporter = SimpleNamespace(
            audited=tell("audited"),
            withheld=tell("withheld"),
            refused=tell("refused"),
            accused=tell("accused"),
            egress=egress,
            metrics=metrics,
        )
        network = SimpleNamespace(open_stream=open_stream, linked=PEERS)
        loop = SimpleNamespace(spawn=spawn, compute=compute, now=lambda: self.clock_s)
        auditor = Auditor(CRYPTO, name, RUN, folder / name, Throttles(), on_lie)
        self.record: Record | None = None  # the newest of its chain
        self.rule = ""  # what a record has made of on_lie
        self.taken = ""  # digest of the wrong mean that is in its state
        self.roll = SimpleNamespace(members=dict.fromkeys(PEERS, SimpleNamespace(since=0)), removed={})
        self.stands = True  # what was made of a state with a wrong mean in it
        members = SimpleNamespace(
            roll=self.roll,
            expel=self.expel,
            roll_back=tell("roll_back"),
            is_member=lambda peer: not peer.startswith("new"),
            may_be_undone=lambda epoch, head: self.stands,
        )
        self.loop, self.network, self.members = loop, network, members
        shared: Any = loop, network, self.averaging, reporter, auditor, members
        self.streams = AuditStreams(loop, network, reporter, auditor)  # type: ignore[arg-type]
        self.accusations = Accusations(*shared, self, self.streams)
        self.accusations.owner = self
        self.audits = AuditDesk(*shared, self.streams, self.accusations.accuse)

    @property
    def epoch(self) -> int:
        return self.record.body.epoch if self.record is not None else EPOCH

    def of_a_record(self, lie: Accusation) -> bool:
        newest = self.record.body if self.record is not None else None
        return newest is not None and (lie.head, lie.epoch) == (newest.prev, newest.epoch - 1)

    def in_the_state(self, lie: Accusation) -> bool:
        return lie.digest == self.taken

    def settings_at(self, epoch: int) -> Settings:
        return {"audit.on_lie": self.rule} if self.rule else {}

    def expel(self, peer: str, why: str, epoch: int) -> None:
        self.told.append(("expel", peer, why))  # type: ignore[arg-type]
        if self.roll.members.pop(peer, None) is not None:
            self.roll.removed[peer] = why

    def said(self, what: str) -> list[Any]:
        return [entry[1:] for entry in self.told if entry[0] == what]


class Table:
    """Four members that contributed to one record; the reducer of SHARD is drawn by nobody."""

    def __init__(self, folder: Path) -> None:
        self.desks: dict[str, Desk] = {}
        for peer in PEERS:
            self.desks[peer] = Desk(peer, self.desks, folder)
        members, self.payloads = [], {}
        for seed, peer in enumerate(PEERS):
            one = self.desks[peer].averaging
            x = torch.randn(N, generator=torch.Generator().manual_seed(seed))
            encoded = one.take(
                torch.cat([CODEC.encode(x[i : i + 256]) for i in range(0, N, 256)]), copy=False
            )
            members.append(Member(peer, 1, one.commit(peer, EPOCH, encoded)))
            self.payloads[peer] = encoded[SHARD]
        body = Body(RUN, EPOCH + 1, "00" * 32, "00" * 32, tuple(members), "00" * 32)
        self.record = Record(body, HEAD, 0, ())
        self.reducer = PEERS[0]
        self.first = PEERS[1]
        second = second_auditor(HEAD, SHARD, self.reducer, self.first, PEERS, CRYPTO)
        assert second is not None
        self.second = second
        (self.other,) = set(PEERS) - {self.reducer, self.first, self.second}
        mean = self.desks[self.first].averaging.mean_digest
        self.order = Order(SHARD, self.reducer, mean(SHARD, list(self.payloads.values()), [1] * 4), "")

    def own(self, peer: str) -> Input:
        member = next(m for m in self.record.body.members if m.peer == peer)
        return Input(SHARD, peer, member.contribution, (), self.payloads[peer])

    def at_reducer(self) -> list[Input]:
        """All others' inputs, with the paths that came with them."""
        owns = [self.own(peer) for peer in PEERS if peer != self.reducer]
        return [
            Input(
                o.shard,
                o.peer,
                o.contribution,
                self.desks[o.peer].averaging.path(o.contribution, SHARD),
                o.blob,
            )
            for o in owns
        ]

    def drawn(self, peer: str, *kept: Input, order: Order | None = None, second: Order | None = None) -> None:
        orders = (order,) if order else ()
        seconds = (dataclasses.replace(second, first=self.first),) if second else ()
        self.desks[peer].audits.do_audit(ev.Audit(self.record, (), orders, seconds, kept))

    async def settle(self) -> None:
        while pending := [t for desk in self.desks.values() for t in desk.tasks if not t.done()]:
            await asyncio.gather(*pending)


def run(scenario: Callable[[Table], Coroutine[Any, Any, None]], folder: Path) -> Table:
    async def begin() -> Table:
        table = Table(folder)
        await scenario(table)
        for desk in table.desks.values():
            desk.tells_again = False
        await table.settle()
        return table

    return asyncio.run(begin())
