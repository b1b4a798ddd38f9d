"""Where the `tapestry` command begins and ends.

A Ctrl-C from here on is one line and exit code 1, imports included. Commands that load torch, and train
nothing, load less of it, and leave without its teardown, which takes a second and saves nothing.

Must stay light: until the handler stands, Python's own prints a traceback. So must tapestry.node and
tapestry.node.cli, which are imported before; what Python does before those is not ours.
"""

from __future__ import annotations

import atexit
import os
import sys

from tapestry.node.cli import interrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal  # without its enums, which take longer than all of this

LOOK_AT_MODELS = ("init", "export")
NO_TEARDOWN = ("start", *LOOK_AT_MODELS, "verify", "log", "backup", "restore", "exit", "doctor", "data")


def main() -> None:
    """The entry point."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else somebody wants it ignored
    if ours:
        signal.signal(signal.SIGINT, interrupt.end)
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in LOOK_AT_MODELS:
        from tapestry.node.trainer import imports

        imports.spare_torch()
    from tapestry.node.cli.main import main as run

    try:
        if ours:
            signal.signal(signal.SIGINT, interrupt.CTRL_C)  # main.py knows what to do with it
        run()
    except KeyboardInterrupt:  # before main.py has begun
        interrupt.end()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
        if ours:
            # All is done and said. Python's own handler would print a traceback even now.
            signal.signal(signal.SIGINT, lambda *_: os._exit(code))
        if _leaves_at_once(command, code):
            _leave(code)
        raise


def _leaves_at_once(command: str, code: int) -> bool:
    """One that failed too, for it may be of an interrupt: Python forgets now and then that it was caught, and
    kills itself."""
    if code == interrupt.INTERRUPTED:
        return True
    return command in NO_TEARDOWN and "torch" in sys.modules


def _leave(code: int) -> None:
    """End now, as the interpreter would: these commands have waited for their threads and children."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
