"""What lost at a fork, kept: the records that were left for a better chain, and what makes their states.

    branches/<epoch>-<head>/branch.json    where it left the chain, what stood behind both sides; sealed
    branches/<epoch>-<head>/chain.jsonl    its records, the lines that lay in the home's chain.jsonl
    branches/<epoch>-<head>/updates/       theirs, and those between the checkpoint and the first of them
    branches/<epoch>-<head>/checkpoints/   the newest one that leads to its head

Records before the first one are not written again: they lie in the home's chain or, if that was left in its
turn, in a newer branch (lineage/branches.py finds them). So the oldest branch goes first, and takes nothing
along that another one needs. Updates and checkpoints are hard links: nothing is copied where the file system
has them. Signed means of an update are not kept: the record's signatures stand for it (signed_means.py).

A fork is left in this order, each step on the disk before the next:

    1. branches/.new is filled: the file of the records, the links, branch.json, then their folders
    2. .new gets its name, and the folder `branches` is synced
    3. chain.jsonl is replaced (chain_file.py)
    4. the home's own names of what only the branch needs go, and the oldest branches beyond the limits

Killed before 3 a node has the chain that it had: `load` removes what begins with a dot, and a branch whose
head is on the chain, which is none. Killed after 3 it has the other chain, and the branch.

All branches together are never more than the limits, nor than half of the room that there would be without
them. What does not fit keeps its records, or not even those; the switch itself is not held up.

Blocking; the disk thread. Must not import: asyncio; hivemind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tapestry.node.disk.files import atomic_write, is_damage, seal, sync_folder, unseal
from tapestry.node.disk.store import Store
from tapestry.node.disk.use import disk_free
from tapestry.node.home import Home
from tapestry.node.protocol import strict
from tapestry.node.protocol.chain import Chain
from tapestry.node.protocol.place import Place, Tip, next_place, why_lost
from tapestry.node.protocol.record import Record

if TYPE_CHECKING:
    from tapestry.node.disk.checkpoints import Checkpoints  # torch

BRANCHES_MAX = 16  # Guess: forks are rare; a run that leaves more in its life has other troubles
BYTES_MAX = 8 << 30  # Guess: as for the update log
ABOUT_BYTES_MAX = 64 << 10
_NEW, _GONE = ".new", ".gone"

_log = logging.getLogger("tapestry.disk")


@dataclass(frozen=True, slots=True)
class BranchLimits:
    """Of one home's branches, all together."""

    count_max: int = BRANCHES_MAX  # 0: none is kept
    bytes_max: int = BYTES_MAX


BRANCH_LIMITS = BranchLimits()


@dataclass(frozen=True, slots=True)
class Side:
    """The end of one side of a fork, and what stands behind it, as fork choice saw it."""

    epoch: int
    head: str
    full: int
    voice: int
    since: int

    @classmethod
    def of(cls, place: Place) -> Side:
        tip = place.tip
        return cls(place.epoch, place.head, tip.full, tip.voice, tip.since)

    @classmethod
    def read(cls, raw: Any) -> Side:
        """Strict. Raises ValueError."""
        strict.table(raw, [field.name for field in dataclasses.fields(cls)], "a side")
        strict.hexadecimal(raw["head"], (64,), "head")
        for name in ("epoch", "full", "voice", "since"):
            strict.integer(raw[name], 0, 2**63, name)
        return cls(**raw)

    @property
    def tip(self) -> Tip:
        return Tip(self.full, self.voice, self.since, self.head)


@dataclass(frozen=True, slots=True)
class About:
    """branch.json."""

    number: int  # it counts the branches of a home: the lowest is the oldest
    run_id: str
    since: int  # the last epoch that both sides have
    since_head: str
    lost: Side
    won: Side  # as it was when this one was left
    left_at: str  # UTC, by this node's clock
    lacks: str  # what keeps the state of its head from being made; "" if nothing does

    @property
    def name(self) -> str:
        return f"{self.lost.epoch:08d}-{self.lost.head[:16]}"

    @property
    def why(self) -> str:
        """Why it lost."""
        if not self.won.tip.beats(self.lost.tip):
            return "nobody gave its updates, so this node went back to the record before it"
        return why_lost(self.lost.tip, self.won.tip)

    def line(self) -> bytes:
        return seal(dataclasses.asdict(self)) + b"\n"


@dataclass(frozen=True, slots=True)
class Kept:
    """One branch on the disk."""

    about: About
    path: Path
    size_bytes: int

    @property
    def name(self) -> str:
        return self.path.name


class Branches:
    """Those of one home. Call `load` first."""

    def __init__(self, home: Home, limits: BranchLimits) -> None:
        self._home = home
        self._shelf = home.branches
        self._limits = limits
        self._kept: tuple[Kept, ...] = ()  # oldest first; replaced as a whole, so that any thread may read it

    @property
    def names(self) -> tuple[str, ...]:
        """Oldest first. Any thread."""
        return tuple(one.name for one in self._kept)

    def load(self, chain: Chain) -> None:
        """Find out what there is, and finish what a kill left unfinished. Raises OSError."""
        for path in sorted(self._shelf.glob(".*")):
            if path.is_dir() and not path.is_symlink():  # not what a file manager or a network disk leaves
                _delete(path)
        self._kept = tuple(found(self._home))
        for one in self._kept:
            if chain.head_at(one.about.lost.epoch) == one.about.lost.head:
                self._drop(one, "its records are on the chain: they were not left")
        self.fit()

    def keep(
        self, chain: Chain, since: int, theirs: Sequence[Record], store: Store, checkpoints: Checkpoints
    ) -> str:
        """What `chain` has after `since`, which is to be left for `theirs`. The name of the branch; "" if the
        limits allow none, or the disk: whatever becomes of what lost, the node goes on with what won.
        """
        if not self._limits.count_max or since >= chain.epoch:
            return ""
        try:
            return self._keep(chain, since, theirs, store, checkpoints)
        except OSError as error:
            shutil.rmtree(self._shelf / _NEW, ignore_errors=True)
            _log.warning("branch=not_kept epoch=%d reason=%r; look at the disk", chain.epoch, str(error))
        self._drop_followers(chain, since)
        return ""

    def _keep(
        self, chain: Chain, since: int, theirs: Sequence[Record], store: Store, checkpoints: Checkpoints
    ) -> str:
        """`keep`, where the limits allow one. Raises OSError."""
        record_bytes, room = store.record_bytes_after(since), self._room()
        if record_bytes > min(room, disk_free(self._home) // 2):
            why = f"its records are {record_bytes} bytes, and there is no room for them"
            _log.warning(
                "branch=not_kept epoch=%d reason=%r; make room, or raise branches_mb", chain.epoch, why
            )
            self._drop_followers(chain, since)
            return ""
        sources = _sources(chain, since, store, checkpoints)
        if record_bytes + sources.size_bytes > room:
            lacks = f"updates and checkpoint: {sources.size_bytes} bytes were more than there was room for"
            sources = _Sources((), (), lacks)
        new = self._shelf / _NEW
        about = self._make(new, chain, since, theirs, store, sources)
        target = self._shelf / about.name
        if target.exists():  # left before, and had again since: all of it is on our chain
            self._remove(target)
        os.rename(new, target)
        sync_folder(self._shelf)
        sync_folder(self._home.path)
        size_bytes = _size_bytes(target)
        self._kept = (*(k for k in self._kept if k.path != target), Kept(about, target, size_bytes))
        _log.warning(
            "branch=kept name=%s epochs=%d-%d bytes=%d lost=%r lacks=%r; `tapestry log --branches` shows it",
            *(about.name, since + 1, chain.epoch, size_bytes, about.why, about.lacks),
        )
        return about.name

    def fit(self) -> None:
        """Drop the oldest beyond the limits, which the room on the disk may have made smaller."""
        try:
            room = self._room()
        except OSError as error:
            _log.warning("branch=not_fitted reason=%r; look at the disk", str(error))
            return
        while self._kept and (len(self._kept) > self._limits.count_max or self._bytes() > room):
            allowed = f"{self._limits.count_max} and {room} bytes are kept, and it is the oldest"
            self._drop(self._kept[0], allowed)

    def _drop_followers(self, chain: Chain, since: int) -> None:
        """Of records after `since`, which are to go: nothing could prove them. Older ones may follow them."""
        follow = [
            one.about.since > since and chain.head_at(one.about.since) == one.about.since_head
            for one in self._kept
        ]
        while any(follow):
            self._drop(self._kept[0], "the records that it follows, or a newer branch does, are not kept")
            follow.pop(0)

    def _room(self) -> int:
        """Bytes that all branches may take: half of what would be free without them, at most."""
        return min(self._limits.bytes_max, (disk_free(self._home) + self._bytes()) // 2)

    def _bytes(self) -> int:
        return sum(one.size_bytes for one in self._kept)

    def _make(
        self,
        new: Path,
        chain: Chain,
        since: int,
        theirs: Sequence[Record],
        store: Store,
        sources: _Sources,
    ) -> About:
        """Step 1, in `new`."""
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700, parents=True)
        copy = Home(new)
        with copy.chain.open("xb") as file:
            store.copy_records_after(since, file)
            file.flush()
            os.fsync(file.fileno())
        lacks = _take_all(sources, copy)
        won = chain.place_at(since)
        for record in theirs:
            won = next_place(won, record)
        number = max((one.about.number for one in self._kept), default=0) + 1
        left_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        run_id, lost = chain.genesis.run_id, Side.of(chain.place)
        about = About(number, run_id, since, chain.head_at(since), lost, Side.of(won), left_at, lacks)
        atomic_write(copy.branch_json, about.line())
        for folder in (copy.updates, copy.checkpoints, new):
            sync_folder(folder)
        return about

    def _drop(self, one: Kept, why: str) -> None:
        _log.warning(
            "branch=dropped name=%s bytes=%d reason=%r; more are kept with larger limits in node.toml",
            one.name,
            one.size_bytes,
            why,
        )
        self._remove(one.path)
        self._kept = tuple(k for k in self._kept if k is not one)

    def _remove(self, path: Path) -> None:
        """Not half of it: `load` goes on with what a kill left. No disk that refuses it holds anything up."""
        gone = self._shelf / f"{_GONE}-{secrets.token_hex(8)}"  # one of before may still be there
        try:
            os.rename(path, gone)
        except OSError as error:
            _log.warning(
                "branch=not_deleted path=%s reason=%r; delete it, and look at the disk", path, str(error)
            )
        else:
            _delete(gone)


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        _log.warning(
            "branch=not_deleted path=%s reason=%r; delete it, and look at the disk", folder, str(error)
        )


def found(home: Home) -> list[Kept]:
    """The branches of a home, oldest first. One that cannot be read is none, and said. Raises OSError."""
    kept = []
    for path in folders(home):
        try:
            kept.append(Kept(read_about(path), path, _size_bytes(path)))
        except (ValueError, OSError) as error:
            if not is_damage(error) and not isinstance(error, FileNotFoundError):
                raise
            _log.warning(
                "branch=unreadable path=%s reason=%r; look at the disk: `tapestry verify` says more",
                path,
                str(error),
            )
    return sorted(kept, key=lambda one: one.about.number)


def folders(home: Home) -> list[Path]:
    """Of the branches, by name."""
    shelf = home.branches
    return sorted(p for p in shelf.glob("*-*") if not p.name.startswith(".") and p.is_dir())


def read_about(folder: Path) -> About:
    """Strict. Raises ValueError, OSError."""
    with Home(folder).branch_json.open("rb") as file:
        data = file.read(ABOUT_BYTES_MAX)
    raw = unseal(data.removesuffix(b"\n"))
    strict.table(raw, [field.name for field in dataclasses.fields(About)], "a branch")
    strict.integer(raw["number"], 1, 2**53, "number")
    strict.integer(raw["since"], 0, 2**53, "since")
    for name in ("run_id", "since_head"):
        strict.hexadecimal(raw[name], (64,), name)
    for name in ("left_at", "lacks"):
        strict.text(raw[name], 1000, name)
    about = About(**{**raw, "lost": Side.read(raw["lost"]), "won": Side.read(raw["won"])})
    if about.line() != data:
        raise ValueError("not in the form in which a node writes it")
    return about


@dataclass(frozen=True, slots=True)
class _Sources:
    """What of a home makes the states of a branch."""

    updates: tuple[Path, ...]
    checkpoints: tuple[Path, ...]  # one, or none
    lacks: str
    size_bytes: int = 0


def _sources(chain: Chain, since: int, store: Store, checkpoints: Checkpoints) -> _Sources:
    """Updates of the records after `since`, the newest checkpoint that leads there, and what is between."""
    wanted = dict.fromkeys(range(since + 1, chain.epoch + 1))
    begun, lacks = checkpoints.newest(chain), ""
    at = begun.epoch if begun is not None else chain.epoch
    while at < chain.epoch:
        at = chain.step_from(at, chain.epoch)
        if at in chain.rolled:
            continue
        wanted[at] = None
        if not lacks and not store.has_update(chain.head_at(at)):
            lacks = f"the update of epoch {at}"
    if begun is None:
        lacks = "a checkpoint"
    updates = [file for epoch in wanted if (file := store.update_file(chain.head_at(epoch))) is not None]
    paths = tuple(file.path for file in updates)
    size_bytes = sum(file.size_bytes for file in updates)
    if begun is None:
        return _Sources(paths, (), lacks, size_bytes)
    return _Sources(paths, (begun.path,), lacks, size_bytes + begun.size_bytes)


def _take_all(sources: _Sources, copy: Home) -> str:
    """Links, or copies. What the branch lacks then: a disk that does not give them, or has no room, is no
    reason to keep no records."""
    lacks = sources.lacks
    for paths, folder in ((sources.updates, copy.updates), (sources.checkpoints, copy.checkpoints)):
        folder.mkdir()
        for path in paths:
            try:
                _take(path, folder / path.name)
            except OSError as error:
                _log.warning(
                    "branch=incomplete path=%s reason=%r; look at the disk, and make room", path, str(error)
                )
                (folder / path.name).unlink(missing_ok=True)
                lacks = lacks or f"{path.name}: {error.strerror}"
    return lacks


def _take(path: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        os.link(path, target)
        return
    size_bytes = path.stat().st_size  # a file system without hard links
    if size_bytes > shutil.disk_usage(target.parent).free // 2:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    shutil.copyfile(path, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
