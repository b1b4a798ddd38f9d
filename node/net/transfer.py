"""Genesis, updates and checkpoints over one libp2p stream: a donor serves, a joiner fetches and verifies.

A stream carries requests, one frame each, and their answers in the same order:

    genesis                      -> the genesis, in the header
    update (epoch, head)         -> the count of shards; then a frame for each shard's payload
    checkpoint (epoch_max)       -> the manifest of the newest checkpoint up to epoch_max
    chunk (epoch, head, index)   -> CHUNK_BYTES of that checkpoint's data
    file (digest, index)         -> PIECE_BYTES of a file of the base that the run pins

or the word `missing` or `busy`. A chunk is named by its checkpoint and not by what was asked before, and
`Download` knows which chunks it has: so a download can go on after a break, and with several donors.

Nothing from a donor is believed: an update has the digest that its record names before it is written to the
update log, a chunk the digest of the manifest, and the state the digest that the chain signed. Chunks go
straight into the state's own memory, which is torn until that digest was right.

What a fetch raises: RemoteProtocolError when the donor did or sent what it may not; DonorFailed when it
cannot or will not serve, ended the stream, was silent for stall_s, or slower than BYTES_PER_SECOND_MIN;
OSError when our own disk failed; and what opening the stream raises.

Imports: net/wire.py's frames and asyncio; no hivemind. What opens streams is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

import msgpack
import torch
from blake3 import blake3
from torch import Tensor

from tapestry.compression.refusals import RefusedPayload
from tapestry.node.disk.base import PIECE_BYTES, BaseError, BaseFile, BaseFolder
from tapestry.node.disk.checkpoints import (
    CHUNK_BYTES,
    Checkpoint,
    Checkpoints,
    chunk_count,
    read_chunk,
)
from tapestry.node.disk.draft import Draft
from tapestry.node.disk.store import Store, UpdateMissing, result_digest
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
from tapestry.node.protocol import strict
from tapestry.node.protocol.chain import (
    EPOCH_MAX,
    Chain,
    Crypto,
    Genesis,
    InvalidRecord,
    canonical,
    genesis_from_dict,
    genesis_to_dict,
)
from tapestry.node.state.model import Arithmetic, DigestMismatch, ModelState, spans

CHUNKS_AHEAD = 8  # asked for before the first has come: 8 MiB hide 80 ms at 100 MB/s. Guess
BYTES_PER_SECOND_MIN = 16 * 1024  # of a donor that drips; Guess
REQUEST_BYTES_MAX = 1024
GENESIS_BYTES_MAX = 256 * 1024  # a spec of 64 kB, escaped
DIGEST_BYTES = 32

OpenStream = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
OnBytes = Callable[[str, int], None]  # direction ("in" or "out"), count


class Serving(Protocol):
    """Who hears of what a peer is served."""

    def sent(self, count: int) -> None: ...
    def part(self, epoch: int, digest: str) -> None:
        """What is sent from now on is of this update (by its head), checkpoint (its state's digest), file of
        the base (its digest), or genesis (the run id)."""


class _Unwatched:
    def sent(self, count: int) -> None: ...
    def part(self, epoch: int, digest: str) -> None: ...


_fetches = itertools.count()  # names of the drafts of this process
_log = logging.getLogger("tapestry.transfer")


class DonorFailed(Exception):
    """The donor did not serve us, and said nothing wrong. `reason`: missing, busy, ended or timeout."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TransferLimits:
    stall_s: float  # silence that ends a transfer
    serves_max: int = 4  # streams served at once; the next is told `busy`. Guess
    throttles: Throttles = field(default_factory=Throttles)  # the node's, which its links share


# --- the donor --------------------------------------------------------------------------------------


class Donor:
    """Serves one home's genesis, updates and checkpoints. `serve` is a stream's handler."""

    def __init__(
        self,
        genesis: Genesis,
        store: Store,
        checkpoints: Checkpoints,
        limits: TransferLimits,
        on_bytes: OnBytes,
        base: BaseFolder | None = None,  # of a run that continues one
        genesis_only: bool = False,  # for who is no member: no state, no update, no file
    ) -> None:
        self._genesis_only = genesis_only
        self._base = base
        self._genesis = genesis
        self._store = store
        self._checkpoints = checkpoints
        self._limits = limits
        self._on_bytes = on_bytes
        self._serving = 0

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, serving: Serving | None = None
    ) -> None:
        """Answer until the peer is done. Raises RemoteProtocolError, StreamEnded, TimeoutError, OSError."""
        served = serving or _Unwatched()

        def on_bytes(direction: str, count: int) -> None:
            self._on_bytes(direction, count)
            if direction == "out":
                served.sent(count)

        stream = _Stream(reader, writer, self._limits, on_bytes)
        if self._serving >= self._limits.serves_max:
            await stream.send({"is": "busy"})
            return
        self._serving += 1
        try:
            with contextlib.closing(_OpenFile()) as open_file:
                while True:
                    try:
                        header, _ = await stream.receive(REQUEST_BYTES_MAX, 0)
                    except StreamEnded as ended:
                        if ended.clean:
                            return
                        raise
                    await self._answer(stream, header, open_file, served)
        finally:
            self._serving -= 1

    async def _answer(
        self, stream: _Stream, request: dict[str, Any], open_file: _OpenFile, served: Serving
    ) -> None:
        match request:
            case {"ask": "genesis", **rest} if not rest:
                served.part(0, self._genesis.run_id)
                await stream.send({"is": "genesis", "genesis": canonical(genesis_to_dict(self._genesis))})
            case _ if self._genesis_only:
                raise RemoteProtocolError("not_member", "more than the genesis is for members")
            case {"ask": "update", "epoch": epoch, "head": head, **rest} if not rest:
                await self._send_update(stream, _epoch(epoch), _digest(head), served)
            case {"ask": "checkpoint", "epoch_max": epoch_max, **rest} if not rest:
                await self._send_manifest(stream, _epoch(epoch_max))
            case {"ask": "chunk", "epoch": epoch, "head": head, "index": index, **rest} if not rest:
                name = (_epoch(epoch), _digest(head))
                await self._send_chunk(stream, open_file, name, _epoch(index), served)
            case {"ask": "file", "digest": digest, "index": index, **rest} if not rest:
                await self._send_piece(stream, _digest(digest), _epoch(index), served)
            case _:
                raise RemoteProtocolError("malformed", "no request that a donor knows")

    async def _send_update(self, stream: _Stream, epoch: int, head: str, served: Serving) -> None:
        try:
            payloads = await asyncio.to_thread(self._store.read_update, epoch, head)
        except UpdateMissing:
            await stream.send({"is": "missing"})
            return
        served.part(epoch, head)
        await stream.send({"is": "update", "shards": len(payloads)})
        for index, payload in enumerate(payloads):
            await stream.send({"is": "shard", "index": index}, _bytes_of(payload))

    async def _send_piece(self, stream: _Stream, digest: str, index: int, served: Serving) -> None:
        data = await asyncio.to_thread(self._base.piece, digest, index) if self._base is not None else None
        if data is None:
            await stream.send({"is": "missing"})
        else:
            served.part(0, digest)
            await stream.send({"is": "piece", "index": index}, data)

    async def _send_manifest(self, stream: _Stream, epoch_max: int) -> None:
        found = [c for c in self._checkpoints.list() if c.epoch <= epoch_max]
        if not found:
            await stream.send({"is": "missing"})
            return
        checkpoint = found[0]
        manifest = {
            "is": "manifest",
            "epoch": checkpoint.epoch,
            "head": checkpoint.head,
            "state_digest": checkpoint.state_digest,
            "n": checkpoint.n,
            "names": checkpoint.names,
            "chunk_bytes": CHUNK_BYTES,
        }
        await stream.send(manifest, checkpoint.chunks)

    async def _send_chunk(
        self, stream: _Stream, open_file: _OpenFile, name: tuple[int, str], index: int, served: Serving
    ) -> None:
        try:
            checkpoint, file = open_file.get(name, self._checkpoints)
        except FileNotFoundError:
            await stream.send({"is": "missing"})
            return
        if index >= chunk_count(checkpoint.data_bytes):
            raise RemoteProtocolError("malformed", f"chunk {index} of {chunk_count(checkpoint.data_bytes)}")
        try:
            data = await asyncio.to_thread(read_chunk, checkpoint, file, index)
        except ValueError as error:  # ours is damaged: better to say nothing than to send it
            self._checkpoints.refuse(checkpoint, str(error))
            await stream.send({"is": "missing"})
            return
        served.part(checkpoint.epoch, checkpoint.state_digest)
        await stream.send({"is": "chunk", "index": index}, data)


class _OpenFile:
    """The checkpoint that a stream asks for, held open: it may be pruned while it is sent."""

    def __init__(self) -> None:
        self._name: tuple[int, str] | None = None
        self._open: tuple[Checkpoint, BinaryIO] | None = None

    def get(self, name: tuple[int, str], checkpoints: Checkpoints) -> tuple[Checkpoint, BinaryIO]:
        """Raises FileNotFoundError."""
        if self._open is None or self._name != name:
            self.close()
            for checkpoint in checkpoints.list():
                if (checkpoint.epoch, checkpoint.head) == name:
                    self._name, self._open = name, (checkpoint, checkpoint.path.open("rb"))
        if self._open is None:
            raise FileNotFoundError(f"no checkpoint of epoch {name[0]}")
        return self._open

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


# --- the joiner -------------------------------------------------------------------------------------


async def fetch_genesis(
    open_stream: OpenStream, crypto: Crypto, limits: TransferLimits, on_bytes: OnBytes
) -> Genesis:
    """The genesis that the peer is of, its signature and run id checked."""
    async with _opened(open_stream, limits, on_bytes) as stream:
        await stream.send({"ask": "genesis"})
        answer, _ = await stream.answer("genesis", {"genesis": bytes}, GENESIS_BYTES_MAX, 0)
        try:
            return genesis_from_dict(json.loads(answer["genesis"]), crypto)
        except InvalidRecord as error:
            raise RemoteProtocolError("genesis", str(error)) from error
        except (ValueError, RecursionError) as error:
            raise RemoteProtocolError("malformed", "the genesis is not JSON") from error


@dataclass(frozen=True, slots=True)
class WantedUpdate:
    """As events.FetchUpdate names it."""

    epoch: int  # of the state that it makes
    head: str
    result: str  # digest that the bytes must have


async def fetch_update(
    open_stream: OpenStream,
    wanted: WantedUpdate,
    arithmetic: Arithmetic,
    store: Store,
    limits: TransferLimits,
    on_bytes: OnBytes,
) -> None:
    """Get an update into the update log. It is there only if it is the one that the record names.

    Each shard goes to the disk as it comes: an update need not fit into memory.
    """
    draft = store.draft(arithmetic.payload_sizes, f"fetch-{next(_fetches)}")
    try:
        async with _opened(open_stream, limits, on_bytes) as stream:
            await stream.send({"ask": "update", "epoch": wanted.epoch, "head": wanted.head})
            answer, _ = await stream.answer("update", {"shards": int}, REQUEST_BYTES_MAX, 0)
            if answer["shards"] != len(arithmetic.shards):
                text = f"{answer['shards']} shards, not {len(arithmetic.shards)}"
                raise RemoteProtocolError("update", text)
            payloads = []
            for index in range(len(arithmetic.shards)):
                payload = await _receive_shard(stream, arithmetic, index)
                payloads.append(await asyncio.to_thread(_put, draft, index, payload))
        if await asyncio.to_thread(result_digest, payloads, draft.digests(payloads)) != wanted.result:
            text = f"update {wanted.epoch} is not the one that its record names"
            raise RemoteProtocolError("digest", text)
        await asyncio.to_thread(store.write_update, wanted.epoch, wanted.head, payloads, draft)
    finally:
        draft.drop()


def _put(
    draft: Draft,
    index: int,
    payload: Tensor,  # uint8 (payload size,)
) -> Tensor:
    return draft.put(index, payload, blake3(_bytes_of(payload)).hexdigest())


async def fetch_state(
    open_stream: OpenStream,
    epoch_max: int,
    chain: Chain,
    state: ModelState,
    limits: TransferLimits,
    on_bytes: OnBytes,
) -> str:
    """A donor's newest checkpoint up to `epoch_max`, whole, in `state`: gives its digest, as signed.

    After any exception the state is torn if a chunk had come.
    """
    async with _opened(open_stream, limits, on_bytes) as stream:
        download = Download(await fetch_manifest(stream, epoch_max, chain, state), state)
        await download.pull(stream)
    return await asyncio.to_thread(download.finish)


async def fetch_file(
    open_stream: OpenStream,
    file: BaseFile,
    folder: BaseFolder,
    limits: TransferLimits,
    on_bytes: OnBytes,
) -> None:
    """Get a file of the base, from where an earlier download ended. It has its name only if it is the one."""
    async with _opened(open_stream, limits, on_bytes) as stream:
        count = -(-file.size_bytes // PIECE_BYTES)
        begin = folder.part_bytes(file) // PIECE_BYTES
        await asyncio.to_thread(folder.cut, file, begin * PIECE_BYTES)
        asked: deque[int] = deque()
        for index in range(begin, count):
            await stream.send({"ask": "file", "digest": file.digest, "index": index})
            asked.append(index)
            if len(asked) == CHUNKS_AHEAD:
                await _receive_piece(stream, file, folder, asked.popleft())
        while asked:
            await _receive_piece(stream, file, folder, asked.popleft())
    try:
        await asyncio.to_thread(folder.finish, file)
    except BaseError as error:
        raise RemoteProtocolError("digest", str(error)) from error


async def _receive_piece(stream: _Stream, file: BaseFile, folder: BaseFolder, index: int) -> None:
    size = min(PIECE_BYTES, file.size_bytes - index * PIECE_BYTES)
    answer, data = await stream.answer("piece", {"index": int}, REQUEST_BYTES_MAX, size)
    if answer["index"] != index or len(data) != size:
        raise RemoteProtocolError("malformed", f"{len(data)} bytes in place of piece {index} of {file.name}")
    await asyncio.to_thread(folder.append, file, data)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a donor says of a checkpoint, and what the chain says of the same epoch."""

    epoch: int
    head: str
    state_digest: str  # signed
    chunks: bytes  # blake3 (32 bytes) of each chunk


async def fetch_manifest(stream: _Stream, epoch_max: int, chain: Chain, state: ModelState) -> Manifest:
    """Refused unless it is of a state of our chain, with the digest that was signed, and of our model."""
    fields: dict[str, type] = {
        "epoch": int,
        "head": str,
        "state_digest": str,
        "n": int,
        "names": tuple,
        "chunk_bytes": int,
    }
    chunks_bytes = DIGEST_BYTES * chunk_count(state.size_bytes)
    await stream.send({"ask": "checkpoint", "epoch_max": epoch_max})
    answer, chunks = await stream.answer("manifest", fields, REQUEST_BYTES_MAX, chunks_bytes)
    epoch, head, digest = answer["epoch"], answer["head"], answer["state_digest"]
    if not 0 <= epoch <= min(epoch_max, chain.epoch) or chain.head_at(epoch) != head:
        raise RemoteProtocolError("foreign", f"a checkpoint of epoch {epoch} that is not on our chain")
    if chain.state_digest_at(epoch) != digest:
        raise RemoteProtocolError("digest", f"a checkpoint of epoch {epoch} with a digest nobody signed")
    if (answer["n"], answer["names"], answer["chunk_bytes"]) != (state.n, state.names, CHUNK_BYTES):
        raise RemoteProtocolError("foreign", "a checkpoint of another model")
    if len(chunks) != chunks_bytes:
        raise RemoteProtocolError("malformed", "a manifest that does not name every chunk")
    return Manifest(epoch, head, digest, bytes(chunks))


class Download:
    """A checkpoint on its way into a state: which chunks are there, and which are not."""

    def __init__(self, manifest: Manifest, state: ModelState) -> None:
        self.manifest = manifest
        self.missing = dict.fromkeys(range(chunk_count(state.size_bytes)))  # in order
        self._state = state

    async def pull(self, stream: _Stream) -> None:
        """Fetch what is missing, CHUNKS_AHEAD requests at a time."""
        manifest = self.manifest
        asked: deque[int] = deque()
        for index in [*self.missing]:
            await stream.send(
                {"ask": "chunk", "epoch": manifest.epoch, "head": manifest.head, "index": index}
            )
            asked.append(index)
            if len(asked) == CHUNKS_AHEAD:
                await self._receive(stream, asked.popleft())
        while asked:
            await self._receive(stream, asked.popleft())

    def finish(self) -> str:
        """The state is whole. Raises RemoteProtocolError if it is not the one that was signed."""
        assert not self.missing
        manifest = self.manifest
        try:
            self._state.adopt(manifest.epoch, manifest.head, manifest.state_digest)
        except DigestMismatch as error:
            raise RemoteProtocolError("digest", str(error)) from error
        return manifest.state_digest

    async def _receive(self, stream: _Stream, index: int) -> None:
        start = index * CHUNK_BYTES
        size = min(CHUNK_BYTES, self._state.size_bytes - start)
        answer, data = await stream.answer("chunk", {"index": int}, REQUEST_BYTES_MAX, size)
        if answer["index"] != index or len(data) != size:
            raise RemoteProtocolError("malformed", f"{len(data)} bytes in place of chunk {index}")
        expected = self.manifest.chunks[DIGEST_BYTES * index : DIGEST_BYTES * (index + 1)]
        if blake3(data).digest() != expected:
            raise RemoteProtocolError("digest", f"chunk {index} is not the one of the manifest")
        taken = 0
        for span in spans(self._state.overwrite(), start, start + size):
            span[:] = data[taken : taken + len(span)]
            taken += len(span)
        del self.missing[index]


async def _receive_shard(stream: _Stream, arithmetic: Arithmetic, index: int) -> Tensor:
    shard, size = arithmetic.shards[index], arithmetic.payload_sizes[index]
    answer, data = await stream.answer("shard", {"index": int}, REQUEST_BYTES_MAX, size)
    if answer["index"] != index or len(data) != size:
        raise RemoteProtocolError("malformed", f"{len(data)} bytes in place of shard {index}")
    payload = torch.frombuffer(data, dtype=torch.uint8)
    try:
        arithmetic.codec.check(payload, shard.n)
    except RefusedPayload as error:
        raise RemoteProtocolError(error.reason, f"shard {index}: {error.detail}") from error
    return payload


# --- frames -----------------------------------------------------------------------------------------


class _Stream:
    """Headers as msgpack maps, payloads as bytes; deadlines, and bytes counted."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        limits: TransferLimits,
        on_bytes: OnBytes,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._stall_s = limits.stall_s
        self._throttles = limits.throttles
        self._on_bytes = on_bytes

    async def send(self, header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
        """Within our cap, whose wait is ours. Raises TimeoutError if the peer does not take it."""
        patience_s = self._stall_s + len(payload) / BYTES_PER_SECOND_MIN
        limits = WriteLimits(self._throttles.upload, True, patience_s, whole_frame=True)
        parts = frame_parts(msgpack.packb(header), [payload] if payload else ())
        await write_frame(self._writer, parts, limits, lambda count: self._on_bytes("out", count))

    async def receive(
        self, header_bytes_max: int, payload_bytes_max: int
    ) -> tuple[dict[str, Any], bytearray]:
        """A frame within these limits. Raises StreamEnded, TimeoutError, RemoteProtocolError."""
        limits = FrameLimits(
            header_bytes_max, payload_bytes_max, BYTES_PER_SECOND_MIN, self._throttles.download
        )
        header, payload = await read_frame(
            self._reader,
            limits,
            start_s=self._stall_s,
            silence_s=self._stall_s,
            on_bytes=lambda count: self._on_bytes("in", count),
        )
        fields = unpack(header)
        if type(fields) is not dict:
            raise RemoteProtocolError("malformed", "a header that is not a map")
        return fields, payload

    async def answer(
        self, kind: str, fields: dict[str, type], header_bytes_max: int, payload_bytes_max: int
    ) -> tuple[dict[str, Any], bytearray]:
        """An answer of this kind with exactly these fields. Raises DonorFailed if there is none."""
        header, payload = await self.receive(header_bytes_max, payload_bytes_max)
        if header in ({"is": "missing"}, {"is": "busy"}):
            raise DonorFailed(header["is"], f"the donor says {header['is']}")
        if header.pop("is", None) != kind or set(header) != set(fields):
            raise RemoteProtocolError("malformed", f"no answer to a request for {kind}")
        for name, expected in fields.items():
            if type(header[name]) is not expected:
                raise RemoteProtocolError("malformed", f"{name} is a {type(header[name]).__name__}")
        return header, payload


@contextlib.asynccontextmanager
async def _opened(
    open_stream: OpenStream, limits: TransferLimits, on_bytes: OnBytes
) -> AsyncIterator[_Stream]:
    """A stream to a donor, closed at the end. Its loss, or its silence, becomes DonorFailed."""
    reader, writer = await open_stream()
    try:
        yield _Stream(reader, writer, limits, on_bytes)
    except (StreamEnded, ConnectionError) as error:
        raise DonorFailed("ended", f"the stream ended: {error}") from error
    except TimeoutError as error:
        raise DonorFailed("timeout", f"silent for {limits.stall_s:g} s, or too slow") from error
    finally:
        writer.close()


def _epoch(value: Any) -> int:
    """An epoch, or an index: from a request. Raises RemoteProtocolError."""
    try:
        return strict.integer(value, 0, EPOCH_MAX, "a number")
    except strict.Malformed as error:
        raise RemoteProtocolError("malformed", str(error)) from None


def _digest(value: Any) -> str:
    try:
        return strict.hexadecimal(value, (64,), "a head")
    except strict.Malformed as error:
        raise RemoteProtocolError("malformed", str(error)) from None


def _bytes_of(
    payload: Tensor,  # uint8 (size,)
) -> memoryview:
    return memoryview(payload.numpy())  # type: ignore[arg-type]
