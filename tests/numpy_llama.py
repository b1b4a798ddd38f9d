"""A reader of exported models that is not transformers: Llama and Qwen, in numpy, from the files alone.

It takes every number from config.json under the names that other readers use (mlx-lm, llama.cpp), and the
weights by their names in the safetensors files: a number that config.json leaves to transformers' defaults is
a KeyError here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

F64 = NDArray[np.float64]


def logits(
    folder: Path,
    ids: NDArray[np.int64],  # (batch, length)
) -> F64:  # (batch, length, vocab)
    """In f64."""
    config = json.loads((folder / "config.json").read_text())
    read = {name: w for path in sorted(folder.glob("*.safetensors")) for name, w in load_file(path).items()}
    weights = {name: w.astype(np.float64) for name, w in read.items()}
    x = weights["model.embed_tokens.weight"][ids]
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        layer = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        x = x + _attention(config, layer, _norm(x, layer["input_layernorm.weight"], config["rms_norm_eps"]))
        x = x + _mlp(
            config, layer, _norm(x, layer["post_attention_layernorm.weight"], config["rms_norm_eps"])
        )
    x = _norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    tied = config["tie_word_embeddings"]
    return x @ weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def _norm(x: F64, weight: F64, eps: float) -> F64:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * weight


def _attention(config: dict[str, Any], layer: dict[str, F64], x: F64) -> F64:
    batch, length, _ = x.shape
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim", config["hidden_size"] // heads)  # Qwen2 has no such number

    def projected(name: str, count: int) -> F64:  # (batch, count, length, size)
        y = x @ layer[f"self_attn.{name}_proj.weight"].T + layer.get(f"self_attn.{name}_proj.bias", 0.0)
        y = y.reshape(batch, length, count, size)
        if f"self_attn.{name}_norm.weight" in layer:  # Qwen3
            y = _norm(y, layer[f"self_attn.{name}_norm.weight"], config["rms_norm_eps"])
        return y.swapaxes(1, 2)

    q, k = (_turned(projected(n, c), config["rope_theta"]) for n, c in (("q", heads), ("k", groups)))
    k, v = (np.repeat(y, heads // groups, axis=1) for y in (k, projected("v", groups)))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(size)
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return (shares @ v).swapaxes(1, 2).reshape(batch, length, -1) @ layer["self_attn.o_proj.weight"].T


def _turned(x: F64, theta: float) -> F64:
    """Rotary positions (RoFormer, section 3.4.2), a vector's halves as the pairs."""
    length, size = x.shape[-2:]
    angle = np.arange(length)[:, None] * theta ** (-np.arange(0, size, 2) / size)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = x[..., : size // 2], x[..., size // 2 :]
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


def _mlp(config: dict[str, Any], layer: dict[str, F64], x: F64) -> F64:
    assert config["hidden_act"] == "silu"
    gate = x @ layer["mlp.gate_proj.weight"].T
    return gate / (1 + np.exp(-gate)) * (x @ layer["mlp.up_proj.weight"].T) @ layer["mlp.down_proj.weight"].T
