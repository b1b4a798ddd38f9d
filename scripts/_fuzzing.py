"""What a target of fuzz.py is, and mutations that leave an input readable.

Bytes that are changed at random are rarely a message or a table any more, and say little about what reads
the values in it. So an input that is a value (JSON, msgpack, TOML) is also varied as one: a part of it goes,
comes twice, moves, or becomes something that nobody meant.
"""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from tapestry.node.spec.tables import toml_value

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**53 + 1, 2**63, -(2**63), 10**400, 0.5, 1e300),
    *(float("inf"), float("nan"), "", "x", "0", "\0", "\ud800", "~nobody/x", "../x", "[", "é" * 300, b"x"),
    *([], {}, [[]], {"": 0}, [{}], "1" * 5000),
)
DEEP = (50, 300, 700, 930, 990)  # levels: json and our own walks of a value end at about a thousand


@dataclass(frozen=True, slots=True)
class Form:
    """How the inputs of a target are values. Both raise ValueError, TypeError, AttributeError,
    OverflowError, RecursionError."""

    read: Callable[[bytes], Any]
    write: Callable[[Any], bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder."""

    run: Callable[[bytes], object]
    refuses: tuple[type[Exception], ...]
    inputs: tuple[bytes, ...]
    form: Form | None = None  # None: bytes, or text
    tries: int = 100  # of scripts/test, for each input


def varied(form: Form, data: bytes, rng: random.Random) -> bytes | None:
    """The input with one to three parts of its value changed; None if it is no value of this form."""
    try:
        value = form.read(data)
        for _ in range(rng.randint(1, 3)):
            value = _changed(value, rng)
        return form.write(value)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _changed(value: Any, rng: random.Random) -> Any:
    """A part of it is another one; which, chance says."""
    inner = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    if not inner or rng.random() < 0.15:
        return _odd(value, rng)
    at = rng.choice(list(inner))
    changed = value.copy()
    if rng.random() < 0.6:
        changed[at] = _changed(value[at], rng)
        return changed
    match rng.randrange(4):
        case 0:
            del changed[at]
        case 1:
            changed[at] = value[rng.choice(list(inner))]
        case 2 if isinstance(changed, dict):
            changed[rng.choice(["x", "", "self", "__class__", str(at)[:-1], f"{at}s"])] = value[at]
        case 2:
            changed.insert(at, value[at])
        case _:
            changed[at] = _odd(value[at], rng)
    return changed


def _odd(value: Any, rng: random.Random) -> Any:
    """Something that may stand there by mistake or malice; often of the same kind."""
    if type(value) is int and rng.random() < 0.4:
        return value + rng.choice([-1, 1, -value, value, 255, 2**32])
    if isinstance(value, str) and value and rng.random() < 0.4:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(["", "0", "\n", "\0", " ", "~", "é", value]) + value[at + 1 :]
    if rng.random() < 0.03:
        deep: Any = value
        for _ in range(rng.choice(DEEP)):
            deep = [deep]
        return deep
    return rng.choice(ODD)


def _toml(value: Any, name: str = "") -> str:
    """A table and those in it. Raises TypeError for what TOML has no word for."""
    lines, tables = [], []
    for key, inner in value.items():
        path = f"{name}.{json.dumps(key)}" if name else json.dumps(key)
        if isinstance(inner, dict):
            tables.append(f"[{path}]\n{_toml(inner, path)}")
        elif isinstance(inner, list) and inner and all(isinstance(one, dict) for one in inner):
            tables += [f"[[{path}]]\n{_toml(one, path)}" for one in inner]
        elif inner is not None and not isinstance(inner, bytes):
            lines.append(f"{json.dumps(key)} = {toml_value(inner)}\n")
    return "".join([*lines, *tables])


JSON = Form(json.loads, lambda value: json.dumps(value, separators=(",", ":")).encode())
LINES = Form(
    lambda data: [json.loads(line) for line in data.splitlines()],
    lambda value: b"".join(JSON.write(line) + b"\n" for line in value),
)
MSGPACK = Form(lambda data: msgpack.unpackb(data, strict_map_key=False), msgpack.packb)
TOML = Form(lambda data: tomllib.loads(data.decode()), lambda value: _toml(value).encode())
