"""Muon (Jordan 2024; 2502.16982) for the matrices inside the network, AdamW for everything else.

torch's own Muon: Nesterov momentum, five Newton-Schulz steps in bf16, and the scale of 2502.16982, 0.2 times
the root of the longer side, with which an update is as large as AdamW's, so that a learning rate found for
AdamW is of the right size; on a processor the same in f32 (muon_f32.py). The stacked matrices of a mixture's
experts are matrices by themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tapestry.node.spec.training import TrainSpec
from tapestry.node.trainer.optimizers.adamw import AdamW
from tapestry.node.trainer.optimizers.muon_f32 import Matrix, MuonF32
from tapestry.node.trainer.optimizers.parts import Kind, Part, make_part


class Muon:
    """An InnerOptimizer, as `registry` says."""

    def __init__(self, settings: TrainSpec, parts: Sequence[Part]) -> None:
        self._lr = settings.muon_lr or settings.lr
        matrices = [one for part in parts if part.kind is Kind.MATRIX for one in _single(part)]
        self._adamw = AdamW(settings, [part for part in parts if part.kind is not Kind.MATRIX])
        n = sum(matrix.parameter.numel() for matrix in matrices)
        device = parts[0].parameter.device
        self._momentum = torch.zeros(n, device=device)
        self._step_matrices: Callable[[float], None] | None = None
        if matrices:
            make = _in_f32 if device.type == "cpu" else _of_torch
            self._step_matrices = make(settings, matrices, self._momentum)

    def step(self, scale: float) -> None:
        """One step, with both learning rates times `scale`."""
        if self._step_matrices is not None:
            self._step_matrices(self._lr * scale)
        self._adamw.step(scale)

    def tensors(self) -> dict[str, Tensor]:
        """The matrices' momentum and the others' moments, f32 each."""
        return {"momentum": self._momentum, **self._adamw.tensors()}

    def resume(self, steps: int) -> None:
        """Muon itself counts nothing."""
        self._adamw.resume(steps)


def _of_torch(settings: TrainSpec, matrices: Sequence[Part], momentum: Tensor) -> Callable[[float], None]:
    """What steps them with a learning rate: torch's own Muon, with its momenta in `momentum`."""
    muon = torch.optim.Muon(
        [matrix.parameter for matrix in matrices],
        weight_decay=settings.weight_decay,
        momentum=settings.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    for matrix, buffer in zip(matrices, _views(matrices, momentum), strict=True):
        muon.state[matrix.parameter] = {"momentum_buffer": buffer}

    def step(lr: float) -> None:
        for group in muon.param_groups:
            group["lr"] = lr
        muon.step()  # type: ignore[no-untyped-call]

    return step


def _in_f32(settings: TrainSpec, matrices: Sequence[Part], momentum: Tensor) -> Callable[[float], None]:
    """The same, in f32."""
    made = []
    for matrix, buffer in zip(matrices, _views(matrices, momentum), strict=True):
        gradient = matrix.parameter.grad
        assert gradient is not None
        made.append(Matrix(matrix.parameter.detach(), gradient, buffer))
    return MuonF32(made, settings.muon_momentum, settings.weight_decay).step


def _views(matrices: Sequence[Part], flat: Tensor) -> list[Tensor]:
    """A place in `flat` for each, of its shape."""
    ends = itertools.accumulate(matrix.parameter.numel() for matrix in matrices)
    return [
        flat[end - matrix.parameter.numel() : end].view(matrix.parameter.shape)
        for matrix, end in zip(matrices, ends, strict=True)
    ]


def _single(part: Part) -> list[Part]:
    """Its matrices, each (rows, columns)."""
    parameter, gradient = part.parameter, part.parameter.grad
    assert gradient is not None
    if parameter.dim() == 2:
        return [part]
    return [
        make_part(f"{part.name}.{index}", part.kind, value, slope)
        for index, (value, slope) in enumerate(
            zip(parameter.detach().unbind(0), gradient.unbind(0), strict=True)
        )
    ]
