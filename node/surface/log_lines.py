"""How a log record becomes a line: for people, or as JSON with fields of their own types.

The fields are read from the record's *format*, which is ours, never from its text, which may quote a peer:

    _log.info("link=failed peer=%s reason=%s %s", peer, reason, error)
    -> {"event": "link=failed", "link": "failed", "peer": "kT4mQz", "reason": "timeout", "message": ...}

Imports the standard library only.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
import traceback
from datetime import UTC, datetime
from typing import Any

OURS = "tapestry."
_PLACE = re.compile(r"%(?:%|[-+ #0]*\d*(?:\.\d+)?[a-zA-Z])")
_WORD = re.compile(r"\S+")
_KEY = re.compile(r"([a-z][a-z0-9_]*)=(.+)")


class Text(logging.Formatter):
    """`2026-11-29 09:41:07.312 warning links link=failed peer=...`, local time."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        head = f"{clock}.{int(record.msecs):03d} {record.levelname.lower()} {subsystem_of(record)}"
        trace = "".join(f"\n  {printable(line)}" for line in _trace_of(record).split("\n") if line)
        return f"{head} {printable(message_of(record))}{trace}"


class Json(logging.Formatter):
    """One table a line. What is no JSON value becomes text; NaN and infinities become null."""

    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry: dict[str, Any] = {
            "time": clock.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "subsystem": subsystem_of(record),
            "event": event_of(record),
            "message": message_of(record),
        }
        for key, value in fields_of(record).items():
            entry.setdefault(key, _json_value(value))
        trace = _trace_of(record)
        if trace:
            entry["exception"] = trace
        return json.dumps(entry, allow_nan=False)


def printable(text: str) -> str:
    """One line, whatever a peer has put into it: no line of its own, nothing that moves a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def subsystem_of(record: logging.LogRecord) -> str:
    """`links` for `tapestry.links`; a library's own name for a library's."""
    return record.name.removeprefix(OURS)


def message_of(record: logging.LogRecord) -> str:
    """The text. A format that does not fit its arguments costs no line."""
    try:
        return record.getMessage()
    except (TypeError, ValueError):
        return f"{record.msg} {record.args}"


def event_of(record: logging.LogRecord) -> str:
    """What kind of line it is: of all words up to the first field those that are the same each time."""
    words: list[str] = []
    for word in _WORD.findall(str(record.msg)):
        match = _KEY.fullmatch(word)
        if match is None and not _PLACE.search(word):
            words.append(word)
            continue
        if not words and match is not None:
            words.append(match[1] if _PLACE.search(match[2]) else word)
        break
    return " ".join(words)[:64] or "note"


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """The `key=value` of the format; a value that is one place has its argument's own type."""
    args = record.args if isinstance(record.args, tuple) else ()
    fields: dict[str, Any] = {}
    taken = 0
    for word in _WORD.findall(str(record.msg)):
        places = sum(place != "%%" for place in _PLACE.findall(word))
        mine, taken = args[taken : taken + places], taken + places
        match = _KEY.fullmatch(word)
        if match is None or len(mine) < places:
            continue
        if places == 1 and _PLACE.fullmatch(match[2]):
            fields[match[1]] = mine[0]
        elif places == len([p for p in _PLACE.findall(match[2]) if p != "%%"]):
            fields[match[1]] = match[2] % mine if places else match[2]
    return fields


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _trace_of(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    return "".join(traceback.format_exception(record.exc_info[1])).rstrip("\n")
