"""What a home exports, compared with what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from e2e.harness import tapestry
from safetensors import safe_open

from tapestry.node.spec.run import RunSpec
from tapestry.node.trainer.models import registry

EXPORT_S = 600.0  # of a large model on a busy machine


def export(out: Path, home: Path) -> None:
    """The epoch of the home's newest checkpoint: a node that stops may be an update ahead of it."""
    epoch = newest_checkpoint(home).name.split("-")[0]
    done = tapestry("export", out, "--home", home, "--epoch", int(epoch), timeout_s=EXPORT_S)
    assert done.returncode == 0, done.stderr


def newest_checkpoint(home: Path) -> Path:
    return max((home / "checkpoints").glob("*.safetensors"), key=lambda p: int(p.name.split("-")[0]))


def logits_of(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True))


def logits_of_home(home: Path) -> torch.Tensor:
    """Of the network that the run trains, with the parameters of the newest checkpoint."""
    with safe_open(newest_checkpoint(home), framework="pt") as file:
        flat = file.get_tensor("params")
    genesis = (home / "genesis.json").read_text()
    spec = RunSpec.from_canonical(_spec_of(genesis))
    net = registry.build(spec.model, home / "base", spec.data.sequence_length)
    named = dict(net.named_parameters())
    with torch.no_grad():
        for name, view in registry.layout_of(net).views(flat).items():
            named[name].copy_(view)
    return _logits(net)


def _spec_of(genesis: str) -> bytes:
    def found(value: object) -> str | None:
        if isinstance(value, dict):
            if isinstance(value.get("spec"), str):
                return str(value["spec"])
            value = [*value.values()]
        if isinstance(value, list):
            return next((text for item in value if (text := found(item))), None)
        return None

    text = found(json.loads(genesis))
    assert text is not None
    return text.encode()


def _logits(net: Any) -> torch.Tensor:
    ids = torch.arange(40).remainder(250)[None]
    with torch.no_grad():
        logits: torch.Tensor = net.eval()(input_ids=ids).logits
    return logits
