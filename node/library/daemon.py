"""The node of a script: a child process that lives as long as the script, or one that runs already.

Either way the script ends up with a connected socket and the shared buffers' descriptors (trainer/guest.py).
A child's output goes to HOME/node.out, as with `start --detach`; why it ended is read from there.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tapestry.node.home import Home, Liveness, NodeInfo
from tapestry.node.library.errors import SwarmError
from tapestry.node.surface.ask import ask
from tapestry.node.trainer.guest import GREETING, knock
from tapestry.node.trainer.shared import BUFFERS

START_S = 120.0  # a child's first sign: its interpreter on a busy machine. Guess
ANSWER_S = 10.0  # of a node that runs: it greets at once, unless another script is there
STOP_S = 20.0  # the node's own limit is 10 s (daemon/life.py)
LOOK_S = 1.0  # between two signs of life, while waiting
LOG_TAIL_BYTES = 16 << 10


class Daemon:
    """A node, and the connection to it. `start` or `find` one, and `close` it."""

    @classmethod
    def start(cls, home: Home, flags: Sequence[str]) -> Daemon:
        """A child. Raises SwarmError."""
        home.create()
        ours, theirs = socket.socketpair()
        with theirs, home.open_output() as log:
            began = log.tell()
            command = [sys.executable, "-P", "-m", "tapestry.node.cli", "start", f"--home={home.path}"]
            process = subprocess.Popen(
                [*command, "--external", f"--script-fd={theirs.fileno()}", *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a terminal's Ctrl-C is the script's
            )
        return cls(home, ours, process, began)

    @classmethod
    def find(cls, home: Home) -> Daemon | None:
        """The node that runs in this home; None if none does. Raises SwarmError if it takes no scripts."""
        pid = home.holder()
        if pid is None:
            return None
        said = home.output.stat().st_size if home.output.exists() else 0  # perhaps by another node, long ago
        try:
            return cls(home, knock(home.trainer_socket), None, said)
        except OSError as error:
            raise SwarmError(
                f"the node in {home.path} (pid {pid}) takes no scripts: {error.strerror}",
                f"tapestry stop --home {home.path}, or start it with --external",
            ) from error

    def __init__(
        self, home: Home, connection: socket.socket, process: subprocess.Popen[bytes] | None, log_began: int
    ) -> None:
        self.connection = connection
        self._home = home
        self._process = process
        self._log_began = log_began

    @property
    def is_child(self) -> bool:
        """Whether it ends with the script."""
        return self._process is not None

    def receive_buffers(self) -> dict[str, int]:
        """The greeting: descriptors by name. Raises SwarmError."""
        limit_s = START_S if self.is_child else ANSWER_S
        if not select.select([self.connection], [], [], limit_s)[0]:
            why = (
                "does not answer"
                if self.is_child
                else "does not answer: another script may be training there"
            )
            raise SwarmError(f"the node in {self._home.path} {why}", f"see {self._home.log}")
        data, fds, _, _ = socket.recv_fds(self.connection, len(GREETING), len(BUFFERS))
        if not data:
            raise self.failure()
        if data != GREETING or len(fds) != len(BUFFERS):
            raise SwarmError(
                "the node speaks another version of this protocol", "restart it with this version"
            )
        return dict(zip(BUFFERS, fds, strict=True))

    def wait_for_word(self, on_wait: Callable[[float], None]) -> None:
        """Until the node says something or hangs up: it may be asking to be admitted. `on_wait`: seconds."""
        since_s = time.monotonic()
        while not select.select([self.connection], [], [], LOOK_S)[0]:
            on_wait(time.monotonic() - since_s)

    def info(self, timeout_s: float) -> NodeInfo:
        """What it has written to node.json, once it is up. Raises SwarmError."""
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            state = self._home.read_node_json()
            if state.liveness is Liveness.RUNNING and state.info is not None:
                return state.info
            if self._has_ended():
                raise self.failure()
            time.sleep(0.02)
        raise SwarmError(
            f"the node in {self._home.path} is not up after {timeout_s:g} s", f"see {self._home.log}"
        )

    def ask(self, path: str) -> Any:
        """A page of its endpoint, as JSON, also before the node is up. Raises SwarmError."""
        state = self._home.read_node_json()
        url = state.info.http if state.info is not None else self._home.starting_url(state.pid)
        if self._has_ended():
            raise self.failure()
        if url is None:
            raise SwarmError(f"the node in {self._home.path} is starting and does not answer yet")
        try:
            return ask(self._home, url, path)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise SwarmError(f"the node in {self._home.path} does not answer: {error}") from error

    def failure(self) -> SwarmError:
        """Why it is gone, as it said last. A child that is leaving is waited for; `close` alone kills."""
        how = "has ended"
        if self._process is not None:
            try:
                how = f"has ended (exit {self._process.wait(STOP_S)})"
            except subprocess.TimeoutExpired:
                how = "has hung up, and does not end"
        lines = _tail(self._home.output, self._log_began)
        said = [line for line in lines if line.startswith("error: ")]
        if not said:
            last = f": {lines[-1]}" if lines else ""
            return SwarmError(f"the node in {self._home.path} {how}{last}")
        after = lines[lines.index(said[-1]) + 1 :]
        hints = [line.removeprefix("hint: ") for line in after if line.startswith("hint: ")]
        details = [line.strip() for line in after if line.startswith("  ")]
        return SwarmError(said[-1].removeprefix("error: "), hints[-1] if hints else None, details)

    def stop(self) -> None:
        """Ask a child to leave in good order; it says so on the connection when it is done."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def close(self) -> int:
        """Hang up, and wait for a child to end. Its exit code; 0 of a node that goes on."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)  # also where a forked process still has it
        self.connection.close()
        return 0 if self._process is None else self._wait(STOP_S)

    def _has_ended(self) -> bool:
        if self._process is not None:
            return self._process.poll() is not None
        return not self._home.is_held()

    def _wait(self, timeout_s: float) -> int:
        """A child's exit code; one that does not end is killed, which its home survives."""
        assert self._process is not None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()


def _tail(path: Path, began: int) -> list[str]:
    try:
        with path.open("rb") as log:
            size = os.fstat(log.fileno()).st_size
            log.seek(max(began, size - LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").splitlines()
    except OSError:
        return []
