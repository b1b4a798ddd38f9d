"""What a node prints while it runs, to stderr: changes of state, one line each; in a terminal one live line.

Text for people or JSON for collectors. The live line is rewritten in place and gives way to log lines.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from typing import TextIO


def start_logging(log_format: str) -> LiveLine:
    """Send the log of `tapestry.*` to stderr. Called once, by the daemon."""
    live = LiveLine(sys.stderr, enabled=log_format == "text" and sys.stderr.isatty())
    handler = _Handler(live)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    root = logging.getLogger("tapestry")
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False
    return live


class LiveLine:
    """The last line of the terminal."""

    def __init__(self, stream: TextIO, enabled: bool) -> None:
        self._stream = stream
        self._enabled = enabled
        self._text = ""

    def show(self, text: str) -> None:
        """Put `text` in place of what stands there."""
        if self._enabled:
            self._text = text[: shutil.get_terminal_size().columns - 1]
            self._write("\r\x1b[K" + self._text)

    def print(self, line: str) -> None:
        """A line that stays, above the live one."""
        clear = "\r\x1b[K" if self._text else ""
        self._write(f"{clear}{line}\n{self._text}")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._enabled = False  # the terminal is gone; the node goes on


class _Handler(logging.Handler):
    def __init__(self, live: LiveLine) -> None:
        super().__init__()
        self._live = live

    def emit(self, record: logging.LogRecord) -> None:
        self._live.print(self.format(record))


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno <= logging.INFO else f" {record.levelname.lower()}"
        text = f"{clock}.{int(record.msecs):03d}{level} {printable(record.getMessage())}"
        return text + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def printable(text: str) -> str:
    """One line, whatever a peer has put into it: no line of its own, nothing that moves a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)
