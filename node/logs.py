"""Logs: changes of state, one line each, to stderr; text for people or JSON for collectors."""

from __future__ import annotations

import json
import logging
import sys
import time


def start_logging(log_format: str) -> None:
    """Send the log of `tapestry.*` to stderr. Called once, by the daemon."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    root = logging.getLogger("tapestry")
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno <= logging.INFO else f" {record.levelname.lower()}"
        text = f"{clock}.{int(record.msecs):03d}{level} {record.getMessage()}"
        return text + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


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
