"""A node as a script sees it: a daemon, started with `tapestry start` on loopback with free ports.

It is known from outside only: by its HOME/node.json, /status, /metrics, HOME/chain.jsonl and exit code.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _chains import ChainRecord, chain_record
from _processes import end_with_parent, family_of

HTTP_TIMEOUT_S = 3.0
HTTP_BYTES_MAX = 4 * 2**20
COMMAND_S = 30.0  # of a command that does little
INVITE_S = 90.0  # it waits for a record, for 60 s at most
INIT_S = 180.0  # with a base of 135M parameters 15 s on two cores that do nothing else
EXPORT_S = 300.0  # the same: 20 s
INSTALLED = (sys.executable, "-P", "-m", "tapestry.node.cli")


class Failed(Exception):
    """Something that was promised did not hold; one line, and perhaps more that explain it."""

    def __init__(self, line: str, details: Sequence[str] = ()) -> None:
        self.details = tuple(details)
        super().__init__(line)


@dataclass
class Node:
    """One daemon, as it is seen from outside."""

    label: str  # "node 2", and node2 is its home's name
    place: Path
    tapestry: tuple[str, ...]
    flags: tuple[str, ...]  # of every `tapestry start`: what it trains on, and more
    ends_by_itself: bool = False  # so that only an exit code other than 0 is unexpected
    peers: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    info: dict[str, Any] = field(default_factory=dict)  # node.json
    status: dict[str, Any] = field(default_factory=dict)
    family: set[tuple[int, int]] = field(default_factory=set)  # (pid, start) of every process of this node
    expected_end: bool = True
    killed_at_end: bool = False
    orphans: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)  # (epoch, validation loss), first and last
    sent: dict[str, float] = field(default_factory=dict)  # bytes by kind, of the process that runs
    sent_before: dict[str, float] = field(default_factory=dict)  # of those that ran before

    @property
    def home(self) -> Path:
        return self.place / self.label.replace(" ", "")

    @property
    def log(self) -> Path:
        return self.home.with_suffix(".log")

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def ready(self) -> bool:
        return self.running and bool(self.info) and bool(self.status)

    @property
    def address(self) -> str:
        return str(self.info["addresses"][0])

    @property
    def peer_id(self) -> str:
        return str(self.info["peer_id"])

    @property
    def epoch(self) -> int:
        epoch = self.status.get("epoch")
        return epoch if isinstance(epoch, int) else -1

    @property
    def digest(self) -> str:
        return str(self.status.get("state_digest") or "")

    @property
    def bytes_sent(self) -> dict[str, float]:
        kinds = dict.fromkeys([*self.sent_before, *self.sent])
        return {kind: self.sent_before.get(kind, 0) + self.sent.get(kind, 0) for kind in kinds}

    def make_home(self, *options: str) -> None:
        """With `tapestry init`, for who founds a run; one thread, for others share this machine."""
        run_command([*self.tapestry, "init", str(self.home), *options], "tapestry init", INIT_S)
        replace_key(self.home / "node.toml", "threads", 1)

    def make_home_of_joiner(self) -> None:
        """It takes the run spec from its peer; its own affairs need one line."""
        self.home.mkdir(mode=0o700)
        (self.home / "node.toml").write_text("threads = 1  # three nodes share this machine\n")

    def invitation(self, uses: int) -> str:
        """A line with which so many join at once. The node must be ready."""
        command = [*self.tapestry, "invite", "--home", str(self.home), "--uses", str(uses)]
        return run_command(command, "tapestry invite", INVITE_S)

    def make_id(self) -> str:
        """Its peer id, before its first start."""
        return run_command([*self.tapestry, "id", "--home", str(self.home)], "tapestry id", COMMAND_S)

    def start(self, peers: list[str]) -> str:
        """Start the daemon; returns the command as one would type it."""
        self.peers = peers
        arguments = ["start", "--home", str(self.home), *self.flags]
        arguments += ["--listen", "/ip4/127.0.0.1/tcp/0", "--http", "127.0.0.1:0"]
        for peer in peers:
            arguments += ["--peer", peer]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.tapestry, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,  # Ctrl-C comes to us alone, and we stop them
                preexec_fn=end_with_parent,
            )
        self.expected_end = False
        self.info, self.status = {}, {}
        return shlex.join(["tapestry", *arguments])

    def look(self) -> None:
        """Read node.json, /status and /metrics. A node that does not answer keeps what it said before."""
        if not self.running:
            return
        assert self.process is not None
        self.family |= family_of(self.process.pid)
        if not self.info:
            self.info = self._read_info()
            if not self.info:
                return
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            status = json.loads(fetched(f"{self.info['http']}/status"))
            self.sent = network_bytes(fetched(f"{self.info['http']}/metrics").decode(), "sent")
            self.status = status
            self._keep_loss()

    def _read_info(self) -> dict[str, Any]:
        """node.json, if the process that runs now has written it: the file of a killed one stays behind."""
        assert self.process is not None
        try:
            info = json.loads((self.home / "node.json").read_bytes())
            if info["pid"] != self.process.pid or not info["addresses"] or not info["http"]:
                return {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return dict(info)

    def _keep_loss(self) -> None:
        loss = self.status.get("val_loss")
        if isinstance(loss, int | float):
            self.losses = [*self.losses[:1], (self.epoch, float(loss))]

    def ended(self) -> int | None:
        """The exit code, if the daemon has ended and should not have."""
        if self.process is None or self.expected_end:
            return None
        code = self.process.poll()
        return None if self.ends_by_itself and code == 0 else code

    def kill(self) -> set[tuple[int, int]]:
        """SIGKILL for the daemon alone; returns the processes that should die with it."""
        assert self.process is not None
        self.expected_end = True
        family = family_of(self.process.pid)
        self.family |= family
        self.process.kill()
        self.process.wait()
        for kind, count in self.sent.items():
            self.sent_before[kind] = self.sent_before.get(kind, 0) + count
        self.sent = {}
        self.status = {**self.status, "phase": "killed", "tokens_per_second": None, "peers": None}
        self.info = {**self.info, "http": ""}
        return family

    def terminate(self) -> None:
        self.expected_end = True
        if self.running:
            assert self.process is not None
            self.family |= family_of(self.process.pid)
            self.process.terminate()

    def records(self) -> list[ChainRecord]:
        """HOME/chain.jsonl so far. A line that is being written is left for the next look."""
        try:
            lines = (self.home / "chain.jsonl").read_bytes().split(b"\n")[:-1]
        except OSError:
            return []
        try:
            return [chain_record(line) for line in lines]
        except ValueError as error:
            raise Failed(f"{self.home / 'chain.jsonl'}: {error}") from error

    def log_tail(self, count: int = 15) -> list[str]:
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").splitlines()[-count:]
            return [f"{self.label} | {line}" for line in lines]
        return []


def environment() -> dict[str, str]:
    """Ours, without what would configure the nodes; one thread each, for there may be but two cores."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TAPESTRY_")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def replace_key(path: Path, key: str, value: object, section: str = "") -> None:
    """Change a number in a file that `tapestry init` wrote. Without a section the key must be the only one
    of its name. Raises Failed."""
    text = path.read_text()
    begin, end = 0, len(text)
    if section:
        match = re.search(rf"(?ms)^\[{section}\]$.*?(?=^\[|\Z)", text)
        begin, end = match.span() if match else (0, 0)
    part, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text[begin:end])
    if count != 1:
        raise Failed(f"{path} has {count} keys {key}, expected one")
    path.write_text(text[:begin] + part + text[end:])


def run_command(command: Sequence[str], what: str, limit_s: float) -> str:
    """What it says. Raises Failed, with what it said, when `what` does not end with 0 and in time."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, env=environment(), check=False
        )
    except subprocess.TimeoutExpired as late:
        raise Failed(f"{what} took more than {limit_s:.0f} s") from late
    if done.returncode:
        raise Failed(f"{what} ended with exit code {done.returncode}", done.stderr.splitlines())
    return done.stdout.strip()


def fetched(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the node is local: no proxy
    with opener.open(url, timeout=HTTP_TIMEOUT_S) as response:
        return bytes(response.read(HTTP_BYTES_MAX))


def network_bytes(metrics: str, direction: str) -> dict[str, float]:
    """kind -> bytes that were sent or received, from tapestry_network_bytes_total{direction=...,kind=...}."""
    pattern = rf'^tapestry_network_bytes_total\{{direction="{direction}",kind="(\w+)"\}} (\S+)$'
    return {kind: float(value) for kind, value in re.findall(pattern, metrics, re.MULTILINE)}
