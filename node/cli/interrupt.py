"""What Ctrl-C does to a command: by `end` at once, where nothing is begun that must be ended in order; else
by a KeyboardInterrupt, of which main.py says the same.

Must stay light: entry.py imports it first.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

INTERRUPTED = 1  # errors.ExitCode.FAILED; importing it would take the time that entry.py saves
WORDS = b"\nerror: interrupted\n"


class Key:
    """A handler of SIGINT as Python's own, which remembers: libraries turn a KeyboardInterrupt that hits one
    of their imports into errors of their own."""

    pressed = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        raise KeyboardInterrupt


CTRL_C = Key()


def end(number: int = 0, frame: FrameType | None = None) -> None:
    """A handler of SIGINT: the process is gone, whatever import it was in, which would tell an exception."""
    try:  # noqa: SIM105 - contextlib takes too long
        os.write(2, WORDS)
    except OSError:
        pass  # nobody reads it
    os._exit(INTERRUPTED)
