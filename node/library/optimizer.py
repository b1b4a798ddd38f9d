"""The state of any torch optimizer, in a safetensors file: written when the node asks, read at a start.

Only what it has learnt (`state_dict()["state"]`: moments, step counts); learning rates and the like are the
script's, which may have changed them. Nothing is pickled: tensors are tensors, Python numbers become tensors
of one element whose name says so. A state that holds anything else is not kept, which the node's log says.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tapestry.node.library.errors import SwarmError
from tapestry.node.trainer.optimizers.state import Identity, Snapshot, write_snapshot

NUMBERS: Mapping[str, tuple[type, torch.dtype]] = {
    "bool": (bool, torch.bool),
    "int": (int, torch.int64),
    "float": (float, torch.float64),
}


class StateNotKept(ValueError):
    """One line that says why."""


# Their optimizers keep the parameters once more (masters in f32, the sequence z), and step from those: a base
# that is loaded into the module is undone by the next step.
KEEP_COPIES = ("deepspeed", "schedulefree")


def require_no_copies(optimizer: torch.optim.Optimizer) -> None:
    """Raises SwarmError for one that would not step from the base, however often that is loaded."""
    for one in (optimizer, _inner(optimizer)):
        library = type(one).__module__.partition(".")[0]
        if library in KEEP_COPIES:
            raise SwarmError(
                f"the optimizer is {library}'s {type(one).__name__}, which steps from its own copy of the "
                "parameters, and so leaves the run's base",
                "an optimizer that steps the module's own parameters, such as torch.optim.AdamW",
            )


def save_state(path: Path, optimizer: torch.optim.Optimizer, epoch: int, schema: str) -> None:
    """Atomically. Raises StateNotKept, OSError."""
    tensors = dict(_flattened(optimizer.state_dict()["state"]))
    if tensors:
        write_snapshot(path, Snapshot(epoch, 0, tensors), Identity(_name(optimizer), schema))


def load_state(path: Path, optimizer: torch.optim.Optimizer, schema: str) -> int | None:
    """The epoch of the state that was taken up; None if there is no file. Raises StateNotKept."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if (metadata.get("optimizer"), metadata.get("schema")) != (_name(optimizer), schema):
                raise StateNotKept(f"{path}: of another optimizer, module or order of its parameters")
            state = _nested({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            epoch = int(metadata["epoch"])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise StateNotKept(f"{path}: cannot be used: {error}") from error
    return epoch


def _inner(optimizer: torch.optim.Optimizer) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


def _name(optimizer: torch.optim.Optimizer) -> str:
    return type(_inner(optimizer)).__name__


def _flattened(state: Mapping[Any, Any]) -> list[tuple[str, Tensor]]:
    flat = []
    for index, values in state.items():
        if not isinstance(index, int) or not isinstance(values, Mapping):
            raise StateNotKept("its state is not by parameter")
        for key, value in values.items():
            name, tensor = _tensor(f"{index} {key}", value)
            if tensor is not None:
                flat.append((name, tensor))
    return flat


def _tensor(name: str, value: object) -> tuple[str, Tensor | None]:
    if isinstance(value, Tensor):
        return name, value.detach().to("cpu", copy=True).contiguous()
    if value is None:
        return name, None
    for word, (kind, dtype) in NUMBERS.items():
        if type(value) is kind:
            return f"{name} {word}", torch.tensor(value, dtype=dtype, device="cpu")
    raise StateNotKept(f"its state holds a {type(value).__name__}, which cannot be written without pickle")


def _nested(flat: Mapping[str, Tensor]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in flat.items():
        index, key, *word = name.split(" ")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise StateNotKept(f"{name} is not finite")
        state.setdefault(int(index), {})[key] = NUMBERS[word[0]][0](tensor.item()) if word else tensor
    return state
