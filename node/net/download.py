"""A state from several donors at once: each asked for pieces as fast as it gives them, none of them believed.

Every donor says which checkpoint it has (a *manifest*: epoch, head, the state's digest, a digest for each
chunk). One manifest is chosen, that of most donors; who has it takes part. Chunks that nobody was asked for
go to whoever has room in its window, and a window is as many chunks as its donor gives in WINDOW_S, so the
fast give more. When all are asked for, who is idle is asked for the last ones of the slowest as well, and the
first to give a chunk has given it (work stealing; the end game of BitTorrent: Cohen, "Incentives build
robustness in BitTorrent", 2003, section 2.4).

A donor that sends another chunk than its own manifest names, or fails, is told to the caller by its name, and
what it was asked for is asked of the others. If the whole state is not the one that the chain signed, all who
gave that manifest lied, each for itself. If nobody who has the chosen manifest is left, the others are
asked anew: who offers what it does not give costs one try and keeps nobody from joining.

What has come lies in a file too (disk/part.py): a joiner that is killed goes on where it was, as long as a
donor has the same checkpoint. At the end that file is the checkpoint.

What `fetch_state` raises is as in transfer.py: what the first donor failed of, if none gave the state. What
opens a stream raises DonorFailed if it cannot.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from blake3 import blake3

from tapestry.node.disk.checkpoints import CHUNK_BYTES, Checkpoints, chunk_count
from tapestry.node.disk.files import is_damage
from tapestry.node.disk.part import Part, Pieces
from tapestry.node.net.transfer import (
    CHUNKS_AHEAD,
    DIGEST_BYTES,
    REQUEST_BYTES_MAX,
    DonorFailed,
    OnBytes,
    OpenStream,
    Stream,
    TransferLimits,
    opened,
)
from tapestry.node.net.wire import RemoteProtocolError
from tapestry.node.progress import Told, silent
from tapestry.node.protocol.chain import Chain
from tapestry.node.state.model import DigestMismatch, ModelState, spans

DONORS_MAX = 4  # at a time. Guess: four half-idle uplinks fill one downlink
MANIFESTS_WAIT_S = 1.0  # for the others', once one donor has said what it has. Guess
WINDOW_S = 1.0  # of a donor's own speed: how much of it is on its way. Guess
WINDOW_MIN = 2  # chunks: one is read while the next is on its way

OnFault = Callable[[str, Exception], None]

_log = logging.getLogger("tapestry.transfer")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a donor says of a checkpoint, and what the chain says of the same epoch."""

    epoch: int
    head: str
    state_digest: str  # signed
    chunks: bytes  # blake3 (32 bytes) of each chunk


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is fetched, and into what."""

    epoch_max: int
    chain: Chain
    state: ModelState
    checkpoints: Checkpoints | None = None  # where it becomes a checkpoint; None: nowhere
    told: Told = silent  # how far it is
    epoch_min: int = 0


async def fetch_state(
    donors: Mapping[str, OpenStream],  # by name; the first is the one to blame if all fail
    wanted: Wanted,
    limits: TransferLimits,
    on_bytes: OnBytes,
    on_fault: OnFault,
) -> str:
    """A checkpoint that donors have, of an epoch that is wanted, whole, in the state: gives its digest, as
    signed.

    `on_fault` hears of each donor that failed or lied, while others go on. After any exception the state is
    torn if a chunk had come.
    """
    first, asked = next(iter(donors)), dict(donors)
    faults: dict[str, Exception] = {}

    def tell(name: str, error: Exception) -> None:
        faults[name] = error
        if name != first:  # what becomes of the whole says whether the first is told by itself
            on_fault(name, error)

    while asked:
        fetch = _Fetch(asked, wanted, limits, on_bytes, tell)
        try:
            digest = await asyncio.to_thread(fetch.finish) if await fetch.run() else ""
        except RemoteProtocolError as error:
            fetch.blame(error)
            digest = ""
        finally:
            fetch.close()
        if digest:
            if first in faults:
                on_fault(first, faults[first])
            return digest
        asked = {name: donors[name] for name in asked if name not in faults}
    raise faults[first]


async def fetch_manifest(stream: Stream, epoch_max: int, chain: Chain, state: ModelState) -> Manifest:
    """Refused unless it is of a state of our chain, with the digest that was signed, and of our model.

    One that was rolled back since is of no use: then it is asked for what came before.
    """
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
    if 0 <= epoch <= epoch_max and not chain.leads(epoch):
        return await fetch_manifest(stream, chain.last_before(epoch), chain, state)
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

    def __init__(self, manifest: Manifest, state: ModelState, part: Part | None = None) -> None:
        self.manifest = manifest
        self.missing = dict.fromkeys(range(chunk_count(state.size_bytes)))  # in order
        self._state = state
        self.part = part
        self._lock = threading.Lock()  # a thread may outlive the task that asked for it
        self._open = True

    def take_up(self) -> None:
        """Put what an earlier download left into the state."""
        assert self.part is not None
        for index in [*self.missing]:
            try:
                data = self.part.read(index)
            except OSError as error:
                if not is_damage(error):
                    raise
                continue  # it is asked for again
            if blake3(data).digest() == self._digest_of(index):
                self._place(index, data)
                del self.missing[index]

    async def ask(self, stream: Stream, index: int) -> None:
        manifest = self.manifest
        await stream.send({"ask": "chunk", "epoch": manifest.epoch, "head": manifest.head, "index": index})

    async def receive(self, stream: Stream, index: int) -> None:
        """The answer to the oldest `ask` of this stream. Raises RemoteProtocolError for any other chunk."""
        size = min(CHUNK_BYTES, self._state.size_bytes - index * CHUNK_BYTES)
        answer, data = await stream.answer("chunk", {"index": int}, REQUEST_BYTES_MAX, size)
        if answer["index"] != index or len(data) != size:
            raise RemoteProtocolError("malformed", f"{len(data)} bytes in place of chunk {index}")
        await asyncio.to_thread(self._take, index, data)
        self.missing.pop(index, None)  # another donor may have been faster

    def _take(self, index: int, data: bytearray) -> None:
        """In a thread: the loop reads what the other donors send meanwhile. Raises RemoteProtocolError."""
        if blake3(data).digest() != self._digest_of(index):
            raise RemoteProtocolError("digest", f"chunk {index} is not the one of the manifest")
        if index in self.missing:
            if self.part is not None:
                self.part.put(index, data)
            self._place(index, data)

    def close(self) -> None:
        """From now on nothing is written into the state."""
        with self._lock:
            self._open = False

    def finish(self) -> str:
        """The state is whole. Raises RemoteProtocolError if it is not the one that was signed."""
        assert not self.missing
        manifest = self.manifest
        try:
            self._state.adopt(manifest.epoch, manifest.head, manifest.state_digest)
        except DigestMismatch as error:
            raise RemoteProtocolError("digest", str(error)) from error
        return manifest.state_digest

    def _digest_of(self, index: int) -> bytes:
        return self.manifest.chunks[DIGEST_BYTES * index : DIGEST_BYTES * (index + 1)]

    def _place(self, index: int, data: bytes | bytearray) -> None:
        start, taken, view = index * CHUNK_BYTES, 0, memoryview(data)
        with self._lock:
            if not self._open:
                return
            for span in spans(self._state.overwrite(), start, start + len(data)):
                span[:] = view[taken : taken + len(span)]
                taken += len(span)


@dataclass(slots=True)
class _Giving:
    """A donor that takes part."""

    began_s: float
    asked: deque[int] = field(default_factory=deque)  # in the order of its answers
    given: int = 0

    def window(self, now_s: float) -> int:
        """Chunks that may be on their way."""
        if not self.given:
            return WINDOW_MIN
        a_second = self.given / max(1e-3, now_s - self.began_s)
        return max(WINDOW_MIN, min(CHUNKS_AHEAD, int(WINDOW_S * a_second) + 1))


class _Fetch:
    """One call of `fetch_state`."""

    def __init__(
        self,
        donors: Mapping[str, OpenStream],
        wanted: Wanted,
        limits: TransferLimits,
        on_bytes: OnBytes,
        on_fault: OnFault,
    ) -> None:
        self._donors, self._wanted, self._limits, self._on_bytes = donors, wanted, limits, on_bytes
        self._on_fault = on_fault
        self._offers: dict[str, Manifest] = {}
        self._faults: dict[str, Exception] = {}
        self._left: Download | None = None  # an earlier one, and its file
        self._left_part: Part | None = None
        self._download: Download | None = None
        self._part: Part | None = None
        self._tasks: list[asyncio.Task[None]] = []  # one for each donor
        self._giving: dict[str, _Giving] = {}
        self._free: deque[int] = deque()  # chunks that nobody is asked for
        self._changed = asyncio.Condition()

    async def run(self) -> bool:
        """Until all chunks are there, or nobody is left who could give one: whether they are."""
        checkpoints = self._wanted.checkpoints
        if checkpoints is not None:  # before a donor waits for us
            self._left = await asyncio.to_thread(self._take_up, checkpoints)
        self._tasks = [asyncio.create_task(self._ask(*donor)) for donor in self._donors.items()]
        try:
            await self._choose()
            await self._settle(lambda: self._is_whole or self._nobody_is_asked)
        finally:
            for task in self._tasks:
                task.cancel()
            done = await asyncio.gather(*self._tasks, return_exceptions=True)
            for download in (self._left, self._download):
                if download is not None:
                    await asyncio.to_thread(download.close)
        for outcome in done:  # our own disk's, or our bug
            if isinstance(outcome, Exception):
                raise outcome
        return self._is_whole

    def finish(self) -> str:
        """The digest of the whole state. Raises RemoteProtocolError if it is not the signed one. Blocking."""
        assert self._download is not None
        try:
            with ThreadPoolExecutor(1) as beside:  # the disk writes while the processor hashes
                synced = beside.submit(self._part.sync) if self._part is not None else None
                digest = self._download.finish()
            if synced is not None:
                synced.result()
        except RemoteProtocolError:
            if self._part is not None:
                self._part.drop()
            raise
        if self._part is not None and self._wanted.checkpoints is not None:
            self._wanted.checkpoints.keep(self._part)
        shares = ",".join(f"{name[-6:]}:{giving.given}" for name, giving in self._giving.items())
        _log.info("state=fetched epoch=%d donors=%s", self._download.manifest.epoch, shares)
        return digest

    def blame(self, error: RemoteProtocolError) -> None:
        """All who offered the state lied. On the loop, as everything that hears of faults."""
        assert self._download is not None
        for name, offer in self._offers.items():
            if offer == self._download.manifest:
                self._on_fault(name, error)

    def close(self) -> None:
        for part in (self._left_part, self._part):
            if part is not None:
                part.close()

    @property
    def _nobody_is_asked(self) -> bool:
        """All donors gave what they have, or failed, or our own disk did."""
        return all(task.done() for task in self._tasks)

    @property
    def _is_whole(self) -> bool:
        return self._download is not None and not self._download.missing

    # --- which checkpoint ---------------------------------------------------------------------------

    async def _choose(self) -> None:
        """What most donors have, and of that the newest; what was begun before, if somebody has that."""
        await self._settle(lambda: bool(self._offers) or self._nobody_is_asked)
        if not self._offers:
            return
        try:
            async with asyncio.timeout(MANIFESTS_WAIT_S):
                await self._settle(lambda: len(self._offers) + len(self._faults) == len(self._donors))
        except TimeoutError:
            pass
        offers = [self._offers[name] for name in self._donors if name in self._offers]
        counts = Counter(offers)
        chosen = max(counts, key=lambda offer: (counts[offer], offer.epoch))  # of equals, the first
        left, wanted = self._left, self._wanted
        if left is not None and left.manifest in offers:
            self._part, download = left.part, left
            count = len(left.manifest.chunks) // DIGEST_BYTES
            found = count - len(left.missing)
            if found:
                _log.info("state=resumed epoch=%d chunks=%d of=%d", left.manifest.epoch, found, count)
        else:
            if wanted.checkpoints is not None:
                pieces = Pieces(chosen.epoch, chosen.head, chosen.state_digest, chosen.chunks)
                self._part = await asyncio.to_thread(wanted.checkpoints.begin_part, pieces, wanted.state)
            download = Download(chosen, wanted.state, self._part)
        self._free.extend(download.missing)
        self._download = download
        await self._tell()

    def _take_up(self, checkpoints: Checkpoints) -> Download | None:
        """What an earlier download left, read and compared: that may take longer than a donor waits."""
        state = self._wanted.state
        self._left_part = part = checkpoints.part()
        if part is None or len(part.pieces.chunks) != DIGEST_BYTES * chunk_count(state.size_bytes):
            return None
        one = part.pieces
        manifest = Manifest(one.epoch, one.head, one.state_digest, one.chunks)
        download = Download(manifest, state, part)
        download.take_up()
        return download

    async def _offer_of(self, stream: Stream) -> Manifest:
        wanted, left = self._wanted, self._left.manifest if self._left is not None else None
        if (
            left is not None
            and wanted.epoch_min <= left.epoch <= wanted.epoch_max
            and wanted.chain.leads(left.epoch)
        ):
            try:
                offer = await fetch_manifest(stream, left.epoch, wanted.chain, wanted.state)
            except DonorFailed as error:
                if error.reason != "missing":
                    raise
            else:
                if offer == left:
                    return offer
        offer = await fetch_manifest(stream, wanted.epoch_max, wanted.chain, wanted.state)
        if offer.epoch < wanted.epoch_min:
            raise DonorFailed("missing", f"its checkpoint of epoch {offer.epoch} is older than ours")
        return offer

    # --- one donor ----------------------------------------------------------------------------------

    async def _ask(self, name: str, open_stream: OpenStream) -> None:
        """All that is asked of it. Its faults are told; what our disk raises is passed on."""
        try:
            async with opened(open_stream, self._limits, self._on_bytes) as stream:
                self._offers[name] = offer = await self._offer_of(stream)
                await self._tell()
                await self._settle(lambda: self._download is not None)
                assert self._download is not None
                chosen, wanted = self._download.manifest, self._wanted
                if offer.epoch > chosen.epoch:  # it may have the older one as well
                    offer = await fetch_manifest(stream, chosen.epoch, wanted.chain, wanted.state)
                if offer == chosen:
                    self._giving[name] = _Giving(time.monotonic())
                    await self._pull(stream, self._giving[name], self._download)
        except (DonorFailed, RemoteProtocolError) as error:
            self._faults[name] = error
            self._on_fault(name, error)
        finally:
            giving = self._giving.get(name)
            if giving is not None:
                self._give_back(giving)
            await self._tell()

    async def _pull(self, stream: Stream, giving: _Giving, download: Download) -> None:
        while download.missing:
            while len(giving.asked) < giving.window(time.monotonic()):
                index = self._next(giving)
                if index is None:
                    break
                giving.asked.append(index)
                await download.ask(stream, index)
            if not giving.asked:
                await self._settle(lambda: not download.missing or self._may_ask(giving))
                continue
            await download.receive(stream, giving.asked[0])
            giving.asked.popleft()
            giving.given += 1
            self._say(download)
            await self._tell()

    def _say(self, download: Download) -> None:
        count, size = len(download.manifest.chunks) // DIGEST_BYTES, self._wanted.state.size_bytes
        done = size * (count - len(download.missing)) // max(1, count)
        self._wanted.told(f"state of epoch {download.manifest.epoch} bytes", done, size)

    def _next(self, giving: _Giving) -> int | None:
        """A chunk to ask this donor for: one that nobody is asked for, or else, if it is idle, one of the
        last that the slowest is asked for."""
        if self._free:
            return self._free.popleft()
        return None if giving.asked else self._to_steal(giving)

    def _may_ask(self, giving: _Giving) -> bool:
        return bool(self._free) or self._to_steal(giving) is not None

    def _to_steal(self, giving: _Giving) -> int | None:
        assert self._download is not None
        asked = Counter(index for one in self._giving.values() for index in one.asked)
        slowest = sorted(self._giving.values(), key=lambda one: one.given / max(1, len(one.asked)))
        for other in slowest:
            for index in reversed(other.asked):
                if other is not giving and asked[index] == 1 and index in self._download.missing:
                    return index
        return None

    def _give_back(self, giving: _Giving) -> None:
        assert self._download is not None
        elsewhere = {i for one in self._giving.values() if one is not giving for i in one.asked}
        back = [i for i in giving.asked if i in self._download.missing and i not in elsewhere]
        self._free.extendleft(reversed(back))
        giving.asked.clear()

    # --- waiting ------------------------------------------------------------------------------------

    async def _settle(self, until: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(until)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
