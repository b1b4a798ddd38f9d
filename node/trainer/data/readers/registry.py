"""All formats of data. Must stay light: a format imports what it needs when it reads."""

from __future__ import annotations

import importlib.util

from tapestry.node.trainer.data.errors import DataError
from tapestry.node.trainer.data.files import without_packing
from tapestry.node.trainer.data.readers import arrow, csv, jsonl, parquet, text
from tapestry.node.trainer.data.readers.format import TABLES_EXTRA, Format

FORMATS: tuple[Format, ...] = (
    jsonl.FORMAT,
    csv.FORMAT,
    csv.TSV,
    parquet.FORMAT,
    arrow.FORMAT,
    text.FORMAT,  # takes what is left
)
_BY_NAME = {one.name: one for one in FORMATS}


def format_named(name: str) -> Format:
    """A format by the name in a SourceFile."""
    return _BY_NAME[name]


def format_of(path: str) -> Format:
    """By the file's name; what no other format claims is text, if it turns out to be."""
    name = without_packing(path)
    packed = name != path.lower()
    for one in FORMATS:
        if name.endswith(one.suffixes) and not (packed and one.is_packed):
            return one
    raise AssertionError("text takes what is left")


def format_in(path: str, encoding: str, lines_min: int) -> Format:
    """The same, but a .json of at least so many lines (1 or 2), each an object, is JSON lines: exports of
    hubs are called so. Raises OSError, DamagedFile."""
    by_name = format_of(path)
    if is_json(path) and jsonl.objects(path, encoding) >= lines_min:
        return jsonl.FORMAT
    return by_name


def is_json(path: str) -> bool:
    """By its name, which does not say whether it is a value or lines of them."""
    return without_packing(path).endswith(".json")


def require(one: Format, path: str) -> None:
    """Raises DataError if the package that reads the format is not installed."""
    if one.needs and importlib.util.find_spec(one.needs) is None:
        raise DataError(f"{path}: to read {one.name}, {TABLES_EXTRA}")
