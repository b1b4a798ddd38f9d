"""Where the `tapestry` command begins and ends.

A Ctrl-C from here on ends it without a word, imports included. Commands that load torch, and train nothing,
load less of it, and leave without its teardown, which takes a second and saves nothing.

Must stay light: until the handler stands, Python's own prints a traceback. So must tapestry.node and
tapestry.node.cli, which are imported before; what Python does before those is not ours.
"""

from __future__ import annotations

import atexit
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from types import FrameType
else:
    import _signal as signal  # without its enums, which take longer than all of this

INTERRUPTED = 1  # errors.ExitCode.FAILED; importing it would take the time that this module saves
LOOK_AT_MODELS = ("init", "export")
NO_TEARDOWN = ("start", *LOOK_AT_MODELS, "verify", "log", "backup", "restore", "exit", "doctor", "data")


def main() -> None:
    """The entry point."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else somebody wants it ignored
    if ours:
        signal.signal(signal.SIGINT, _end)
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in LOOK_AT_MODELS:
        from tapestry.node.trainer import imports

        imports.spare_torch()
    from tapestry.node.cli.main import main as run

    try:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # main.py knows what to do with it
        run()
    except KeyboardInterrupt:  # before main.py has begun
        _end()
    except SystemExit as end:
        if ours:
            signal.signal(signal.SIGINT, _end)  # Python's own end would print a traceback too
        if _leaves_at_once(command, end.code):
            _leave(int(end.code or 0))
        raise


def _leaves_at_once(command: str, code: object) -> bool:
    """One that failed too, for it may be of an interrupt: Python forgets now and then that it was caught, and
    kills itself."""
    if code == INTERRUPTED:
        return True
    return command in NO_TEARDOWN and "torch" in sys.modules and isinstance(code, int)


def _leave(code: int) -> None:
    """End now, as the interpreter would: these commands have waited for their threads and children."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end(number: int = 0, frame: FrameType | None = None) -> None:
    """Nothing is begun yet, or all is done."""
    os._exit(INTERRUPTED)
