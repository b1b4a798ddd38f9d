"""What node.toml and the flags of `tapestry start` say about this member's data.

`--data` and `--validation` are short forms; the section `[data]` of node.toml says everything. Both become
one `DataSettings` whose sources have absolute paths and different names. Nothing here reads a file of data:
node/trainer/data/ does that.

Must not import numpy, torch or anything heavy: the command line waits for this module.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from tapestry.node.errors import UserError
from tapestry.node.spec.tables import FILLED_IN, Between, Pattern

DATA_MISSING = "no data to train on"
SOURCES_MAX = 256  # Guess: each is a label of a metric and a file of tokens
NAME = Pattern(r"[^\x00-\x1f\x7f]{0,64}", "at most 64 printable characters")
WORD = Pattern(r"[A-Za-z0-9_-]{1,64}", "1 to 64 letters, digits, - and _")
STDLIB = re.compile(r"stdlib(?::([0-9]{1,9})/([0-9]{1,9}))?")
HUB = re.compile(r"hub:(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.-]+))?", re.ASCII)
# What follows the last colon of PATH:FIELD. "a.b" looks into a table inside a row.
_FIELD = re.compile(r"[^/:\x00-\x1f]{1,128}")


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """One source of training text. In node.toml: a table [[data.source]]."""

    path: Annotated[str, 'A file, a folder, "stdlib", "stdlib:K/N", or "hub:OWNER/NAME".']
    field: Annotated[str, "Which field of a row holds the text, in jsonl, csv, parquet and arrow."] = ""
    name: Annotated[str, NAME, 'What metrics and log call it. "": after its path.'] = ""
    weight: Annotated[
        float,
        Between(0.0, 1e6, above=True),
        "1: each of its windows is seen as often as any other's; 2: twice as often.",
    ] = 1.0
    encoding: Annotated[str, 'Of its text, such as "latin-1". "": UTF-8, or UTF-16 with a mark.'] = ""
    follow_links: Annotated[bool, "Whether links that lead out of the folder are followed."] = False
    rehearsal: Annotated[bool, "It takes its part out of rehearsal_share, not out of the rest."] = False


@dataclass(frozen=True, slots=True)
class ValidationSettings:
    """One set of text to measure the base on. In node.toml: a table [[data.validation]]."""

    path: Annotated[str, "As in [[data.source]]."]
    name: Annotated[str, NAME, 'The label `set` of its loss in metrics. "": after its path.'] = ""
    field: Annotated[str, "As in [[data.source]]."] = ""
    encoding: Annotated[str, "As in [[data.source]]."] = ""
    follow_links: Annotated[bool, "As in [[data.source]]."] = False


@dataclass(frozen=True, slots=True)
class DataSettings:
    """All of this member's data, and when it is too doubtful to train on."""

    paths: Annotated[
        tuple[str, ...],
        'Text to train on: files, folders, "PATH:FIELD" for tables (jsonl, csv, parquet, arrow), '
        '"hub:OWNER/NAME:FIELD", or "stdlib" (the sources of the Python standard library). '
        "It never leaves this node.",
    ] = ()
    source: Annotated[
        tuple[SourceSettings, ...],
        "The same, with more to say. Weights need this form.",
    ] = ()
    validation: Annotated[
        tuple[ValidationSettings, ...],
        "What the base is measured on each epoch. With none, windows of every source are held out.",
    ] = ()
    rehearsal_share: Annotated[
        float,
        Between(0.0, 0.9),
        "Share of the windows that come from sources with rehearsal = true: text like what the base has "
        "learnt from, so that it does not forget.",
    ] = 0.0
    left_out_max: Annotated[
        float, Between(0.0, 1.0), "Refuse a source of which a larger share of bytes cannot be read."
    ] = 0.5
    malformed_max: Annotated[
        float,
        Between(0.0, 1.0),
        "Refuse a source of which a larger share of rows (or of characters) is malformed or has no text.",
    ] = 0.01
    passes_per_epoch_max: Annotated[
        float,
        Between(0.0, 1e6, above=True),
        "Refuse data so small that an epoch of the run goes over it more often than this.",
    ] = 2.0
    allow_doubtful: Annotated[bool, "Warn in these three cases, in place of refusing."] = False


NO_DATA = DataSettings()


@dataclass(frozen=True, slots=True)
class Domain:
    """What must not be learnt from: text that a pattern finds, or that a program of the member's names."""

    name: Annotated[str, WORD, "What it is called: in `protected`, and where what was dropped is counted."]
    patterns: Annotated[
        tuple[str, ...],
        "Regular expressions of Python, upper and lower case alike. A row of a table, or a paragraph of "
        "text, in which one is found is dropped.",
    ] = ()
    command: Annotated[
        tuple[str, ...],
        "A program and its arguments. It gets each text as a line of JSON and answers each with a line: "
        "1 drops it, 0 keeps it. Anything else ends the start. It runs in the folder of data.toml.",
    ] = ()
    folder: Annotated[str, FILLED_IN, "Where it runs: that of data.toml."] = ""


@dataclass(frozen=True, slots=True)
class Located:
    """Where one source lay when it was asked whether it may be read: nothing else is read of it."""

    path: Annotated[str, "Of the source, as in its settings."]
    real: Annotated[
        tuple[str, ...],
        "Its real path, and the real paths that its links lead to, of a folder for all that lies in it.",
    ]


@dataclass(frozen=True, slots=True)
class Protection:
    """The domains of one source."""

    path: Annotated[str, "Of the source, as in its settings."]
    domains: Annotated[tuple[Domain, ...], "All that it must be kept clear of."]


def resolved_data(settings: DataSettings, hint: str) -> DataSettings:
    """The same with every source in `source`, named, and `paths` empty. Raises UserError.

    Paths are absolute already (see `rebased_data`). `hint` says where data can be given.
    """
    sources = [*map(source_of, settings.paths), *map(_with_field, settings.source)]
    if not sources:
        raise UserError(DATA_MISSING, hint=hint)
    if len(sources) > SOURCES_MAX or len(settings.validation) > SOURCES_MAX:
        raise UserError(
            f"more than {SOURCES_MAX} sources of data", hint="put files of one kind into one folder"
        )
    _check_rehearsal(settings.rehearsal_share, sources)
    sets = [_with_field(one) for one in settings.validation]
    for one in [*sources, *sets]:
        _check_encoding(one.path, one.encoding)
    return replace(settings, paths=(), source=_named(sources), validation=_named(sets))


def source_of(text: str) -> SourceSettings:
    """What `--data TEXT` means."""
    path, field = split_field(text)
    return SourceSettings(path, field)


def validation_of(text: str) -> dict[str, str]:
    """What `--validation [NAME=]PATH[:FIELD]` means: a table like [[data.validation]]."""
    name, equals, path = text.partition("=")
    if not equals or "/" in name or os.path.lexists(text):
        return {"path": text}
    return {"name": name, "path": path}


def split_field(text: str) -> tuple[str, str]:
    """PATH:FIELD as its two parts; a name that exists as it stands has no field."""
    if text.startswith("stdlib:") or ":" not in text or os.path.lexists(text):
        return text, ""
    if text.startswith("hub:") and text.count(":") == 1:
        return text, ""
    path, field = text.rsplit(":", 1)
    return (path, field) if _FIELD.fullmatch(field) else (text, "")


def data_table(value: Any) -> Any:
    """The short form `data = ["PATH", ...]` of node.toml as the table that it stands for."""
    return {"paths": value} if isinstance(value, list) else value


def rebased_data(table: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """The table with paths made absolute; words such as stdlib stay."""
    rebased = dict(table)
    if "paths" in table:
        rebased["paths"] = [_rebased(path, base) for path in table["paths"]]
    for key in ("source", "validation"):
        if key in table:
            rebased[key] = [{**one, "path": _rebased(one["path"], base)} for one in table[key]]
    return rebased


def merged_data(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` goes before `low`, key by key; but either way of naming sources replaces both."""
    named = {"paths", "source"} if {"paths", "source"} & set(high) else set()
    return {key: value for key, value in low.items() if key not in named} | dict(high)


def is_word(text: str) -> bool:
    """Whether a source is one of the words that name no path."""
    return text == "stdlib" or text.startswith(("stdlib:", "hub:"))


def real_of(path: str) -> str:
    """The path without links, as they lead today; a word stays."""
    return path if is_word(path) else os.path.realpath(path)


def reals_of(paths: Iterable[str]) -> tuple[str, ...]:
    """Of those that are links, or lie behind one: where they are today."""
    return tuple(dict.fromkeys(real for path in paths if (real := real_of(path)) != path))


def _rebased(text: str, base: Path) -> str:
    return text if is_word(text) else str(path_in(base, text))


def path_in(base: Path, text: str) -> Path:
    """A path of somebody's settings, from `base` on. Raises UserError where it can be none."""
    try:
        if "\0" in text:
            raise ValueError
        return base / Path(text).expanduser()
    except (ValueError, RuntimeError):  # RuntimeError: ~NAME of a user that this machine has not
        raise UserError(
            f"{text[:80]} is no path here", hint="~NAME must be a user of this machine; a whole path will do"
        ) from None


def _with_field(one: Any) -> Any:
    if one.field:
        return one
    path, field = split_field(one.path)
    return replace(one, path=path, field=field)


def _named(sources: Sequence[Any]) -> tuple[Any, ...]:
    """Each with a name that no other has."""
    taken: dict[str, None] = {}
    named = []
    for one in sources:
        wanted = one.name or _default_name(one.path)
        candidates: Iterable[str] = (wanted, *(f"{wanted}-{number}" for number in range(2, SOURCES_MAX + 2)))
        name = next(name for name in candidates if name not in taken)
        taken[name] = None
        named.append(replace(one, name=name))
    return tuple(named)


def _default_name(path: str) -> str:
    if is_word(path):
        return re.sub(r"^hub:", "", path).replace(":", "-").replace("/", "-")[:60]
    printable = "".join(c if c.isprintable() else "?" for c in os.path.basename(path.rstrip("/")))
    return printable.split(".")[0][:60] or printable[:60] or "data"


def _check_rehearsal(share: float, sources: Sequence[SourceSettings]) -> None:
    rehearsing = [one for one in sources if one.rehearsal]
    if bool(rehearsing) != (share > 0) or len(rehearsing) == len(sources):
        raise UserError(
            "rehearsal_share and the sources with rehearsal = true do not fit",
            hint="set data.rehearsal_share above 0, and rehearsal = true in some sources but not in all",
        )


def _check_encoding(path: str, encoding: str) -> None:
    if not encoding:
        return
    try:
        "".encode(encoding)
    except (LookupError, ValueError):
        raise UserError(
            f"data {path}: there is no encoding {encoding[:40]!r}",
            hint='names are those of Python, such as "latin-1", "shift_jis", "utf-16-le"',
        ) from None
