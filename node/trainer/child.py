"""A worker as a child process of the node, and the socket to it; process.Hired and process.Hire.

Must not import torch: see process.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Sequence

from tapestry.node.trainer.messages import HEADER, Command, Report, body_length, pack, unpack_report

OUTPUT_LINES = 20  # of what a worker wrote last, kept to explain its death
OUTPUT_LINE_BYTES = 500
EXIT_GRACE_S = 5.0  # from the end of the conversation to the end of the process


class Children:
    """Workers of our own; Hire."""

    again = False

    def __init__(self, command: Sequence[str], threads: int) -> None:
        self._command, self._threads = command, threads

    async def __call__(self, fds: dict[str, int]) -> Worker:
        return await Worker.spawn(self._command, self._threads, fds)


class Worker:
    """One child process and the socket to it; Hired."""

    guest = False

    @classmethod
    async def spawn(cls, command: Sequence[str], threads: int, fds: dict[str, int]) -> Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    *("--channel", str(theirs.fileno())),
                    *(f"--{name}={fd}" for name, fd in fds.items()),
                    *("--parent", str(os.getpid())),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    pass_fds=(theirs.fileno(), *fds.values()),
                    start_new_session=True,  # a terminal's Ctrl-C is for the node
                    env=_environment(threads),
                )
                reader, writer = await asyncio.open_connection(sock=ours)
            except BaseException:
                ours.close()
                raise
        return cls(process, reader, writer)

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.attached = False
        self._process = process
        self._reader = reader
        self._writer = writer

    @property
    def pid(self) -> int:
        return self._process.pid

    async def receive(self) -> Report:
        """Raises MessageError; IncompleteReadError or ConnectionError when the worker has hung up."""
        length = body_length(await self._reader.readexactly(HEADER.size))
        return unpack_report(await self._reader.readexactly(length))

    def send(self, command: Command) -> None:
        """Commands are few and small; the silence limit bounds what piles up before a stuck worker."""
        if not self._writer.is_closing():
            self._writer.write(pack(command))

    async def collect_output(self) -> tuple[str, ...]:
        """The last lines of standard output and error, until both are closed."""
        assert self._process.stdout is not None
        lines: deque[str] = deque(maxlen=OUTPUT_LINES)
        rest = b""
        while piece := await self._process.stdout.read(4096):
            *whole, rest = (rest + piece).split(b"\n")
            lines.extend(_readable(line) for line in whole if line.strip())
            rest = rest[-OUTPUT_LINE_BYTES:]
        if rest.strip():
            lines.append(_readable(rest))
        return tuple(lines)

    async def end(self) -> int:
        """The exit status; a worker that has hung up but lives on is killed."""
        try:
            async with asyncio.timeout(EXIT_GRACE_S):
                return await self._process.wait()
        except TimeoutError:
            self.kill()
            return await self._process.wait()

    def kill(self) -> None:
        if self._process.returncode is None:
            try:
                with contextlib.suppress(PermissionError):  # nice, with much memory to give back
                    os.setpriority(os.PRIO_PROCESS, self._process.pid, 0)
                self._process.kill()
            except ProcessLookupError:
                return  # it has just gone by itself

    async def close(self) -> None:
        """Whatever went before: no process and no socket is left."""
        self.kill()
        self._writer.close()
        await self._process.wait()


def _environment(threads: int) -> dict[str, str]:
    """Ours, and: nothing from a network, nothing chatty, no more threads than allowed."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "true",  # before there is a model, all threads are the tokenizer's
        "RAYON_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        # Trainers that share cores must not spin: three with two threads each on two cores were 5x slower.
        "OMP_WAIT_POLICY": "PASSIVE",
        "MKL_NUM_THREADS": str(threads),
    }


def _readable(line: bytes) -> str:
    return line[-OUTPUT_LINE_BYTES:].decode("utf-8", errors="replace")
