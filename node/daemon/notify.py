"""What a service manager is told, sd_notify(3): READY, STATUS, STOPPING, and the watchdog's sign of life.

One datagram to $NOTIFY_SOCKET; without it everything here does nothing. The sign of life comes from the
event loop, so a loop that hangs is restarted. The variables are taken out of the environment: trainer and
p2pd are not to speak for us.

As process 1 of a container a node also takes in what others left behind: a process whose parent ended
becomes ours, and stays a zombie until somebody asks for its status.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, MutableMapping

from tapestry.node.errors import printable

STATUS_EVERY_S = 10.0
REAP_EVERY_S = 5.0
START_MORE_US = 60_000_000  # EXTEND_TIMEOUT_USEC: a joiner may fetch a state for long

_log = logging.getLogger("tapestry.node")


class Notifier:
    """Made once, at the start."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self._address = environ.pop("NOTIFY_SOCKET", "")
        wanted_us = environ.pop("WATCHDOG_USEC", "0")
        whose = environ.pop("WATCHDOG_PID", "")
        ours = whose in ("", str(os.getpid()))
        self._watchdog_s = int(wanted_us) / 1e6 if ours and wanted_us.isdecimal() else 0.0
        self._ready = False
        self._is_speechless = False  # what we do could not be put into words, and people know of it

    @property
    def every_s(self) -> float:
        """How often `beat` is to be called: well within the watchdog's time."""
        return min(STATUS_EVERY_S, self._watchdog_s / 3) if self._watchdog_s else STATUS_EVERY_S

    def ready(self, status: str) -> None:
        """What is shown from this moment on is what the node does now, not what it did while it started."""
        self._ready = True
        self.send(f"READY=1\n{_status_line(status)}")

    def stopping(self) -> None:
        self.send("STOPPING=1")

    def beat(self, status: str) -> None:
        """We are alive, and this is what we do."""
        lines = [_status_line(status)]
        if self._watchdog_s:
            lines.append("WATCHDOG=1")
        if not self._ready:
            lines.append(f"EXTEND_TIMEOUT_USEC={START_MORE_US}")
        self.send("\n".join(lines))

    def send(self, text: str) -> None:
        """Never waits, never fails."""
        if not self._address:
            return
        name = self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(text.encode(), "\0" + name[1:] if name.startswith("@") else name)

    async def run(self, status: Callable[[], str]) -> None:
        """Until cancelled. A `status` that fails is our bug: told once, and the node lives on."""
        reaper = Reaper() if os.getpid() == 1 else None
        while True:
            self.beat(self._words(status))
            if reaper is not None:
                reaper.look()
            await asyncio.sleep(min(self.every_s, REAP_EVERY_S) if reaper is not None else self.every_s)

    def _words(self, status: Callable[[], str]) -> str:
        try:
            return status()
        except Exception:
            if not self._is_speechless:
                self._is_speechless = True
                _log.exception("status=not_told; the node goes on: look at its log, and report this bug")
            return "alive; its log says why it cannot say more"


def _status_line(status: str) -> str:
    """One line whatever peers said in it: each line is a field, and MAINPID= and STOPPING= are others."""
    return f"STATUS={printable(status)}"


class Reaper:
    """Asks for the status of ended children that nobody else asks for.

    Our own (trainer, p2pd) are waited for by the loop, at once: what is still there at the second look is
    nobody's.
    """

    def __init__(self) -> None:
        self._seen = 0

    def look(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                ended = None
            if ended is None:
                self._seen = 0
                return
            if ended.si_pid != self._seen:
                self._seen = ended.si_pid
                return
            with contextlib.suppress(ChildProcessError):
                os.waitpid(ended.si_pid, os.WNOHANG)
            self._seen = 0
            _log.debug("reaped pid=%d", ended.si_pid)
