"""The worker's side of the gate (protocol/gate.py): the loss of a step that was taken aside, and of its base.

Always the same few windows that this member holds out, so that the difference is that of the parameters. The
loss of a step that was taken is that of the next base: it is not measured twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from tapestry.node.trainer.data.corpus import Batch

LOSS_MAX = 1e6  # of what is not finite as well: worse than anything


class Trial:
    """One at a time."""

    def __init__(
        self,
        windows: Mapping[str, Batch],
        measure: Callable[[Tensor, Iterable[Batch]], list[float]],  # the loss of each
    ) -> None:
        self._windows = windows
        self._measure = measure
        self._known = "", 0.0  # head of the state that was measured last, and its loss

    def judge(
        self,
        base_head: str,
        base: Tensor,  # f32 (n,), CPU
        head: str,
        step: Tensor,  # f32 (n,), CPU
    ) -> tuple[float, float]:
        """The mean loss before the step and after it."""
        known_head, known = self._known
        before = known if known_head == base_head else self._loss(base)
        after = self._loss(step)
        self._known = head, after
        return before, after

    def _loss(self, params: Tensor) -> float:
        losses = self._measure(params, self._windows.values())
        mean = math.fsum(losses) / len(losses)
        return min(mean, LOSS_MAX) if math.isfinite(mean) else LOSS_MAX
