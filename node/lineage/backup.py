"""`tapestry backup OUT` and `restore`: a home as one file, taken beside a running node or from a stopped one.

What `exit` takes along (leave.py), and besides it where the others were, for a restored member looks for
its run, and what `rejoin --bring` left for the next contribution: the chain says whether that was made
meanwhile. Left out is what can be made again: token caches, logs, the running node's lock. Records, updates
and checkpoints are checked before the file gets its name, and again when it is restored; numbers are not
replayed: `verify` does.

A restored home is marked (disk/home_mark.py): its node looks for its run before it trains
(daemon/restored.py), because others may have gone on. What this member has promised them since is not in the
backup. So its votes are not restored either, nor with them the name of its disk: it is another disk
(docs/decisions/003-lost-disk.md).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from tapestry.node.disk.files import atomic_write, seal, sync_folder, unseal
from tapestry.node.disk.home_mark import new_mark, read_mark, write_mark
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage.leave import copy_run
from tapestry.node.lineage.proof import Proof
from tapestry.node.lineage.uses import note
from tapestry.node.progress import Told, counted

EXTRAS = (
    "peers.json",
    "listen.json",
    "history.jsonl",
    "http.token",
    "log-levels.json",
    "home.json",
    "brought.safetensors",
    "brought.given",
    "brought.offered",
    ".gitignore",
)
TOP = "tapestry-home"  # the folder in the archive
UNPACKED = ".restore"  # in the home, while it is restored


def backup(home: Home, out: Path, told: Told) -> Proof:
    """Write the file OUT, checked, or nothing. Raises UserError."""
    if not home.genesis.exists():
        raise UserError(f"{home.path} holds no run to back up", hint="name the home with --home DIR")
    if os.path.lexists(out):
        raise UserError(f"{out} is there already: name a new file")
    out = out.absolute()
    with _folder(out.with_name(f".{out.name}.backup-{os.getpid()}"), f"cannot write {out}") as folder:
        copy = Home(folder / TOP)
        copy.path.mkdir(mode=0o700)
        copy_run(home, copy, told)
        for name in EXTRAS:
            with contextlib.suppress(FileNotFoundError):
                shutil.copy2(home.path / name, copy.path / name)
        proof = _checked(copy, home.path, "nothing was written", told)
        archive = folder / "archive"
        fd = os.open(archive, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
            total = sum(path.stat().st_size for path in copy.path.rglob("*") if path.is_file())
            written = counted(told, "writing the archive bytes", total)
            tar.add(copy.path, TOP, filter=lambda info: _noted(info, written))
            file.flush()
            os.fsync(fd)
        os.replace(archive, out)
        sync_folder(out.parent)
    return proof


def restore(archive: Path, home: Home, told: Told) -> Proof:
    """Make `home` of a backup, checked, or nothing. Raises UserError.

    The folder may be there, as a user's home or a mount: with dot files and lost+found, and nothing else.
    All is unpacked and checked in a folder within, and then moved up. Until that is done HOME/.restoring says
    what is to be moved, and no node starts: after a kill another `restore` takes back what was moved, and
    begins anew.
    """
    with _as_user_error(f"cannot restore {archive} to {home.path}"):
        home.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            home.path.mkdir(mode=0o700)
            is_new = True
        except FileExistsError:
            is_new = False
            if not home.path.is_dir():
                raise _is_there(home) from None
        if not (home.restoring.exists() or home.is_held()):
            _require_empty(home)  # before the lock, which is a file: this folder may be another's
        with home.lock():
            _take_back(home)
            _require_empty(home)
            try:
                proof = _restored(archive, home, told)
            except BaseException:
                _take_back(home)
                if is_new:
                    shutil.rmtree(home.path)
                raise
            shutil.rmtree(home.path / UNPACKED, ignore_errors=True)
            return proof


def _restored(archive: Path, home: Home, told: Told) -> Proof:
    """With the home's lock held; the folder that all came from is left. Raises UserError, OSError."""
    _plan(home, [])
    folder = home.path / UNPACKED
    folder.mkdir(mode=0o700)
    _extract(archive, folder, told)
    copy = Home(folder / TOP)
    if not copy.genesis.is_file():
        raise UserError(f"{archive} is no backup of a home", hint="`tapestry backup OUT` makes one")
    proof = _checked(copy, archive, "nothing was restored", told)
    for of in (copy, Home(copy.island)):
        of.vote.unlink(missing_ok=True)
    mark = read_mark(copy) or new_mark(home)
    write_mark(copy, replace(mark, restored_at=datetime.now(UTC).isoformat(timespec="seconds")))
    note(copy, "restored")
    with contextlib.suppress(OSError):  # a mount may be another user's
        home.path.chmod(0o700)
    told("writing to the disk", 0, 1)
    os.sync()
    there = os.listdir(home.path)  # a user's .gitignore stays
    names = [name for name in os.listdir(copy.path) if name not in there]
    names.sort(key=lambda name: name == home.genesis.name)  # it makes it a home
    _plan(home, names)
    for name in names:
        os.replace(copy.path / name, home.path / name)
    sync_folder(home.path)
    home.restoring.unlink()
    sync_folder(home.path)
    return proof


def _plan(home: Home, names: list[str]) -> None:
    """What is to be moved up from now on."""
    atomic_write(home.restoring, seal(names), 0o600)


def _take_back(home: Home) -> None:
    """What a `restore` that did not come to its end has left. Raises UserError, OSError."""
    if not home.restoring.exists():
        return
    try:
        names = unseal(home.restoring.read_bytes())
    except ValueError as error:
        hint = f"remove what `restore` left in {home.path} by hand, and give it again"
        raise UserError(f"{home.restoring} is damaged: {error}", hint=hint) from error
    for name in names:
        if not os.path.lexists(home.path / UNPACKED / TOP / name):  # it was moved
            _remove(home.path / name)
    _plan(home, [])
    _remove(home.path / UNPACKED)
    home.restoring.unlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _require_empty(home: Home) -> None:
    """But for what a new user's home and a new file system have, and the lock."""
    others = (home.lock_file.name, "lost+found")
    if any(not name.startswith(".") and name not in others for name in os.listdir(home.path)):
        raise _is_there(home)


def _is_there(home: Home) -> UserError:
    return UserError(f"{home.path} is there already", hint="move it away, or restore to another --home DIR")


def _extract(archive: Path, folder: Path, told: Told) -> None:
    """What a home can hold, below TOP alone, whatever the archive says. Raises UserError, OSError."""
    try:
        with tarfile.open(archive, "r:") as tar:
            members = tar.getmembers()
            for member in members:
                if not _is_ours(member):
                    raise UserError(f"{archive} is no backup of a home: it holds {member.name!r}")
            written = counted(told, "unpacking bytes", sum(member.size for member in members))
            for member in sorted(members, key=tarfile.TarInfo.issym):
                _write(tar, member, folder / member.name)
                written(member.size)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive} is no backup of a home, or is damaged: {error}") from error


def _noted(member: tarfile.TarInfo, written: Callable[[int], None]) -> tarfile.TarInfo:
    """tarfile asks before it writes each."""
    written(member.size)
    return member


def _is_ours(member: tarfile.TarInfo) -> bool:
    """Whether a home can hold it. Of links: `base` of an island alone, to the home's (island.py)."""
    parts = PurePosixPath(member.name).parts
    if parts[:1] != (TOP,) or ".." in parts or parts[1:] == ("lock",):
        return False
    if parts[1:] and parts[1].startswith(".") and parts[1] not in EXTRAS:  # .ssh, where a user lives
        return False
    if member.issym():
        is_island = parts[1:-1] == ("island",) or (len(parts) == 4 and parts[1] == "islands")
        return is_island and parts[-1] == "base" and member.linkname == "../" * (len(parts) - 2) + "base"
    return member.isfile() or member.isdir()


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Its bytes, and nobody else's right to write. (`extract` has filters from Python 3.11.4 on.)

    Links come last (_extract), so that nothing is written through one.
    """
    folder = path if member.isdir() else path.parent
    folder.mkdir(parents=True, exist_ok=True)
    if member.issym():
        path.symlink_to(member.linkname)
        return
    content = tar.extractfile(member)
    if content is not None:
        with content, path.open("xb") as file:
            shutil.copyfileobj(content, file)
    path.chmod(member.mode & 0o755)


def _checked(copy: Home, source: Path, else_: str, told: Told) -> Proof:
    from tapestry.node.lineage.verify import verify_home  # torch: seconds, and refusals come before

    proof = verify_home(copy, replay=False, told=told)
    if not proof.holds:
        raise UserError(
            f"{source} does not hold, and {else_}",
            exit_code=ExitCode.FAILED,
            details=[str(fault) for fault in proof.faults],
            hint="take another backup; `tapestry verify HOME` looks at a home",
        )
    return proof


@contextmanager
def _folder(path: Path, failure: str) -> Iterator[Path]:
    """A folder that is gone afterwards. Raises UserError for an OSError in it."""
    with _as_user_error(failure):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700)
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _as_user_error(failure: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{failure}: {error.strerror or error}",
            exit_code=ExitCode.FAILED,
            hint="is there room, and may this user write there?",
        ) from error
