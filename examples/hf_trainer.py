"""transformers' Trainer as a member: a small Llama, from nothing, on the sources of Python's json package.

python examples/hf_trainer.py HOME [ADDRESS]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tapestry.node import SwarmCallback


def windows(length: int = 64) -> list[dict[str, torch.Tensor]]:
    """The text's bytes, cut into samples."""
    text = b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    ids = torch.tensor(list(text))
    rows = ids[: len(ids) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def main(home: str, peer: str = "") -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    callback = SwarmCallback(
        home=home,
        peer=peer,
        name="trainer",
        inner_steps=5,
        until_epoch=2,
        flags=["--listen=/ip4/127.0.0.1/tcp/0"],
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=8,
            max_steps=1000,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
        )
        trainer = Trainer(model, arguments, train_dataset=windows(), callbacks=[callback])
        with callback:
            trainer.train()
    assert callback.swarm is not None
    print(f"epoch {callback.swarm.epoch} after {trainer.state.global_step} steps", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
