"""What is wrong with a trainer that does not contribute: the cause, since when, and what would mend it.

A trainer that ends is started again, with growing pauses, and its node learns of it twice: why (`Failed`, the
worker's last word, which not all have) and that (`Died`). The cause is kept until a contribution is made:
neither the next start nor the next pause hides it. One that comes back REPEATS_MAX times is taken to stay.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import UTC, datetime

from tapestry.node.trainer.messages import Failed
from tapestry.node.trainer.process import Died

REPEATS_MAX = 3  # Guess: what has ended three trainers in a row will end the fourth

CURES = {  # by messages.Failed.reason
    "data": "put the data back, or start the node again with other --data",
    "disk": "make room on the disk or mend it",
    "room": "make room on the disk or mend it",
    "model": "start the node again with the versions of tapestry and transformers that the run uses",
    "settings": "put [training] in node.toml right and start the node again",
    "device": "see that the device is free and its driver works, or start the node again with --device cpu",
    "memory": "start the node again with a smaller micro_batch, or checkpointing = true, in node.toml's "
    "[training]",
    "diverged": "look at this member's data; where members with other data diverge too, the run's train.lr "
    "is too high",
    "timeout": "see that the machine is not overloaded or asleep; set a smaller micro_batch in node.toml's "
    "[training]",
}
UNKNOWN_CURE = "the log has the trainer's last lines; if they do not help, file an issue with them"


class TrainerHealth:
    """Owned by the trainer's desk."""

    def __init__(self, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.trouble = ""  # what is wrong, until a contribution is made; "" if nothing is
        self.cause = self.ends = ""  # the same in two: what is wrong, and what would end it
        self._clock = clock
        self._since = ""  # when it first ended for this cause
        self._kind = ""  # of the latest end: a reason of messages.Failed, or how it died
        self._ends = 0  # in a row, all for the same cause
        self._failed: Failed | None = None  # the worker's last word; its end is yet to come

    def failed(self, event: Failed) -> str:
        """Its last word: what is wrong."""
        self._failed = event
        self.cause, self.ends = f"trainer failed: {event.reason}: {event.text}", "ends with its next start"
        self.trouble = self.cause
        return self.trouble

    def died(self, event: Died) -> str:
        """It is gone: what is wrong, how often it was, and what comes next."""
        kind, cause = self._last_word(event)
        self._ends = self._ends + 1 if kind == self._kind else 1
        self._kind = kind
        if self._ends == 1:
            self._since = f"{self._clock():%Y-%m-%d %H:%M} UTC"
        times = f", {self._ends} times in a row since {self._since}" if self._ends > 1 else ""
        self.cause = f"trainer ended{times}: {cause}"
        self.ends = f"next start in {event.will_restart_in_s:g} s"
        if self.lasting:
            self.ends += f"; it cannot mend itself: {CURES.get(kind, UNKNOWN_CURE)}"
        self.trouble = f"{self.cause}; {self.ends}"
        return self.trouble

    @property
    def lasting(self) -> bool:
        """Whether it has ended so often for one cause that another start will not help."""
        return self._ends >= REPEATS_MAX

    @property
    def worth_telling(self) -> bool:
        """In the log: the first ends for a cause, then ever more seldom: the same each minute is no news."""
        return self._ends <= REPEATS_MAX or self._ends & (self._ends - 1) == 0

    def contributed(self) -> None:
        """It works."""
        self.trouble = self.cause = self.ends = self._kind = ""
        self._ends = 0

    def _last_word(self, event: Died) -> tuple[str, str]:
        """Kind and cause: what it said itself, else how it ended."""
        failed, self._failed = self._failed, None
        if failed is not None:
            return failed.reason, f"{failed.reason}: {failed.text}"
        last = f": {event.output[-1]}" if event.output else ""
        if event.exit_code == -signal.SIGKILL:
            return "memory", f"killed, which is what the kernel does when memory runs out{last}"
        how = f"signal {-event.exit_code}" if event.exit_code < 0 else f"exit {event.exit_code}"
        return how, f"{how}{last}"
