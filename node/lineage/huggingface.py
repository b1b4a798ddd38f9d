"""The shared base -> a Hugging Face directory that transformers loads offline; and a sample from one.

`export_model` writes config.json, generation_config.json, model.safetensors, the byte tokenizer in the
`tokenizers` library's format, and tapestry.json with the lineage. It needs no transformers: the formats
are written directly. Only `sample`, for a command line or a script, imports it.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tapestry.compression.shards import Layout
from tapestry.node.spec.training import LlamaSpec
from tapestry.node.trainer.data.corpus import BOS_ID, EOS_ID, PAD_ID, encode
from tapestry.node.trainer.models.llama import config_fields

# Text that contains these names would be read as the special tokens, so they are unlikely ones.
SPECIAL_TOKENS = {"<|tapestry_bos|>": BOS_ID, "<|tapestry_eos|>": EOS_ID, "<|tapestry_pad|>": PAD_ID}
SAMPLE_TEMPERATURE = 0.7  # guess: livelier than the likeliest byte, still words


class ExportError(RuntimeError):
    """The directory could not be written; one line that says why."""


def export_model(
    out_dir: Path,
    spec: LlamaSpec,
    sequence_length: int,
    layout: Layout,
    flat: Tensor,  # f32 (n,)
    *,
    meta: Mapping[str, Any],
) -> None:
    """Write the whole directory or nothing. `meta` (run id, epoch, head, ...) becomes tapestry.json.

    Raises ExportError if `out_dir` is there already and not an empty folder, or cannot be written.
    """
    out_dir = out_dir.absolute()
    temporary = out_dir.with_name(f".{out_dir.name}.{uuid.uuid4().hex}")
    try:
        if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
            raise ExportError(f"{out_dir} is there already: name a new or an empty folder")
        temporary.mkdir(parents=True)
        for name, content in _json_files(spec, sequence_length, meta).items():
            (temporary / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        tensors = {name: view.contiguous() for name, view in layout.views(flat).items()}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        os.replace(temporary, out_dir)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot write {out_dir}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sample(out_dir: Path, prompt: str, n_bytes: int, seed: int) -> str:
    """What the exported model writes after the prompt: n_bytes bytes, read as UTF-8 as far as they are."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(out_dir, local_files_only=True).eval()
    window = model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(seed)
    ids = [EOS_ID, *encode(prompt)]  # training never saw bos: documents follow one another's eos
    start = len(ids)
    with torch.no_grad():
        for _ in range(n_bytes):
            logits = model(input_ids=torch.tensor([ids[-window:]])).logits[0, -1, :BOS_ID]
            chances = torch.softmax(logits / SAMPLE_TEMPERATURE, dim=0)
            ids.append(int(torch.multinomial(chances, 1, generator=generator)))
    return bytes(ids[start:]).decode("utf-8", errors="replace")


def _json_files(spec: LlamaSpec, sequence_length: int, meta: Mapping[str, Any]) -> dict[str, Any]:
    specials = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    bos, eos, pad = SPECIAL_TOKENS
    return {
        "config.json": {
            **config_fields(spec, sequence_length),
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "use_cache": True,
        },
        "generation_config.json": specials,
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "clean_up_tokenization_spaces": False,
            "model_max_length": sequence_length,
        },
        "tapestry.json": dict(meta),
    }


def _tokenizer() -> dict[str, Any]:
    """Byte-level BPE without a single merge: one token per byte, with the byte as its id."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id_, "content": name, **flags} for name, id_ in SPECIAL_TOKENS.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_byte_characters())},
            "merges": [],
        },
    }


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_ins = {byte: chr(byte) for byte in printable}
    stand_ins.update({byte: chr(0x100 + index) for index, byte in enumerate(others)})
    return [stand_ins[byte] for byte in range(256)]
