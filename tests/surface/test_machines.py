"""Whatever the environment: signals, modes, file systems."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from e2e.harness import LOOPBACK, TAPESTRY, tapestry

from tapestry.dht.identity import Identity
from tapestry.node.disk import files
from tapestry.node.home import Home


def test_a_home_ignores_itself_and_an_ignore_file_of_ones_own_stays(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create()
    (home.path / "identity.key").write_bytes(b"secret")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "-C", tmp_path, "add", "-A"], check=True)
    listed = subprocess.run(["git", "-C", tmp_path, "ls-files"], check=True, capture_output=True, text=True)
    assert listed.stdout == ""
    (home.path / ".gitignore").write_text("mine\n")
    home.create()
    assert (home.path / ".gitignore").read_text() == "mine\n"


def test_a_file_system_without_hard_links_takes_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    made = Identity.load_or_create(tmp_path / "key")
    assert Identity.load(tmp_path / "key").peer_id == made.peer_id
    assert os.listdir(tmp_path) == ["key"] and (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_folder_that_cannot_be_synced_is_told_once_and_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fsync = os.fsync

    def sync(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(fd)

    monkeypatch.setattr(files.os, "fsync", sync)
    for text in (b"one", b"two"):
        files.atomic_write(tmp_path / "file", text)
    assert (tmp_path / "file").read_bytes() == b"two"
    assert [record.getMessage().startswith(f"folder={tmp_path}") for record in caplog.records] == [True]


@pytest.mark.parametrize("delay_s", [0.0, 0.3])
def test_sigterm_while_a_node_starts_ends_it_though_nothing_else_would(
    tmp_path: Path, delay_s: float
) -> None:
    """Process 1 of a container has no default actions: here SIGTERM is blocked until the command is there."""
    code = (
        "import sys, time\n"
        "from tapestry.node.cli import start as module\n"
        "def slow(*_):\n"
        "    print('starting', flush=True)\n"
        "    while True: time.sleep(0.01)\n"
        "module._check_early = slow\n"
        "from tapestry.node.cli.main import main\n"
        f"sys.argv = ['tapestry', 'start', '--home', {str(tmp_path)!r}, '--data', 'stdlib']\n"
        "main()\n"
    )
    process = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "starting\n"
    time.sleep(delay_s)
    process.send_signal(signal.SIGTERM)
    with process.stdout:
        assert process.wait(10) == 0


@pytest.mark.e2e
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a /dev/shm of its own")
@pytest.mark.parametrize("mount", ["-o size=4k", "-o ro"], ids=["full", "read-only"])
def test_a_node_without_shared_memory_ends_in_one_line(tmp_path: Path, mount: str) -> None:
    home = Home(tmp_path / "home")
    made = tapestry("init", home.path, "--name", "x", "--preset", "nano")
    assert made.returncode == 0, made.stderr
    start = shlex.join([*TAPESTRY, "start", f"--home={home.path}", "--data=stdlib:1/3", *LOOPBACK])
    script = f"mount -t tmpfs {mount} tmpfs /dev/shm && {{ cat /dev/zero > /dev/shm/x; exec {start}; }}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
    assert done.returncode == 1 and len(said) == 2, done.stderr
    assert "most likely of /dev/shm" in said[0] and "df /dev/shm" in said[1]
    assert "Traceback" not in done.stderr + home.log.read_text()


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # of hivemind, at import
def test_an_ignored_hangup_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    from tapestry.node.daemon import life

    class Loop:
        def __init__(self) -> None:
            self.handled: list[int] = []

        def add_signal_handler(self, number: int, *_: object) -> None:
            self.handled.append(number)

    def handled(hangup: object) -> list[int]:
        loop = Loop()
        monkeypatch.setattr(life.asyncio, "get_running_loop", lambda: loop)
        monkeypatch.setattr(life.signal, "getsignal", lambda number: hangup)
        life.Daemon._handle_signals(object())  # type: ignore[arg-type]
        return loop.handled

    assert handled(signal.SIG_IGN) == [signal.SIGTERM, signal.SIGINT]
    assert handled(signal.SIG_DFL) == [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
