"""Small Hugging Face bases for tests: random weights, two layers, a tokenizer of their own.

`make_base(folder, family)` writes what a published base has: config.json, generation_config.json, weights in
safetensors (in any dtype, in several files), a tokenizer with a chat template, README.md.
Everything follows from the arguments, so two calls write the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCAB = 320  # ids of the tokenizer below: bytes, merges, and the special ones
POSITIONS = 128
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
README = "---\nlicense: apache-2.0\nlanguage: en\n---\n# A small base\n"
CORPUS = "".join(f"line {i}: the square of {i} is {i * i}, and the cube {i**3}\n" for i in range(400))

Fields = dict[str, Any]
_DENSE: Fields = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
_GPT2: Fields = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": POSITIONS}
_NEOX: Fields = {**_DENSE, "num_key_value_heads": None}
_MAMBA: Fields = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "intermediate_size": 64}

# model_type and the fields of the configuration; names as tests use them.
FAMILIES: dict[str, tuple[str, Fields]] = {
    "llama": ("llama", _DENSE),
    "qwen2": ("qwen2", {**_DENSE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_DENSE, "head_dim": 8, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", _DENSE),
    "gemma3": ("gemma3_text", {**_DENSE, "head_dim": 8, "sliding_window": 16}),
    "mistral": ("mistral", {**_DENSE, "head_dim": 8}),
    "phi": ("phi", {**_DENSE, "num_key_value_heads": 4}),
    "gpt2": ("gpt2", _GPT2),
    "gpt-neox": ("gpt_neox", {key: value for key, value in _NEOX.items() if value is not None}),
    "mixtral": ("mixtral", {**_DENSE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", {**_DENSE, "num_experts": 4, "num_experts_per_tok": 2}),
    "mamba": ("mamba", _MAMBA),
}
MIXTURES = ("mixtral", "olmoe")  # of experts
STATE_SPACE = ("mamba",)


def make_base(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    seed: int = 1,
    vocab: int = VOCAB,
    **fields: Any,
) -> Path:
    """Write a base of `FAMILIES` into `folder` and return it. `fields` go over those of the family."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    tokenizer = make_tokenizer(folder)
    model_type, own = FAMILIES[family]
    ids = {name: tokenizer[content] for name, content in _SPECIAL.items()}
    config = AutoConfig.for_model(model_type, **{"vocab_size": vocab, **own, **ids, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        _shake(model)
    model.generation_config = GenerationConfig(**ids, do_sample=True, temperature=0.7)
    model.to(dtype)
    size_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size_bytes + 1 if shards == 1 else size_bytes // shards + 1)
    (folder / "README.md").write_text(README)
    return folder


def make_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-level BPE of VOCAB ids in `folder`; returns the ids of the special tokens by content."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": POSITIONS,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2))
    return {content: tokenizer.token_to_id(content) for content in (BOS, EOS, PAD)}


def begin_with(folder: Path, bos: str = BOS) -> None:
    """Let the tokenizer in `folder` put BOS before each text, as those of Llama 3 and Gemma do."""
    from tokenizers import Tokenizer, processors

    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    begins = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begins])
    tokenizer.save(path)


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Read a JSON file, let `change` change it, write it back."""
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


_SPECIAL = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def _shake(model: torch.nn.Module) -> None:
    """Move every parameter off its neutral start (norms of 1, biases of 0): a mix-up of two then shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
