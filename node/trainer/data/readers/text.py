"""Plain text: a file is a document."""

from __future__ import annotations

from collections.abc import Iterator

from tapestry.node.trainer.data.files import Piece, SourceFile, decoded, pieces_of
from tapestry.node.trainer.data.readers.format import Format
from tapestry.node.trainer.data.tally import Tally


def read(file: SourceFile, tally: Tally) -> Iterator[Piece]:
    with decoded(file) as text:
        for piece in pieces_of(text):
            yield piece, False
    yield "", True


def _no_fields(file: SourceFile) -> list[str]:
    return []


FORMAT = Format("text", ("",), is_table=False, read=read, fields=_no_fields)
