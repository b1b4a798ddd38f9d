"""A base's folder, looked at without torch: which files have its weights, and what config.json says.

What is refused here is refused before anything is loaded, which takes seconds. Must not import torch or
transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tapestry.node.spec.training import WEIGHTS
from tapestry.node.trainer.models.hub import fetch
from tapestry.node.trainer.models.refusal import ModelError

CONFIG = "config.json"
SINGLE = WEIGHTS
INDEX = "model.safetensors.index.json"
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
CONFIG_BYTES_MAX = 256 << 10  # guess: the longest, with a list entry for every layer, have 20 kB
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# DeepSeek-V3, of 90,000 tensors, has an index of 9 MB.
INDEX_BYTES_MAX = 32 << 20

# Bounds before anything is built: an order above the largest open models (Kimi K2: 61 layers of 384 experts;
# Llama 3.1 405B: 126 layers of width 16,384; Gemma: 262,144 ids).
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


def look_at(source: str | Path, need_weights: bool) -> Path:
    """The folder of a base, or of a hub id's snapshot. Raises ModelError for what its files' names and its
    config.json tell."""
    folder = fetch(source)
    if not folder.is_dir():
        raise ModelError(f"{folder} is no directory")
    if (folder / "adapter_config.json").exists() and not (folder / CONFIG).exists():
        raise ModelError(
            f"{folder} holds an adapter, not a model", "merge it into its base first (PEFT: merge_and_unload)"
        )
    if need_weights:
        weight_files(folder)
    read_config(folder)
    return folder


def weight_files(folder: Path) -> list[str]:
    """What transformers loads of a folder: the single file, whatever lies beside it; else the index and what
    it names. Raises ModelError."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).exists():
        names = sorted(set(read_index(folder).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder} lacks {missing[0]}, which {INDEX} names ({len(missing)} such files)",
                "download it again: the copy is not complete",
            )
        return [INDEX, *names]
    pickled = _first(path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLED)
    if pickled:
        raise ModelError(
            f"{folder} holds pickled weights ({pickled}), which run code when they are read",
            "use a revision with safetensors, or save the model again with transformers' save_pretrained",
        )
    raise ModelError(f"{folder} holds no {SINGLE} and no {INDEX}")


def _first(names: Iterable[str]) -> str:
    return next(iter(names), "")


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    path = folder / INDEX
    table = read_json(path, INDEX_BYTES_MAX)
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise ModelError(f"{path} names {str(name)[:60]!r}, which is no safetensors file beside it")
    return weight_map


def positions_by(value_of: Callable[[str], Any]) -> int | None:
    """How long a sequence may be, by the configuration's keys; None if it says nothing."""
    return next((n for n in map(value_of, POSITIONS) if type(n) is int and n > 0), None)


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says, checked. Raises ModelError."""
    table = read_json(folder / CONFIG, CONFIG_BYTES_MAX)
    try:
        _check_config(folder / CONFIG, table)
    except RecursionError as error:
        raise ModelError(f"{folder / CONFIG} is nested too deeply") from error
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


def read_json(path: Path, bytes_max: int) -> dict[str, Any]:
    """A JSON table from a file that may be anything. Raises ModelError."""
    try:
        with path.open("rb") as file:
            data = file.read(bytes_max + 1)
        if len(data) > bytes_max:
            raise ModelError(f"{path} is larger than {bytes_max} bytes")
        table = json.loads(data)
    except FileNotFoundError as error:
        raise ModelError(f"there is no {path}") from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ModelError(f"{path} is no JSON object")
    return table
