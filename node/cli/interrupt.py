"""What Ctrl-C says, and gives to the shell, where nothing is begun that must be ended in order.

Everywhere else main.py says the same of a KeyboardInterrupt. Must stay light: entry.py imports it first.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

INTERRUPTED = 1  # errors.ExitCode.FAILED; importing it would take the time that entry.py saves
WORDS = b"\nerror: interrupted\n"


def end(number: int = 0, frame: FrameType | None = None) -> None:
    """A handler of SIGINT: the process is gone, whatever import it was in, which would tell an exception."""
    try:  # noqa: SIM105 - contextlib takes too long
        os.write(2, WORDS)
    except OSError:
        pass  # nobody reads it
    os._exit(INTERRUPTED)
