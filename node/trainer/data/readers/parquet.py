"""Parquet, through pyarrow: one column holds documents. Only that column is read, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tapestry.node.trainer.data.errors import DamagedFile
from tapestry.node.trainer.data.files import Piece, SourceFile
from tapestry.node.trainer.data.readers.format import Format
from tapestry.node.trainer.data.readers.jsonl import field_of
from tapestry.node.trainer.data.tally import Tally

BATCH_ROWS = 512  # Guess: documents of 100 kB make 50 MB


def read(file: SourceFile, tally: Tally) -> Iterator[Piece]:
    table = _open(file)
    with table:
        top = file.field if file.field in table.schema_arrow.names else file.field.split(".")[0]
        if top not in table.schema_arrow.names:
            tally.rows += table.metadata.num_rows
            tally.no_field.add(file.path, count=table.metadata.num_rows)
            return
        yield from rows_of(_batches(table, top), file, tally)


def fields(file: SourceFile) -> list[str]:
    with _open(file) as table:
        return list(table.schema_arrow.names)


def rows_of(batches: Iterator[Any], file: SourceFile, tally: Tally) -> Iterator[Piece]:
    """The documents of arrow record batches."""
    number = 0
    for batch in batches:
        for row in plain_rows(batch):
            number += 1
            tally.rows += 1
            if row is None:
                tally.malformed.add(f"{file.path}:{number}")
                continue
            found = field_of(row, file.field)
            if not isinstance(found, str):
                tally.no_field.add(f"{file.path}:{number}")
            elif found:
                yield found, True


def plain_rows(batch: Any) -> list[Any]:
    """Of an arrow record batch; None for one whose text is not UTF-8, which arrow does not look at."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        return [_plain_row(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _plain_row(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return None


def _open(file: SourceFile) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file.path)
    except pyarrow.ArrowException as error:
        raise DamagedFile(f"not parquet: {_first_line(error)}") from error


def _batches(table: Any, column: str) -> Iterator[Any]:
    import pyarrow

    try:
        yield from table.iter_batches(batch_size=BATCH_ROWS, columns=[column])
    except (pyarrow.ArrowException, OSError) as error:  # pyarrow says OSError of a page that it cannot unpack
        raise DamagedFile(f"broken parquet: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


FORMAT = Format(
    "parquet",
    (".parquet", ".pq"),
    is_table=True,
    read=read,
    fields=fields,
    is_packed=True,
    needs="pyarrow",
)
