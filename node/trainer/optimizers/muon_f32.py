"""Muon's step in f32, matrices of one shape together: for processors, which have no fast bf16 as a rule.

torch.optim.Muon orthogonalizes in bf16, one matrix at a time. Without bf16 arithmetic that took 2.3 s a step
for the 0.9M parameters of `tiny` (one core of an AMD EPYC that others used too); this took 0.14 s. The
formula is torch's, with Nesterov momentum and the scale of 2502.16982:

    m = m + (1 - momentum) * (g - m)
    u = orthogonal(g + momentum * (m - g))
    p = p * (1 - lr * weight_decay) - lr * 0.2 * sqrt(max(rows, columns)) * u
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_ELEMENTS = 1 << 22  # stepped together, one matrix at least. Guess: 16 MB, a few times over
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan 2024
NEWTON_SCHULZ_STEPS = 5
EPS = 1e-7  # torch.optim.Muon's


@dataclass(frozen=True, slots=True)
class Matrix:
    """What is stepped, in place: f32 (rows, columns) each."""

    value: Tensor
    gradient: Tensor
    momentum: Tensor


class MuonF32:
    """Steps matrices from their gradients and momenta."""

    def __init__(self, matrices: Sequence[Matrix], momentum: float, weight_decay: float) -> None:
        self._groups = _groups(matrices)
        self._momentum = momentum
        self._weight_decay = weight_decay

    def step(self, lr: float) -> None:
        """One step with this learning rate."""
        for group in self._groups:
            gradients = torch.stack([matrix.gradient for matrix in group])
            momenta = torch.stack([matrix.momentum for matrix in group])
            momenta.lerp_(gradients, 1.0 - self._momentum)
            updates = orthogonal(gradients.lerp_(momenta, self._momentum))
            scale = 0.2 * math.sqrt(max(updates.shape[1:]))
            for matrix, kept, update in zip(group, momenta, updates, strict=True):
                matrix.momentum.copy_(kept)
                matrix.value.mul_(1.0 - lr * self._weight_decay).sub_(update, alpha=lr * scale)


def orthogonal(
    x: Tensor,  # f32 (count, rows, columns)
) -> Tensor:  # f32 (count, rows, columns)
    """Matrices with the same singular vectors and singular values of about 1, from 0.7 to 1.2."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(EPS)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _groups(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Of one shape each, and not too large together."""
    groups: list[list[Matrix]] = []
    open_groups: dict[tuple[int, ...], list[Matrix]] = {}
    for matrix in matrices:
        shape = tuple(matrix.value.shape)
        group = open_groups.get(shape)
        if group is None or (len(group) + 1) * matrix.value.numel() > GROUP_ELEMENTS:
            group = open_groups[shape] = []
            groups.append(group)
        group.append(matrix)
    return groups
