"""What all systems share: model, data, optimizer, and how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tapestry.node.spec.run import RunSpec, preset_spec
from tapestry.node.trainer.data.corpus import Corpus, load_corpus


@dataclass(frozen=True)
class Plan:
    """What all systems share; crosses to the workers as JSON."""

    folder: str
    nodes: int
    preset: str
    minutes: float
    inner_steps: int
    batch_size: int
    accumulation: int
    hivemind_accumulation: int
    lr: float
    seed: int
    snapshot_s: float
    addresses: tuple[str, ...] = ()

    def spec(self, inner_steps: int) -> RunSpec:
        """The run spec: AdamW is the inner optimizer with inner steps, and the outer one without."""
        adamw = {"lr": self.lr, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}
        plain = preset_spec(self.preset, "bench").to_dict()
        plain["model"]["seed"] = self.seed
        plain["train"] |= adamw | {
            "inner_steps": inner_steps,
            "batch_size": self.batch_size,
            "accumulation": self.accumulation,
            "warmup_steps": 0,
            "grad_clip": 1e9,
        }
        if not inner_steps:
            plain["outer"] = adamw | {"optimizer": "adamw"}
            plain["limits"]["checkpoint_every_epochs"] = 100  # an epoch is a fraction of a second
        plain["limits"]["updates_kept_epochs"] = 1_000_000  # the curve is made from them
        plain["round"]["min_members"] = self.nodes
        return RunSpec.from_dict(plain)

    def corpus(self, part: int) -> Corpus:
        length = self.spec(1).data.sequence_length
        return load_corpus(
            [f"stdlib:{part + 1}/{self.nodes}"], Path(self.folder) / "cache", length, self.seed
        )
