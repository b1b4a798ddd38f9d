"""Settings -> a Llama from transformers, its layout, and its random initial state.

transformers takes seconds and hundreds of megabytes to import, so only the functions that build a model
do it: the node process may import this module and never pays. Models are built from configuration
alone; nothing is looked up on a network or in a cache of models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tapestry.compression.shards import Layout
from tapestry.node.spec.training import ModelSettings
from tapestry.node.trainer.data.corpus import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE


def initial_state(settings: ModelSettings, seed: int) -> Tensor:
    """f32 (n,) on the CPU: transformers' own random initialisation, from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(settings)
    return model_layout(model).flatten(dict(model.named_parameters()))


def import_architectures() -> None:
    """What `build_model` imports, before it is known what is to be built."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: F401


def build_model(settings: ModelSettings) -> nn.Module:
    """A LlamaForCausalLM in f32 on torch's current default device, which may be `meta`."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = LlamaConfig(**config_fields(settings), attn_implementation="sdpa")
    model: nn.Module = LlamaForCausalLM(config).float()
    return model


def model_layout(model: nn.Module) -> Layout:
    """Trainable parameters in the model's own order; tied ones once."""
    named = [(name, tuple(value.shape)) for name, value in model.named_parameters() if value.requires_grad]
    return Layout.from_named(named)


def parameter_count(settings: ModelSettings) -> int:
    """n, by arithmetic alone: to print in a summary before any model is built."""
    head_size = settings.hidden_size // settings.heads
    attention = 2 * settings.hidden_size * head_size * (settings.heads + settings.kv_heads)
    mlp = 3 * settings.hidden_size * settings.intermediate_size
    norms = 2 * settings.hidden_size
    embeddings = VOCAB_SIZE * settings.hidden_size * (1 if settings.tie_embeddings else 2)
    return settings.layers * (attention + mlp + norms) + embeddings + settings.hidden_size


def config_fields(settings: ModelSettings) -> dict[str, Any]:
    """The fields of a Hugging Face Llama configuration."""
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "max_position_embeddings": settings.sequence_length,
        "tie_word_embeddings": settings.tie_embeddings,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "use_cache": False,
    }
