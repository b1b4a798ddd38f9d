"""The inner optimizer's state, kept from epoch to epoch, on disk and in memory."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tapestry.node.spec.training import TrainSpec

STATE_VERSION = "1"


class InnerStateError(ValueError):
    """A saved inner state cannot be used; one line that says why."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """AdamW's state at the beginning of an epoch, on the CPU."""

    epoch: int
    steps: int
    first: Tensor  # f32 (n,)
    second: Tensor  # f32 (n,)


class Moments:
    """torch's fused AdamW on one flat parameter, with linear warmup; then the rate is constant."""

    def __init__(self, local: nn.Parameter) -> None:
        self._optimizer = torch.optim.AdamW([local], fused=True)
        self._state = {
            "step": torch.zeros((), dtype=torch.float32, device=local.device),
            "exp_avg": torch.zeros_like(local.data),
            "exp_avg_sq": torch.zeros_like(local.data),
        }
        self._optimizer.state[local] = self._state
        self._steps = 0

    def step(self, settings: TrainSpec) -> None:
        self._steps += 1
        warm = min(1.0, self._steps / settings.warmup_steps) if settings.warmup_steps else 1.0
        self._optimizer.param_groups[0].update(
            lr=settings.lr * warm,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        self._optimizer.step()

    def snapshot(self, epoch: int) -> Snapshot:
        first, second = (self._state[name].to("cpu", copy=True) for name in ("exp_avg", "exp_avg_sq"))
        return Snapshot(epoch, self._steps, first, second)

    def restore(self, snapshot: Snapshot) -> None:
        self._steps = snapshot.steps
        self._state["step"].fill_(snapshot.steps)
        self._state["exp_avg"].copy_(snapshot.first)
        self._state["exp_avg_sq"].copy_(snapshot.second)


def write_snapshot(path: Path, snapshot: Snapshot, schema: str) -> None:
    metadata = {
        "version": STATE_VERSION,
        "epoch": str(snapshot.epoch),
        "steps": str(snapshot.steps),
        "schema": schema,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        save_file({"first": snapshot.first, "second": snapshot.second}, temporary, metadata=metadata)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except SafetensorError as error:  # how the library reports a failed write, a full disk included
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_snapshot(path: Path, n: int, schema: str) -> Snapshot:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("version") != STATE_VERSION or metadata.get("schema") != schema:
                raise InnerStateError(f"{path}: of another version or another model")
            epoch, steps = int(metadata["epoch"]), int(metadata["steps"])
            tensors = [_read_moment(file, name, n) for name in ("first", "second")]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InnerStateError(f"{path}: cannot be used: {error}") from error
    return Snapshot(epoch, steps, tensors[0], tensors[1])


def _read_moment(file: Any, name: str, n: int) -> Tensor:
    """f32 (n,), finite; shape and dtype are looked at before anything is allocated."""
    piece = file.get_slice(name)
    if piece.get_shape() != [n] or piece.get_dtype() != "F32":
        raise InnerStateError(f"{name} is not f32 ({n},)")
    tensor: Tensor = file.get_tensor(name)
    if not torch.isfinite(tensor).all():
        raise InnerStateError(f"{name} is not finite")
    return tensor
