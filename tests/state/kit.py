"""A small run with real signatures, real payloads and a home of its own, for the tests of node/state."""

from __future__ import annotations

import asyncio
import copy
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from tapestry.compression.codecs import get_codec
from tapestry.compression.shards import shard_bounds
from tapestry.dht.identity import Identity
from tapestry.node.disk.checkpoints import Checkpoints
from tapestry.node.disk.store import Store, result_digest
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.members import UNIT, Change, change_message, rollback_value
from tapestry.node.protocol.place import seat_of
from tapestry.node.protocol.record import (
    Body,
    Member,
    Record,
    accept_message,
    draw_message,
    found,
    head_of,
    seat_message,
)
from tapestry.node.spec.run import NesterovSpec, OuterSpec
from tapestry.node.state.model import Arithmetic, ModelState
from tapestry.node.state.outer import make_outer

SCHEMA = "5c" * 32
IDENTITY = Identity(Ed25519PrivateKey.from_private_bytes(b"tapestry state tests ed25519 key"))
CRYPTO = NodeCrypto(IDENTITY)
STALL_S = 0.2


def arithmetic(n: int, spec: OuterSpec | None = None, shard_elements: int = 256) -> Arithmetic:
    return Arithmetic(
        shard_bounds(n, shard_elements), get_codec("int8-block"), make_outer(spec or NesterovSpec())
    )


def new_state(n: int, arith: Arithmetic | None = None, fill: float = 0.0) -> ModelState:
    """Not of any run yet: as a node has it before it loads one."""
    return ModelState(torch.full((n,), fill), SCHEMA, arith or arithmetic(n), 0, "0" * 64)


def state_bytes(state: ModelState) -> bytes:
    return b"".join(bytes(vector) for vector in state.vectors())


@dataclass
class Run:
    """A founder alone: every `advance` is an epoch, written as a node writes it."""

    folder: Path
    n: int
    kept: int = 3
    outer: OuterSpec = field(default_factory=NesterovSpec)
    seed: int = 0
    shard_elements: int = 256

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.home = Home(self.folder)
        self.rng = torch.Generator().manual_seed(self.seed)
        self.state = new_state(self.n, arithmetic(self.n, self.outer, self.shard_elements))
        self.state.params.copy_(torch.randn(self.n, generator=self.rng))
        self.digest = self.state.digest()
        genesis = found("spec", IDENTITY.peer_id, self.digest, SCHEMA, self.n, "0" * 32, CRYPTO)
        self.chain = Chain(genesis)
        self.state.head = genesis.run_id
        self.store = Store(self.home, CRYPTO)
        self.store.load()
        self.store.write_genesis(genesis)
        self.checkpoints = Checkpoints(self.home.checkpoints, genesis.run_id, self.kept)
        self.checkpoints.load()
        self.payloads: list[list[Tensor]] = []
        self.numbers = [state_bytes(self.state)]  # of every state there was
        self.digests = [self.digest]

    def advance(self, epochs: int = 1) -> None:
        for _ in range(epochs):
            payloads = self.random_payloads()
            record = self.next_record(payloads)
            self.store.write_update(record.body.epoch, record.head, payloads)
            self.store.append_record(record)
            self.chain.append(record)
            self.state.apply(payloads, record)
            self.digest = self.state.digest()
            self.payloads.append(payloads)
            self.numbers.append(state_bytes(self.state))
            self.digests.append(self.digest)

    def roll_back(self, to: int) -> None:
        """An epoch whose record says that the state is that of epoch `to` again."""
        payloads = self.random_payloads()
        change = Change("rollback", "", rollback_value(to, self.chain.head_at(to), "x"), 99, f"{to:032x}")
        change = change.signed(
            IDENTITY.peer_id, CRYPTO.sign(change_message(self.chain.genesis.run_id, change))
        )
        record = self.next_record(payloads, (change,))
        self.chain.check(record, CRYPTO)
        self.store.write_update(record.body.epoch, record.head, payloads)
        self.store.append_record(record)
        self.chain.append(record)
        self.digest = self.digests[to]
        self.state = self.fresh_at(to)
        self.state.rename(record.body.epoch, record.head)
        self.numbers.append(self.numbers[to])
        self.digests.append(self.digest)

    def _parts(self, numbers: bytes) -> list[bytes]:
        size = len(self.state.vectors()[0])
        return [numbers[at : at + size] for at in range(0, len(numbers), size)]

    def random_payloads(self) -> list[Tensor]:
        codec = self.state.arithmetic.codec
        return [codec.encode(torch.randn(s.n, generator=self.rng)) for s in self.state.arithmetic.shards]

    def next_record(self, payloads: list[Tensor], changes: tuple[Change, ...] = ()) -> Record:
        member = Member(IDENTITY.peer_id, UNIT, "c0" * 32, "", 7)
        word = CRYPTO.sign(seat_message(self.chain.head, ""))
        body = Body(
            run_id=self.chain.genesis.run_id,
            epoch=self.chain.epoch + 1,
            prev=self.chain.head,
            state_digest=self.digest,
            members=(replace(member, seat=seat_of(self.chain.place, member, False, word)),),
            result=result_digest(payloads),
            changes=changes,
        )
        head = head_of(body, CRYPTO)
        vote, draw = CRYPTO.sign(accept_message(head, 0)), CRYPTO.sign(draw_message(head))
        return Record(body, head, 0, ((IDENTITY.peer_id, vote),), None, ((IDENTITY.peer_id, draw),))

    def save(self) -> Path:
        return self.checkpoints.save(self.state, self.digest).path

    def copy(self, folder: Path) -> Run:
        """The same run in another home, its own to damage."""
        shutil.copytree(self.folder, folder)
        copied = copy.copy(self)
        copied.folder, copied.home = folder, Home(folder)
        copied.state = self.fresh()
        for ours, theirs in zip(copied.state.overwrite(), self.state.vectors(), strict=True):
            ours[:] = theirs
        copied.state.adopt(self.state.epoch, self.state.head, self.digest)
        copied.store, copied.checkpoints = copied.reopened()
        return copied

    def fresh(self) -> ModelState:
        """An empty state for the same model."""
        return new_state(self.n, arithmetic(self.n, self.outer, self.shard_elements))

    def fresh_at(self, epoch: int) -> ModelState:
        """A copy of the state of this epoch."""
        state = self.fresh()
        for ours, theirs in zip(state.overwrite(), self._parts(self.numbers[epoch]), strict=True):
            ours[:] = theirs
        state.adopt(epoch, self.chain.head_at(epoch), self.digests[epoch])
        return state

    def reopened(self) -> tuple[Store, Checkpoints]:
        """As after a kill -9: what the disk alone gives."""
        store = Store(self.home, CRYPTO)
        store.load()
        checkpoints = Checkpoints(self.home.checkpoints, self.chain.genesis.run_id, self.kept)
        checkpoints.load()
        return store, checkpoints


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def stream_pair() -> AsyncIterator[tuple[Stream, Stream]]:
    """Two ends of one stream, in this process."""
    ends = [await asyncio.open_connection(sock=end) for end in socket.socketpair()]
    try:
        yield ends[0], ends[1]
    finally:
        for _, writer in ends:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in ends), return_exceptions=True)


def unreadable(path: Path) -> None:
    """A file whose bytes the kernel refuses, with EIO, as those of a bad sector."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


def flip(path: Path, offset: int) -> None:
    """Damage one byte; a negative offset counts from the end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
