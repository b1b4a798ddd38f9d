"""Arrow, as stream (what `datasets` saves) or file (feather), through pyarrow: one column holds documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tapestry.node.trainer.data.errors import DamagedFile
from tapestry.node.trainer.data.files import Piece, SourceFile
from tapestry.node.trainer.data.readers.format import Format
from tapestry.node.trainer.data.readers.parquet import BATCH_ROWS, rows_of
from tapestry.node.trainer.data.tally import Tally


def read(file: SourceFile, tally: Tally) -> Iterator[Piece]:
    schema, batches = _open(file)
    top = file.field if file.field in schema.names else file.field.split(".")[0]
    if top not in schema.names:
        top = ""
    yield from rows_of(_selected(batches, top), file, tally)


def fields(file: SourceFile) -> list[str]:
    return list(_open(file)[0].names)


def _open(file: SourceFile) -> tuple[Any, Iterator[Any]]:
    """The schema, and the batches; memory-mapped."""
    import pyarrow
    import pyarrow.ipc

    try:
        stream = pyarrow.ipc.open_stream(pyarrow.memory_map(file.path))
        return stream.schema, iter(stream)
    except pyarrow.ArrowException:
        pass  # then it may be of the other kind
    try:
        table = pyarrow.ipc.open_file(pyarrow.memory_map(file.path))
    except pyarrow.ArrowException as error:
        raise DamagedFile(f"not arrow: {str(error)[:200]}") from error
    return table.schema, (table.get_batch(number) for number in range(table.num_record_batches))


def _selected(batches: Iterator[Any], column: str) -> Iterator[Any]:
    """Only the column, BATCH_ROWS at a time; without a column, as many empty rows."""
    import pyarrow

    try:
        for batch in batches:
            chosen = batch.select([column] if column else [])
            for start in range(0, batch.num_rows, BATCH_ROWS):
                if column:
                    yield chosen.slice(start, BATCH_ROWS)
                else:
                    yield _Empty(min(BATCH_ROWS, batch.num_rows - start))
    except (pyarrow.ArrowException, OSError) as error:
        raise DamagedFile(f"broken arrow: {str(error)[:200]}") from error


class _Empty:
    """Rows without the column."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def to_pylist(self) -> list[dict[str, Any]]:
        return [{}] * self._rows


FORMAT = Format(
    "arrow",
    (".arrow", ".feather"),
    is_table=True,
    read=read,
    fields=fields,
    is_packed=True,
    needs="pyarrow",
)
