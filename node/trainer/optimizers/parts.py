"""What an optimizer steps: the model's parameters, each with what it is to an optimizer.

    MATRIX   the weight of a linear layer inside the network, or such weights of a mixture's experts, stacked
    DECAYED  another tensor of two dimensions and more, such as an embedding or the output layer
    PLAIN    biases, the weights of norms, whatever has one dimension, and what the model's authors marked

Weight decay leaves PLAIN out, as is usual (nanoGPT; transformers.Trainer leaves out biases and norms). Muon
steps MATRIX alone: Muon's author gives embeddings and the output layer to AdamW too.

A part's parameter and gradient may be views of a flat vector; then `joined` makes one part of neighbours of
one kind, so that an optimizer that works element by element has few tensors to go through.

Must not import transformers: a layer is known by the name of its class.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby, pairwise

from torch import Tensor, nn

from tapestry.compression.shards import Layout


class Kind(Enum):
    """What a parameter is to an optimizer."""

    MATRIX = "matrix"
    DECAYED = "decayed"
    PLAIN = "plain"

    @property
    def decays(self) -> bool:
        """Whether weight decay is for it."""
        return self is not Kind.PLAIN


@dataclass(frozen=True, slots=True)
class Part:
    """A parameter with its gradient in `parameter.grad`, both f32; `name` is the model's for it."""

    name: str
    kind: Kind
    parameter: nn.Parameter


def flat_parts(
    kinds: dict[str, Kind],  # of each of the layout's names
    layout: Layout,
    flat: Tensor,  # f32 (n,)
    gradient: Tensor,  # f32 (n,)
) -> list[Part]:
    """The layout's tensors in its order, as views of the two vectors."""
    parts = []
    for name, shape, offset in zip(layout.names, layout.shapes, layout.offsets, strict=True):
        place = slice(offset, offset + math.prod(shape))
        parts.append(make_part(name, kinds[name], flat[place].view(shape), gradient[place].view(shape)))
    return parts


def make_part(
    name: str,
    kind: Kind,
    value: Tensor,  # f32, stepped in place
    gradient: Tensor,  # f32, of the same shape
) -> Part:
    """A part that shares memory with both tensors."""
    parameter = nn.Parameter(value)
    parameter.grad = gradient
    return Part(name, kind, parameter)


def joined(parts: Sequence[Part]) -> list[Part]:
    """Parts of one kind that lie one after another in memory become one, of one dimension."""
    merged: list[Part] = []
    for _, run in groupby(_numbered(parts), key=lambda entry: entry[0]):
        members = [part for _, part in run]
        n = sum(part.parameter.numel() for part in members)
        value, gradient = (
            tensor.as_strided((n,), (1,))
            for tensor in (members[0].parameter.detach(), _gradient(members[0]).detach())
        )
        merged.append(make_part(members[0].name, members[0].kind, value, gradient))
    return merged


def _numbered(parts: Sequence[Part]) -> Iterable[tuple[int, Part]]:
    """Each part with the number of its run."""
    number = 0
    for before, part in pairwise([None, *parts]):
        assert part is not None
        if before is not None and not (before.kind.decays == part.kind.decays and _adjacent(before, part)):
            number += 1
        yield number, part


def _adjacent(first: Part, second: Part) -> bool:
    return all(
        a.is_contiguous()
        and b.is_contiguous()
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.storage_offset() + a.numel() == b.storage_offset()
        for a, b in (
            (first.parameter, second.parameter),
            (_gradient(first), _gradient(second)),
        )
    )


def _gradient(part: Part) -> Tensor:
    assert part.parameter.grad is not None
    return part.parameter.grad


def kinds_of(model: nn.Module) -> dict[str, Kind]:
    """The kind of each parameter, by its name in `model.named_parameters()`."""
    owners = {
        (f"{path}.{name}" if path else name): module
        for path, module in model.named_modules(remove_duplicate=False)
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    }
    outside = _embeddings(model)
    return {
        name: Kind.DECAYED if id(parameter) in outside else _kind(name, parameter, owners[name])
        for name, parameter in model.named_parameters()
    }


def _embeddings(model: nn.Module) -> set[int]:
    """Which tensors are an embedding or the output layer; one may be both."""
    modules: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter, lambda: None)()
        if isinstance(module, nn.Module):
            modules.append(module)
    return {
        id(parameter)
        for module in modules
        for name, parameter in module.named_parameters(recurse=False)
        if name == "weight"
    }


def _kind(name: str, parameter: Tensor, owner: nn.Module) -> Kind:
    owner_class = type(owner).__name__
    if parameter.dim() < 2 or name.endswith("bias") or "Norm" in owner_class:
        return Kind.PLAIN
    if getattr(parameter, "_no_weight_decay", False):  # how the state-space models mark theirs
        return Kind.PLAIN
    linear = isinstance(owner, nn.Linear) or owner_class == "Conv1D"  # GPT-2's linear layer, transposed
    if linear and parameter.dim() == 2:
        return Kind.MATRIX
    if parameter.dim() == 3 and "Experts" in owner_class:  # one matrix for each
        return Kind.MATRIX
    return Kind.DECAYED
