"""tapestry.json of an export, read strictly: what somebody says of a model, before any of it is compared.

The manifest's digest of it proves nothing, for whoever wrote the one wrote the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tapestry.node.lineage.huggingface import json_text
from tapestry.node.protocol import strict

NAME = "tapestry.json"
BYTES_MAX = 64 << 20  # guess: the layout of a model of 90,000 tensors has 10 MB
TENSORS_MAX = 1_000_000  # guess
DIMENSIONS_MAX = 64
TEXT_MAX = 1024
EPOCH_MAX = 2**53
_OF_A_STATE = (
    *("run_id", "run_name", "epoch", "head", "state_digest", "members", "vectors"),
    *("form", "dtype", "layout"),
)
_OF_A_DERIVATIVE = ("derivative", "version", "dtype", "weights", "files", "digest")


def read_claims(folder: Path) -> dict[str, Any]:
    """Of a model of the run, or of a derivative, which has the key `derivative`; in the form in which it is
    written. Raises ValueError, OSError."""
    with (folder / NAME).open("rb") as file:
        data = file.read(BYTES_MAX + 1)
    if len(data) > BYTES_MAX:
        raise ValueError(f"larger than {BYTES_MAX} bytes")
    try:
        table = _map(json.loads(data), "it")
        written = json_text(table)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if "derivative" in table:
        _check_derivative(strict.table(table, _OF_A_DERIVATIVE, "an export's lineage"))
    else:
        _check_model(strict.table(table, _OF_A_STATE, "an export's lineage"))
    if written != data:
        raise ValueError("not in the form in which it is written")
    return table


def _check_model(table: dict[str, Any]) -> None:
    _check_texts(table, ("run_id", "head", "state_digest", "form", "dtype"))
    strict.integer(table.get("epoch"), 0, EPOCH_MAX, "epoch")
    for pair in strict.sequence(table.get("vectors"), TENSORS_MAX, "vectors"):
        for text in strict.sequence(pair, 2, "a vector", 2):
            strict.text(text, TEXT_MAX, "a vector's name or digest")
    for pair in strict.sequence(table.get("layout"), TENSORS_MAX, "layout"):
        name, shape = strict.sequence(pair, 2, "a tensor of the layout", 2)
        strict.text(name, TEXT_MAX, "a tensor's name")
        for size in strict.sequence(shape, DIMENSIONS_MAX, "a shape"):
            strict.integer(size, 0, 2**53, "a size")


def _check_derivative(table: dict[str, Any]) -> None:
    _check_texts(table, ("derivative", "weights", "dtype", "digest"))
    for name, digest in _map(table.get("files"), "files").items():
        strict.text(digest, TEXT_MAX, f"the digest of {name}")
    version = _map(table.get("version"), "version")
    _check_texts(version, ("digest",))
    parent = _map(version.get("parent"), "parent")
    _check_texts(parent, ("run_id", "run_name", "head"))
    strict.integer(parent.get("epoch"), 0, EPOCH_MAX, "epoch")


def _check_texts(table: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        strict.text(table.get(name), TEXT_MAX, name)


def _map(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise strict.Malformed(f"{what} must be a table")
    return value
