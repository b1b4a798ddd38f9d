"""An open base, or the configuration of one -> the spec of a run that continues it, and HOME/base.

`tapestry init --base DIR` looks at the directory without building anything (trainer/models/pretrained.py),
copies the files that every member must hold, and pins them and the weights by their digests. The numbers of
training are a start for continued pre-training, to be edited in run.toml before the run is founded.

Imports torch and transformers: only commands that need them come here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tapestry.node.disk.base import BaseFile, take_base
from tapestry.node.errors import UserError
from tapestry.node.progress import Told, counted, silent
from tapestry.node.spec.run import RunSpec, new_spec
from tapestry.node.spec.training import WEIGHTS, DataSpec, TrainingSpec, TrainSpec, TransformersSpec
from tapestry.node.trainer.models.pretrained import BaseFacts, check_base
from tapestry.node.trainer.models.refusal import ModelError
from tapestry.node.trainer.models.stored import join_files
from tapestry.node.trainer.models.weights import weights_digest
from tapestry.node.trainer.tokenizers.api import TokenizerError
from tapestry.node.trainer.tokenizers.base import adds_bos

SEQUENCE_LENGTH_MAX = 1024  # guess: what a member with little memory can train; larger where all have GPUs
SHARDS = 512  # guess: about so many, so that their frames neither stall a link nor crowd a roster
SHARD_ELEMENTS_MIN = 262_144


@dataclass(frozen=True, slots=True)
class Adopted:
    """What `init` says and writes."""

    spec: RunSpec
    facts: BaseFacts


def adopt(
    source: str,  # a directory, or a hub id
    target: Path,  # HOME/base
    name: str,
    *,
    weights: bool,  # begin from the base's weights; else from random ones
    lora_rank: int,  # 0: all parameters are trained
    told: Told = silent,
) -> Adopted:
    """Copies into `target`. Raises UserError."""
    told(f"looking at {source}", 0, 1)
    try:
        facts = check_base(source, need_weights=weights, lora=lora_rank > 0)
        files = take_base(facts.folder, target)
        if lora_rank:
            size = sum(path.stat().st_size for path in facts.folder.glob("*.safetensors"))
            join_files(facts.folder, target / WEIGHTS, counted(told, "copying the weights bytes", size))
            files = (*files, BaseFile.of(target / WEIGHTS))
        reading = counted(told, "reading the weights bytes", 4 * facts.parameters)
        digest = weights_digest(facts.folder, reading) if weights else ""
        add_bos = adds_bos(facts.folder)
    except ModelError as error:
        raise UserError(str(error), hint=error.hint or None) from error
    except TokenizerError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{source}: {error}") from error
    model = TransformersSpec(
        "transformers",
        files=tuple(str(file) for file in files),
        weights=digest,
        parameters=facts.parameters,
        lora_rank=lora_rank,
        lora_alpha=2.0 * lora_rank or 32.0,
    )
    return Adopted(_spec(name, model, facts, add_bos), facts)


def _spec(name: str, model: TransformersSpec, facts: BaseFacts, add_bos: bool) -> RunSpec:
    longest = facts.sequence_length_max or SEQUENCE_LENGTH_MAX
    training = TrainingSpec(
        model,
        DataSpec("base", min(longest, SEQUENCE_LENGTH_MAX), add_bos=add_bos),
        # Guesses: continued pre-training goes on gently, adapters need a larger rate (LoRA, 2106.09685, D.4).
        TrainSpec(
            batch_size=8,
            inner_steps=32,
            lr=3e-4 if model.lora_rank else 5e-5,
            weight_decay=0.0 if model.lora_rank else 0.1,
            betas=(0.9, 0.95),
            warmup_steps=32,
        ),
    )
    trained = facts.parameters if not model.lora_rank else 0
    elements = SHARD_ELEMENTS_MIN
    while elements * SHARDS < trained:
        elements *= 2
    return new_spec(name, training, shard_elements=elements)
