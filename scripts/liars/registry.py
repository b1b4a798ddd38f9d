"""The liars by the names by which scripts/attack.py knows them."""

from __future__ import annotations

import importlib
from typing import Protocol

from liars.seen import Seen

MODULES = {
    "flip": "flip",
    "scale": "scale",
    "not-finite": "not_finite",
    "weight": "weight",
    "replay": "replay",
    "free-copy": "free_copy",
    "free-noise": "free_noise",
    "poison": "poison",
    "lying-reducer": "lying_reducer",
    "lying-leader": "lying_leader",
    "two-votes": "two_votes",
    "stolen-key": "stolen_key",
}


class Liar(Protocol):
    """A module of this package. RUN and `strike` may be missing."""

    __doc__: str

    def lie(self) -> None:
        """In the process of the member that lies, before anything of it has started."""

    def broken(self, seen: Seen) -> list[str]:
        """What of the promise does not hold, a line each."""


def load(name: str) -> Liar:
    """Raises KeyError."""
    return importlib.import_module(f"liars.{MODULES[name]}")  # type: ignore[return-value]


def what(name: str) -> str:
    """What it does: the first line of its docstring."""
    return load(name).__doc__.splitlines()[0]
