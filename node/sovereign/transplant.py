"""Numbers only: what a derivative learnt, brought onto another base; and several derivatives in one.

With the old base a, the derivative a', the new base b, and d = a' - a, tensor by tensor in f32:

    task   b + s d                                  task arithmetic (Ilharco et al., 2212.04089)
    ties   d without its smallest entries, and without those that pull against a stronger move of the base
           itself (b - a): the sign with more weight is elected (Yadav et al., 2306.01708)
    dare   d with entries drawn out at random, the rest divided by the share that is kept, so that its
           expectation is d (Yu et al., 2311.03099)

A merge of derivatives of one base adds w_i d_i; ties elects a sign of all of them for each entry, and takes
the weighted mean of those that have it. What is drawn follows from seed and tensor name alone: two machines
make the same model.

One tensor of each model is in memory at a time. All models are stored alike: by the names in which
transformers stores the architecture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.sovereign.derivative import Transplant
from tapestry.node.trainer.models.folder import SINGLE
from tapestry.node.trainer.models.stored import FLOATS, Source, StoredWeights, write_weights

Wrote = Callable[[int], None]


def transplant(
    new_base: Path, old_base: Path, derived: Path, out: Path, how: Transplant, wrote: Wrote | None = None
) -> None:
    """Write b + f(a' - a) into `out` as one safetensors file, f32. Raises UserError, ModelError, OSError."""
    b, a, d = (StoredWeights.find(folder) for folder in (new_base, old_base, derived))
    _require_alike(((new_base, b), (old_base, a), (derived, d)))

    def load(name: str) -> Tensor:
        base, old, own = b.read(name).float(), a.read(name).float(), d.read(name).float()
        return base + _brought(own - old, base - old, name, how)

    _write(b, load, out, wrote)


def merge(
    base: Path,
    derived: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    how: Transplant,
    wrote: Wrote | None = None,
) -> None:
    """Write base + the joined differences into `out`. Raises UserError, ModelError, OSError."""
    ground = StoredWeights.find(base)
    models = [StoredWeights.find(folder) for folder in derived]
    _require_alike(((base, ground), *zip(derived, models, strict=True)))

    def load(name: str) -> Tensor:
        start = ground.read(name).float()
        deltas = [model.read(name).float() - start for model in models]
        return start + joined(deltas, weights, name, how)

    _write(ground, load, out, wrote)


def joined(
    deltas: Sequence[Tensor],  # f32, of one shape
    weights: Sequence[float],
    name: str,  # of the tensor
    how: Transplant,
) -> Tensor:
    """What several differences are together."""
    scaled = [how.scale * weight for weight in weights]
    if how.way == "ties":
        kept = [trimmed(delta, how.density) for delta in deltas]
        return how.scale * elected_mean(kept, weights) * sum(weights)
    if how.way == "dare":
        deltas = [dropped(delta, how, f"{index}/{name}") for index, delta in enumerate(deltas)]
    total = torch.zeros_like(deltas[0])
    for weight, delta in zip(scaled, deltas, strict=True):
        total += weight * delta
    return total


def trimmed(delta: Tensor, density: float) -> Tensor:
    """The share `density` of the entries, the largest in size; the others are 0."""
    count = max(1, round(density * delta.numel()))
    if count >= delta.numel():
        return delta
    sizes = delta.abs().reshape(-1)
    least = sizes.kthvalue(delta.numel() - count + 1).values
    return torch.where(delta.abs() >= least, delta, torch.zeros_like(delta))


def elected_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """For each entry the weighted mean of those whose sign the weighted sum has; 0 where none has."""
    total, mass = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for weight, delta in zip(weights, deltas, strict=True):
        total += weight * delta
    sign = total.sign()
    summed = torch.zeros_like(total)
    for weight, delta in zip(weights, deltas, strict=True):
        agrees = (delta.sign() == sign) & (delta != 0)
        summed += weight * delta * agrees
        mass += weight * agrees
    return torch.where(mass > 0, summed / mass.clamp_min(1e-30), torch.zeros_like(summed))


def dropped(delta: Tensor, how: Transplant, name: str) -> Tensor:
    """Each entry stays with the chance `density`, divided by it."""
    seed = int.from_bytes(blake3(f"{how.seed}/{name}".encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(delta.shape, generator=generator) < how.density
    return delta * kept / how.density


def _brought(delta: Tensor, move: Tensor, name: str, how: Transplant) -> Tensor:
    if how.way == "dare":
        delta = dropped(delta, how, name)
    elif how.way == "ties":
        delta = trimmed(delta, how.density)
        outvoted = (delta.sign() * move.sign() < 0) & (move.abs() > delta.abs())
        delta = torch.where(outvoted, torch.zeros_like(delta), delta)
    return how.scale * delta


def _require_alike(models: Sequence[tuple[Path, StoredWeights]]) -> None:
    first_folder, first = models[0]
    shapes = {name: tensor.shape for name, tensor in first.tensors.items()}
    for folder, model in models[1:]:
        theirs = {name: tensor.shape for name, tensor in model.tensors.items()}
        if theirs != shapes:
            names = sorted(name for name in {**shapes, **theirs} if shapes.get(name) != theirs.get(name))
            raise UserError(
                f"{folder} and {first_folder} are of different models: {len(names)} tensors, as {names[0]}",
                exit_code=ExitCode.FAILED,
            )


def _write(like: StoredWeights, load: Callable[[str], Tensor], out: Path, wrote: Wrote | None) -> None:
    sources = [
        Source(name, tensor.shape, torch.float32, functools.partial(load, name))
        for name, tensor in sorted(like.tensors.items())
        if tensor.dtype in FLOATS
    ]
    write_weights(out / SINGLE, sources, wrote)
