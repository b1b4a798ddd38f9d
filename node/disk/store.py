"""What a node must not forget, but for checkpoints: genesis, chain, vote, and the update log.

    genesis.json     who began this run, and with which state
    chain.jsonl      one sealed record per line, appended and synced: chain_file.py
    vote.json        what this node promised and accepted in the round under way; sealed
    updates/<epoch>-<head>.upd    the encoded result of each epoch: update_header.py
    updates/<epoch>-<head>.means  who made it, while it is no record: signed_means.py

Each of them survives a `kill -9` and a full disk at any moment: a file is replaced whole, and what an
append left unfinished is cut off. A write that fails raises OSError and leaves what was there.

Damage is treated by what it can do. A chain may be shorter than it was, peers have the rest: the records
before the damage are kept, the others set aside. An update can be fetched again: it is dropped. But a
forgotten vote could be cast twice, and two results be committed in one epoch, so a damaged one is refused.

Blocking; any thread. Must not import: asyncio; hivemind; nor torch, as draft.py says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

from blake3 import blake3

from tapestry.node.disk.chain_file import ChainFile
from tapestry.node.disk.draft import Draft, mapped
from tapestry.node.disk.files import (
    atomic_write,
    is_damage,
    remove_temporaries,
    seal,
    set_aside,
    unseal,
    write_file,
)
from tapestry.node.disk.signed_means import SUFFIX as MEANS_SUFFIX
from tapestry.node.disk.update_header import (
    UPDATE_SUFFIX,
    UpdateHeader,
    header_bytes,
    read_update_header,
    update_name,
)
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.protocol import strict
from tapestry.node.protocol.canon import Crypto, canonical
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.events import Vote
from tapestry.node.protocol.record import (
    Genesis,
    OtherVersion,
    Record,
    body_from_dict,
    body_to_dict,
    genesis_from_dict,
    genesis_to_dict,
)
from tapestry.node.spec.run import LimitsSpec

if TYPE_CHECKING:
    from torch import Tensor

READ_BYTES = 1 << 20  # at a time, to see that a file can be read
_NONE_KNOWN: Mapping[int, str] = MappingProxyType({})

_log = logging.getLogger("tapestry.disk")


class UpdateMissing(Exception):
    """The update log does not have this update. `reason` is missing, corrupt or foreign."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class LoadedStore:
    """What the disk gave back. No genesis: a home that belongs to no run yet."""

    genesis: Genesis | None
    epoch: int  # that its chain ends with
    vote: Vote | None
    updates: tuple[str, ...]  # heads whose update is in the update log


@dataclass(frozen=True, slots=True)
class UpdateFile:
    """One file of the update log."""

    epoch: int  # of the state that it makes
    path: Path
    size_bytes: int


class Store:
    """One home's. Call `load` first."""

    def __init__(self, home: Home, crypto: Crypto) -> None:
        self._home = home
        self.crypto = crypto
        self._chain: ChainFile | None = None  # of a home with a genesis
        self._updates: dict[str, UpdateFile] = {}
        self._lock = threading.Lock()

    def load(self) -> LoadedStore:
        """Read everything. Raises UserError for a damaged genesis or vote, and OSError."""
        self._home.updates.mkdir(exist_ok=True)
        genesis = self.read_genesis()
        if genesis is not None:
            self._chain = ChainFile(self._home, genesis, self.crypto)
        vote = read_vote(self._home)
        self._load_updates()
        epoch = 0 if self._chain is None else len(self._chain)
        return LoadedStore(genesis, epoch, vote, self.heads_with_updates())

    # --- genesis -------------------------------------------------------------------------------

    def write_genesis(self, genesis: Genesis) -> None:
        atomic_write(self._home.genesis, canonical(genesis_to_dict(genesis)) + b"\n")
        self._chain = ChainFile(self._home, genesis, self.crypto)

    def read_genesis(self) -> Genesis | None:
        """None of a home that belongs to no run yet. Raises UserError, OSError."""
        path = self._home.genesis
        try:
            return genesis_from_dict(json.loads(path.read_bytes()), self.crypto)
        except FileNotFoundError:
            return None
        except OtherVersion as error:
            raise UserError(
                f"{path}: {error}",
                exit_code=ExitCode.REFUSED,
                hint="start this home with the version of tapestry that made it; to go on with this one, "
                "`tapestry export` with that version and found a new run with `init --base`",
            ) from error
        except (ValueError, OSError) as error:
            if not is_damage(error):
                raise
            raise UserError(
                f"{path} is damaged: {error}",
                exit_code=ExitCode.FAILED,
                hint="move it away and join again: the node fetches it from a peer",
            ) from error

    # --- chain ---------------------------------------------------------------------------------

    def chain(self, genesis: Genesis) -> Chain:
        """What is on the disk, for one thread to go on with."""
        return Chain(genesis, past=self._chain)

    @property
    def epoch(self) -> int:
        """Of the newest record."""
        return 0 if self._chain is None else len(self._chain)

    def record(self, epoch: int) -> Record | None:
        """From the disk, for any thread; None if there is none. Raises OSError for one that is damaged."""
        found = () if self._chain is None else self._chain.read(epoch - 1, 1)
        return found[0] if found else None

    def append_record(self, record: Record) -> None:
        """Write the record that follows the last one. On OSError the chain on disk is as before."""
        assert self._chain is not None
        self._chain.append(record)

    def switch_chain(self, epoch: int, records: Sequence[Record]) -> None:
        """Put `records` in the place of those after `epoch`: all of it, or on OSError nothing."""
        assert self._chain is not None
        self._chain.switch(epoch, records)

    def record_bytes_after(self, epoch: int) -> int:
        """Of the records after `epoch`, as they lie in chain.jsonl."""
        assert self._chain is not None
        return self._chain.bytes_after(epoch)

    def copy_records_after(self, epoch: int, file: BinaryIO) -> None:
        """Their lines, as they are. Raises OSError."""
        assert self._chain is not None
        self._chain.copy_after(epoch, file)

    # --- vote ----------------------------------------------------------------------------------

    def write_vote(self, vote: Vote) -> None:
        """On disk when this returns: only then may it be sent."""
        atomic_write(self._home.vote, seal(_vote_to_dict(vote)) + b"\n")

    # --- updates -------------------------------------------------------------------------------

    def write_update(
        self,
        epoch: int,
        head: str,
        payloads: Sequence[Tensor],  # uint8 (payload size,) for each shard
        draft: Draft | None = None,  # where some of them may lie already
        means: bytes = b"",  # who made it: signed_means.py
    ) -> None:
        """On disk when this returns. Writing one again does nothing, but for `means` that were not there."""
        views = [_bytes_of(payload) for payload in payloads]
        path = self._home.updates / update_name(epoch, head)

        known = draft.digests(payloads) if draft is not None else {}
        header = UpdateHeader(epoch, head, result_digest(payloads, known), tuple(map(len, views)))

        def write(file: BinaryIO) -> None:
            file.write(header.pack())
            for view in views:
                file.write(view)

        with self._lock:
            if means:  # before the update: who has that can give both
                atomic_write(path.with_suffix(MEANS_SUFFIX), means)
            if head in self._updates:
                return
            if draft is not None:
                draft.finish(path, header.pack(), payloads)
            else:
                write_file(path, write)
            self._updates[head] = UpdateFile(epoch, path, header.size_bytes)

    def read_means(self, epoch: int, head: str) -> bytes:
        """Who made this update, as it was written beside it. Raises UpdateMissing and OSError."""
        path = (self._home.updates / update_name(epoch, head)).with_suffix(MEANS_SUFFIX)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise UpdateMissing("missing", f"{path} is gone, or never was") from None

    def drop_means(self, epoch: int) -> None:
        """Of updates up to `epoch`, which are records, or never became one."""
        for path in self._home.updates.glob(f"*{MEANS_SUFFIX}"):
            if path.name < f"{epoch + 1:08d}":
                path.unlink(missing_ok=True)

    def draft(self, sizes: Sequence[int], name: str = "draft") -> Draft:
        """For an update of payloads of these sizes; one of a name at a time."""
        return Draft(self._home.updates, header_bytes(len(sizes)), sizes, name)

    def has_update(self, head: str) -> bool:
        return head in self._updates

    def update_file(self, head: str) -> UpdateFile | None:
        """Where the update of this head lies, if it does."""
        return self._updates.get(head)

    def drop_updates(self, heads: Sequence[str]) -> None:
        """Of records that were left."""
        for head in heads:
            with self._lock:
                update = self._updates.pop(head, None)
                if update is not None:
                    update.path.unlink(missing_ok=True)

    def heads_with_updates(self) -> tuple[str, ...]:
        """Oldest first."""
        return tuple(head for _, head in sorted((u.epoch, head) for head, u in [*self._updates.items()]))

    @property
    def updates_bytes(self) -> int:
        """What the update log takes on disk."""
        return sum(update.size_bytes for update in list(self._updates.values()))

    def read_update(
        self, epoch: int, head: str, result: str | None = None
    ) -> list[Tensor]:  # uint8 (payload size,) for each shard
        """The payloads, compared with the digest in the record, or else with the one in the file.

        Raises UpdateMissing; a file that turned out to be damaged is gone after that. And OSError.
        """
        path = self._path_of(epoch, head)
        with self._reading(head, path):
            header, payloads = read_update_file(path)
            if (header.epoch, header.head) != (epoch, head) or result_digest(payloads) != header.result:
                raise ValueError("its bytes changed")
        if result not in (None, header.result):
            raise UpdateMissing("foreign", f"{path} is not the result that the record names")
        return payloads

    def stream_update(self, epoch: int, head: str) -> Iterator[tuple[int, bytes]]:
        """How many payloads there are, and each as it is read: who sends them on is not silent meanwhile.

        The last one comes only if all of them have the digest in the file. Raises as `read_update`.
        """
        path, digests = self._path_of(epoch, head), []
        with self._reading(head, path), path.open("rb") as file:
            header = read_update_header(file)
            for length in header.lengths:
                payload = file.read(length)
                digests.append(blake3(payload).hexdigest())
                if len(digests) == len(header.lengths) and (
                    (header.epoch, header.head) != (epoch, head) or _joined(digests) != header.result
                ):
                    raise ValueError("its bytes changed")
                yield len(header.lengths), payload

    def read_shard(self, epoch: int, head: str, result: str, shard: int) -> bytes:
        """One payload of the update that has this result. It is not compared with its digest.

        Raises UpdateMissing, and OSError.
        """
        path = self._path_of(epoch, head)
        with self._reading(head, path), path.open("rb") as file:
            header = read_update_header(file)
            if header.result != result or shard >= len(header.lengths):
                raise UpdateMissing("foreign", f"{path} is another result, or has no shard {shard}")
            file.seek(sum(header.lengths[:shard]), os.SEEK_CUR)
            return file.read(header.lengths[shard])

    def _path_of(self, epoch: int, head: str) -> Path:
        """Raises UpdateMissing."""
        update = self._updates.get(head)
        if update is None or update.epoch != epoch:
            raise UpdateMissing("missing", f"the update log has no update {epoch} of {head[:12]}")
        return update.path

    @contextlib.contextmanager
    def _reading(self, head: str, path: Path) -> Iterator[None]:
        """A file that is gone, or damaged, is out of the log after that. Raises UpdateMissing for it."""
        try:
            yield
        except FileNotFoundError:
            self._updates.pop(head, None)
            raise UpdateMissing("missing", f"{path} is gone") from None
        except (ValueError, OSError) as error:
            if not is_damage(error):
                raise
            self._drop(head, str(error))
            raise UpdateMissing("corrupt", f"{path}: {error}") from error

    def prune(self, chain: Chain, limits: LimitsSpec, base_epoch: int) -> None:
        """Keep the updates that the spec's limits allow, newest first, and those after `base_epoch`.

        `base_epoch` is that of a checkpoint: with the updates after it, it is the state, so they stay even
        if the limits are smaller. Results of rounds that are over and were decided otherwise go.
        """
        self.drop_means(chain.epoch)
        count, total_bytes = 0, 0
        for head in reversed(self.heads_with_updates()):
            update = self._updates.get(head)
            if update is None or update.epoch > chain.epoch:
                continue  # just dropped; or of the round under way: somebody may have voted for it
            on_chain = chain.head_at(update.epoch) == head
            count += on_chain
            total_bytes += update.size_bytes * on_chain
            allowed = count <= limits.updates_kept_epochs and total_bytes <= limits.updates_kept_bytes
            if not on_chain or (update.epoch <= base_epoch and not allowed):
                with self._lock:
                    self._updates.pop(head, None)
                    update.path.unlink(missing_ok=True)

    def _load_updates(self) -> None:
        folder = self._home.updates
        remove_temporaries(folder)
        self._updates = {}
        for path in sorted(folder.glob(f"*{UPDATE_SUFFIX}")):
            try:
                with path.open("rb") as file:
                    header = read_update_header(file)
            except (ValueError, OSError) as error:
                if not is_damage(error):
                    raise
                _log.warning(
                    "update dropped path=%s reason=%r; the others have it. Check the disk", path, str(error)
                )
                path.unlink()
                continue
            self._updates[header.head] = UpdateFile(header.epoch, path, header.size_bytes)

    def _drop(self, head: str, why: str) -> None:
        with self._lock:
            update = self._updates.pop(head, None)
            if update is not None:
                set_aside(update.path, why)


def result_digest(payloads: Sequence[Tensor], known: Mapping[int, str] = _NONE_KNOWN) -> str:
    """As node/protocol/exchange.py defines it: of the shards' digests (some may be known), in order."""
    digests = [
        known[shard] if shard in known else blake3(_bytes_of(payload)).hexdigest()
        for shard, payload in enumerate(payloads)
    ]
    return _joined(digests)


def _joined(digests: Sequence[str]) -> str:
    return blake3("".join(digests).encode()).hexdigest()


def read_vote(home: Home) -> Vote | None:
    """None of a node that has promised nothing. Raises UserError, OSError."""
    try:
        return _vote_from_dict(unseal(home.vote.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        if not is_damage(error):
            raise
        raise UserError(
            f"{home.vote} is damaged: {error}; without it this node might vote twice in one round",
            exit_code=ExitCode.FAILED,
            hint="restore it, or move it away once the run has committed an epoch without this node",
        ) from error


def _vote_to_dict(vote: Vote) -> dict[str, Any]:
    return {
        "epoch": vote.epoch,
        "head": vote.head,
        "promised": vote.promised,
        "accepted_ballot": vote.accepted_ballot,
        "accepted": None if vote.accepted is None else body_to_dict(vote.accepted),
        "life": vote.life,
        "standing": list(vote.standing),
        **({"left": vote.left} if vote.left else {}),
    }


def _vote_from_dict(raw: Any) -> Vote:
    """Strict. Raises ValueError."""
    names = [field.name for field in dataclasses.fields(Vote) if field.name != "left"]
    if isinstance(raw, dict) and "left" in raw:  # only of a round that was left
        names.append("left")
        strict.hexadecimal(raw["left"], (64,), "left")
    strict.table(raw, names, "a vote")
    strict.hexadecimal(raw["head"], (64,), "head")
    strict.hexadecimal(raw["life"], (0, 32), "life")
    three = strict.sequence(raw["standing"], 3, "standing", 3)
    standing = [strict.integer(number, 0, 2**63, "standing") for number in three]
    for name in ("epoch", "promised", "accepted_ballot"):
        strict.integer(raw[name], -1, 2**63, name)
    accepted = None if raw["accepted"] is None else body_from_dict(raw["accepted"])
    if (accepted is None) != (raw["accepted_ballot"] == -1):
        raise ValueError("an accepted body and its ballot go together")
    return Vote(**{**raw, "accepted": accepted, "standing": tuple(standing)})


def read_update_file(path: Path) -> tuple[UpdateHeader, list[Tensor]]:
    """The file's parts, as views of the mapped file. Raises ValueError and OSError.

    It is read before it is mapped: of a sector that cannot be read a mapping makes a signal, which ends us.
    """
    with path.open("rb") as file:
        header = read_update_header(file)
        piece = bytearray(READ_BYTES)
        while file.readinto(piece):
            pass
        whole = mapped(file.fileno(), header.size_bytes)
    begin = header.size_bytes - sum(header.lengths)
    parts: Sequence[Tensor] = whole[begin:].split(list(header.lengths))  # type: ignore[no-untyped-call]
    return header, list(parts)


def _bytes_of(
    payload: Tensor,  # uint8 (size,)
) -> memoryview:
    return memoryview(payload.numpy())  # type: ignore[arg-type]
