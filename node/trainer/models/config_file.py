"""A base's config.json, bounded by arithmetic alone, before anything is built of it.

It may come from a peer: one that asks for code, chooses an implementation, or means more than any open model
is refused while it is still a table. What the architecture makes of it is pretrained.py's affair.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tapestry.node.trainer.models.refusal import ModelError
from tapestry.node.trainer.models.stored import read_json

CONFIG_BYTES_MAX = 256 << 10  # guess: the longest, with a list entry for every layer, have 20 kB

# An order above the largest open models (Kimi K2: 61 layers of 384 experts; Llama 3.1 405B: 126 layers of
# width 16,384; Gemma: 262,144 ids).
_INT_MAX = 1 << 31
_BOUNDS = {
    "vocab_size": 1 << 21,
    "hidden_size": 1 << 17,
    "n_embd": 1 << 17,
    "d_model": 1 << 17,
    "intermediate_size": 1 << 20,
    "n_inner": 1 << 20,
    "num_hidden_layers": 512,
    "n_layer": 512,
    "n_layers": 512,
    "num_layers": 512,
    "num_attention_heads": 2048,
    "n_head": 2048,
    "num_key_value_heads": 2048,
    "num_experts": 2048,
    "num_local_experts": 2048,
    "n_routed_experts": 2048,
    "head_dim": 1 << 14,
    "state_size": 1 << 14,
}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_LAYER_EXPERTS_MAX = 1 << 16
_LIST_MAX = 4096  # entries of one list: layer_types has one for each layer
# They choose code: kernels of a hub among them. The node chooses for itself.
_CHOOSES_CODE = re.compile(r"_?(attn|experts)_implementation(_internal)?|(use_)?kernels?(_config)?")
_REMOTE_CODE = ("auto_map", "custom_pipelines")


def read_config(path: Path) -> dict[str, Any]:
    """What the file says, checked. Raises ModelError."""
    table = read_json(path, CONFIG_BYTES_MAX)
    try:
        _check_config(path, table)
    except RecursionError as error:
        raise ModelError(f"{path} is nested too deeply") from error
    return table


def _check_config(path: Path, table: Mapping[str, Any]) -> None:
    """By arithmetic alone. Raises ModelError."""
    model_type = table.get("model_type")
    for key, value in _walk(table):
        if key in _REMOTE_CODE and value:
            raise ModelError(
                f"{path} asks for remote code ({key}), which is never run",
                "use a base whose architecture is part of transformers",
            )
        if key in ("quantization_config", "compression_config") and value:
            raise ModelError(
                f"{path} is of quantized weights, which cannot be trained",
                "use the revision in bfloat16, float16 or float32",
            )
        if key == "transformers_weights" and value:
            raise ModelError(f"{path} names a file of weights of its own (transformers_weights)")
        if _CHOOSES_CODE.fullmatch(key) and value:
            raise ModelError(f"{path} chooses an implementation ({key}); each member's machine does that")
        _check_bounds(path, key, value)
    layers, experts = _largest(table, _LAYERS), _largest(table, _EXPERTS)
    if layers * experts > _LAYER_EXPERTS_MAX:
        raise ModelError(f"{path}: {layers} layers of {experts} experts are more than can be built")
    if not isinstance(model_type, str):
        raise ModelError(f"{path} names no model_type")


def _check_bounds(path: Path, key: str, value: Any) -> None:
    if isinstance(value, list) and len(value) > _LIST_MAX:
        raise ModelError(f"{path}: {key} is a list of {len(value)}, at most {_LIST_MAX}")
    if type(value) is not int:
        return
    limit = _BOUNDS.get(key, _INT_MAX)
    if abs(value) > limit or (key in _BOUNDS and value < 0):
        raise ModelError(f"{path}: {key} is {str(value)[:24]}, at most {limit} is taken")


def _walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth; the entries of a list under the list's key."""
    if key:
        yield key, value
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _walk(inner, str(name) or "?")
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner, key)


def _largest(table: Mapping[str, Any], names: tuple[str, ...]) -> int:
    return max((value for key, value in _walk(table) if key in names and type(value) is int), default=1)
