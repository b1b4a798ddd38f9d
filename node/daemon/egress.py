"""Writes down what leaves this node: lineage/egress.py says what the file holds.

On the loop a few additions a frame: `sent` counts bytes for a receiver, `part` names what they are of. Every
FLUSH_S a line for each kind goes to the file, in a thread; of control, which leaves each second also where
nothing else happens, every CONTROL_S. A SIGKILL costs what was not yet flushed; a torn line is cut by the
next start, which says so. A disk that is full loses nothing while the node runs: the
counts stay, and go into later lines. Of no kind are more than RECEIVERS_HELD receivers kept apart meanwhile:
what goes to further ones is counted for a receiver without a name.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tapestry.node.disk.files import set_aside
from tapestry.node.disk.linked import BrokenLink, LinkedFile
from tapestry.node.home import Home
from tapestry.node.lineage.egress import KINDS, PARTS_MAX, RULES, Left, Started

FLUSH_S = 2.0  # guess: what a SIGKILL may leave unwritten
CONTROL_S = 600.0  # guess: 64 members' heartbeats take 0.6 MB a day so, 170 MB with a line each FLUSH_S
RECEIVERS_FULL = 1024  # of control; then it is written sooner. And of a line, which may hold RECEIVERS_MAX
RECEIVERS_HELD = 1 << 16  # of one kind: 64 such lines of 70 kB, where the disk takes none. Guess
OTHERS = ""  # the receiver of what is told of nobody by name

_log = logging.getLogger("tapestry.node")

Clock = Callable[[], str]


class Egress(Protocol):
    """Who hears of what leaves."""

    def sent(self, kind: str, peer: str, count: int) -> None: ...
    def part(self, kind: str, epoch: int, digest: str) -> None: ...


class Unwritten:
    """Of tools that put a node together and keep no ledger."""

    def sent(self, kind: str, peer: str, count: int) -> None: ...
    def part(self, kind: str, epoch: int, digest: str) -> None: ...


@dataclass(slots=True)
class _Window:
    """What left of one kind since the last line."""

    receivers: dict[str, int] = field(default_factory=dict)
    parts: dict[tuple[int, str], None] = field(default_factory=dict)
    more_parts: int = 0

    def lines(self, at: str, kind: str) -> list[Any]:
        """One line for each RECEIVERS_FULL receivers; the first has the parts."""
        receivers = list(self.receivers.items())
        pages = [receivers[one : one + RECEIVERS_FULL] for one in range(0, len(receivers), RECEIVERS_FULL)]
        lines = [Left(at, kind, sum(n for _, n in page), dict(page), RULES[kind], (), 0) for page in pages]
        lines[0] = replace(lines[0], parts=tuple(self.parts), more_parts=self.more_parts)
        return [line.value() for line in lines]


def now_utc() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class EgressLedger:
    """`sent` and `part` on the loop; `run` writes until it is cancelled, and `close` what is left."""

    def __init__(self, home: Home, clock: Clock = now_utc) -> None:
        """Goes on with the home's file. In a thread, please. Raises OSError."""
        self._clock = clock
        self._windows = {kind: _Window() for kind in KINDS}
        self._writing = threading.Lock()
        self._failing = False
        try:
            self._file = LinkedFile(home.egress)
        except BrokenLink as error:
            cure = "check the disk, or ask who changed it: what left before is in it, and a new one begins"
            set_aside(home.egress, str(error), cure)
            self._file = LinkedFile(home.egress)

    def begin(self, run_id: str) -> None:
        """What follows is of this run. In a thread, please. Raises OSError."""
        self._file.append([Started(self._clock(), run_id, self._file.torn_bytes).value()], sync=True)

    def sent(self, kind: str, peer: str, count: int) -> None:
        receivers = self._windows[kind].receivers
        if len(receivers) >= RECEIVERS_HELD and peer not in receivers:
            peer = OTHERS
        receivers[peer] = receivers.get(peer, 0) + count

    def part(self, kind: str, epoch: int, digest: str) -> None:
        window = self._windows[kind]
        if len(window.parts) < PARTS_MAX or (epoch, digest) in window.parts:
            window.parts[epoch, digest] = None
        else:
            window.more_parts += 1

    async def run(self) -> None:
        waited_s = 0.0
        while True:
            await asyncio.sleep(FLUSH_S)
            waited_s += FLUSH_S
            control = self._windows["control"]
            full = len(control.parts) == PARTS_MAX or len(control.receivers) >= RECEIVERS_FULL
            if waited_s >= CONTROL_S or full:
                waited_s = 0.0
                await self.flush()
            else:
                await self.flush([kind for kind in KINDS if kind != "control"])

    async def flush(self, kinds: Iterable[str] = KINDS, sync: bool = False) -> None:
        """Lines for each kind of which something left. Without bytes its parts wait for them."""
        at, failed = self._clock(), ""
        for kind in kinds:  # each by itself: what one holds keeps no other from being written
            window = self._windows[kind]
            if not window.receivers:
                continue
            self._windows[kind] = _Window()
            try:
                await asyncio.to_thread(self._append, window.lines(at, kind), sync)
            except OSError as error:
                self._take_back(kind, window)
                failed = error.strerror or os.strerror(error.errno or 0)
        if failed and not self._failing:
            _log.error("egress=not_written reason=%r; it is written once the disk takes it", failed)
        if self._failing and not failed:
            _log.info("egress=written again")
        self._failing = bool(failed)

    def _append(self, lines: list[Any], sync: bool) -> None:
        """A flush that was cancelled may still be writing."""
        with self._writing:
            self._file.append(lines, sync=sync)

    async def close(self) -> None:
        await self.flush(sync=True)
        self._file.close()

    def _take_back(self, kind: str, window: _Window) -> None:
        since = self._windows[kind]
        self._windows[kind] = window
        for peer, count in since.receivers.items():
            self.sent(kind, peer, count)
        for epoch, digest in since.parts:
            self.part(kind, epoch, digest)
        window.more_parts += since.more_parts
