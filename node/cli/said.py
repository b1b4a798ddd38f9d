"""What a long command says of itself while it works (progress.py has the form).

On a terminal: one line on stderr, after QUIET_S, drawn anew by a thread of its own, so that it also goes on
while something takes long that cannot say how far it is. Elsewhere a line now and then: a log of a night's
work stays readable.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

import click
from rich.cells import cell_len

from tapestry.node.lineage.columns import WIDTH, cut
from tapestry.node.progress import Progress

QUIET_S = 2.0  # what takes longer says how far it is
DRAWN_EVERY_S = 0.5
STARTING = "starting"  # torch and its kin take seconds to load, on a busy machine ten
SAID_EVERY_S = 30.0  # where stderr is no terminal


class Said:
    """A context; `update` is a progress.Told, for any thread; `what` is said until its first word. What is
    slow to import is imported in it. `soon`: off a terminal too there is a line after QUIET_S, for what takes
    seconds and no night."""

    def __init__(self, what: str = STARTING, soon: bool = False) -> None:
        self._soon = soon
        self._progress = Progress()
        self._progress.update(what, 0, 1)
        self._terminal = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._drawn = 0  # columns of the line that stands there
        self._thread = threading.Thread(target=self._draw, name="said", daemon=True)

    def __enter__(self) -> Said:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.clear()

    def update(self, what: str, done: int, total: int) -> None:
        with self._lock:
            self._progress.update(what, done, total)

    def clear(self) -> None:
        """Leave the terminal at the beginning of a clean line, for other words."""
        with self._lock:
            if self._drawn:
                click.echo("\r" + " " * self._drawn + "\r", nl=False, err=True)
            self._drawn = 0

    def _draw(self) -> None:
        began_s = time.monotonic()
        say_at_s = began_s + (QUIET_S if self._soon else SAID_EVERY_S)
        while not self._ended.wait(DRAWN_EVERY_S):
            now_s = time.monotonic()
            if now_s - began_s < QUIET_S:
                continue
            with self._lock:
                text = cut(self._progress.text, WIDTH - 1)
                if self._terminal:
                    click.echo("\r" + text + " " * (self._drawn - cell_len(text)), nl=False, err=True)
                    self._drawn = max(self._drawn, cell_len(text))
                elif text and now_s >= say_at_s:
                    say_at_s = now_s + SAID_EVERY_S
                    click.echo(text, err=True)


@contextlib.contextmanager
def waited_for(what: str) -> Iterator[None]:
    """Say what is waited for, and for how long already."""
    with Said(what, soon=True):
        yield
