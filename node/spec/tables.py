"""Tables of settings: keys declared once, TOML and JSON read strictly, a commented file written.

Each key is declared once, as a field of a frozen dataclass, with its type, its bounds and its comment; the
reader, the error messages and the commented file that `tapestry init` writes all come from that declaration.
Unknown keys are errors that name the key that was meant.

Must not import torch, hivemind or transformers: the command line waits for this module.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import textwrap
import tomllib
import types
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from tapestry.node.errors import UserError
from tapestry.node.protocol.settings import Between as Between  # what rules of run.toml are too

FILE_BYTES_MAX = 64 * 1024  # Guess; a run.toml with all its comments has 8 kB.


SHOWN_CHARS_MAX = 60  # of a wrong value, in an error message


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pattern:
    """A string that the regular expression matches as a whole; `words` say the same."""

    regex: str
    words: str

    def admits(self, value: str) -> bool:
        return re.fullmatch(self.regex, value, re.ASCII) is not None

    def __str__(self) -> str:
        return f"of {self.words}"


@dataclass(frozen=True, slots=True)
class Name:
    """What people call something, in any language: letters and digits of any script, with their marks, blanks
    and . _ - ' between them; in Unicode's composed form (NFC), so that one name has one spelling."""

    chars_max: int

    def admits(self, value: str) -> bool:
        kinds = [unicodedata.category(char)[0] for char in value]
        return (
            0 < len(value) <= self.chars_max
            and kinds[0] in "LN"
            and all(kind in "LNM" or char in NAME_EXTRA for kind, char in zip(kinds, value, strict=True))
            and unicodedata.is_normalized("NFC", value)
        )

    def __str__(self) -> str:
        return f"of 1 to {self.chars_max} letters, digits, blanks and . _ - ', the first a letter or a digit"


NAME_EXTRA = " ._-'\u00b7\u2019\u200c\u200d"  # with the joiners of Persian, Hindi and others
Rule = Between | Pattern | Name


class FilledIn:
    """Of a key that the program gives its value, whoever reads the file: nobody writes it there."""


FILLED_IN = FilledIn()


@dataclass(frozen=True, slots=True)
class Key:
    """One declared key: its type, its rule, the comment that the template carries."""

    kind: Any  # what typing.get_type_hints gives: int, Literal[...], tuple[float, float], a dataclass, ...
    rule: Rule | None
    comment: str
    filled_in: bool = False


class TableError(ValueError):
    """A table that is not as declared; the message names the key, its value and what is allowed."""


def keys_of(kind: type) -> tuple[tuple[str, Key], ...]:
    """The keys that a dataclass declares, in order."""
    return _keys(kind)


@functools.cache  # Python evaluates the text of every annotation anew: most of the time that a spec took
def _keys(kind: Any) -> tuple[tuple[str, Key], ...]:
    keys = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner, *notes = get_args(hint)
        rule = next((note for note in notes if isinstance(note, Between | Pattern | Name)), None)
        keys.append((name, Key(inner, rule, notes[-1], FILLED_IN in notes)))
    return tuple(keys)


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables; raises UserError that names the file, and the line where TOML says it."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise UserError(f"{path}: larger than {FILE_BYTES_MAX} bytes, which is not a configuration file")
        return tomllib.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    except (ValueError, RecursionError) as error:  # tomllib's own error, or int's on too many digits
        raise UserError(f"{path}: not valid TOML: {error}") from error


def read_table(kind: type[T], table: object, prefix: str = "") -> T:
    """Build the dataclass `kind` from a table; raises TableError. Missing keys take their defaults."""
    if not isinstance(table, Mapping):
        raise TableError(f"{prefix[:-1]}: {shown(table)} is not a table")
    keys = dict(keys_of(kind))
    for name in table:
        if name not in keys:
            _refuse_unknown(str(name), list(keys), prefix)
    values = {
        name: _read_value(key, table.get(name, _MISSING), prefix + name)
        for name, key in keys.items()
        if name in table or is_section(key.kind)
    }
    for required in dataclasses.fields(kind):  # type: ignore[arg-type]  # every kind here is a dataclass
        if required.name not in values and required.default is dataclasses.MISSING:
            raise TableError(f"{prefix}{required.name}: missing")
    return kind(**values)


def refuse_filled_in(kind: type, table: Mapping[str, Any]) -> None:
    """Of a file's tables, read as `kind` already: raises TableError for a key that is nobody's to write, in a
    table of an array. Empty it may stand there: templates of older versions had it so."""
    for name, key in keys_of(kind):
        keys = keys_of(get_args(key.kind)[0]) if _is_array(key.kind) else ()
        ours = [inner for inner, one in keys if not one.filled_in]
        for number, one in enumerate(table.get(name, ()) if keys else (), 1):
            for inner, declared in keys:
                if declared.filled_in and one.get(inner):
                    _refuse_unknown(inner, ours, f"{name}[{number}].")


_MISSING: Mapping[str, object] = types.MappingProxyType({})  # a section that is left out


def is_section(kind: Any) -> bool:
    """Whether a key's type is a table: a dataclass, or several to choose from by their first key."""
    return any(dataclasses.is_dataclass(choice) for choice in _choices(kind))


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _read_value(key: Key, value: object, path: str) -> object:
    if is_section(key.kind):
        return _read_section(_choices(key.kind), value, path)
    if get_origin(key.kind) is not tuple:
        return _read_scalar(key.kind, key.rule, value, path)
    element, *rest = get_args(key.kind)
    if is_section(element):
        return _read_tables(element, value, path)
    count = None if rest == [Ellipsis] else 1 + len(rest)
    if not isinstance(value, list) or count not in (None, len(value)):
        what = "a list" if count is None else f"a list of {count}"
        raise TableError(f"{path}: {shown(value)} is not {what}; each {allowed(element, key.rule)}")
    return tuple(_read_scalar(element, key.rule, item, path) for item in value)


def _read_section(kinds: tuple[type, ...], value: object, path: str) -> object:
    """One of several dataclasses: the first key, a Literal, says which; the first of them is the default."""
    if len(kinds) == 1 or not isinstance(value, Mapping):
        return read_table(kinds[0], value, f"{path}.")
    tags = {get_args(tag.kind)[0]: kind for kind in kinds for tag in [keys_of(kind)[0][1]]}
    tag_name = keys_of(kinds[0])[0][0]
    tag = value.get(tag_name, next(iter(tags)))
    if not isinstance(tag, str) or tag not in tags:
        raise TableError(f"{path}.{tag_name}: {shown(tag)} is not {_one_of(tuple(tags))}")
    known = [name for name, _ in keys_of(tags[tag])]
    elsewhere = {name for kind in kinds for name, _ in keys_of(kind)}
    for name in value:
        if name not in known and name in elsewhere:
            raise TableError(
                f"{path}.{name}: no key of {tag_name} = {shown(tag)}, "
                f"which takes {', '.join(known[1:]) or 'nothing else'}"
            )
    return read_table(tags[tag], value, f"{path}.")


def _read_tables(kind: type, value: object, path: str) -> object:
    """An array of tables, [[path]] in TOML."""
    if not isinstance(value, list):
        raise TableError(f"{path}: {shown(value)} is not an array of tables, [[{path}]]")
    return tuple(read_table(kind, item, f"{path}[{number}].") for number, item in enumerate(value, 1))


def _is_word_or_number(kind: Any) -> bool:
    """Whether a key takes one of some words as well as a number: Literal["auto"] | float."""
    return get_origin(kind) in (Union, types.UnionType) and get_origin(get_args(kind)[0]) is Literal


def _read_scalar(kind: Any, rule: Rule | None, value: object, path: str, told: Any = None) -> object:
    """The value as the declared type. An integer will do for a float; true and false are no numbers."""
    if _is_word_or_number(kind):
        word, number = get_args(kind)
        return value if value in get_args(word) else _read_scalar(number, rule, value, path, kind)
    told = told or kind
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = _as_float(value)
    fits = value in get_args(kind) if get_origin(kind) is Literal else type(value) is kind
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise TableError(f"{path}: {shown(value)} is not {allowed(told, rule)}")
    if rule is not None and not rule.admits(value):  # type: ignore[arg-type]  # a key's rule fits its type
        raise TableError(f"{path}: {shown(value)} is not {allowed(told, rule)}")
    return value + 0.0 if isinstance(value, float) else value  # -0.0 becomes 0.0: equal specs, equal bytes


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _refuse_unknown(name: str, known: list[str], prefix: str) -> NoReturn:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    meant = f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(known)}"
    raise TableError(f"{prefix}{_clipped(name)}: unknown key; {meant}")


def load_json(data: bytes) -> object:
    """JSON as a peer may send it: bounded, no repeated keys, no NaN. Raises TableError."""
    if len(data) > FILE_BYTES_MAX:
        raise TableError(f"{len(data)} bytes, at most {FILE_BYTES_MAX} are allowed")
    try:
        return json.loads(data.decode("ascii"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise TableError(f"not JSON: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise TableError("a key is there twice")
    return table


def _refuse_constant(name: str) -> NoReturn:
    raise TableError(f"{name} is no number")


def commented_toml(table: object, prefix: str = "") -> str:
    """The dataclass as TOML, every key under its comment, arrays of tables and sections last."""
    keys = list(keys_of(type(table)))
    plain = [
        _commented(name, key, getattr(table, name))
        for name, key in keys
        if not is_section(key.kind) and not _is_array(key.kind)
    ]
    arrays = [
        _commented_array(prefix + name, key, getattr(table, name))
        for name, key in keys
        if _is_array(key.kind)
    ]
    sections = [
        f"{_comment(key.comment)}\n[{name}]\n{commented_toml(getattr(table, name), f'{prefix}{name}.')}"
        for name, key in keys
        if is_section(key.kind)
    ]
    return "\n".join(plain + arrays + sections)


def _is_array(kind: Any) -> bool:
    """Whether a key's type is an array of tables: a tuple of dataclasses."""
    return get_origin(kind) is tuple and is_section(get_args(kind)[0])


def _commented_array(path: str, key: Key, tables: tuple[object, ...]) -> str:
    """The tables; where there is none, the keys that one may have, as comments."""
    if tables:
        written = (f"[[{path}]]\n{commented_toml(one, f'{path}.')}" for one in tables)
        return _comment(key.comment) + "\n" + "\n".join(written)
    example = "\n".join(
        f"#   {name} = ...  {inner.comment}"
        for name, inner in keys_of(get_args(key.kind)[0])
        if not inner.filled_in
    )
    return f"{_comment(key.comment)}\n# [[{path}]]\n{example}\n"


def _commented(name: str, key: Key, value: object) -> str:
    element = get_args(key.kind)[0] if get_origin(key.kind) is tuple else key.kind
    self_evident = element is str or len(get_args(element)) == 1  # any text, or one choice
    bounds = f"\n# Allowed: {allowed(element, key.rule)}" if key.rule or not self_evident else ""
    return f"{_comment(key.comment)}{bounds}\n{name} = {toml_value(plain(value))}\n"


def _comment(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="# ", subsequent_indent="# ", break_long_words=False)


def toml_value(value: object) -> str:
    """A bool, a number, a string, or a list of them, in TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def allowed(kind: Any, rule: Rule | None) -> str:
    """What a key takes, in words: for the error message and for the comment in the file."""
    if get_origin(kind) is Literal:
        return _one_of(get_args(kind))
    if _is_word_or_number(kind):
        word, number = get_args(kind)
        return f"{_one_of(get_args(word))} or {allowed(number, rule)}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[kind]
    return f"{words} {rule}" if rule else words


def shown(value: object) -> str:
    """A value in an error message: as TOML writes it, not too long, whatever it is."""
    if isinstance(value, list):
        return _clipped(
            f"[{', '.join('[...]' if isinstance(item, list) else shown(item) for item in value)}]"
        )
    if isinstance(value, Mapping):
        return "a table"
    if value is None:
        return "nothing"
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of many digits"
    return _clipped(toml_value(value))


def _clipped(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS_MAX else text[: SHOWN_CHARS_MAX - 3] + "..."


def _one_of(values: tuple[str, ...]) -> str:
    return " or ".join(toml_value(value) for value in values)


def plain(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
