"""Names of inner optimizers, as run.toml writes them -> optimizers. A new one is a file and a line here.

An inner optimizer is made of the run's [train] and the parts that it steps. All that it remembers, it shows
as named tensors (`tensors`) that `step` changes in place, and a count of its steps: `state` copies them at an
epoch's beginning, puts them back, and writes them to disk, and knows nothing else of any optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from tapestry.node.spec.training import TrainSpec
from tapestry.node.trainer.optimizers.adamw import AdamW
from tapestry.node.trainer.optimizers.adamw8bit import AdamW8bit
from tapestry.node.trainer.optimizers.muon import Muon
from tapestry.node.trainer.optimizers.parts import Part
from tapestry.node.trainer.optimizers.unavailable import OptimizerUnavailable


class InnerOptimizer(Protocol):
    """Steps its parts from their gradients."""

    def step(self, scale: float) -> None:
        """One step, with every learning rate times `scale`."""

    def tensors(self) -> dict[str, Tensor]:
        """What it remembers, by name: the same tensors every time."""

    def resume(self, steps: int) -> None:
        """`tensors` have been overwritten with those after so many steps."""


_OPTIMIZERS: dict[str, Callable[[TrainSpec, Sequence[Part]], InnerOptimizer]] = {
    "adamw": AdamW,
    "muon": Muon,
    "adamw8bit": AdamW8bit,
}


_WHOLE_ONLY = ("muon",)  # these need whole matrices


def make_optimizer(settings: TrainSpec, parts: Sequence[Part], alone: bool = True) -> InnerOptimizer:
    """The run's inner optimizer, for parts that are whole if `alone`, else a process's share of each.

    Raises OptimizerUnavailable where this machine cannot run it.
    """
    if not alone and settings.optimizer in _WHOLE_ONLY:
        raise OptimizerUnavailable(
            f"train.optimizer is {settings.optimizer}, which works on one device only: name one with --device"
        )
    return _OPTIMIZERS[settings.optimizer](settings, parts)
