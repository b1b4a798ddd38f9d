"""The home directory: its lock, node.json, atomic writes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tapestry.node.disk.files import atomic_write
from tapestry.node.disk.home_mark import claim
from tapestry.node.disk.use import KINDS, disk_free, disk_use
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home, Liveness, NodeInfo

HOLD_THE_LOCK = """
import signal, sys
from pathlib import Path
from tapestry.node.home import Home
lock = Home(Path(sys.argv[1])).lock()
print("locked", flush=True)
signal.pause()
"""


@contextmanager
def _other_node(home: Home) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD_THE_LOCK, str(home.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


def _info(pid: int) -> NodeInfo:
    return NodeInfo(
        pid=pid,
        peer_id="12D3KooW",
        run_id="ab" * 32,
        addresses=("/ip4/127.0.0.1/tcp/4001/p2p/12D3KooW",),
        http="http://127.0.0.1:9470",
        version="0.1.0",
        started_at="2026-11-22T04:55:51Z",
    )


# ---- where it is -------------------------------------------------------------------------------------


def test_the_flag_goes_before_the_environment_and_that_before_the_platforms_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    env = {"TAPESTRY_HOME": "/from/env"}
    assert Home.locate("/from/flag", env).path == Path("/from/flag")
    assert Home.locate(None, env).path == Path("/from/env")
    assert Home.locate(None, {"TAPESTRY_HOME": ""}).path == tmp_path / "tapestry"


def test_a_relative_home_is_made_absolute_and_a_tilde_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert Home.locate("a", {}).path == tmp_path / "a"
    assert Home.locate("~/a", {}).path == Path("/home/someone/a")


def test_a_home_is_made_closed_to_others_and_one_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    home = Home(tmp_path / "a" / "b")
    home.create()
    home.create()
    assert home.path.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the home"):
        Home(tmp_path / "file" / "home").create()


# ---- the lock ----------------------------------------------------------------------------------------


def test_a_home_with_a_live_node_is_refused_with_its_pid_and_exit_code_2(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with _other_node(home) as other:
        with pytest.raises(UserError, match=rf"is in use by a live node \(pid {other.pid}\)") as caught:
            home.lock()
        assert caught.value.exit_code == ExitCode.USAGE
        assert home.holder() == other.pid


def test_the_lock_of_a_node_killed_with_sigkill_is_no_obstacle(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with _other_node(home) as other:
        other.kill()
        other.wait()
        assert home.holder() is None
        with home.lock():
            assert home.holder() == os.getpid()


def test_a_killed_node_that_nobody_reaped_yet_holds_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with _other_node(home) as other:
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
        assert home.holder() is None


def test_a_refused_start_does_not_disturb_the_holder(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with home.lock():
        for _ in range(3):
            with pytest.raises(UserError):
                home.lock()
            assert home.holder() == os.getpid()


def test_a_released_lock_can_be_taken_again_and_releasing_twice_is_harmless(tmp_path: Path) -> None:
    home = Home(tmp_path)
    lock = home.lock()
    lock.release()
    lock.release()
    assert home.holder() is None
    home.lock().release()


def test_a_reused_pid_is_not_taken_for_the_node(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.lock_file.write_text(f"{os.getpid()} 1\n")  # this pid, but it began at another time
    assert home.holder() is None


@pytest.mark.parametrize("content", [b"", b"12", b"a b", b"1 2 3", b"\xff\xff \xff", b"-1 -1", b"9" * 100])
def test_rubbish_in_the_lock_file_names_nobody(tmp_path: Path, content: bytes) -> None:
    Home(tmp_path).lock_file.write_bytes(content)
    assert Home(tmp_path).holder() is None


def test_a_home_that_cannot_be_locked_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot lock the home"):
        Home(tmp_path / "none").lock()


# ---- node.json ---------------------------------------------------------------------------------------


def test_node_json_has_the_keys_of_the_contract(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.write_node_json(_info(1))
    assert list(json.loads(home.node_json.read_text())) == [
        "pid",
        "peer_id",
        "run_id",
        "addresses",
        "http",
        "version",
        "started_at",
    ]


def test_a_node_is_starting_then_running_then_not_running(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert home.read_node_json().liveness is Liveness.NOT_RUNNING
    with home.lock():
        state = home.read_node_json()
        assert (state.liveness, state.pid, state.info) == (Liveness.STARTING, os.getpid(), None)
        home.write_node_json(_info(os.getpid()))
        state = home.read_node_json()
        assert (state.liveness, state.info) == (Liveness.RUNNING, _info(os.getpid()))
        home.remove_node_json()
        home.remove_node_json()
    assert home.read_node_json().liveness is Liveness.NOT_RUNNING


def test_a_node_json_whose_node_died_is_stale_and_still_says_what_ran(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.write_node_json(_info(os.getpid()))  # the pid lives, but it does not hold the home
    state = home.read_node_json()
    assert (state.liveness, state.pid, state.info) == (Liveness.STALE, None, _info(os.getpid()))


def test_a_stale_node_json_does_not_stand_for_the_node_that_is_starting(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.write_node_json(_info(1))
    with home.lock():
        assert home.read_node_json().liveness is Liveness.STARTING


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"pid": 1}', b"[" * 60_000],
)
def test_a_broken_node_json_is_as_none(tmp_path: Path, content: bytes) -> None:
    home = Home(tmp_path)
    home.node_json.write_bytes(content)
    assert home.read_node_json().liveness is Liveness.NOT_RUNNING


@pytest.mark.parametrize(
    ("key", "value"), [("pid", "1"), ("pid", True), ("addresses", "x"), ("addresses", [1]), ("http", None)]
)
def test_a_node_json_with_a_value_of_the_wrong_type_is_as_none(
    tmp_path: Path, key: str, value: object
) -> None:
    home = Home(tmp_path)
    home.write_node_json(_info(1))
    home.node_json.write_text(json.dumps(json.loads(home.node_json.read_text()) | {key: value}))
    assert home.read_node_json().info is None


# ---- atomic writes -----------------------------------------------------------------------------------


def test_an_atomic_write_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "vote.json"
    path.write_bytes(b"old")
    path.with_name("vote.json.tmp").write_bytes(b"left by a writer that was killed")
    atomic_write(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["vote.json"]


def test_a_write_that_finds_no_room_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "vote.json"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            atomic_write(path, b"x" * 8192)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["vote.json"]


def test_a_write_into_a_missing_folder_raises_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "none" / "file", b"x")
    assert os.listdir(tmp_path) == []


# ---- which home it is --------------------------------------------------------------------------------


def test_a_copied_home_is_not_confused_with_the_one_that_runs(tmp_path: Path) -> None:
    home, copy = Home(tmp_path / "a"), Home(tmp_path / "b")
    home.create()
    with _other_node(home) as other:
        home.write_node_json(_info(other.pid))
        shutil.copytree(home.path, copy.path)
        assert home.read_node_json().liveness is Liveness.RUNNING
        assert copy.read_node_json().liveness is Liveness.STALE
        assert (copy.is_held(), copy.holder()) == (False, None)
        copy.lock().release()


def test_a_node_in_another_pid_namespace_or_on_another_machine_is_there_and_its_pid_is_not_ours(
    tmp_path: Path,
) -> None:
    home = Home(tmp_path)
    with home.lock():
        words = home.lock_file.read_text().split()
        for index, foreign in ((2, "another-boot"), (3, "pid:[1]"), (1, "1")):
            changed = [*words[:index], foreign, *words[index + 1 :]]
            home.lock_file.write_text(" ".join(changed) + "\n")
            assert (home.is_held(), home.holder()) == (True, None)
            with pytest.raises(UserError, match="in another container or machine"):
                home.require_free()


def test_who_only_looks_keeps_no_node_from_starting(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.lock().release()
    looking = os.open(home.lock_file, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.05, os.close, [looking]).start()
    home.lock().release()


def test_a_home_that_moved_goes_on_and_a_copy_beside_it_is_refused_with_what_to_do(tmp_path: Path) -> None:
    home = Home(tmp_path / "a")
    home.create()
    home.identity_key.write_bytes(b"key")
    made = claim(home, "machine 1")
    assert claim(home, "machine 1") == made
    link = Home(tmp_path / "link")
    link.path.symlink_to(home.path)
    assert claim(link, "machine 1").id == made.id  # another way to the same folder
    assert claim(home, "machine 1").path == str(home.path)

    copy = Home(tmp_path / "b")
    shutil.copytree(home.path, copy.path)
    with pytest.raises(UserError, match=f"is a copy of {home.path}, which is still there") as caught:
        claim(copy, "machine 1")
    assert caught.value.exit_code == ExitCode.REFUSED and f"rm {copy.identity_key}" in (
        caught.value.hint or ""
    )
    shutil.rmtree(home.path)
    assert claim(copy, "machine 1") == replace(made, path=str(copy.path))
    assert claim(copy, "machine 2").machine == "machine 2"


def test_a_home_of_a_later_version_is_refused_and_a_damaged_mark_says_what_to_do(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.mark.write_text('{"format": 2, "what": "later versions know"}')
    with pytest.raises(UserError, match="made by a later version") as caught:
        claim(home)
    assert caught.value.exit_code == ExitCode.REFUSED
    for text in ("", "[]", '{"format": 1}', '{"format": 0, "id": "", "path": "", "machine": ""}'):
        home.mark.write_text(text)
        with pytest.raises(UserError, match="is damaged") as caught:
            claim(home)
        assert caught.value.hint == "remove it: it is made again"


def test_what_a_home_takes_on_disk_is_told_by_kind(tmp_path: Path) -> None:
    home = Home(tmp_path)
    for name, count in (
        ("updates/a", 8192),
        ("cache/x/y", 4096),
        ("node.log", 4096),
        ("node.log.1", 4096),
        ("egress.jsonl", 4096),
        ("egress-000001.jsonl", 4096),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * count)
    (tmp_path / "branches/x/updates").mkdir(parents=True)
    (tmp_path / "branches/x/updates/a").hardlink_to(tmp_path / "updates/a")  # counts once
    (tmp_path / "branches/x/updates/b").write_bytes(b"x" * 4096)
    (tmp_path / "checkpoints").symlink_to("/usr")  # led elsewhere: not of this home
    use = disk_use(home)
    assert {kind: count for kind, count in use.items() if count} == {
        "updates": 8192,
        "branches": 4096,
        "cache": 4096,
        "logs": 8192,
        "egress": 8192,
    }
    assert set(use) == set(KINDS) and disk_free(home) > 0
    assert set(disk_use(Home(tmp_path / "none")).values()) == {0}
