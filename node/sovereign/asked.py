"""Whether what derive, evaluate, rebase, merge and rejoin are asked for can be done: what needs no tensors.

Commands call these before they import torch, which takes seconds; build.py calls them again, with the name
locked. Must not import torch or transformers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.follow import Broken, read_genesis
from tapestry.node.sovereign.derivative import Shelf, Version
from tapestry.node.spec.training import LlamaSpec
from tapestry.node.trainer.models.folder import positions_by, read_config
from tapestry.node.trainer.models.refusal import ModelError

EXTRA = "pip install 'tapestry-node[sovereign]'"
SUITE = "suite.toml"


def require_extra() -> None:
    """Raises UserError where trl is not installed: said before anything is read."""
    if importlib.util.find_spec("trl") is None:
        raise UserError("derivatives are trained by trl, which is not installed", hint=EXTRA)


def require_new(shelf: Shelf, name: str) -> None:
    """Raises UserError where there is a derivative of that name."""
    if (found := shelf.read(name)) and found.versions:
        raise UserError(
            f"there is a derivative {name} already",
            hint=f"choose another name; `tapestry rebase {name}` brings that one to a newer base",
        )


def require_length(home: Home, length: int) -> None:
    """Raises UserError where the home's base is known to have fewer positions, and where its spec
    is refused."""
    try:
        _, spec = read_genesis(home.genesis, ReaderCrypto())
        if isinstance(spec.model, LlamaSpec):
            longest: int | None = spec.data.sequence_length
        else:
            longest = positions_by(read_config(home.base).get)
    except (Broken, ModelError, OSError):
        return  # said where it is read for the training
    if longest is not None and length > longest:
        raise too_long(length, longest)


def too_long(length: int, longest: int) -> UserError:
    """Of a recipe's sequences."""
    return UserError(
        f"sequence_length {length}: the base has {longest} positions",
        hint="give less with --sequence-length, or leave it out: as many as the base takes, to 1024",
    )


def require_suite(home: Home, suite_file: Path | None) -> Path:
    """The suite that the base is measured on. Raises UserError."""
    path = suite_file or home.path / SUITE
    if not path.exists():
        raise UserError(
            f"the base is measured on a suite, and there is no {path}",
            hint="docs/sovereign.md says how to write one; --suite FILE",
        )
    return path


def shares_of(names: Sequence[str], weights: Sequence[float]) -> tuple[float, ...]:
    """One weight for each of what is merged; without any, equal ones, 1 in all. Raises UserError."""
    if len(names) < 2 or len(set(names)) != len(names):
        raise UserError("a merge takes two derivatives or more, each once")
    shares = tuple(weights) or tuple(1 / len(names) for _ in names)
    if len(shares) != len(names):
        raise UserError(f"{len(names)} derivatives and {len(shares)} weights: give as many")
    return shares


def to_merge(shelf: Shelf, names: Sequence[str]) -> list[tuple[str, Version]]:
    """The current version of each. Raises UserError unless all stand on one base."""
    parts = [(name, shelf.require(name).version()) for name in names]
    parent = parts[0][1].parent
    for name, version in parts[1:]:
        if version.parent.head != parent.head:
            raise UserError(
                f"{name} stands on {version.parent}, {parts[0][0]} on {parent}",
                hint=f"tapestry rebase {name} --onto {parent.epoch} first",
            )
    return parts
