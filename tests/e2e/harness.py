"""Real daemons on loopback for the end-to-end tests: start, watch, kill, and leave nothing behind.

The nodes are subprocesses of the installed command; what is asserted is what they print, serve and leave on
disk. Every wait has a deadline; a test that times out shows the node's log.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from e2e.nursery import Forked, Nursery

TAPESTRY = (sys.executable, "-P", "-m", "tapestry.node.cli")
GUESTS = 1000  # of one invitation, the most that there may be
LOOPBACK = ("--listen", "/ip4/127.0.0.1/tcp/0", "--http", "127.0.0.1:0")
DEADLINE_S = 90.0  # on two cores that other tests use as well
CLONE_NEWNET = 0x40000000  # linux/sched.h

# A sitecustomize.py that moves a process's wall clock. p2pd is not Python and keeps its own; it tells nobody
# the time of day.
SHIFTED_CLOCK = """
import os, time
_shift_s = float(os.environ["CLOCK_SHIFT_S"])
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + _shift_s
time.time_ns = lambda: _time_ns() + int(_shift_s * 1e9)
"""


def tapestry(*arguments: object, timeout_s: float = DEADLINE_S) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; one that imports much comes from the nursery."""
    if arguments[0] in ("start", "export"):
        return _forked([*map(str, arguments)], timeout_s)
    return subprocess.run(
        [*TAPESTRY, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(),
        check=False,
    )


def _forked(arguments: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = Nursery.get().start(arguments, environment(), stdout.fileno(), stderr.fileno())
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(arguments, code, stdout.read(), stderr.read())


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("TAPESTRY_")} | {"OMP_NUM_THREADS": "1"}


def init(folder: Path, *flags: object, is_open: bool = False, **changes: str) -> Path:
    """A home as `init` makes it (preset nano without flags); `key = value` lines of run.toml are replaced.

    The run is one of members, who come by `Node.invitation`. `is_open`: whoever has an address contributes,
    and is a member after one contribution.
    """
    flags = flags or ("--preset", "nano")
    if is_open:
        flags, changes = (*flags, "--admission", "open"), {"open_votes_after": "1"} | changes
    done = tapestry("init", folder, "--name", "test", *flags)
    assert done.returncode == 0, done.stderr
    run = folder / "run.toml"
    lines = run.read_text().splitlines()
    for key, value in changes.items():
        assert any(line.startswith(f"{key} = ") for line in lines), key
        lines = [f"{key} = {value}" if line.startswith(f"{key} = ") else line for line in lines]
    if changes.get("rule") == '"mean"':  # it has no use for norms
        lines = [line for line in lines if not line.startswith("norm_max = ")]
    run.write_text("\n".join(lines) + "\n")
    node = folder / "node.toml"
    node.write_text(node.read_text().replace("threads = 0", "threads = 1"))
    return folder


class Node:
    """One daemon and its home. Use as a context manager, or call `end`.

    With `prefix` (`ip netns exec NAME`) it lives in that network namespace, its HTTP on the loopback there.
    It comes from the nursery, unless it is to be a command of its own: `forked=False`, or a prefix, a program
    or an environment of its own.
    """

    def __init__(
        self,
        home: Path,
        *flags: object,
        data: str = "stdlib:1/3",
        prefix: Sequence[str] = (),
        address: str = "127.0.0.1",
        forked: bool = True,
    ) -> None:
        self.home = home
        self.flags = [str(f) for f in flags]
        self.data = data
        self.prefix = list(prefix)
        self.listen = f"/ip4/{address}/tcp/0"
        self.environment: dict[str, str] = {}  # beside our own
        self.program: Sequence[str] = TAPESTRY
        self.forked = forked
        self.process: subprocess.Popen[bytes] | Forked | None = None
        self._line = ""  # of its invitation
        self.log = home.with_name(home.name + ".log")

    def shift_clock(self, shift_s: float) -> None:
        """From its next start its wall clock is so many seconds ahead."""
        folder = self.home.with_name(self.home.name + ".clock")
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(SHIFTED_CLOCK)
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
        self.environment = {"PYTHONPATH": path, "CLOCK_SHIFT_S": str(shift_s)}

    def lie(self, name: str, switch: Path | None = None) -> None:
        """From its next start it is a liar of scripts/liars; while the file `switch` exists, or always."""
        self.environment = {"LIAR": name} | ({"LIE_WHILE": str(switch)} if switch is not None else {})

    def start(self, *more: object) -> Node:
        arguments = ["start", "--home", str(self.home), "--data", self.data]
        arguments += ["--listen", self.listen, "--http", "127.0.0.1:0", *self.flags, *map(str, more)]
        with self.log.open("ab") as log:
            lies, bare = "LIAR" in self.environment, self.program is TAPESTRY and not self.prefix
            if self.forked and bare and (lies or not self.environment):
                wanted = environment() | self.environment
                self.process = Nursery.get().start(arguments, wanted, log.fileno(), log.fileno())
                return self
            assert not lies, "a liar comes from the nursery"
            self.process = subprocess.Popen(
                [*self.prefix, *self.program, *arguments],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment() | self.environment,
            )
        return self

    def __enter__(self) -> Node:
        return self.start() if self.process is None else self

    def __exit__(self, *_: object) -> None:
        self.end()

    def wait_ready(self, deadline_s: float = DEADLINE_S) -> Node:
        """Until node.json is this process's."""
        self.wait("node.json", lambda: self.json()["pid"] == self.pid, deadline_s)
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def address(self) -> str:
        address: str = self.json()["addresses"][0]
        return address

    def invitation(self, address: str = "") -> str:
        """The line by which others join, by way of this node or of another's `address`. Made once, while this
        node runs, which must be the founder's."""
        if not self._line:
            done = tapestry("invite", "--home", self.home, "--uses", GUESTS)
            assert done.returncode == 0, done.stderr
            self._line = done.stdout.strip()
        own, _, rest = self._line.partition(",")
        return f"{address or own},{rest}"

    def json(self) -> dict[str, Any]:
        table: dict[str, Any] = json.loads((self.home / "node.json").read_text())
        return table

    def get(self, path: str) -> str:
        url = self.json()["http"].rstrip("/") + path
        with self.network(), urllib.request.urlopen(url, timeout=5) as answer:
            text: str = answer.read().decode()
            return text

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """This thread is in the node's network namespace."""
        if not self.prefix:
            yield
            return
        with open("/proc/thread-self/ns/net") as ours, open(f"/run/netns/{self.prefix[-1]}") as its:
            _enter(its.fileno())
            try:
                yield
            finally:
                _enter(ours.fileno())

    def status(self) -> dict[str, Any]:
        table: dict[str, Any] = json.loads(self.get("/status"))
        return table

    def electorate(self) -> int:
        """How many may vote in the round under way; 0 between two rounds."""
        round_ = self.status()["round"]
        return round_["electorate"] if round_ else 0

    def wait(self, what: str, condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
        """Poll until `condition` holds; what cannot be read yet does not hold."""
        end = time.monotonic() + deadline_s
        while True:
            assert self.process is not None
            try:
                if condition():
                    return
            except (OSError, ValueError, KeyError):
                pass
            ended = self.process.poll()
            if ended is not None or time.monotonic() > end:
                raise AssertionError(f"{self.home.name}: no {what} (exit {ended}):\n{self.tail()}")
            time.sleep(0.05)

    def wait_epoch(self, epoch: int, deadline_s: float = DEADLINE_S) -> None:
        self.wait(f"epoch {epoch}", lambda: self.status()["epoch"] >= epoch, deadline_s)

    def tail(self, count: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def p2pd(self) -> psutil.Process | None:
        """The live p2pd of this node, if there is one."""
        return self._child(lambda command: "p2pd" in command)

    def trainer(self) -> psutil.Process | None:
        """The live trainer of this node, if there is one: the other child, since one that was forked has the
        nursery's command line."""
        return self._child(lambda command: "p2pd" not in command)

    def _child(self, matches: Callable[[str], bool]) -> psutil.Process | None:
        for child in psutil.Process(self.pid).children():
            with contextlib.suppress(psutil.Error):  # gone, or waiting to be reaped
                if matches(" ".join(child.cmdline())):
                    return child
        return None

    def kill(self) -> None:
        """SIGKILL, and wait until nothing of it is left."""
        children = self.children()
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive, f"left behind: {alive}"

    def stop(self, deadline_s: float = 15.0) -> int:
        """SIGTERM, and the exit code."""
        assert self.process is not None
        children = self.children()
        self.process.terminate()
        code = self.process.wait(deadline_s)
        _, alive = psutil.wait_procs(children, timeout=2)
        assert not alive, f"left behind: {alive}"
        return code

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _enter(fd: int) -> None:
    """setns(2), of this thread alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class Digests:
    """Epoch -> state digest, as every node said it: no epoch may have two."""

    def __init__(self, *nodes: Node) -> None:
        self.nodes = nodes
        self.seen: dict[int, tuple[str, str]] = {}
        self.shared: dict[int, set[str]] = {}

    def poll(self) -> None:
        for node in self.nodes:
            try:
                status = node.status()
            except (OSError, ValueError):
                continue
            epoch, digest = status["epoch"], status["state_digest"]
            if not digest:
                continue
            known = self.seen.setdefault(epoch, (digest, node.home.name))
            assert known[0] == digest, f"epoch {epoch}: {known} and {(digest, node.home.name)}"
            self.shared.setdefault(epoch, set()).add(node.home.name)

    def wait(self, what: str, condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
        """Poll all nodes until `condition` holds."""

        def holds() -> object:
            self.poll()
            return condition()

        running = next(n for n in self.nodes if n.process is not None and n.process.poll() is None)
        running.wait(what, holds, deadline_s)
