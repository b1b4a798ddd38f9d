"""What is known of one system's run, and its losses, taken afterwards on the same held-out windows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tapestry.node.trainer.models.llama import build_model, model_layout
from training.model import load, mean_loss
from training.plan import Plan

HELD_OUT_TOKENS = 4096  # of each part


@dataclass
class Curve:
    """What is known of one system's run; times in seconds from its start."""

    system: str
    times: list[float] = field(default_factory=list)  # of the snapshots
    tokens: list[int] = field(default_factory=list)  # of all nodes, at the snapshots
    steps: list[int] = field(default_factory=list)  # optimizer steps or epochs
    files: list[Path] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)  # snapshot -> loss
    sent: list[tuple[float, float]] = field(default_factory=list)  # (time, bytes sent per node)
    notes: dict[str, Any] = field(default_factory=dict)

    def points(self) -> list[int]:
        return sorted(self.losses)

    def bytes_at(self, at_s: float) -> float:
        times, sent = zip(*self.sent, strict=True)
        return float(np.interp(at_s, times, sent))


class Keep:
    """Writes a snapshot when snapshot_s have gone by since the last one."""

    def __init__(self, curve: Curve, plan: Plan) -> None:
        self._curve = curve
        self._every_s = plan.snapshot_s
        self._folder = Path(plan.folder) / curve.system

    def __call__(self, at_s: float, tokens: int, step: int, flat: Tensor) -> None:
        curve = self._curve
        if curve.times and at_s - curve.times[-1] < self._every_s:
            return
        path = self._folder / f"state-{step}.pt"
        torch.save(flat, path)
        for values, value in ((curve.times, at_s), (curve.tokens, tokens), (curve.steps, step)):
            values.append(value)
        curve.files.append(path)


class Judge:
    """The same held-out windows for everybody, and the model to take their loss with."""

    def __init__(self, plan: Plan) -> None:
        self._model = build_model(plan.spec(1).model, plan.spec(1).data.sequence_length)
        self.layout = model_layout(self._model)
        corpora = [plan.corpus(i) for i in range(plan.nodes)]
        windows = [c.validation_windows(HELD_OUT_TOKENS // c.use.sequence_length) for c in corpora]
        self._windows = torch.from_numpy(np.concatenate(windows))

    def evaluate(self, curve: Curve, points: int) -> None:
        for index in np.unique(np.linspace(0, len(curve.files) - 1, points).astype(int)):
            self.loss_at(curve, int(index))

    def loss_at(self, curve: Curve, index: int) -> float:
        if index not in curve.losses:
            curve.losses[index] = self.loss_of(torch.load(curve.files[index]))
        return curve.losses[index]

    def loss_of(self, flat: Tensor) -> float:
        load(self._model, self.layout.views(flat))
        self._model.eval()
        with torch.no_grad():
            losses = [mean_loss(self._model, part).item() * len(part) for part in self._windows.split(16)]
        return math.fsum(losses) / len(self._windows)

    def first_at(self, curve: Curve, target: float) -> int | None:
        """The first snapshot at or below the target, among all those around the point where it is passed."""
        points = curve.points()
        reached = next((i for i in points if curve.losses[i] <= target), None)
        if reached is None or reached == points[0]:
            return reached
        low = max(i for i in points if i < reached)
        while reached - low > 1:
            middle = (low + reached) // 2
            low, reached = (low, middle) if self.loss_at(curve, middle) <= target else (middle, reached)
        return reached


def summary(curve: Curve, target: float, judge: Judge) -> dict[str, Any]:
    at = judge.first_at(curve, target)
    points = curve.points()
    last = points[-1]
    return {
        "seconds": curve.times[last],
        "tokens": curve.tokens[last],
        "steps": curve.steps[last],
        "loss": curve.losses[last],
        "sent_bytes_per_node": curve.bytes_at(curve.times[last]),
        "target_s": None if at is None else curve.times[at],
        "target_tokens": None if at is None else curve.tokens[at],
        "target_bytes_per_node": None if at is None else curve.bytes_at(curve.times[at]),
        "curve": [[round(curve.times[i], 2), curve.tokens[i], round(curve.losses[i], 4)] for i in points],
        **curve.notes,
    }
