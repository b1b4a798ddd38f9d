"""The node's side of a step that is taken aside and measured by the worker: one at a time.

The parameters after the step lie in the buffer that a founder's initial state came through (buffers.py). It
is written only while `lock` is held, which is until the worker has answered or has gone: it never reads what
another step writes.
"""

from __future__ import annotations

import asyncio

from tapestry.node.trainer.messages import Judged


class Aside:
    """Loop only."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self._asked = ""  # head of the state that the step leads to
        self._answer: asyncio.Future[tuple[float, float] | None] | None = None

    @property
    def waiting(self) -> bool:
        """Whether the worker owes an answer."""
        return self._answer is not None

    async def answer(self, head: str) -> tuple[float, float] | None:
        """Losses before and after, once the worker has said them; None if it goes without."""
        self._asked, self._answer = head, asyncio.get_running_loop().create_future()
        try:
            return await self._answer
        finally:
            self._answer = None

    def answered(self, report: Judged) -> None:
        if self._answer is not None and not self._answer.done() and report.head == self._asked:
            self._answer.set_result((report.before, report.after))

    def gone(self) -> None:
        """The worker is."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)
