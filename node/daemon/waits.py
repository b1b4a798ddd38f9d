"""Tells people of a wait that lasts, without being asked: in the log, in the page's events, as a metric.

One look each LOOK_S at what status shows. A wait is told when it has lasted for longer than is usual
(protocol/waits.py), again each AGAIN_S while it goes on, and when it is over. It is over when it was no news
for OVER_S: a round that begins ballot after ballot waits on. A wait of the same kind that comes back within
AGAIN_S is told only once it has lasted longer than those before it: a quorum on the edge is told once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from tapestry.node.protocol.waits import Wait, span
from tapestry.node.surface.history import History
from tapestry.node.surface.metrics import Metrics

LOOK_S = 5.0
AGAIN_S = 3600.0
OVER_S = 60.0

_log = logging.getLogger("tapestry.node")


@dataclass(slots=True)
class _Told:
    """A kind of wait that people know of."""

    at: float  # of our clock: when it was told last
    seen_at: float  # when it was still news
    for_s: float  # the longest that it had lasted since `at`
    is_over: bool = False  # and people know that too


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
        self._is_broken = False  # a look has failed, and people know of it

    async def run(self) -> None:
        """Until cancelled. A look that fails is our bug: it is told once, and the next one is tried."""
        while True:
            try:
                self.look()
            except Exception:
                if not self._is_broken:
                    self._is_broken = True
                    _log.exception("waits=not_told; look at `tapestry status` instead, and report this bug")
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Tell what is new of it."""
        wait, now = self._look(), self._clock()
        if wait is not None and wait.lasting:
            told = self._told.get(wait.kind)
            if told is None or now - told.at >= AGAIN_S or (told.is_over and wait.for_s > told.for_s):
                told = self._told[wait.kind] = _Told(now, now, wait.for_s)
                self._tell(wait)
            if not told.is_over:
                told.seen_at, told.for_s = now, max(told.for_s, wait.for_s)
            self._metrics.set_waiting({wait.kind: wait.for_s})
        else:
            self._metrics.set_waiting({})
        for kind, told in self._told.items():
            if not told.is_over and now - told.seen_at >= OVER_S:
                told.is_over = True
                _log.info("waited=%s for_s=%.0f it is over", kind, told.for_s)
                self._history.tell(f"the wait is over, after {span(told.for_s)}", "good")

    def _tell(self, wait: Wait) -> None:
        _log.warning("waiting=%s for_s=%.0f what=%r; %s", wait.kind, wait.for_s, wait.what, wait.ends)
        self._history.tell(f"waiting: {wait.text}", "warning")
