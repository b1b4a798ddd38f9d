"""Values from outside, checked: the one place that says what a number, a text or a digest may be.

For whatever was decoded from JSON or msgpack: messages, records, files, what the trainer's process reports.
Each function gives the value back or raises Malformed with a line that names it; callers turn that into the
error of their boundary. Nothing is converted: a boolean is no integer, an integer no float. Checks are of
types and bounds, in constant time, before anything is built from a value.

Two boundaries keep checks of their own: dht/presence.py, which imports none of ours, and spec/tables.py,
whose errors help a person to mend a file. Imports only `math`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

_HEX_DIGITS = "0123456789abcdef"


class Malformed(ValueError):
    """A value that is not of its kind; one line that says which, and what it should be."""


def table(value: Any, keys: Iterable[str], what: str) -> dict[str, Any]:
    """A map with exactly these keys."""
    names = tuple(keys)
    if not isinstance(value, dict) or set(value) != set(names):
        raise Malformed(f"{what} must have exactly {', '.join(names)}")
    return value


def sequence(value: Any, count_max: int, what: str, count_min: int = 0) -> Sequence[Any]:
    """A list or a tuple; its elements are not looked at."""
    if not isinstance(value, (list, tuple)) or not count_min <= len(value) <= count_max:
        raise Malformed(f"{what} must be a list of {count_min} to {count_max}")
    return value


def integer(value: Any, low: int, high: int, what: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise Malformed(f"{what} must be an integer from {low} to {high}")
    return value


def boolean(value: Any, what: str) -> bool:
    if type(value) is not bool:
        raise Malformed(f"{what} must be true or false")
    return value


def finite(value: Any, what: str, low: float = -math.inf) -> float:
    """A float that is neither NaN nor infinite, and not below `low`."""
    if type(value) is not float or not math.isfinite(value) or value < low:
        raise Malformed(f"{what} must be a finite number{'' if low == -math.inf else f', {low:g} or more'}")
    return value


def text(value: Any, length_max: int, what: str, length_min: int = 0) -> str:
    if type(value) is not str or not length_min <= len(value) <= length_max:
        raise Malformed(f"{what} must be a text of {length_min} to {length_max} characters")
    return value


def word(value: Any, length_max: int, what: str) -> str:
    """A word that may be shown anywhere, as phases and peer ids are: ASCII letters and digits."""
    if type(value) is not str or len(value) > length_max or not (value.isascii() and value.isalnum()):
        raise Malformed(f"{what} must be a word of at most {length_max} letters and digits")
    return value


def hexadecimal(value: Any, lengths: tuple[int, ...], what: str) -> str:
    """Lower-case hex digits, as many as one of `lengths` says."""
    if type(value) is not str or len(value) not in lengths or value.strip(_HEX_DIGITS):
        raise Malformed(f"{what} must be {' or '.join(map(str, lengths))} hex digits")
    return value
