"""What scripts/bench/learning.py trains: a preset from random weights, or a base that is continued.

A subject has a tokenizer and the length of a window, and makes networks and the state they begin with, by
the product's own code. Another kind of model is another class here and a line in `subject_of`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from tapestry.compression.shards import Layout
from tapestry.node.lineage.adopt import adopt
from tapestry.node.spec.training import PRESETS, LlamaSpec, ModelSpec
from tapestry.node.trainer.models import registry
from tapestry.node.trainer.tokenizers.api import Tokenizer
from tapestry.node.trainer.tokenizers.base import BaseTokenizer, eos_id_of
from tapestry.node.trainer.tokenizers.byte import ByteTokenizer


class Subject(Protocol):
    """A model that members train."""

    name: str
    sequence_length: int  # tokens that are predicted in a window
    tokenizer: Tokenizer

    def network(self, seed: int) -> tuple[nn.Module, Layout]:
        """A network of its own, and the layout of what is trained in it."""

    def initial_state(self, seed: int) -> Tensor:  # f32 (n,)
        """What all members begin with."""


@dataclasses.dataclass(frozen=True, slots=True)
class Preset:
    """A small Llama with random weights, fed bytes."""

    name: str
    model: LlamaSpec
    sequence_length: int
    tokenizer: Tokenizer = dataclasses.field(default_factory=ByteTokenizer)

    @classmethod
    def of(cls, name: str, hidden: int | None, layers: int | None, sequence_length: int | None) -> Preset:
        """`hidden` and `layers`: a smaller or larger model of the preset's shape."""
        preset = PRESETS[name]
        model = preset.model
        assert isinstance(model, LlamaSpec)
        if hidden:
            scale = hidden / model.hidden_size
            heads = max(1, round(model.heads * scale))
            model = dataclasses.replace(
                model,
                hidden_size=hidden,
                intermediate_size=round(model.intermediate_size * scale),
                heads=heads,
                kv_heads=max(1, heads // 2),
            )
        if layers:
            model = dataclasses.replace(model, layers=layers)
        return cls(name, model, sequence_length or preset.data.sequence_length)

    def network(self, seed: int) -> tuple[nn.Module, Layout]:
        return _network(dataclasses.replace(self.model, seed=seed), None, self.sequence_length)

    def initial_state(self, seed: int) -> Tensor:
        return registry.initial_state(dataclasses.replace(self.model, seed=seed), None, self.sequence_length)


class Base:
    """A base in a directory, as `tapestry init --base DIR [--lora R]` takes it."""

    def __init__(self, folder: Path, lora_rank: int, sequence_length: int) -> None:
        """Raises UserError."""
        self.name = f"{folder.name}, " + (f"LoRA of rank {lora_rank}" if lora_rank else "all parameters")
        self.sequence_length = sequence_length
        self._copy = tempfile.TemporaryDirectory(prefix="learning-")
        self._folder = Path(self._copy.name) / "base"
        spec = adopt(str(folder), self._folder, "learning", weights=True, lora_rank=lora_rank).spec
        self._model = spec.model
        self.tokenizer = BaseTokenizer(self._folder / "tokenizer.json", eos_id_of(self._folder))
        self._weights = folder if not lora_rank else self._folder

    def network(self, seed: int) -> tuple[nn.Module, Layout]:
        return _network(dataclasses.replace(self._model, seed=seed), self._folder, self.sequence_length)

    def initial_state(self, seed: int) -> Tensor:
        return registry.initial_state(
            dataclasses.replace(self._model, seed=seed), self._weights, self.sequence_length
        )


def _network(model: ModelSpec, folder: Path | None, length: int) -> tuple[nn.Module, Layout]:
    network = registry.build(model, folder, length).float()  # as a trainer does on the CPU
    return network, registry.layout_of(network)
