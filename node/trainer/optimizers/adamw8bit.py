"""AdamW with moments of 8 bits (2110.02861): bitsandbytes' own. 2 bytes a parameter in place of 8.

Tensors of fewer than 4,096 elements keep moments of 32 bits, as bitsandbytes does by default. Its states are
saved as they are, codes and scales.

bitsandbytes is imported when the optimizer is made: the import takes seconds and may print.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tapestry.node.spec.training import TrainSpec
from tapestry.node.trainer.optimizers.parts import Part
from tapestry.node.trainer.optimizers.unavailable import OptimizerUnavailable

_KEPT = ("state1", "state2", "absmax1", "absmax2")  # bitsandbytes' names; its maps never change


class AdamW8bit:
    """An InnerOptimizer, as `registry` says. Raises OptimizerUnavailable."""

    def __init__(self, settings: TrainSpec, parts: Sequence[Part]) -> None:
        self._lr = settings.lr
        self._parts = parts
        device = parts[0].parameter.device
        try:
            _try(_bitsandbytes(), device)
            self._optimizer = self._make(settings)
        except (ImportError, RuntimeError, NotImplementedError, AttributeError) as error:
            raise OptimizerUnavailable(
                f"train.optimizer is adamw8bit, and bitsandbytes cannot run it on {device.type}: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; "
                "start with --device cpu or on another machine"
            ) from error

    def _make(self, settings: TrainSpec) -> Any:
        optimizer = _bitsandbytes().optim.AdamW8bit(
            [
                {
                    "params": [part.parameter for part in self._parts if part.kind.decays == decays],
                    "weight_decay": settings.weight_decay if decays else 0.0,
                }
                for decays in (True, False)
            ],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
        )
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                optimizer.init_state(group, parameter, group_index, index)
        return optimizer

    def step(self, scale: float) -> None:
        """One step, with the learning rate times `scale`."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * scale
        self._optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Codes uint8 or moments f32 in the parameter's shape, scales f32 (blocks,)."""
        return {
            f"{part.name}.{key}": state[key]
            for part in self._parts
            for state in [self._optimizer.state[part.parameter]]
            for key in _KEPT
            if key in state
        }

    def resume(self, steps: int) -> None:
        """Correct the bias of moments that are so many steps old."""
        for part in self._parts:
            self._optimizer.state[part.parameter]["step"] = steps


def _bitsandbytes() -> Any:
    for name in ("bitsandbytes", "kernels"):  # a line about other kernels, at import on a CPU
        logging.getLogger(name).setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def _try(bitsandbytes: Any, device: torch.device) -> None:
    """A step of a small tensor that has moments of 8 bits; raises what bitsandbytes raises."""
    parameter = nn.Parameter(torch.zeros(4096, device=device))
    parameter.grad = torch.zeros(4096, device=device)
    bitsandbytes.optim.AdamW8bit([parameter]).step()
