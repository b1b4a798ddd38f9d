"""HOME/listen.json: where a node was told to listen and which ports it took, so that others find it again.

--listen and --announce hold until they are given anew: without them a start would move the node to all
interfaces, or away from where the others look for it. What node.toml says goes before them once it changes.

Must not import torch or hivemind.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tapestry.dht.addresses import parse_announce, parse_listen
from tapestry.node.disk.files import atomic_write
from tapestry.node.home import Home

Said = tuple[tuple[str, ...], tuple[str, ...]]  # listen and announce, by node.toml or by default


@dataclass(frozen=True, slots=True)
class Listening:
    """Of the last start."""

    listen: tuple[str, ...]  # as it was asked for; port 0: a free one
    announce: tuple[str, ...]
    said: Said | None  # besides the flags, at that start; None: written by an older node
    bound: tuple[str, ...]  # what p2pd took; none where other addresses are announced


def read_listening(home: Home) -> Listening | None:
    """None where it is not known."""
    try:
        table = json.loads(home.listen.read_bytes())
        said = table.get("said")
        return Listening(
            tuple(map(parse_listen, _texts(table["asked"]))),
            tuple(map(parse_announce, _texts(table.get("announce", [])))),
            None if said is None else (_texts(said[0]), _texts(said[1])),
            tuple(map(parse_listen, _texts(table["bound"]))),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None


def write_listening(home: Home, last: Listening) -> None:
    """Raises OSError."""
    table = {"asked": last.listen, "announce": last.announce, "said": last.said, "bound": last.bound}
    atomic_write(home.listen, json.dumps(table).encode() + b"\n")


def _texts(value: Any) -> tuple[str, ...]:
    """Raises TypeError."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise TypeError("no list of strings")
    return tuple(value)
