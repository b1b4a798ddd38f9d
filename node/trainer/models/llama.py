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
from tapestry.node.spec.training import LlamaSpec
from tapestry.node.trainer.tokenizers.byte import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE


def initial_state(spec: LlamaSpec, sequence_length: int) -> Tensor:
    """f32 (n,) on the CPU: transformers' own random initialisation, from the spec's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = build_model(spec, sequence_length)
    return model_layout(model).flatten(dict(model.named_parameters()))


def import_architectures() -> None:
    """What `build_model` imports, before it is known what is to be built."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: F401


def build_model(spec: LlamaSpec, sequence_length: int) -> nn.Module:
    """A LlamaForCausalLM in f32 on torch's current default device, which may be `meta`."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = LlamaConfig(**config_fields(spec, sequence_length), attn_implementation="sdpa")
    model: nn.Module = LlamaForCausalLM(config).float()
    return model


def model_layout(model: nn.Module) -> Layout:
    """Trainable parameters in the model's own order; tied ones once."""
    named = [(name, tuple(value.shape)) for name, value in model.named_parameters() if value.requires_grad]
    return Layout.from_named(named)


def config_fields(spec: LlamaSpec, sequence_length: int) -> dict[str, Any]:
    """The fields of a Hugging Face Llama configuration."""
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "max_position_embeddings": sequence_length,
        "tie_word_embeddings": spec.tie_embeddings,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "use_cache": False,
    }
