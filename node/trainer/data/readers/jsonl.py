"""JSON lines: each line an object, one field of which is a document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tapestry.node.trainer.data.files import Piece, SourceFile, decoded
from tapestry.node.trainer.data.readers.format import Format
from tapestry.node.trainer.data.tally import Tally

LINE_CHARS_MAX = 64 << 20  # Guess: a longer line is no line of text

LOOKED_AT_CHARS = 16 << 20  # of a line, to see whether it is an object. Guess: a long book


def read(file: SourceFile, tally: Tally) -> Iterator[Piece]:
    with decoded(file) as text:
        number = 0
        while line := text.readline(LINE_CHARS_MAX):
            number += 1
            if not line.strip():
                continue
            tally.rows += 1
            where = f"{file.path}:{number}"
            if not line.endswith("\n") and len(line) == LINE_CHARS_MAX:
                _skip_line(text)
                tally.malformed.add(where)
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                tally.malformed.add(where)
                continue
            found = field_of(row, file.field)
            if not isinstance(found, str):
                tally.no_field.add(where)
            elif found:
                yield valid(found), True


def fields(file: SourceFile) -> list[str]:
    with decoded(file) as text:
        try:
            row = json.loads(text.readline(LINE_CHARS_MAX))
        except (ValueError, RecursionError):
            return []
    return sorted(row) if isinstance(row, dict) else []


def objects(path: str, encoding: str) -> int:
    """How many of the first two lines are an object each; 2 means JSON lines, whatever the file is called."""
    with decoded(SourceFile(path, 0, 0, FORMAT.name, encoding=encoding)) as text:
        for count in range(2):
            line = text.readline(LOOKED_AT_CHARS)
            try:
                if not line.startswith("{") or not isinstance(json.loads(line), dict):
                    return count
            except (ValueError, RecursionError):
                return count
    return 2


def field_of(row: Any, field: str) -> Any:
    """The value of a field, or with a dotted name of a field inside a field; None if there is none."""
    if isinstance(row, dict) and field in row:
        return row[field]
    for name in field.split("."):
        if not isinstance(row, dict):
            return None
        row = row.get(name)
    return row


def _skip_line(text: Any) -> None:
    while (rest := text.readline(LINE_CHARS_MAX)) and not rest.endswith("\n"):
        continue


def valid(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no character."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


FORMAT = Format("jsonl", (".jsonl", ".ndjson"), is_table=True, read=read, fields=fields)
