"""Training on alone, on purpose: `start --island`, and the way back.

HOME/island is the home as it was when the island began: its chain, updates and checkpoints (as links, so that
what the island prunes stays), its vote and the trainer's state. The epochs made alone go into the home as
ever: the first of them is a forced record, whose electorate is this member alone. They are a branch: nobody
else has them, and the run's other members would not take them.

The way back first makes a derivative of what was learnt alone (sovereign/build.py, keep_island), or writes
down its difference, to be contributed (bring.py). Then `end` puts the home of before in its place; the
island's records, updates and checkpoints go to HOME/islands/EPOCH-HEAD, which `verify` accepts. The vote of
before comes back too: what this member promised to the others it still keeps. A command that was killed in
the middle is given again and goes on.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tapestry.node.disk.files import atomic_write, sync_folder, unseal
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.follow import read_genesis
from tapestry.node.lineage.snapshot import snapshot
from tapestry.node.lineage.uses import note
from tapestry.node.protocol.record import record_from_dict

# The chain last: while it is the island's, the way back is not finished.
MOVED = ("vote.json", "trainer", "updates", "checkpoints", "chain.jsonl")


@dataclass(frozen=True, slots=True)
class Tip:
    """The end of a chain."""

    epoch: int
    head: str
    run_id: str


def begin(home: Home) -> Tip:
    """Keep the home as it is, unless it is on an island already. Where the island began.

    Raises UserError, OSError.
    """
    if not home.island.exists():
        home.require_way(alone=True)
        if (left := _begun(home.path / "islands")) is not None:
            _put_away(left)  # the last way back was killed when all was in its place
        new = home.island.with_name("island.new")
        shutil.rmtree(new, ignore_errors=True)
        snapshot(home, new)
        for name in ("vote.json", "trainer"):
            source = home.path / name
            if source.is_dir():
                shutil.copytree(source, new / name)
            elif source.exists():
                shutil.copyfile(source, new / name)
        if home.base.exists():
            (new / "base").symlink_to(os.path.join("..", "base"))
        sync_folder(new)
        os.rename(new, home.island)
        sync_folder(home.path)
    return tip(Home(home.island))


def require(home: Home) -> tuple[Tip, Tip]:
    """Where the island began, and where it is. Raises UserError if there is none."""
    if not home.island.exists():
        raise UserError(
            f"{home.path} is on no island",
            hint="`tapestry start --island` trains on alone, from a home or an exit",
        )
    return tip(Home(home.island)), tip(home)


def is_ending(home: Home) -> bool:
    """Whether a way back was begun and not finished."""
    return home.island.exists() and _begun(home.path / "islands") is not None


def end(home: Home) -> Path | None:
    """Put the home of before in its place. Where the island's records lie now; None if it made none.

    Raises UserError.
    """
    here, began = tip(home), tip(Home(home.island))
    shelf = home.path / "islands"
    try:
        target = _begun(shelf) or shelf / f".{here.epoch:08d}-{here.head[:16]}"
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not Home(target).left_island.exists():  # else the chain there may be put back already
            atomic_write(Home(target).left_island, json.dumps({"since_epoch": began.epoch}).encode(), 0o600)
        if not (target / "genesis.json").exists():
            shutil.copyfile(home.genesis, target / "genesis.json")
            if home.base.exists():
                (target / "base").symlink_to(os.path.join("..", "..", "base"))
        for name in MOVED:
            _exchange(home.path / name, home.island / name, target / name)
        sync_folder(home.path)
        note(home, "rejoined", run_id=began.run_id, epoch=began.epoch)
        shutil.rmtree(home.island)
        return _put_away(target)
    except OSError as error:
        raise UserError(
            f"cannot put {home.path} back: {error.strerror or error}",
            exit_code=ExitCode.FAILED,
            hint="mend the disk and give the command again: it goes on",
        ) from error


def _exchange(now: Path, before: Path, aside: Path) -> None:
    """`now` goes aside and `before` takes its place; what was done already is not done again."""
    if before.exists():
        if now.exists() and not aside.exists():
            os.rename(now, aside)
        os.rename(before, now)
    elif not aside.exists() and now.exists():
        os.rename(now, aside)  # there was none before


def _put_away(target: Path) -> Path | None:
    """What lies aside gets its name; it goes if no epoch was made on it, by what the way back wrote first."""
    name = target.name.removeprefix(".")
    since = json.loads(Home(target).left_island.read_bytes())["since_epoch"]
    if int(name.partition("-")[0]) == int(since):
        shutil.rmtree(target)
        return None
    os.rename(target, target.with_name(name))
    return target.with_name(name)


def _begun(shelf: Path) -> Path | None:
    """A way back that was not finished."""
    return next(iter(sorted(shelf.glob(".*-*"))), None) if shelf.exists() else None


def tip(home: Home) -> Tip:
    """Of the last whole record, whose signatures are not checked here. Raises UserError."""
    crypto = ReaderCrypto()
    try:
        genesis, _ = read_genesis(home.genesis, crypto)
        last = b""
        if home.chain.exists():
            with home.chain.open("rb") as lines:
                for line in lines:
                    last = line if line.endswith(b"\n") else last
        if not last:
            return Tip(0, genesis.run_id, genesis.run_id)
        record = record_from_dict(unseal(last[:-1]), crypto)
        return Tip(record.body.epoch, record.head, genesis.run_id)
    except (OSError, ValueError) as error:
        raise UserError(f"{home.path} holds no run that can be read: {error}") from error
