"""A story that a script tells with nodes: told to its end, whatever end that is, and nothing stays behind.

A story that breaks a promise raises Failed; the first signal ends it too. Signal handlers are set only once
it is told.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from _nodes import Failed
from _show import Show, opened_show


@dataclass(frozen=True)
class Options:
    """Of scripts/quickstart."""

    minutes: float
    base: Path | None  # absolute; None: the story without one
    epochs: int  # with a base
    keep: Path | None
    seed: int
    plain: bool
    tapestry: tuple[str, ...]


class Story(Protocol):
    """What `told` tells."""

    def tell(self, signals: Signals) -> None:
        """Raises Failed when something that was promised did not hold."""

    def stop(self, signals: Signals) -> None:
        """End all its nodes; may be called twice."""

    def conclude(self, signals: Signals) -> None:
        """Stop, report and judge. Raises Failed."""


def told(make: Callable[[Path, Show], Story], title: str, options: Options) -> int:
    """Tell a story to its end, whatever end that is, and leave nothing behind; returns the exit code."""
    signals = Signals()
    with contextlib.ExitStack() as stack:
        try:
            show = stack.enter_context(opened_show(title, options.plain))
            place = stack.enter_context(opened_place(options.keep))
            story = make(place, show)
            stack.callback(story.stop, signals)
            story.tell(signals)
            story.conclude(signals)
            return 0
        except Failed as failure:
            show.event(f"FAILED: {failure}", bad=True)
            for line in failure.details:
                show.event(f"  {line}")
            return 1
        except Ended as end:
            show.event(f"ended by {signal.Signals(end.number).name}: stopping the nodes")
            return 128 + end.number


class Ended(BaseException):
    """A signal asked us to end. Like KeyboardInterrupt no Exception, so that nothing on the way eats it."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


class Signals:
    """The first SIGINT, SIGTERM or SIGHUP raises Ended; further ones only count, and hasten the stopping."""

    def __init__(self) -> None:
        self.count = 0
        self.raised = 0
        self.ending = False  # the nodes are being stopped: a signal hastens that and no more
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.count += 1
        if not self.raised and not self.ending:
            self.raised = 1
            raise Ended(number)

    @property
    def hasten(self) -> bool:
        return self.count > self.raised


@contextlib.contextmanager
def opened_place(keep: Path | None) -> Iterator[Path]:
    """Where the homes, the logs and the model lie: removed afterwards unless it is to be kept."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
        return
    place = Path(tempfile.mkdtemp(prefix="tapestry-quickstart-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
