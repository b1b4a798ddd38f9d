"""The numbers of a base: read one tensor at a time in the module's order, and their digest.

    digest = blake3 of canonical JSON ["tapestry weights 1", [[name, shape], ...]]
             + f32 little-endian bytes of every parameter and persistent buffer, in the module's own order

Tied parameters count once. How the files were cut, and whether they hold f32, bf16 or f16, changes nothing:
all of these are f32 numbers. Names and order are those of the installed transformers, as in the layout that
members agree on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from tapestry.node.trainer.models.pretrained import frame_of, kept_tensors, load_config, quiet, same_names
from tapestry.node.trainer.models.refusal import ModelError
from tapestry.node.trainer.models.stored import StoredWeights

PIECE = 1 << 22  # elements that are converted at once: 16 MiB


def weights_digest(source: nn.Module | Path, read: Callable[[int], None] | None = None) -> str:
    """64 hex digits, of a built model or of a base's folder. `read` hears of the bytes of each tensor of a
    folder. Raises ModelError."""
    if isinstance(source, nn.Module):
        named = [(name, tuple(tensor.shape)) for name, tensor in kept_tensors(source)]
        return digest_of(named, kept_tensors(source))
    module = frame_of(source).module
    tensors = read_weights(source, module)
    return digest_of(weights_shapes(module), tensors if read is None else _heard(tensors, read))


def _heard(
    tensors: Iterable[tuple[str, Tensor]], read: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor
        read(4 * tensor.numel())


def weights_shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes that the digest covers, in order."""
    return [(name, tuple(tensor.shape)) for name, tensor in kept_tensors(module)]


def digest_of(named: list[tuple[str, tuple[int, ...]]], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """As `weights_digest`, of tensors that come one after another in the order of `named`."""
    hasher = WeightsHasher(named)
    for _, tensor in tensors:
        hasher.update(tensor)
    return hasher.hexdigest()


class WeightsHasher:
    """The digest while the tensors go by."""

    def __init__(self, named: list[tuple[str, tuple[int, ...]]]) -> None:
        header = ["tapestry weights 1", [[name, list(shape)] for name, shape in named]]
        self._hasher = blake3(json.dumps(header, separators=(",", ":")).encode("ascii"))

    def update(self, tensor: Tensor) -> None:
        """The next tensor, of any dtype, on any device."""
        flat = tensor.detach().reshape(-1)
        for start in range(0, flat.numel(), PIECE):
            piece = flat[start : start + PIECE].to("cpu", torch.float32).contiguous()
            self._hasher.update(memoryview(piece.numpy()).cast("B"))  # type: ignore[arg-type]

    def hexdigest(self) -> str:
        return self._hasher.hexdigest()


def read_weights(folder: Path, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every kept tensor of the base by name, in the module's order, in the dtype in which it is stored.

    `module` may be on the meta device; it says which and in which order. One tensor is in memory at a time,
    unless transformers has to join stored tensors into larger ones: then all are. Raises ModelError.
    """
    stored = StoredWeights.find(folder)
    if same_names(module, stored):
        for name, _ in kept_tensors(module):
            yield name, stored.read(name)
    else:
        for name, tensor in kept_tensors(load_base(folder, torch.float32)):
            yield name, tensor.detach()


def load_base(folder: Path, dtype: torch.dtype) -> Any:
    """The base with its weights, built by transformers; `dtype` is that of its parameters. Raises ModelError.

    transformers fills what a checkpoint lacks with random numbers and says so in a warning: here it is an
    error.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    quiet()
    try:
        module, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a model's own loading raises
        text = " ".join(str(error).split())[:200]
        raise ModelError(f"{folder} does not load: {type(error).__name__}: {text}") from error
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        names = sorted(str(name) for name in loading.get(what) or ())
        if names:
            raise ModelError(f"{folder} holds no weights for {names[0][:120]} ({len(names)} {what})")
    return module
