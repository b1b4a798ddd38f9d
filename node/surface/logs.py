"""What a node says while it runs: changes of state, one line each; in a terminal one live line below them.

    logging call -> Desk: formatted, repeats left out -> bounded queue -> one thread -> stderr, HOME/node.log

A terminal that is held (Ctrl-S) or a disk that is slow keeps nobody waiting but that thread: when the queue
is full, lines are dropped and counted. node.log is bounded: it is rotated by size. A start in the background
(`start --detach`) and a script's node write to node.log alone; their stderr, which is HOME/node.out, has the
banner and whatever a crash leaves.

What was printed for people in words of its own is logged with `extra={"printed": True}`: for node.log alone,
or the screen would say it twice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TextIO

from tapestry.node.surface.log_levels import WatchedLevels
from tapestry.node.surface.log_lines import Json, Text, message_of, printable

__all__ = ["LiveLine", "Log", "LogLimits", "Repeats", "RotatedFile", "Shows", "printable", "start_logging"]

LINES_WAITING_MAX = 10_000  # Guess: a few MB
TICK_S = 1.0
CLOSE_S = 2.0  # to write what waits when the node ends
OUTPUT_BYTES_MAX = 2**20  # of node.out: a banner and the last words of libraries
REPEAT_S = 60.0  # Guess: the same warning once in so long
ALIKE_MAX = 10  # Guess: different warnings of one kind in that time

_log = logging.getLogger("tapestry.log")


@dataclass(frozen=True, slots=True)
class LogLimits:
    """Of HOME/node.log and those before it."""

    file_bytes_max: int = 16 * 2**20
    files_max: int = 5


class Shows(Protocol):
    """Something with a live line."""

    def show(self, text: str) -> None:
        """Put `text` in place of what stands there."""


def start_logging(log_format: str, stream: TextIO | None = None) -> Log:
    """Send the log of this process to stderr. Called once, by the daemon; close what it returns."""
    log = Log(log_format, sys.stderr if stream is None else stream)
    desk = Desk(log, Json() if log_format == "json" else Text())
    ours, everybody = logging.getLogger("tapestry"), logging.getLogger()
    ours.handlers = [desk]
    ours.setLevel(logging.INFO)
    ours.propagate = False
    everybody.handlers = [desk]  # what asyncio and libraries complain of; their level is WARNING
    logging.captureWarnings(True)
    return log


class Log:
    """The thread that writes. `keep_in` when the home is ours, `close` at the end."""

    def __init__(self, log_format: str, stream: TextIO) -> None:
        self._screen = LiveLine(stream, enabled=log_format == "text" and stream.isatty())
        self._to_screen = True
        self._file: RotatedFile | None = None
        self._file_fails = False
        self._ticks: list[Callable[[], None]] = []
        self._lost = 0
        self._queue: queue.Queue[tuple[str, str] | None] = queue.Queue(LINES_WAITING_MAX)
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    # --- any thread ----------------------------------------------------------------------------

    @property
    def is_on_screen(self) -> bool:
        """Whether stderr gets it."""
        return self._to_screen

    def show(self, text: str) -> None:
        """The live line."""
        if self._screen.enabled:
            self._put("live", text)

    def line(self, text: str, printed: bool = False) -> None:
        """`printed`: the screen has it, in other words."""
        self._put("printed" if printed else "line", text)

    def keep_in(self, path: Path, levels: Path, output: Path, limits: LogLimits) -> None:
        """From now on in a file too, which is this process's alone; `levels` says how much is said.

        A stderr that is that file, or the `output` of a start in the background, gets nothing more.
        Raises OSError.
        """
        file = RotatedFile(path, limits)
        self._to_screen = not _is_same_file(self._screen.stream, (path, output))
        watched = WatchedLevels(levels)
        watched.look()
        self._ticks += [watched.look, file.reopen, lambda: _bound(output, OUTPUT_BYTES_MAX)]
        self._file = file

    def leave_screen(self) -> None:
        """From now on the file alone; the live line is gone, and others write where it was."""
        self.show("")
        self.flush()
        self._to_screen = False

    def every_second(self, call: Callable[[], None]) -> None:
        """In the thread that writes."""
        self._ticks.append(call)

    def flush(self, timeout_s: float = CLOSE_S) -> None:
        """Wait until what was said is written."""
        end_s = time.monotonic() + timeout_s
        while self._queue.unfinished_tasks and self._thread.is_alive() and time.monotonic() < end_s:
            time.sleep(0.005)

    def close(self) -> None:
        """Write what waits, take the live line away, and end the thread. Lines that come later go nowhere."""
        self.show("")
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_S)
        self._thread.join(CLOSE_S)

    def _put(self, kind: str, text: str) -> None:
        try:
            self._queue.put_nowait((kind, text))
        except queue.Full:
            self._lost += kind != "live"

    # --- its thread ----------------------------------------------------------------------------

    def _write_all(self) -> None:
        tick_at = time.monotonic() + TICK_S
        while True:
            try:
                item = self._queue.get(timeout=TICK_S)
            except queue.Empty:
                pass
            else:
                if item is None:
                    break
                self._write(*item)
                self._queue.task_done()
            if time.monotonic() >= tick_at:
                tick_at = time.monotonic() + TICK_S
                self._tick()
        if self._file is not None:
            self._file.close()

    def _write(self, kind: str, text: str) -> None:
        if kind == "live":
            self._screen.show(text)
            return
        if self._to_screen and kind == "line":
            self._screen.print(text)
        if self._file is None:
            return
        try:
            self._file.write(text)
            self._file_fails = False
        except OSError as error:
            if not self._file_fails:
                self._file_fails = True
                where = f"{self._file.path}: {error.strerror}"
                self._screen.print(f"the log cannot be written to {where}; make room or mend the disk")

    def _tick(self) -> None:
        for call in self._ticks:
            with contextlib.suppress(OSError):
                call()
        if self._lost:
            lost, self._lost = self._lost, 0
            _log.warning(
                "lines=lost count=%d because they came faster than they can be written; "
                "next='tapestry log-level', or a faster disk",
                lost,
            )


class Desk(logging.Handler):
    """Formats a record where it is made, leaves out what was said just now, and hands it over."""

    def __init__(self, log: Log, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._out = log
        self._repeats = Repeats(REPEAT_S, ALIKE_MAX)
        log.every_second(self._tell_repeats)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            kind = (record.name, str(record.msg))
            if not self._repeats.may_tell(kind, message_of(record), time.monotonic()):
                return
        self._out.line(self.format(record), printed=getattr(record, "printed", False))

    def flush(self) -> None:
        self._out.flush()

    def _tell_repeats(self) -> None:
        self.acquire()
        try:
            left_out = self._repeats.take(time.monotonic())
        finally:
            self.release()
        for (name, _), text, count in left_out:
            logging.getLogger(name).info("repeated times=%d within_s=%g like=%r", count, REPEAT_S, text[:200])


@dataclass(slots=True)
class _Kind:
    since_s: float
    texts: set[str] = field(default_factory=set)
    left_out: int = 0
    last: str = ""


class Repeats:
    """Which warnings may be told: each text once in `every_s`, and `alike_max` of one kind."""

    def __init__(self, every_s: float, alike_max: int) -> None:
        self._every_s = every_s
        self._alike_max = alike_max
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def may_tell(self, kind: tuple[str, str], text: str, now: float) -> bool:
        known = self._kinds.setdefault(kind, _Kind(now))
        if text in known.texts or len(known.texts) >= self._alike_max:
            known.left_out, known.last = known.left_out + 1, text
            return False
        known.texts.add(text)
        return True

    def take(self, now: float) -> list[tuple[tuple[str, str], str, int]]:
        """What was left out in the times that are over: kind, the latest text, how many."""
        over = [kind for kind, known in self._kinds.items() if now - known.since_s >= self._every_s]
        ended = [(kind, self._kinds.pop(kind)) for kind in over]
        return [(kind, known.last, known.left_out) for kind, known in ended if known.left_out]


class RotatedFile:
    """`path`, and `path`.1 to .N of before: each below a number of bytes."""

    def __init__(self, path: Path, limits: LogLimits) -> None:
        self.path = path
        self._limits = limits
        self._open()

    def write(self, line: str) -> None:
        """Raises OSError."""
        data = line.encode(errors="backslashreplace") + b"\n"
        if self._size and self._size + len(data) > self._limits.file_bytes_max:
            self._rotate()
        self._size += self._file.write(data) or 0

    def reopen(self) -> None:
        """Somebody else moved or removed it."""
        try:
            if os.stat(self.path).st_ino == os.fstat(self._file.fileno()).st_ino:
                return
        except FileNotFoundError:
            pass
        before = self._file
        self._open()
        before.close()

    def close(self) -> None:
        self._file.close()

    def _open(self) -> None:
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._size = os.fstat(self._file.fileno()).st_size

    def _rotate(self) -> None:
        names = [self.path, *(Path(f"{self.path}.{i}") for i in range(1, self._limits.files_max))]
        if len(names) == 1:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():  # else an earlier try could not open a new one
            for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(newer, older)
        self.reopen()


class LiveLine:
    """The last line of the terminal, and the lines that stay above it."""

    def __init__(self, stream: TextIO, enabled: bool) -> None:
        self.stream = stream
        self.enabled = enabled
        self._text = ""

    def show(self, text: str) -> None:
        """Put `text` in place of what stands there."""
        if self.enabled:
            self._text = printable(text)[: shutil.get_terminal_size().columns - 1]
            self._write("\r\x1b[K" + self._text)

    def print(self, line: str) -> None:
        """A line that stays, above the live one."""
        clear = "\r\x1b[K" if self._text else ""
        self._write(f"{clear}{line}\n{self._text}")

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            self.enabled = False  # the terminal is gone; the node goes on


def _is_same_file(stream: TextIO, paths: Iterable[Path]) -> bool:
    try:
        ours = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    for path in paths:
        with contextlib.suppress(OSError):
            found = os.stat(path)
            if (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino):
                return True
    return False


def _bound(path: Path, bytes_max: int) -> None:
    """Empty a file that a process appends to, before it grows without end. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_size > bytes_max:
            os.truncate(path, 0)
