"""Checkpoints: whole states on disk, from which the update log leads to the head.

    checkpoints/<epoch>-<head>.safetensors

A safetensors file (one tensor for the parameters, one for each buffer of the outer optimizer) whose
metadata say of which run, epoch and head it is, the state's digest, and the digest of every CHUNK_BYTES of
its data, so that a donor can say at once what it has to give. It is written here and not by the safetensors
package: that needs the metadata first, which are known last, and copies every tensor.

A file that cannot be used is set aside as *.corrupt with one line in the log, and the one before it is
taken instead. Blocking; any thread, one at a time. Must not import: asyncio; hivemind.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from tapestry.node.disk.files import is_damage, remove_temporaries, set_aside, sync_folder, write_file
from tapestry.node.disk.part import NAME as PART_NAME
from tapestry.node.disk.part import Part, Pieces
from tapestry.node.disk.store import Store, UpdateMissing
from tapestry.node.protocol.chain import Chain
from tapestry.node.state.model import FLOAT_BYTES, DigestMismatch, ModelState, spans

SUFFIX = ".safetensors"
CHUNK_BYTES = 1 << 20  # of the data; what a joiner verifies at once. Guess
# 1 GiB, hashed and written: 3.1 s so, 3.4 s with one sync at its end, 3.7 s with one after every 64 MiB.
WRITE_OUT_BYTES = 16 << 20  # of the data, a moment later: see `_write`
HEADER_BYTES_MAX = 64 << 20  # room for the digests of a state of 800 GiB
_LENGTH = struct.Struct("<Q")
_METADATA = ("run_id", "epoch", "head", "state_digest", "schema", "chunk_bytes", "chunks")

_log = logging.getLogger("tapestry.disk")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One file, by its header."""

    epoch: int
    head: str
    state_digest: str
    run_id: str
    schema: str
    n: int
    names: tuple[str, ...]  # params, then the buffers
    chunks: bytes  # blake3 (32 bytes) of each CHUNK_BYTES of the data, the last one shorter
    path: Path
    data_start: int  # byte offset in the file

    @property
    def data_bytes(self) -> int:
        return FLOAT_BYTES * self.n * len(self.names)

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return self.data_start + self.data_bytes


class Abandoned(Exception):
    """A checkpoint was not written to its end, as was asked. All is as it was."""


class Checkpoints:
    """Those of one home and run. Call `load` first."""

    def __init__(self, folder: Path, run_id: str, kept: int) -> None:
        self._folder = folder
        self._run_id = run_id
        self._kept = kept
        self._files: dict[Path, Checkpoint] = {}
        self._abandoned = False

    def abandon(self) -> None:
        """End the `save` that is going on, and any later one. From any thread."""
        self._abandoned = True

    def load(self) -> None:
        """Find out what there is, by the headers. Raises OSError."""
        self._folder.mkdir(exist_ok=True)
        remove_temporaries(self._folder)
        self._files = {}
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            try:
                self._files[path] = read_checkpoint(path, self._run_id)
            except (ValueError, OSError) as error:
                if not is_damage(error):
                    raise
                set_aside(path, str(error))

    def list(self) -> list[Checkpoint]:
        """Newest first."""
        return sorted(self._files.values(), key=lambda c: (c.epoch, c.head), reverse=True)

    def newest(self, chain: Chain) -> Checkpoint | None:
        """On the path to the head."""
        return next((c for c in self.list() if _leads(c, chain, chain.epoch)), None)

    def base_epoch(self, chain: Chain) -> int:
        """Of the newest one below the head: the updates after it must be kept. 0 if there is none."""
        return self.base_of(chain, max(0, chain.epoch - 1))

    def base_of(self, chain: Chain, epoch: int) -> int:
        """Of the newest one on the path to the head, up to `epoch`; 0 if there is none."""
        epochs = [c.epoch for c in self.list() if c.epoch <= epoch and _leads(c, chain, chain.epoch)]
        return max(epochs, default=0)

    def save(self, state: ModelState, digest: str) -> Checkpoint:
        """Write the state, whose digest was computed before. After OSError and Abandoned all is as it was."""
        assert not state.torn
        path = self._folder / _name(state.epoch, state.head)
        if path not in self._files:
            write_file(path, lambda file: self._write(file, state, digest))
            self._files[path] = read_checkpoint(path, self._run_id)
        return self._files[path]

    def _write(self, file: BinaryIO, state: ModelState, digest: str) -> None:
        """The disk has its first bytes while the last are hashed; so it can be abandoned, too."""
        begun = 0
        for written in _write_checkpoint(file, state, digest, self._run_id):
            if self._abandoned:
                raise Abandoned
            if written - begun >= WRITE_OUT_BYTES:
                file.flush()
                os.posix_fadvise(file.fileno(), begun, written - begun, os.POSIX_FADV_DONTNEED)  # and goes on
                begun = written

    def part(self) -> Part | None:
        """What is there of a checkpoint that was being fetched; its numbers are not compared yet."""
        path = self._folder / PART_NAME
        try:
            one = read_checkpoint(path, self._run_id)
        except (ValueError, OSError):
            path.unlink(missing_ok=True)
            return None
        pieces = Pieces(one.epoch, one.head, one.state_digest, one.chunks)
        return Part(path, pieces, one.data_start, one.data_bytes, CHUNK_BYTES)

    def begin_part(self, pieces: Pieces, state: ModelState) -> Part:
        """An empty one, in the place of any other. Raises OSError."""
        metadata = {
            "run_id": self._run_id,
            "epoch": str(pieces.epoch),
            "head": pieces.head,
            "state_digest": pieces.state_digest,
            "schema": state.schema,
            "chunk_bytes": str(CHUNK_BYTES),
            "chunks": pieces.chunks.hex(),
        }
        header, path = _header(metadata, state.n, state.names), self._folder / PART_NAME
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            file.write(header)
            file.truncate(len(header) + state.size_bytes)
        return Part(path, pieces, len(header), state.size_bytes, CHUNK_BYTES)

    def keep(self, part: Part) -> None:
        """It is whole, and its state was the one that was signed. Raises OSError."""
        path = self._folder / _name(part.pieces.epoch, part.pieces.head)
        part.sync()
        os.replace(part.path, path)
        sync_folder(self._folder)
        self._files[path] = read_checkpoint(path, self._run_id)

    def prune(self, chain: Chain, back_to: int | None = None) -> None:
        """Keep the newest on the path to our head, and always one below it: joiners are given that. And what
        leads to state `back_to`.

        Nobody has signed the state at the head yet; the one below is signed by the head's record. The rest,
        those of a fork that was left and those that were rolled back, go.
        """
        ours = [c for c in self.list() if _leads(c, chain, chain.epoch)]
        keep = ours[: self._kept] + [c for c in ours if c.epoch < chain.epoch][:1]
        if back_to is not None:
            keep += [c for c in ours if c.epoch <= back_to][:1]
        for checkpoint in self.list():
            if checkpoint not in keep and checkpoint.epoch <= chain.epoch:
                self._files.pop(checkpoint.path, None)  # unless a donor has just refused it
                checkpoint.path.unlink(missing_ok=True)

    def drop_left(self, chain: Chain, since: int) -> None:
        """Those of records after `since` that the chain has no more."""
        for checkpoint in self.list():
            if since < checkpoint.epoch and chain.head_at(checkpoint.epoch) != checkpoint.head:
                self._files.pop(checkpoint.path, None)
                checkpoint.path.unlink(missing_ok=True)

    def load_newest(self, chain: Chain, epoch_max: int, into: ModelState) -> Checkpoint | None:
        """The newest usable one on the path to state `epoch_max`, loaded; None, and `into` torn, if none is.

        Usable: its bytes have the digest that it names, which is the one that the chain signed, if it did.
        """
        for checkpoint in self.list():
            if not _leads(checkpoint, chain, epoch_max):
                continue
            try:
                _load(checkpoint, chain, into)
            except (DigestMismatch, FileNotFoundError) as error:
                self.refuse(checkpoint, str(error))
            except (ValueError, OSError) as error:
                if not is_damage(error):
                    raise
                self.refuse(checkpoint, str(error))
            else:
                return checkpoint
        into.overwrite()
        return None

    def refuse(self, checkpoint: Checkpoint, why: str) -> None:
        """It turned out to be damaged."""
        if self._files.pop(checkpoint.path, None) is not None:
            set_aside(checkpoint.path, why)


@dataclass(frozen=True, slots=True)
class Restoration:
    """How far the disk could take a state."""

    epoch: int
    state_digest: str
    reason: str  # why not further; "" if as far as was asked


def restore(
    chain: Chain, epoch: int, store: Store, checkpoints: Checkpoints, state: ModelState
) -> Restoration | None:
    """Bring the state to `epoch`: newest usable checkpoint on the path to it, then updates. None, and torn,
    without one.

    Stops where the update log has no more. Raises OSError.
    """
    newest = checkpoints.load_newest(chain, epoch, state)
    if newest is None:
        return None
    reason = ""
    applied = False
    while state.epoch < epoch:
        step = chain.step_from(state.epoch, epoch)
        if step in chain.rolled:
            state.rename(step, chain.head_at(step))
            continue
        (record,) = chain.after(state.epoch, 1)
        try:
            payloads = store.read_update(record.body.epoch, record.head, record.body.result)
        except UpdateMissing as error:
            reason = f"{error.reason}: {error}"
            break
        state.apply(payloads, record, chain.settings_of(record))
        applied = True
    digest = state.digest() if applied else newest.state_digest  # loading compared it
    return Restoration(state.epoch, digest, reason)


def read_chunk(checkpoint: Checkpoint, file: BinaryIO, index: int) -> bytes:
    """One chunk of the data; raises ValueError if it is not what the header says any more."""
    start = index * CHUNK_BYTES
    size = min(CHUNK_BYTES, checkpoint.data_bytes - start)
    data = os.pread(file.fileno(), size, checkpoint.data_start + start)
    if blake3(data).digest() != checkpoint.chunks[32 * index : 32 * index + 32]:
        raise ValueError(f"chunk {index} changed on disk")
    return data


def chunk_count(data_bytes: int) -> int:
    return -(-data_bytes // CHUNK_BYTES)


def leads_to(chain: Chain, epoch: int, store: Store, checkpoints: Checkpoints) -> bool:
    """Whether the disk has what makes state `epoch`, by the names of its files."""
    begun = [c.epoch for c in checkpoints.list() if _leads(c, chain, epoch)]
    at = max(begun, default=epoch + 1)
    while at < epoch:
        step = chain.step_from(at, epoch)
        if step not in chain.rolled and not store.has_update(chain.head_at(step)):
            return False
        at = step
    return at == epoch


def _leads(checkpoint: Checkpoint, chain: Chain, epoch: int) -> bool:
    """Whether it is of our chain, and on the path to state `epoch`."""
    on_path = checkpoint.epoch <= chain.epoch and chain.leads(checkpoint.epoch, epoch)
    return on_path and chain.head_at(checkpoint.epoch) == checkpoint.head


def _load(checkpoint: Checkpoint, chain: Chain, into: ModelState) -> None:
    """Raises ValueError, DigestMismatch, OSError."""
    signed = chain.state_digest_at(checkpoint.epoch)
    if signed not in (None, checkpoint.state_digest):
        raise ValueError("its digest is not the one that the chain signed")
    if (checkpoint.schema, checkpoint.n, checkpoint.names) != (into.schema, into.n, into.names):
        raise ValueError("it is of another model")
    with checkpoint.path.open("rb") as file:
        file.seek(checkpoint.data_start)
        for vector in into.overwrite():
            if len(vector) and file.readinto(vector) != len(vector):
                raise ValueError("it is cut short")
    into.adopt(checkpoint.epoch, checkpoint.head, checkpoint.state_digest)


def _name(epoch: int, head: str) -> str:
    return f"{epoch:08d}-{head[:16]}{SUFFIX}"


# --- the file ---------------------------------------------------------------------------------------


def _write_checkpoint(file: BinaryIO, state: ModelState, digest: str, run_id: str) -> Iterator[int]:
    """Header, data, and the header again, when the chunks' digests are known: it has the same length. Gives
    the bytes of data written after each chunk."""
    metadata = {
        "run_id": run_id,
        "epoch": str(state.epoch),
        "head": state.head,
        "state_digest": digest,
        "schema": state.schema,
        "chunk_bytes": str(CHUNK_BYTES),
        "chunks": "0" * (64 * chunk_count(state.size_bytes)),
    }
    file.write(_header(metadata, state.n, state.names))
    digests = []
    for chunk in _chunks(state.vectors()):
        hasher = blake3()
        for part in chunk:
            hasher.update(part)
            file.write(part)
        digests.append(hasher.hexdigest())
        yield CHUNK_BYTES * len(digests)
    file.seek(0)
    file.write(_header({**metadata, "chunks": "".join(digests)}, state.n, state.names))


def _header(metadata: dict[str, str], n: int, names: Sequence[str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": metadata}
    for index, name in enumerate(names):
        start = FLOAT_BYTES * n * index
        table[name] = {"dtype": "F32", "shape": [n], "data_offsets": [start, start + FLOAT_BYTES * n]}
    text = json.dumps(table, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8, as the format asks
    return _LENGTH.pack(len(text)) + text


def _chunks(vectors: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    total = sum(map(len, vectors))
    for start in range(0, total, CHUNK_BYTES):
        yield [*spans(vectors, start, min(start + CHUNK_BYTES, total))]


def read_checkpoint(path: Path, run_id: str) -> Checkpoint:
    """By the header, compared with the file's length. Raises ValueError and OSError."""
    with path.open("rb") as file:
        start = file.read(_LENGTH.size)
        if len(start) < _LENGTH.size:
            raise ValueError("no header")
        header_bytes = _LENGTH.unpack(start)[0]
        if header_bytes > HEADER_BYTES_MAX:
            raise ValueError(f"a header of {header_bytes} bytes")
        header = file.read(header_bytes)
        file_bytes = os.fstat(file.fileno()).st_size
    checkpoint = _parse(path, start + header)
    if checkpoint.size_bytes != file_bytes:
        raise ValueError(f"{file_bytes} bytes, should be {checkpoint.size_bytes}")
    if checkpoint.run_id != run_id:
        raise ValueError(f"it is of the run {checkpoint.run_id[:12]}")
    return checkpoint


def _parse(path: Path, header: bytes) -> Checkpoint:
    """Only the very header that `_write_checkpoint` writes. Raises ValueError."""
    table = json.loads(header[_LENGTH.size :])
    metadata = table.pop("__metadata__", None) if isinstance(table, dict) else None
    if not isinstance(metadata, dict) or set(metadata) != set(_METADATA) or "params" not in table:
        raise ValueError("not a checkpoint of ours")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("not a checkpoint of ours")
    params = table["params"]
    shape = params.get("shape") if isinstance(params, dict) else None
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or shape[0] < 0:
        raise ValueError("not a checkpoint of ours")
    n, names = shape[0], tuple(table)
    if _header(metadata, n, names) != header or metadata["chunk_bytes"] != str(CHUNK_BYTES):
        raise ValueError("its header is not in our form")
    checkpoint = Checkpoint(
        epoch=int(metadata["epoch"]),
        head=metadata["head"],
        state_digest=metadata["state_digest"],
        run_id=metadata["run_id"],
        schema=metadata["schema"],
        n=n,
        names=names,
        chunks=bytes.fromhex(metadata["chunks"]),
        path=path,
        data_start=len(header),
    )
    if len(checkpoint.chunks) != 32 * chunk_count(checkpoint.data_bytes):
        raise ValueError("it does not name every chunk")
    return checkpoint
