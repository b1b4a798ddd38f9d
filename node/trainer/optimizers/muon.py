"""Muon (Jordan 2024; 2502.16982) for the matrices inside the network, AdamW for everything else.

torch's own Muon: Nesterov momentum, five Newton-Schulz steps in bf16, and the scale of 2502.16982, 0.2 times
the root of the longer side, with which an update is as large as AdamW's, so that a learning rate found for
AdamW is of the right size. The stacked matrices of a mixture's experts are stepped one by one.

On a processor without bf16 arithmetic the Newton-Schulz steps take long beside a small batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tapestry.node.spec.training import TrainSpec
from tapestry.node.trainer.optimizers.adamw import AdamW
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
        self._muon = None
        if matrices:
            self._muon = torch.optim.Muon(
                [matrix.parameter for matrix in matrices],
                lr=self._lr,
                weight_decay=settings.weight_decay,
                momentum=settings.muon_momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            start = 0
            for matrix in matrices:
                stop = start + matrix.parameter.numel()
                buffer = self._momentum[start:stop].view(matrix.parameter.shape)
                self._muon.state[matrix.parameter] = {"momentum_buffer": buffer}
                start = stop

    def step(self, scale: float) -> None:
        """One step, with both learning rates times `scale`."""
        if self._muon is not None:
            for group in self._muon.param_groups:
                group["lr"] = self._lr * scale
            self._muon.step()  # type: ignore[no-untyped-call]
        self._adamw.step(scale)

    def tensors(self) -> dict[str, Tensor]:
        """The matrices' momentum and the others' moments, f32 each."""
        return {"momentum": self._momentum, **self._adamw.tensors()}

    def resume(self, steps: int) -> None:
        """Muon itself counts nothing."""
        self._adamw.resume(steps)


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
