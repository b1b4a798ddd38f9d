"""Where the `tapestry` command begins and ends.

A Ctrl-C from here on ends it without a word, imports included. Commands that load torch, and train nothing,
load less of it, and leave without its teardown, which takes a second and saves nothing.

Must stay light: until the handler stands, Python's own prints a traceback.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from types import FrameType

INTERRUPTED = 1  # errors.ExitCode.FAILED; importing it would take the time that this module saves
LOOK_AT_MODELS = ("init", "export")


def main() -> None:
    """The entry point."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it ignored
        signal.signal(signal.SIGINT, _end)
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in LOOK_AT_MODELS:
        from tapestry.node.trainer import imports

        imports.spare_torch()
    from tapestry.node.cli.main import main as run

    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # main.py knows what to do with it
    try:
        run()
    except SystemExit as end:
        if command in ("start", *LOOK_AT_MODELS) and "torch" in sys.modules and isinstance(end.code, int):
            _leave(end.code)
        raise


def _leave(code: int) -> None:
    """End now, as the interpreter would: these commands have waited for their threads and children."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end(number: int, frame: FrameType | None) -> None:
    """Nothing was begun yet."""
    os._exit(INTERRUPTED)
