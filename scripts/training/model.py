"""The loss of a model, and its parameters set."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mean_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Scalar: cross entropy in nats per predicted token. windows: int64 (batch, sequence_length + 1)."""
    logits = model(input_ids=windows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def load(model: nn.Module, named: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(named[name])
