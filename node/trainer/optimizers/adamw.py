"""AdamW (1711.05101): torch's fused one, on parts joined to a few long vectors.

Both moments lie in one f32 vector each, in the order of the parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tapestry.node.spec.training import TrainSpec
from tapestry.node.trainer.optimizers.parts import Part, joined


class AdamW:
    """An InnerOptimizer, as `registry` says."""

    def __init__(self, settings: TrainSpec, parts: Sequence[Part]) -> None:
        self._lr = settings.lr
        runs = joined(parts)
        n = sum(run.parameter.numel() for run in runs)
        device = runs[0].parameter.device if runs else torch.device("cpu")
        self._first, self._second = torch.zeros(n, device=device), torch.zeros(n, device=device)
        self._steps = torch.zeros(len(runs), device=device)
        self._optimizer = torch.optim.AdamW(
            [
                {
                    "params": [run.parameter for run in runs if run.kind.decays == decays],
                    "weight_decay": settings.weight_decay if decays else 0.0,
                }
                for decays in (True, False)
            ],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        start = 0
        for index, run in enumerate(runs):
            shape, stop = run.parameter.shape, start + run.parameter.numel()
            self._optimizer.state[run.parameter] = {
                "step": self._steps[index],
                "exp_avg": self._first[start:stop].view(shape),
                "exp_avg_sq": self._second[start:stop].view(shape),
            }
            start = stop

    def step(self, scale: float) -> None:
        """One step, with the learning rate times `scale`."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * scale
        self._optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Both moments, f32 (n,)."""
        return {"first": self._first, "second": self._second}

    def resume(self, steps: int) -> None:
        """Correct the bias of moments that are so many steps old."""
        self._steps.fill_(steps)
