"""What a format of data is. A new one is a file beside this one that makes a `Format`, and a line in
registry.py.

A reader streams: it holds a piece of its file at a time, however large the file is. It yields the same pieces
each time it is asked, because a tokenization that was interrupted goes on after the pieces it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tapestry.node.trainer.data.files import Piece, SourceFile
from tapestry.node.trainer.data.tally import Tally

TABLES_EXTRA = "pip install 'tapestry-node[data]'"


@dataclass(frozen=True, slots=True)
class Format:
    """One format of files."""

    name: str
    suffixes: tuple[str, ...]  # in lower case, without .gz and .zst; "" of the format that takes the rest
    is_table: bool  # needs a field
    read: Callable[[SourceFile, Tally], Iterator[Piece]]  # may raise DamagedFile, OSError and DataError
    fields: Callable[[SourceFile], list[str]]  # names in its first row, for an error message
    is_packed: bool = False  # its files are packed by themselves: .gz and .zst around it are not read
    needs: str = ""  # a package that may not be there
    version: int = 0  # of what `read` gives: a higher one has every source of the format tokenized again
