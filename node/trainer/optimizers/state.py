"""An inner optimizer's state at an epoch's beginning: copied, put back, written to disk and read again.

The state is whatever named tensors the optimizer shows (`registry.InnerOptimizer`). A file carries the
optimizer's name and the hash of the model's layout, and is refused where either is another; each tensor is
checked for name, shape and dtype before it is read, and for being finite after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tapestry.node.trainer.tensor_file import write_tensors

STATE_VERSION = "2"
_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}


class InnerStateError(ValueError):
    """A saved inner state cannot be used; one line that says why."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a saved state must be of."""

    optimizer: str
    schema: str  # Layout.schema_hash


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state with which an epoch began, on the CPU."""

    epoch: int
    steps: int  # that the optimizer had taken
    tensors: Mapping[str, Tensor]


def take_snapshot(live: Mapping[str, Tensor], epoch: int, steps: int) -> Snapshot:
    """Copy the optimizer's tensors."""
    return Snapshot(epoch, steps, {name: value.to("cpu", copy=True) for name, value in live.items()})


def put_back(snapshot: Snapshot, live: Mapping[str, Tensor]) -> None:
    """Overwrite the optimizer's tensors, in place."""
    for name, value in live.items():
        value.copy_(snapshot.tensors[name])


def write_snapshot(path: Path, snapshot: Snapshot, identity: Identity) -> None:
    """Atomically. Raises OSError. One writer at a time: the next one takes over what a killed one left."""
    metadata = {
        "version": STATE_VERSION,
        "optimizer": identity.optimizer,
        "schema": identity.schema,
        "epoch": str(snapshot.epoch),
        "steps": str(snapshot.steps),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, snapshot.tensors, metadata)


def read_snapshot(path: Path, live: Mapping[str, Tensor], identity: Identity) -> Snapshot:
    """A state that fits the optimizer's tensors. Raises InnerStateError."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check(path, metadata, identity)
            if sorted(file.keys()) != sorted(live):
                raise InnerStateError(f"{path}: its tensors are not those of {identity.optimizer}")
            tensors = {name: _read(file, name, value) for name, value in live.items()}
            return Snapshot(int(metadata["epoch"]), int(metadata["steps"]), tensors)
    except InnerStateError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InnerStateError(f"{path}: cannot be used: {error}") from error


def _check(path: Path, metadata: Mapping[str, str], identity: Identity) -> None:
    if metadata.get("version") != STATE_VERSION or metadata.get("schema") != identity.schema:
        raise InnerStateError(f"{path}: of another version or another model")
    if metadata.get("optimizer") != identity.optimizer:
        raise InnerStateError(f"{path}: of {metadata.get('optimizer')}, not of {identity.optimizer}")


def _read(file: Any, name: str, like: Tensor) -> Tensor:
    """Finite; shape and dtype are looked at before anything is allocated."""
    piece = file.get_slice(name)
    if piece.get_shape() != list(like.shape) or piece.get_dtype() != _DTYPES[like.dtype]:
        raise InnerStateError(f"{name} is not {_DTYPES[like.dtype]} {tuple(like.shape)}")
    tensor: Tensor = file.get_tensor(name)
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise InnerStateError(f"{name} is not finite")
    return tensor
