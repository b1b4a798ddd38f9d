"""How far the data or a download are: shown at once, and in the log now and then."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from tapestry.node.progress import Progress, form
from tapestry.node.surface.logs import Shows
from tapestry.node.trainer import messages as tm

PROGRESS_LOG_S = 15.0  # Guess: between two lines of progress in the log

_log = logging.getLogger("tapestry.node")


class TokenizingView:
    """How far the trainer is with its data: in the live line, and in the log."""

    def __init__(self, live: Shows) -> None:
        self._live = live
        self._logged_at = -math.inf

    def show(self, event: tm.Tokenizing, now: float) -> str:
        """What it shows."""
        text = form("tokenizing bytes", event.done_bytes, event.total_bytes, event.bytes_per_second)
        self._live.show(text)
        if now - self._logged_at >= PROGRESS_LOG_S:
            self._logged_at = now
            _log.info("%s", text)
        return text


class Coming:
    """How far a download is: told to `show`, and in the log. `update` is a Told."""

    def __init__(self, show: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._show, self._clock = show, clock
        self._progress = Progress(clock)
        self._logged_at = clock()  # what is short is told by its end

    def update(self, what: str, done: int, total: int) -> None:
        self._progress.update(what, done, total)
        self._show(self.text)
        if self._clock() - self._logged_at >= PROGRESS_LOG_S:
            self._logged_at = self._clock()
            _log.info("%s", self.text)

    def end(self) -> None:
        self._progress.end()

    @property
    def text(self) -> str:
        """ "" where nothing comes."""
        return self._progress.text
