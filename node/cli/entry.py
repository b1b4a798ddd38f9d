"""Where the `tapestry` command begins: a Ctrl-C from here on ends it without a word, imports included.

Must stay light: until the handler stands, Python's own prints a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 1  # errors.ExitCode.FAILED; importing it would take the time that this module saves


def main() -> None:
    """The entry point."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it ignored
        signal.signal(signal.SIGINT, _end)
    if sys.argv[1:2] in (["init"], ["export"]):  # they look at models, and train none
        from tapestry.node.trainer import imports

        imports.spare_torch()
    from tapestry.node.cli.main import main as run

    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # main.py knows what to do with it
    run()


def _end(number: int, frame: FrameType | None) -> None:
    """Nothing was begun yet."""
    os._exit(INTERRUPTED)
