"""TRL's SFTTrainer as a member: a small Llama, from nothing, learns to answer sums.

python examples/trl_trainer.py HOME [ADDRESS]
"""

from __future__ import annotations

import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as BytesBack
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tapestry.node import SwarmCallback


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and one for the end: there is no model to take one from."""
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = BytesBack()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def sums() -> Dataset:
    """64 rows."""
    pairs = [(a, b) for a in range(8) for b in range(8)]
    return Dataset.from_list([{"prompt": f"{a} + {b} = ", "completion": f"{a + b}"} for a, b in pairs])


def main(home: str, peer: str = "") -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    callback = SwarmCallback(
        home=home,
        peer=peer,
        name="sums",
        inner_steps=5,
        until_epoch=2,
        flags=["--listen=/ip4/127.0.0.1/tcp/0"],
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            per_device_train_batch_size=8,
            max_steps=1000,
            max_length=64,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            bf16=False,
        )
        trainer = SFTTrainer(
            LlamaForCausalLM(config),
            arguments,
            train_dataset=sums(),
            processing_class=tokenizer,
            callbacks=[callback],
        )
        with callback:
            trainer.train()
    assert callback.swarm is not None
    print(f"epoch {callback.swarm.epoch} after {trainer.state.global_step} steps", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
