"""`tapestry exit OUT`: everything that a member has of a run, as one directory that holds by itself.

OUT is a home: identity, genesis, chain, updates, checkpoints, the base's files, the trainer's own state,
settings, history, islands, what lost at forks, derivatives and proofs of lies. It is made beside a running
node or from a stopped one, verified before it gets its name, and asks nobody's leave. What is left out is
what can be made again or would lead back: token caches, the running node's lock and addresses, and where
the others were. So a first `tapestry start --home OUT` asks for `--island`, or for a peer to go on with.

What `rejoin --bring` has left for the next contribution (HOME/brought.safetensors) is left out as well: it is
owed to the run once, by the home that came back, and OUT trains on alone. What it was made of is in islands/.
A backup takes it.

The identity is the same one: a member that goes on from OUT does not start the old home again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from tapestry.node.disk.branches import folders
from tapestry.node.disk.files import has_another_end
from tapestry.node.disk.linked import copy_linked
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.follow import Broken, read_records
from tapestry.node.lineage.proof import Proof
from tapestry.node.progress import Told, counted

# Beside chain, updates and checkpoints, which are taken at one epoch.
FILES = (
    "identity.key",
    "genesis.json",
    "descriptions.json",
    "vote.json",
    "run.toml",
    "node.toml",
    "gates.toml",
    "suite.toml",
    "data.toml",
    "history.jsonl",
)
FOLDERS = ("base", "trainer", "derivatives", "island", "islands", "accusations")
LEFT_OUT = shutil.ignore_patterns(".cache", "*.tmp", "*.part", "*.corrupt")


def leave(home: Home, out: Path, told: Told) -> Proof:
    """Write OUT, verified, or nothing. Raises UserError, with what does not hold as its details."""
    if not home.genesis.exists():
        raise UserError(f"{home.path} holds no run to leave with")
    if out.exists():
        raise UserError(f"{out} is there already: name a new folder")
    new = out.absolute().with_name(f".{out.name}.exit-{os.getpid()}")
    try:
        new.mkdir(mode=0o700, parents=True)
        copy_run(home, Home(new), told)
        Home(new).exit_mark.touch(mode=0o600)
        from tapestry.node.lineage.verify import verify_home  # torch: seconds, and refusals come before

        proof = verify_home(Home(new), told=told)
        if not proof.holds:
            raise UserError(
                f"{home.path} does not hold, and nothing was written",
                exit_code=ExitCode.FAILED,
                details=[str(fault) for fault in proof.faults],
                hint=f"tapestry verify {home.path}",
            )
        os.replace(new, out.absolute())
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror or error}", exit_code=ExitCode.FAILED
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return proof


def copy_run(home: Home, copy: Home, told: Told) -> None:
    """The chain first; then of updates and checkpoints those that it has. A live node goes on meanwhile."""
    for name in FILES:
        with contextlib.suppress(FileNotFoundError):  # a live node may just take it away
            shutil.copy2(home.path / name, copy.path / name)
    if home.chain.exists():
        shutil.copy2(home.chain, copy.chain)
        _cut_unfinished(copy.chain)
    for linked in (home.data_events, home.egress):
        copy_linked(linked, copy.path)
    epoch = _epochs(copy.chain)
    for source, target in ((home.checkpoints, copy.checkpoints), (home.updates, copy.updates)):
        target.mkdir()
        _copy_until(source, target, epoch, told)
    _copy_branches(home, copy, told)
    for name in FOLDERS:
        if (home.path / name).is_dir():
            told(name, 0, 1)
            links = name in ("island", "islands")
            shutil.copytree(home.path / name, copy.path / name, symlinks=links, ignore=_left_out)


def _copy_branches(home: Home, copy: Home, told: Told) -> None:
    """What lost at forks. One that the live node drops meanwhile is dropped here too."""
    shelf = folders(home)
    for done, path in enumerate(shelf):
        told("branches", done, len(shelf))
        target = copy.branches / path.name
        try:
            shutil.copytree(path, target, ignore=_left_out)
        except (FileNotFoundError, shutil.Error):
            if path.exists():
                raise
            shutil.rmtree(target, ignore_errors=True)


def _left_out(folder: str, names: list[str]) -> set[str]:
    """What can be made again, and locks: a folder of that name is somebody's derivative."""
    locks = {name for name in names if name == "lock" and not os.path.isdir(os.path.join(folder, name))}
    return LEFT_OUT(folder, names) | locks


def _copy_until(source: Path, target: Path, epoch: int, told: Told) -> None:
    """Files of epochs that the chain has. One that the live node prunes meanwhile is needed no more."""
    paths = [path for path in sorted(source.glob("*-*")) if path.suffix in (".upd", ".safetensors")]
    copied = counted(told, f"copying {source.name} bytes", sum(_size(path) for path in paths))
    for path in paths:
        if int(path.name.partition("-")[0]) > epoch:
            continue
        try:
            shutil.copy2(path, target / path.name)
        except FileNotFoundError:
            (target / path.name).unlink(missing_ok=True)
        copied(_size(path))


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _epochs(chain: Path) -> int:
    """Up to where its lines hold; what does not is said when the copy is verified."""
    count = 0
    with contextlib.suppress(Broken):
        for _ in read_records(chain, ReaderCrypto()):
            count += 1
    return count


def _cut_unfinished(chain: Path) -> None:
    """The line that a live node was just writing; not one whose newline was damaged."""
    with chain.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            file.seek(end - 1)
            if file.read(1) == b"\n":
                break
            end -= 1
        file.seek(end)
        if not has_another_end(file.read()):
            file.truncate(end)
