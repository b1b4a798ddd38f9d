"""Signatures of a long chain, checked by processes of their own while the records are read.

A signature costs 0.1 to 0.2 ms of a core, and a record of 64 members carries 33 of them: seven times what all
the rest of a record costs. Nothing that follows from a record depends on when its signatures are checked,
only on whether they hold. So `Ahead` says of each that it holds, has it checked meanwhile by one of `jobs`
processes, and tells in the end how many held before the first that did not. If that is not all, the chain
is read once more with `Trusting`, which takes that many for checked and checks the others itself: what is
said of a chain is the same, to the letter, as if nothing had been done ahead.

The processes are this module as a program: a line of JSON in, [[peer, signature, message], ...], a line out,
which says how many of them held before the first that did not. One that dies is no proof of anything: what it
had is checked again. Memory is bounded by what is on its way. Must not import torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import deque
from types import TracebackType

from tapestry.node.lineage.crypto import ReaderCrypto

BATCH = 64  # signatures: 20 kB, so that two on their way fit into a pipe and nobody waits to write
ON_THEIR_WAY = 2  # batches of each process: one is checked while the next lies there
WORTH_IT = 4096  # signatures; guess: below, they are checked before the processes have started

Check = tuple[str, str, str]  # peer, signature, message in hex


def jobs_here() -> int:
    """As many as this process may have cores."""
    return len(os.sched_getaffinity(0))


class Ahead(ReaderCrypto):
    """Says that every signature holds, and has it checked; `held` tells whether that was true."""

    def __init__(self, jobs: int) -> None:
        self.asked = 0
        self._jobs = jobs
        self._workers: list[_Worker] = []
        self._batch: list[Check] = []
        self._waiting: list[list[Check]] = []  # before there are processes
        self._sent: deque[tuple[_Worker, int]] = deque()  # in order: to whom, how many
        self._held = 0
        self._failed = False

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.end()

    def verify(self, peer: str, signature: str, message: bytes) -> bool:
        """True."""
        self.asked += 1
        self._batch.append((peer, signature, message.hex()))
        if len(self._batch) == BATCH and not self._failed:
            self._pass_on()
        elif self._failed:
            self._batch.clear()  # what follows a signature that does not hold is read again
        return True

    def held(self) -> int:
        """How many of those asked for hold before the first that does not, or that nobody has checked."""
        for batch in [*self._waiting, self._batch]:
            if not self._failed and not self._workers:
                self._took(checked(batch), len(batch))
        if self._workers and self._batch and not self._failed:
            self._pass_on()
        while self._sent and not self._failed:
            self._take_one()
        return self._held

    def _pass_on(self) -> None:
        batch, self._batch = self._batch, []
        if not self._workers:
            self._waiting.append(batch)
            if len(self._waiting) * BATCH < WORTH_IT:
                return
            self._workers = [_Worker() for _ in range(self._jobs)]
            waiting, self._waiting = self._waiting, []
        else:
            waiting = [batch]
        for one in waiting:
            if len(self._sent) >= ON_THEIR_WAY * len(self._workers):
                self._take_one()
            if self._failed:
                return
            worker = self._next()
            if not worker.send(one):
                self._failed = True
                return
            self._sent.append((worker, len(one)))

    def _next(self) -> _Worker:
        """In turns: who was sent to the longest time ago."""
        self._workers.append(self._workers.pop(0))
        return self._workers[-1]

    def _take_one(self) -> None:
        worker, count = self._sent.popleft()
        self._took(worker.answer(), count)

    def _took(self, held: int, count: int) -> None:
        if not self._failed:
            self._held += held
            self._failed = held < count


class Trusting(ReaderCrypto):
    """Takes the first so many signatures for checked."""

    def __init__(self, held: int) -> None:
        self._left = held

    def verify(self, peer: str, signature: str, message: bytes) -> bool:
        self._left -= 1
        return self._left >= 0 or super().verify(peer, signature, message)


class _Worker:
    """One process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def send(self, batch: list[Check]) -> bool:
        """False if it is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(batch).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            return False
        return True

    def answer(self) -> int:
        """Of the oldest batch that it has; 0 if it is gone."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return int(line) if line.endswith(b"\n") else 0

    def end(self) -> None:
        """It ends when its input does."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


def checked(batch: list[Check]) -> int:
    """How many hold before the first that does not."""
    crypto = ReaderCrypto()
    for number, (peer, signature, message) in enumerate(batch):
        if not crypto.verify(peer, signature, bytes.fromhex(message)):
            return number
    return len(batch)


def main() -> None:
    """The process: until its input ends."""
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(b"%d\n" % checked(json.loads(line)))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
