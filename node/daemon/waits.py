"""Tells people of a wait that lasts, without being asked: in the log, in the page's events, as a metric.

One look each LOOK_S at what status shows. A wait is told when it has lasted for longer than is usual
(protocol/waits.py), again each AGAIN_S while it goes on, and when it is over. It is over when it was no news
for OVER_S: a round that begins ballot after ballot waits on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from tapestry.node.errors import printable
from tapestry.node.protocol.waits import Wait, span
from tapestry.node.surface.history import History
from tapestry.node.surface.metrics import Metrics

LOOK_S = 5.0
AGAIN_S = 3600.0
OVER_S = 60.0

_log = logging.getLogger("tapestry.node")


@dataclass(slots=True)
class _Told:
    """A wait that people know of."""

    at: float  # of our clock: when it was told last
    seen_at: float  # when it was still news
    for_s: float  # how long it had lasted then


class WaitTeller:
    """Owned by the daemon, from before the node has joined until it has stopped."""

    def __init__(
        self,
        look: Callable[[], Wait | None],
        metrics: Metrics,
        history: History,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look = look
        self._metrics = metrics
        self._history = history
        self._clock = clock
        self._told: dict[str, _Told] = {}  # by kind

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Tell what is new of it."""
        wait, now = self._look(), self._clock()
        if wait is not None and wait.lasting:
            told = self._told.get(wait.kind)
            if told is None or now - told.at >= AGAIN_S:
                told = self._told[wait.kind] = _Told(now, now, wait.for_s)
                self._tell(wait)
            told.seen_at, told.for_s = now, wait.for_s
            self._metrics.set_waiting({wait.kind: wait.for_s})
        else:
            self._metrics.set_waiting({})
        for kind in [kind for kind, told in self._told.items() if now - told.seen_at >= OVER_S]:
            for_s = self._told.pop(kind).for_s
            _log.info("waited=%s for_s=%.0f it is over", kind, for_s)
            self._history.tell(f"the wait is over, after {span(for_s)}", "good")

    def _tell(self, wait: Wait) -> None:
        _log.warning("waiting=%s for_s=%.0f what=%r; %s", wait.kind, wait.for_s, wait.what, wait.ends)
        self._history.tell(printable(f"waiting: {wait.text}"), "warning")
