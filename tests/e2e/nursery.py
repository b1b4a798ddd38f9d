"""Nodes that start at once: forks of one process that has imported what a node and a trainer need.

A node's imports and its trainer's take 7 s of a core, and an end-to-end test starts three nodes or more. The
nursery imports them once per session. From there on a child goes the way of the installed command: its
arguments, environment and standard streams, `cli.entry.main`, and the interpreter's end. Its first trainer is
forked from it in turn, with the descriptors, environment and session that trainer/child.py asks for; one
that is started again later is executed as ever. Tests of the start itself, and those that need another
program or environment, start real commands: `Node(..., forked=False)`.

This file is the nursery's program, and what asks it: `Nursery.get().start(...)`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
REQUEST_BYTES_MAX = 1 << 20


# --- for tests --------------------------------------------------------------------------------------


class Nursery:
    """One per test process."""

    _only: Nursery | None = None

    @classmethod
    def get(cls) -> Nursery:
        if cls._only is None:
            cls._only = cls()
        return cls._only

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            environment = {
                **{k: v for k, v in os.environ.items() if not k.startswith("TAPESTRY_")},
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "PASSIVE",  # read when torch is loaded; process.py says why
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_OFFLINE": "1",
                "TRANSFORMERS_VERBOSITY": "error",
            }
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
            )
        self._codes: dict[int, int] = {}
        atexit.register(self.close)

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], stdout: int, stderr: int
    ) -> Forked:
        """`tapestry ARGUMENTS...`"""
        request = json.dumps({"arguments": list(arguments), "environment": dict(environment)}).encode()
        socket.send_fds(self._socket, [request], [stdout, stderr])
        while (pid := self._hear().get("pid")) is None:
            pass
        return Forked(self, pid)

    def code(self, pid: int, timeout_s: float) -> int | None:
        """How a child ended, as subprocess says it; None if it has not within the time."""
        end = time.monotonic() + timeout_s
        while pid not in self._codes:
            ready, _, _ = select.select([self._socket], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            self._hear()
        return self._codes[pid]

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _hear(self) -> dict[str, int]:
        data = self._socket.recv(REQUEST_BYTES_MAX)
        assert data, "the nursery has died"
        said: dict[str, int] = json.loads(data)
        if "ended" in said:
            self._codes[said["ended"]] = os.waitstatus_to_exitcode(said["status"])
        return said


class Forked:
    """What the tests use of subprocess.Popen."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self._nursery = nursery

    def poll(self) -> int | None:
        return self._nursery.code(self.pid, 0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._nursery.code(self.pid, 1e6 if timeout is None else timeout)
        if code is None:
            raise subprocess.TimeoutExpired(["tapestry"], timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# --- the nursery's own process ----------------------------------------------------------------------


def serve(asking: socket.socket) -> int:
    """Until the tests have gone; in a child, the exit code of its command."""
    with contextlib.suppress(BlockingIOError):
        _import_all()
    wakeup, woken = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    while True:
        ready, _, _ = select.select([asking, wakeup], [], [])
        if wakeup in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wakeup, 4096)
            _tell_ended(asking)
        if asking not in ready:
            continue
        data, fds, _, _ = socket.recv_fds(asking, REQUEST_BYTES_MAX, 2)
        if not data:
            return 0
        request = json.loads(data)
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            for fd in (wakeup, woken, asking.fileno()):
                os.close(fd)
            asking.detach()
            return _be_command(request["arguments"], request["environment"], fds)
        for fd in fds:
            os.close(fd)
        asking.send(json.dumps({"pid": pid}).encode())


def _tell_ended(asking: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            asking.send(json.dumps({"ended": ended[0], "status": ended[1]}).encode())


def _import_all() -> None:
    """As launch.py and worker.py do; the sources say why."""
    from tapestry.node.trainer import imports

    imports.submodules_only("hivemind")
    imports.spare_torch()
    with imports.lasting():
        from tapestry.node.trainer.models import llama

        llama.import_architectures()


def _be_command(arguments: list[str], environment: dict[str, str], fds: list[int]) -> int:
    _take_streams(fds)
    _take_environment(environment)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["tapestry", *arguments]
    from tapestry.node.cli import entry
    from tapestry.node.trainer import child

    child.asyncio = _ForkingOnce()  # type: ignore[attr-defined]
    if "LIAR" in environment:
        _lie(environment["LIAR"])
    entry.main()
    return 0


def _lie(name: str) -> None:
    """What scripts/liars/NAME.py changes is changed in this process: harness.py, Node.lie."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
    from liars.registry import load

    load(name).lie()


class _ForkingOnce:
    """asyncio for trainer/child.py, whose first child it forks."""

    def __init__(self) -> None:
        self._used = False

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def create_subprocess_exec(self, *command: str, **options: Any) -> Any:
        from tapestry.node.trainer.process import WORKER_COMMAND

        if self._used or command[: len(WORKER_COMMAND)] != WORKER_COMMAND:
            return await asyncio.create_subprocess_exec(*command, **options)
        self._used = True
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            _be_worker(command, options, writing)  # does not return
        os.close(writing)
        return await _Worker.adopt(pid, reading)


def _be_worker(command: Sequence[str], options: Mapping[str, Any], output: int) -> None:
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in range(1, signal.NSIG):
            if number not in (signal.SIGKILL, signal.SIGSTOP) and signal.getsignal(number) is not None:
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_DFL)
        _take_streams([output, output])
        kept = sorted({0, 1, 2, *options["pass_fds"]})
        for below, above in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
            os.closerange(below + 1, above)
        _take_environment(options["env"])
        import logging

        logging.getLogger().handlers.clear()
        logging.getLogger("tapestry").handlers.clear()
        asyncio._set_running_loop(None)
        sys.argv = [command[3], *command[4:]]
        from tapestry.node.trainer import worker

        code = worker.main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class _Worker:
    """What trainer/child.py uses of asyncio.subprocess.Process."""

    @classmethod
    async def adopt(cls, pid: int, reading: int) -> _Worker:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        await loop.connect_read_pipe(lambda: protocol, os.fdopen(reading, "rb", buffering=0))
        return cls(pid, reader, loop)

    def __init__(self, pid: int, stdout: asyncio.StreamReader, loop: asyncio.AbstractEventLoop) -> None:
        self.pid, self.stdout = pid, stdout
        self.returncode: int | None = None
        self._fd, self._loop, self._ended = os.pidfd_open(pid), loop, asyncio.Event()
        loop.add_reader(self._fd, self._reap)

    def _reap(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._ended.set()

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode


def _take_streams(fds: Sequence[int]) -> None:
    """Standard output and error; nothing is to be read."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, standard in zip((nothing, *fds), (0, 1, 2), strict=True):
        os.dup2(fd, standard)
    for fd in {nothing, *fds} - {0, 1, 2}:
        os.close(fd)


def _take_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    sys.exit(serve(socket.socket(fileno=int(sys.argv[1]))))
