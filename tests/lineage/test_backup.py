"""`tapestry backup` and `restore`: one file, checked, and a home that knows what it was made of."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from homes import MadeHome, base_spec, make_home

from tapestry.node.disk.files import seal
from tapestry.node.disk.home_mark import claim, read_mark
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage import backup as backup_module
from tapestry.node.lineage import island
from tapestry.node.lineage.backup import backup, restore
from tapestry.node.lineage.verify import verify
from tapestry.node.spec.training import PRESETS


def _quiet(_what: str, _done: int, _total: int) -> None:
    return None


@pytest.fixture
def made(tmp_path: Path) -> MadeHome:
    (tmp_path / "m").mkdir()
    made = make_home(tmp_path / "m" / "home", PRESETS["nano"].model)
    made.advance(3, checkpoint=True)
    made.home.peers.write_text("{}")
    made.home.log.write_text("a log")
    (made.home.path / ".gitignore").write_text("ours")
    made.home.vote.write_bytes(seal({"life": "of the disk that is backed up"}) + b"\n")
    claim(made.home)
    return made


def test_a_restored_home_is_what_was_backed_up_and_is_marked(made: MadeHome, tmp_path: Path) -> None:
    out, home = tmp_path / "backup.tar", Home(tmp_path / "again")
    steps: dict[str, tuple[int, int]] = {}

    def told(what: str, done: int, total: int) -> None:
        steps[what] = (done, total)

    assert backup(made.home, out, told).epoch == 3
    assert out.stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["backup.tar", "m"]
    assert restore(out, home, told).epoch == 3
    for what in ("copying checkpoints bytes", "copying updates bytes", "writing the archive bytes"):
        assert steps[what][0] == steps[what][1] > 1000, what
    assert steps["unpacking bytes"] == steps["writing the archive bytes"]
    assert sorted(os.listdir(tmp_path)) == ["again", "backup.tar", "m"]
    assert verify(home.path, told=_quiet).replayed_to == 3
    assert home.identity_key.read_bytes() == made.home.identity_key.read_bytes()
    assert home.path.stat().st_mode & 0o777 == 0o700 and home.identity_key.stat().st_mode & 0o777 == 0o600
    assert home.peers.exists() and not home.log.exists()
    assert made.home.vote.exists() and not home.vote.exists()  # what it promised since, nobody knows here
    mark, before = read_mark(home), read_mark(made.home)
    assert mark is not None and before is not None and before.restored_at == ""
    assert mark.restored_at and mark.id == before.id
    with pytest.raises(UserError, match="is a copy of"):
        claim(home)  # the original is still there


def test_a_home_on_an_island_is_restored_with_the_base_that_its_island_leads_to(tmp_path: Path) -> None:
    made = make_home(tmp_path / "home", base_spec(tmp_path / "home", "qwen3"))
    made.advance(1, checkpoint=True)
    island.begin(made.home)
    made.advance(1, checkpoint=True, alone=True)
    island.end(made.home)
    island.begin(made.home)
    made.home.brought.write_bytes(b"what is still owed to the run")
    (made.home.island / "vote.json").write_text("of before the island")
    derivative = made.home.path / "derivatives" / "lock" / "v1"
    derivative.mkdir(parents=True)
    (derivative.parent / "lock").touch()
    (derivative / "history.json").write_text("[]")
    backup(made.home, tmp_path / "backup.tar", _quiet)
    home = Home(tmp_path / "again")
    assert restore(tmp_path / "backup.tar", home, _quiet).epoch == 1
    (left,) = (home.path / "islands").iterdir()
    for place in (home.island, left):
        assert (place / "base").resolve() == home.base and (home.base / "config.json").is_file()
    assert island.require(home)[0].epoch == 1
    assert not (home.island / "vote.json").exists()
    assert home.brought.read_bytes() == b"what is still owed to the run"
    assert (home.path / "derivatives/lock/v1/history.json").is_file()
    assert not (home.path / "derivatives/lock/lock").exists()


def test_nothing_is_overwritten_and_nothing_is_left_of_what_fails(made: MadeHome, tmp_path: Path) -> None:
    out = tmp_path / "backup.tar"
    out.write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        backup(made.home, out, _quiet)
    out.unlink()
    with pytest.raises(UserError, match="holds no run"):
        backup(Home(tmp_path / "none"), out, _quiet)
    backup(made.home, out, _quiet)
    with pytest.raises(UserError, match="is there already"):
        restore(out, made.home, _quiet)
    (path,) = made.home.updates.glob("00000002-*")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="does not hold, and nothing was written"):
        backup(made.home, tmp_path / "second.tar", _quiet)
    assert sorted(os.listdir(tmp_path)) == ["backup.tar", "m"]


@pytest.fixture
def archive(made: MadeHome, tmp_path: Path) -> Path:
    backup(made.home, tmp_path / "m" / "backup.tar", _quiet)
    return tmp_path / "m" / "backup.tar"


def _new_users_home(path: Path) -> Home:
    """As `useradd --create-home` makes it, on a file system of its own."""
    (path / "lost+found").mkdir(parents=True)
    (path / ".config").mkdir()
    for name in (".bashrc", ".gitignore"):
        (path / name).write_text("theirs")
    return Home(path)


def test_a_backup_is_restored_to_the_home_of_a_new_user_or_a_mount(archive: Path, tmp_path: Path) -> None:
    """The folder above it may be root's, and another file system: nothing is made there."""
    home = _new_users_home(tmp_path / "var" / "tapestry")
    before, beside = set(os.listdir(home.path)), set()
    restore(archive, home, lambda *_: beside.update(os.listdir(home.path.parent)))
    assert beside == {"tapestry"} and verify(home.path, told=_quiet).holds
    assert before < set(os.listdir(home.path))
    assert all((home.path / name).read_text() == "theirs" for name in (".bashrc", ".gitignore"))
    assert not home.restoring.exists() and home.path.stat().st_mode & 0o777 == 0o700
    home.require_way(alone=False)


def test_a_folder_that_is_no_home_is_not_touched(archive: Path, tmp_path: Path) -> None:
    """Not even by the lock, which is a file of that name."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "lock").write_text("mine")
    (folder / "notes").touch()
    with pytest.raises(UserError, match="there already"):
        restore(archive, Home(folder), lambda *_: None)
    assert sorted(os.listdir(folder)) == ["lock", "notes"] and (folder / "lock").read_text() == "mine"


def test_what_cannot_be_restored_leaves_a_home_that_was_there_as_it_was(
    made: MadeHome, tmp_path: Path
) -> None:
    home = _new_users_home(tmp_path / "home")
    before = sorted(os.listdir(home.path))
    bad = _archive(tmp_path / "x.tar", _member("tapestry-home/a"))
    with pytest.raises(UserError, match="is no backup"):
        restore(bad, home, _quiet)
    assert sorted(set(os.listdir(home.path)) - {"lock"}) == before
    home.node_toml.write_text("threads = 1")
    with pytest.raises(UserError, match="is there already"):
        restore(bad, home, _quiet)
    with home.lock(), pytest.raises(UserError, match="is in use"):
        restore(bad, home, _quiet)
    assert home.node_toml.read_text() == "threads = 1"


class Killed(BaseException):
    """What happens after it does not happen."""


def _kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the so-manieth time that something is named anew or removed."""
    left = iter(range(step, -1, -1))

    def patched(module: ModuleType, name: str) -> None:
        real = getattr(module, name)

        def killing(*args: Any, **named: Any) -> Any:
            if next(left, 0) == 0:
                monkeypatch.setattr(backup_module, "_take_back", lambda home: None)
                raise Killed
            return real(*args, **named)

        monkeypatch.setattr(module, name, killing)

    patched(os, "replace")
    patched(os, "sync")
    patched(shutil, "rmtree")
    patched(Path, "unlink")


def test_a_restore_that_is_killed_leaves_no_home_that_looks_whole_and_is_given_again(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it leaves one that is whole."""
    home = _new_users_home(tmp_path / "home")
    before = set(os.listdir(home.path))
    restore(archive, home, _quiet)
    whole, halves, wholes = set(os.listdir(home.path)), 0, 0
    for step in range(100):
        home = _new_users_home(tmp_path / f"home{step}")
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            _kill_at(step, patch)
            restore(archive, home, _quiet)
            break
        left = set(os.listdir(home.path)) - before - {"lock", ".restoring.tmp"}
        if home.restoring.exists():
            halves += home.identity_key.exists() or home.genesis.exists()
            with pytest.raises(UserError, match="was not restored to its end"):
                home.require_way(alone=False)
        elif left:
            wholes += 1
            assert verify(home.path, told=_quiet).holds
            with pytest.raises(UserError, match="is there already"):
                restore(archive, home, _quiet)
        if not home.genesis.exists() or home.restoring.exists():
            restore(archive, home, _quiet)
        home.require_way(alone=False)
        assert set(os.listdir(home.path)) - {".restore"} == whole
        assert (home.path / ".gitignore").read_text() == "theirs"
    assert step > 10 and halves > 3 and wholes > 0


def test_what_somebody_put_into_a_half_restored_home_is_not_taken_away(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = _new_users_home(tmp_path / "home")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        _kill_at(4, patch)
        restore(archive, home, _quiet)
    home.node_toml.write_text("threads = 1")
    with pytest.raises(UserError, match="is there already"):
        restore(archive, home, _quiet)
    assert home.node_toml.read_text() == "threads = 1"


def _archive(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "member",
    [
        _member("../escape"),
        _member("/etc/escape"),
        _member("tapestry-home/../../escape"),
        _member("tapestry-home/link", tarfile.SYMTYPE, "/etc"),
        _member("tapestry-home/island/base", tarfile.SYMTYPE, "../../base"),
        _member("tapestry-home/islands/base", tarfile.SYMTYPE, "../base"),
        _member("tapestry-home/island/base/base", tarfile.SYMTYPE, "../../base"),
        _member("tapestry-home/trainer/base", tarfile.SYMTYPE, "../base"),
        _member("tapestry-home/hard", tarfile.LNKTYPE, "/etc/passwd"),
        _member("tapestry-home/pipe", tarfile.FIFOTYPE),
        _member("other/file"),
        _member("tapestry-home/lock"),
        _member("tapestry-home/.restoring"),
        _member("tapestry-home/.ssh/authorized_keys"),
        _member("tapestry-home/.restore", tarfile.DIRTYPE),
    ],
    ids=lambda member: member.name,
)
def test_an_archive_that_is_no_backup_writes_nothing(tmp_path: Path, member: tarfile.TarInfo) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    archive = _archive(inside / "x.tar", _member("tapestry-home", tarfile.DIRTYPE), member)
    with pytest.raises(UserError, match="it holds"):
        restore(archive, Home(inside / "home"), _quiet)
    assert os.listdir(inside) == ["x.tar"] and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("data", [b"", b"not a tar", b"\0" * 2048])
def test_a_damaged_archive_says_so(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(UserError, match="is no backup of a home"):
        restore(tmp_path / "x.tar", Home(tmp_path / "home"), _quiet)
