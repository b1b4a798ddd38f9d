"""The donor: serves one home's genesis, updates, checkpoints and base to who asks on a stream (transfer.py).

Imports: transfer.py's frames and asyncio; no hivemind.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, BinaryIO, Protocol

from tapestry.node.disk.base import BaseFolder
from tapestry.node.disk.checkpoints import CHUNK_BYTES, Checkpoint, Checkpoints, chunk_count, read_chunk
from tapestry.node.disk.files import is_damage
from tapestry.node.disk.store import Store, UpdateMissing
from tapestry.node.net.places import NoPlace, ServedPlaces
from tapestry.node.net.transfer import REQUEST_BYTES_MAX, OnBytes, Stream, TransferLimits
from tapestry.node.net.wire import RemoteProtocolError, StreamEnded
from tapestry.node.protocol import strict
from tapestry.node.protocol.canon import EPOCH_MAX, canonical
from tapestry.node.protocol.record import Genesis, genesis_to_dict

UPDATES_SPARE = 1  # of the streams served at once: for who needs an update while joiners fetch states


class Serving(Protocol):
    """Who hears of what a peer is served."""

    def sent(self, count: int) -> None: ...
    def part(self, epoch: int, digest: str) -> None:
        """What is sent from now on is of this update (by its head), checkpoint (its state's digest), file of
        the base (its digest), or genesis (the run id)."""


class _Unwatched:
    def sent(self, count: int) -> None: ...
    def part(self, epoch: int, digest: str) -> None: ...


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
        self.stall_s: Callable[[], float] = lambda: limits.stall_s  # or as the members have it by now
        self._on_bytes = on_bytes
        self.is_member: Callable[[str], bool] = lambda peer: True  # as the roll has it by now
        self._serving: dict[Stream, asyncio.StreamWriter] = {}  # what was opened first is the first
        self._places: ServedPlaces[Stream] = ServedPlaces(limits.serves_max)
        # Of those, streams of a state: they last as long as that takes.
        self._states: ServedPlaces[Stream] = ServedPlaces(max(1, limits.serves_max - UPDATES_SPARE))

    async def serve(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        serving: Serving | None = None,
        peer: str = "",
    ) -> None:
        """Answer until the peer is done. Raises RemoteProtocolError, StreamEnded, TimeoutError, OSError."""
        served = serving or _Unwatched()

        def on_bytes(direction: str, count: int) -> None:
            self._on_bytes(direction, count)
            if direction == "out":
                served.sent(count)

        stream = Stream(reader, writer, replace(self._limits, stall_s=self.stall_s()), on_bytes)
        if self._genesis_only:
            if len(self._serving) >= self._limits.serves_max:
                # Anybody may hold these: an honest joiner is done in a moment, and who is silent makes room.
                self._serving.pop(next(iter(self._serving))).close()
        elif not self._has_place(self._places, peer, stream):
            await stream.send({"is": "busy"})
            return
        self._serving[stream] = writer
        try:
            with contextlib.closing(_OpenFile()) as open_file:
                await self._answer_all(stream, open_file, served, peer)
        finally:
            self._serving.pop(stream, None)
            self._places.leave(stream)
            self._states.leave(stream)

    def _has_place(self, places: ServedPlaces[Stream], peer: str, stream: Stream) -> bool:
        """Its own, or that of a stream that ends now."""
        try:
            gone = places.enter(peer, stream, self.is_member(peer))
        except NoPlace:
            return False
        if gone is not None and gone in self._serving:
            self._serving.pop(gone).close()
            self._places.leave(gone)
            self._states.leave(gone)
        return True

    async def _answer_all(self, stream: Stream, open_file: _OpenFile, served: Serving, peer: str) -> None:
        """Until the peer is done."""
        of_state = False
        while True:
            try:
                header, _ = await stream.receive(REQUEST_BYTES_MAX, 0)
            except StreamEnded as ended:
                if ended.clean:
                    return
                raise
            if not of_state and header.get("ask") in ("checkpoint", "chunk"):
                of_state = self._has_place(self._states, peer, stream)
                if not of_state:
                    await stream.send({"is": "busy"})
                    continue
            await self._answer(stream, header, open_file, served)

    async def _answer(
        self, stream: Stream, request: dict[str, Any], open_file: _OpenFile, served: Serving
    ) -> None:
        match request:
            case {"ask": "genesis", **rest} if not rest:
                served.part(0, self._genesis.run_id)
                await stream.send({"is": "genesis", "genesis": canonical(genesis_to_dict(self._genesis))})
            case _ if self._genesis_only:
                raise RemoteProtocolError("not_member", "more than the genesis is for members")
            case {"ask": "update", "epoch": epoch, "head": head, **rest} if not rest:
                await self._send_update(stream, _epoch(epoch), _digest(head), served)
            case {"ask": "means", "epoch": epoch, "head": head, **rest} if not rest:
                await self._send_means(stream, _epoch(epoch), _digest(head), served)
            case {"ask": "checkpoint", "epoch_max": epoch_max, **rest} if not rest:
                await self._send_manifest(stream, _epoch(epoch_max))
            case {"ask": "chunk", "epoch": epoch, "head": head, "index": index, **rest} if not rest:
                name = (_epoch(epoch), _digest(head))
                await self._send_chunk(stream, open_file, name, _epoch(index), served)
            case {"ask": "file", "digest": digest, "index": index, **rest} if not rest:
                await self._send_piece(stream, _digest(digest), _epoch(index), served)
            case _:
                raise RemoteProtocolError("malformed", "no request that a donor knows")

    async def _send_update(self, stream: Stream, epoch: int, head: str, served: Serving) -> None:
        """As it is read: who asks waits stall_s for a word, and to read and hash a large one takes longer.

        Of one whose bytes changed the last shard is not sent, but the word that it is missing. Who asks may
        see before that what no encoder writes, and hang up: so the rest is read all the same.
        """
        payloads, index = self._store.stream_update(epoch, head), 0
        try:
            while (read := await asyncio.to_thread(next, payloads, None)) is not None:
                count, payload = read
                if index == 0:
                    served.part(epoch, head)
                    await stream.send({"is": "update", "shards": count})
                await stream.send({"is": "shard", "index": index}, payload)
                index += 1
        except UpdateMissing:
            await stream.send({"is": "missing"})
        except (RemoteProtocolError, StreamEnded, TimeoutError, OSError):
            with contextlib.suppress(UpdateMissing):
                await asyncio.to_thread(deque, payloads, 0)  # a damaged one is out of the log after that
            raise

    async def _send_means(self, stream: Stream, epoch: int, head: str, served: Serving) -> None:
        try:
            data = await asyncio.to_thread(self._store.read_means, epoch, head)
        except UpdateMissing:
            await stream.send({"is": "missing"})
            return
        served.part(epoch, head)
        await stream.send({"is": "means"}, data)

    async def _send_piece(self, stream: Stream, digest: str, index: int, served: Serving) -> None:
        data = await asyncio.to_thread(self._base.piece, digest, index) if self._base is not None else None
        if data is None:
            await stream.send({"is": "missing"})
        else:
            served.part(0, digest)
            await stream.send({"is": "piece", "index": index}, data)

    async def _send_manifest(self, stream: Stream, epoch_max: int) -> None:
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
        self, stream: Stream, open_file: _OpenFile, name: tuple[int, str], index: int, served: Serving
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
        except (ValueError, OSError) as error:  # ours is damaged: better to say nothing than to send it
            if not is_damage(error):
                raise
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
