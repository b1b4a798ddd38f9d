"""Comma-, semicolon- or tab-separated values: the first row names columns, one of which holds documents."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from tapestry.node.trainer.data.files import Piece, SourceFile, decoded, without_packing
from tapestry.node.trainer.data.readers.format import Format
from tapestry.node.trainer.data.tally import Tally

CELL_CHARS_MAX = 64 << 20  # Guess, as for a line of jsonl


def read(file: SourceFile, tally: Tally) -> Iterator[Piece]:
    csv.field_size_limit(CELL_CHARS_MAX)
    header, delimiter = _header(file)
    column = header.index(file.field) if file.field in header else -1
    with decoded(file) as text:
        rows = csv.reader(text, delimiter=delimiter)
        next(rows, None)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error:
                tally.rows += 1
                tally.malformed.add(f"{file.path}:{rows.line_num}")
                continue
            if not row:
                continue
            tally.rows += 1
            if not 0 <= column < len(row):
                tally.no_field.add(f"{file.path}:{rows.line_num}")
            elif row[column]:
                yield row[column], True


def fields(file: SourceFile) -> list[str]:
    return _header(file)[0]


def _header(file: SourceFile) -> tuple[list[str], str]:
    """The columns' names, and what separates them: of several, whatever shows the field or most columns."""
    with decoded(file) as text:
        line = text.readline(CELL_CHARS_MAX)
    choices = ["\t"] if without_packing(file.path).endswith(".tsv") else [",", ";", "\t"]
    headers = [(next(csv.reader([line], delimiter=one), []), one) for one in choices]
    return max(headers, key=lambda header: (file.field in header[0], len(header[0])))


FORMAT = Format("csv", (".csv", ".tsv"), is_table=True, read=read, fields=fields)
