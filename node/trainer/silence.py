"""How long the worker at hand may say nothing: one that is silent for longer is stuck, and is replaced.

The times, which process.ProcessLimits gives:

    before its hello     `hello_s` from its settings, and from each sign that it gets on with its data
    while it also reads  at least `save_s`: the inner optimizer that it left takes long to read
    with work to do      `silence_s` from each message in either direction
    while it also saves  at least `save_s`: an inner optimizer takes long to write
    idle                 as long as it likes
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Silence:
    """Loop only."""

    def __init__(self, hello_s: float, silence_s: float | None, save_s: float) -> None:
        """`silence_s` None: a worker may be silent for as long as it likes, once it has said hello."""
        self._hello_s, self._silence_s, self._save_s = hello_s, silence_s, save_s
        self._deadline: asyncio.Timeout | None = None
        self.saves = 0  # that the worker was told, and has not done

    @property
    def ends_s(self) -> float | None:
        """By the loop's clock; None: never."""
        return self._deadline.when() if self._deadline is not None else None

    @contextlib.asynccontextmanager
    async def bounded(self) -> AsyncIterator[None]:
        """A conversation with one worker. Raises TimeoutError inside once it has been silent for too long."""
        try:
            async with asyncio.timeout(None) as self._deadline:
                yield
        finally:
            self._deadline = None

    def await_hello(self, reads: bool = False) -> None:
        """From now on; again when it gets on with the data, which may take as long as they need. `reads`: it
        has an inner optimizer to read before."""
        self._end_in(max(self._hello_s, self._save_s) if reads else self._hello_s)

    def watch(self, busy: bool) -> None:
        """A message has gone or come, after the hello; `busy`: the worker owes an answer."""
        silence_s = self._silence_s
        if silence_s is not None and self.saves:
            silence_s = max(silence_s, self._save_s)
        self._end_in(silence_s if busy else None)

    def why(self, attached: bool) -> str:
        """It was too long: in a line; `attached`: it has said hello."""
        if not attached or self.saves:
            return "the trainer was silent for too long"
        return f"the trainer was silent for {self._silence_s:g} s, which a micro-batch must not take"

    def _end_in(self, silence_s: float | None) -> None:
        if self._deadline is not None:
            now_s = asyncio.get_running_loop().time()
            self._deadline.reschedule(now_s + silence_s if silence_s is not None else None)
