"""Genesis, updates and files over one libp2p stream: what a joiner asks, and how it verifies what it gets.

A stream carries requests, one frame each, and their answers in the same order:

    genesis                      -> the genesis, in the header
    update (epoch, head)         -> the count of shards; then a frame for each shard's payload
    means (epoch, head)          -> who made that update, with their signatures, while it is no record
    checkpoint (epoch_max)       -> the manifest of the newest checkpoint up to epoch_max
    chunk (epoch, head, index)   -> CHUNK_BYTES of that checkpoint's data
    file (digest, index)         -> PIECE_BYTES of a file of the base that the run pins

or the word `missing` or `busy`; `missing` also in place of the last shard of an update that is damaged. A
chunk is named by its checkpoint and not by what was asked before: so a download can go on after a break, and
with several donors. donor.py answers; download.py fetches checkpoints.

Nothing from a donor is believed: an update has the digest that its record names before it is written to the
update log; one that a donor says to have accepted, and of which there is no record, is signed by those who
made it (protocol/audit.py); a chunk has the digest of the manifest, and the state the digest that the chain
signed. Chunks go straight into the state's own memory, which is torn until that digest was right.

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
from typing import Any

import msgpack
import torch
from blake3 import blake3
from torch import Tensor

from tapestry.compression.refusals import RefusedPayload
from tapestry.node.disk import signed_means
from tapestry.node.disk.base import ANEW, ENDS, OWN, PART, PIECE_BYTES, BaseError, BaseFile, BaseFolder
from tapestry.node.disk.draft import Draft
from tapestry.node.disk.files import is_damage
from tapestry.node.disk.store import Store, result_digest
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
from tapestry.node.progress import Told, silent
from tapestry.node.protocol.audit import SignedMean, means_fault
from tapestry.node.protocol.canon import Crypto, InvalidRecord
from tapestry.node.protocol.record import Body, Genesis, genesis_from_dict
from tapestry.node.state.model import Arithmetic

CHUNKS_AHEAD = 8  # asked for before the first has come: 8 MiB hide 80 ms at 100 MB/s. Guess
BYTES_PER_SECOND_MIN = 16 * 1024  # of a donor that drips; Guess
REQUEST_BYTES_MAX = 1024
GENESIS_BYTES_MAX = 256 * 1024  # a spec of 64 kB, escaped
DIGEST_BYTES = 32

OpenStream = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
OnBytes = Callable[[str, int], None]  # direction ("in" or "out"), count

_log = logging.getLogger("tapestry.transfer")
_fetches = itertools.count()  # names of the drafts of this process


class DonorFailed(Exception):
    """The donor did not serve us, and said nothing wrong. `reason`: missing, busy, ended or timeout."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class TransferLimits:
    stall_s: float  # silence that ends a transfer
    serves_max: int = 10  # streams served at once; the next is told `busy`. Guess: two peers that catch up
    throttles: Throttles = field(default_factory=Throttles)  # the node's, which its links share


async def fetch_genesis(
    open_stream: OpenStream, crypto: Crypto, limits: TransferLimits, on_bytes: OnBytes
) -> Genesis:
    """The genesis that the peer is of, its signature and run id checked."""
    async with opened(open_stream, limits, on_bytes) as stream:
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
    accepted: Body | None = None  # the value that it is the result of, while that is no record


async def fetch_update(
    open_stream: OpenStream,
    wanted: WantedUpdate,
    arithmetic: Arithmetic,
    store: Store,
    limits: TransferLimits,
    on_bytes: OnBytes,
) -> tuple[SignedMean, ...]:
    """Get an update into the update log. It is there only if it is the one that the record names.

    Each shard goes to the disk as it comes: an update need not fit into memory. Returns who made it, of a
    value that was accepted and is no record; else nothing.
    """
    means: tuple[SignedMean, ...] = ()
    draft = store.draft(arithmetic.payload_sizes, f"fetch-{next(_fetches)}")
    try:
        async with opened(open_stream, limits, on_bytes) as stream:
            if wanted.accepted is not None:
                means = await _receive_means(stream, wanted, wanted.accepted, arithmetic, store)
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
        packed = signed_means.pack(means) if means else b""
        await asyncio.to_thread(store.write_update, wanted.epoch, wanted.head, payloads, draft, packed)
        return means
    finally:
        draft.drop()


async def _receive_means(
    stream: Stream, wanted: WantedUpdate, body: Body, arithmetic: Arithmetic, store: Store
) -> tuple[SignedMean, ...]:
    """Who made it, proven: asked before the update itself, which may be long."""
    shard_count = len(arithmetic.shards)
    await stream.send({"ask": "means", "epoch": wanted.epoch, "head": wanted.head})
    _, data = await stream.answer("means", {}, REQUEST_BYTES_MAX, signed_means.bytes_max(shard_count))
    try:
        means = signed_means.unpack(data, shard_count)
    except ValueError as error:
        raise RemoteProtocolError("unproven", str(error)) from error
    why = await asyncio.to_thread(means_fault, body, means, shard_count, store.crypto)
    if why is not None:
        raise RemoteProtocolError("unproven", f"update {wanted.epoch}, said to have been accepted: {why}")
    return means


def _put(
    draft: Draft,
    index: int,
    payload: Tensor,  # uint8 (payload size,)
) -> Tensor:
    return draft.put(index, payload, blake3(bytes_of(payload)).hexdigest())


async def fetch_file(
    open_stream: OpenStream,
    file: BaseFile,
    folder: BaseFolder,
    limits: TransferLimits,
    on_bytes: OnBytes,
    told: Told = silent,
) -> None:
    """Get a file of the base, from where an earlier download ended. It has its name only if it is the one.

    Where it is another, what an earlier donor gave may be false, or what this one gave of the rest. So what
    was there before is kept, and all is asked of this donor, beside it (disk/base.py): only what a donor gave
    by itself is held against it. As far as the disk has room, a false end destroys nothing that donors before
    it gave. But who adds a false piece and hangs up spoils what it added to. Where both earlier downloads are
    spoilt, what donors give that break off no longer adds up: one that gives all of it in one go ends it.
    """
    await asyncio.to_thread(folder.drop, file, [OWN])
    for end in (PART, ANEW):
        if begin := folder.pieces(file, end):
            try:
                await _complete(open_stream, file, folder, end, limits, on_bytes, told)
                return
            except BaseError as error:
                why = str(error)
            except OSError as error:
                if not is_damage(error):
                    raise
                why = str(error)
            _log.info("base file=%s false=%s kept=%d reason=%r", file.name, end, begin, why)
    end = next(end for end in ENDS if not folder.pieces(file, end))
    try:
        await _complete(open_stream, file, folder, end, limits, on_bytes, told)
    except BaseError as error:
        raise RemoteProtocolError("digest", str(error)) from error


async def _complete(
    open_stream: OpenStream,
    file: BaseFile,
    folder: BaseFolder,
    end: str,
    limits: TransferLimits,
    on_bytes: OnBytes,
    told: Told,
) -> None:
    """What is missing at this end. If it is another file then, raises BaseError and keeps what was there."""
    begin = folder.pieces(file, end)
    async with opened(open_stream, limits, on_bytes) as stream:
        await _receive_pieces(stream, file, folder, end, begin, told)
    await asyncio.to_thread(folder.finish, file, end, begin * PIECE_BYTES)


async def _receive_pieces(
    stream: Stream, file: BaseFile, folder: BaseFolder, end: str, begin: int, told: Told
) -> None:
    """From piece `begin` on, to the last."""
    await asyncio.to_thread(folder.cut, file, end, begin * PIECE_BYTES)
    asked: deque[int] = deque()
    for index in range(begin, -(-file.size_bytes // PIECE_BYTES)):
        told(f"base {file.name} bytes", folder.part_bytes(file, end), file.size_bytes)
        await stream.send({"ask": "file", "digest": file.digest, "index": index})
        asked.append(index)
        if len(asked) == CHUNKS_AHEAD:
            await asyncio.to_thread(folder.append, file, await _piece(stream, file, asked.popleft()), end)
    while asked:
        await asyncio.to_thread(folder.append, file, await _piece(stream, file, asked.popleft()), end)


async def _piece(stream: Stream, file: BaseFile, index: int) -> bytearray:
    """The answer to the oldest question."""
    size = min(PIECE_BYTES, file.size_bytes - index * PIECE_BYTES)
    answer, data = await stream.answer("piece", {"index": int}, REQUEST_BYTES_MAX, size)
    if answer["index"] != index or len(data) != size:
        raise RemoteProtocolError("malformed", f"{len(data)} bytes in place of piece {index} of {file.name}")
    return data


async def _receive_shard(stream: Stream, arithmetic: Arithmetic, index: int) -> Tensor:
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


class Stream:
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
async def opened(open_stream: OpenStream, limits: TransferLimits, on_bytes: OnBytes) -> AsyncIterator[Stream]:
    """A stream to a donor, closed at the end. Its loss, or its silence, becomes DonorFailed."""
    reader, writer = await open_stream()
    try:
        yield Stream(reader, writer, limits, on_bytes)
    except (StreamEnded, ConnectionError) as error:
        raise DonorFailed("ended", f"the stream ended: {error}") from error
    except TimeoutError as error:
        raise DonorFailed("timeout", f"silent for {limits.stall_s:g} s, or too slow") from error
    finally:
        writer.close()


def bytes_of(
    payload: Tensor,  # uint8 (size,)
) -> memoryview:
    return memoryview(payload.numpy())  # type: ignore[arg-type]
