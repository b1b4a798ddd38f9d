"""Comma-, semicolon- or tab-separated values: the first row names columns, one of which holds documents.

A row with more cells than the header is malformed: a separator that was written without quotes has cut a
cell in two, and nobody can say which. Empty cells at a row's end are none.

A .tsv has no quotes as a rule: a cell that begins with one would else swallow tabs and lines up to the next.
Its rows have as many cells as its header, or are malformed, so that one that was written with lines in its
cells shows it. A header in quotes says that all cells may be.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Literal

from tapestry.node.trainer.data.files import Piece, SourceFile, decoded, without_packing
from tapestry.node.trainer.data.readers.format import Format
from tapestry.node.trainer.data.tally import Tally

CELL_CHARS_MAX = 64 << 20  # Guess, as for a line of jsonl
Quoting = Literal[0, 3]  # csv.QUOTE_MINIMAL, csv.QUOTE_NONE


def read(file: SourceFile, tally: Tally) -> Iterator[Piece]:
    header = fields(file)
    column = header.index(file.field) if file.field in header else -1
    for number, row in rows_of(file):
        tally.rows += 1
        if row is None:
            tally.malformed.add(f"{file.path}:{number}")
        elif not 0 <= column < len(row):
            tally.no_field.add(f"{file.path}:{number}")
        elif row[column]:
            yield row[column], True


def rows_of(file: SourceFile) -> Iterator[tuple[int, list[str] | None]]:
    """In which line each row below the header ends, and its cells; None of one that cannot be read."""
    csv.field_size_limit(CELL_CHARS_MAX)
    header, delimiter, quoting = _header(file)
    with decoded(file) as text:
        rows = csv.reader(text, delimiter=delimiter, quoting=quoting)
        next(rows, None)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error:
                yield rows.line_num, None
                continue
            if row and _is_tsv(file):
                yield rows.line_num, [*map(_unquoted, row)] if len(row) == len(header) else None
            elif row:
                yield rows.line_num, None if any(row[len(header) :]) else row


def fields(file: SourceFile) -> list[str]:
    return _header(file)[0]


def _header(file: SourceFile) -> tuple[list[str], str, Quoting]:
    """The columns' names, and what separates them: whatever shows the field; else a comma if it separates
    anything; else whatever gives most columns."""
    with decoded(file) as text:
        line = text.readline(CELL_CHARS_MAX)
    choices = ["\t"] if _is_tsv(file) else [",", ";", "\t"]
    quoting: Quoting = csv.QUOTE_NONE if _is_tsv(file) and not line.startswith('"') else csv.QUOTE_MINIMAL
    headers = [(next(csv.reader([line], delimiter=one, quoting=quoting), []), one) for one in choices]
    header, delimiter = max(
        headers, key=lambda one: (file.field in one[0], one[1] == "," and len(one[0]) > 1, len(one[0]))
    )
    return header, delimiter, quoting


def _is_tsv(file: SourceFile) -> bool:
    return without_packing(file.path).endswith(".tsv")


def _unquoted(cell: str) -> str:
    """Programs that quote a cell with quotes in it double these."""
    inner = cell[1:-1]
    if cell[:1] == cell[-1:] == '"' and '""' in inner and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


FORMAT = Format("csv", (".csv",), is_table=True, read=read, fields=fields, version=1)
TSV = Format("tsv", (".tsv",), is_table=True, read=read, fields=fields)
