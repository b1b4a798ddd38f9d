"""What a member brings to the run from an island: one vector, which its contributions carry until one counts.

The trainer begins each epoch from base + difference, in place of the base, as long as the file is there. So
the difference comes on top of whatever head the run has by then, as part of an ordinary contribution: same
weight, same codec, same limits. The node takes the file away (lineage/bring.py).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tapestry.node.trainer.tensor_file import write_tensors

DIFFERENCE = "difference"


class BroughtError(ValueError):
    """The file is damaged, or of another model."""


def write_brought(
    path: Path,
    difference: Tensor,  # f32 (n,)
    about: dict[str, str],
) -> None:
    """On disk when this returns. Raises OSError."""
    write_tensors(path, {DIFFERENCE: difference}, about)


def read_brought(path: Path, n: int) -> Tensor | None:  # f32 (n,), CPU
    """None if nothing is brought. Raises BroughtError."""
    if not path.exists():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            difference: Tensor = file.get_tensor(DIFFERENCE)
    except (OSError, SafetensorError) as error:
        raise BroughtError(f"{path} cannot be read: {error}") from error
    if difference.dtype != torch.float32 or difference.shape != (n,):
        raise BroughtError(f"{path} is of another model")
    return difference


def read_about(path: Path) -> dict[str, str]:
    """What `write_brought` was told. Raises BroughtError."""
    try:
        with safe_open(str(path), "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise BroughtError(f"{path} cannot be read: {error}") from error
