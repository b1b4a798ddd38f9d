"""The job on an open base, with real daemons: continue it together, and export what others load.

One architecture is tested each time; `scripts/test -m long tests/e2e/test_base.py` does the others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import FAMILIES, make_base
from e2e.harness import Digests, Node, init, tapestry
from safetensors import safe_open

from tapestry.node.spec.run import RunSpec
from tapestry.node.trainer.models import registry

pytestmark = pytest.mark.e2e

FEW_STEPS = {"inner_steps": "4", "batch_size": "2", "sequence_length": "32", "checkpoint_every_epochs": "1"}
OFTEN = ("llama",)
SELDOM = [pytest.param(name, marks=pytest.mark.long) for name in FAMILIES if name not in OFTEN]


@pytest.mark.parametrize("family", [*OFTEN, *SELDOM])
def test_two_members_continue_a_base_and_export_it(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", family, dtype=torch.bfloat16, shards=2)
    home = init(tmp_path / "a", "--base", base, **FEW_STEPS)
    with Node(home) as founder:
        founder.wait_ready()
        with Node(tmp_path / "b", "--peer", founder.address, "--base", base, data="stdlib:2/3") as second:
            second.wait_ready()
            _three_epochs_with_one_digest(founder, second)
            assert "nothing is downloaded for it" in second.log.read_text()
            assert second.stop() == 0
            epoch = founder.status()["epoch"]
            second.start().wait_ready()
            second.wait_epoch(epoch)
            assert [second.stop(), founder.stop()] == [0, 0], second.tail()
    exported = tmp_path / "model"
    _export(exported, home)
    torch.testing.assert_close(_logits_of(exported), _logits_of_home(home), rtol=0, atol=1e-5)
    assert (exported / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_joiner_needs_one_address_and_no_files(tmp_path: Path) -> None:
    """LoRA: the frozen base comes from the peer too, and an epoch sends adapters alone."""
    base = make_base(tmp_path / "base", "llama")
    home = init(tmp_path / "a", "--base", base, "--lora", 4, **FEW_STEPS)
    with Node(home) as founder:
        founder.wait_ready()
        with Node(tmp_path / "b", "--peer", founder.address, data="stdlib:2/3") as second:
            second.wait_ready()
            _three_epochs_with_one_digest(founder, second)
            whole = sum(path.stat().st_size for path in base.glob("*.safetensors"))
            assert founder.status()["params"] * 4 < whole
            assert [second.stop(), founder.stop()] == [0, 0], second.tail()
    names = sorted(path.name for path in (home / "base").iterdir())
    for name in names:
        assert (second.home / "base" / name).read_bytes() == (home / "base" / name).read_bytes()
    merged = tmp_path / "merged"
    _export(merged, second.home)
    torch.testing.assert_close(_logits_of(merged), _logits_of_home(second.home), rtol=1e-4, atol=1e-4)


def test_the_same_architecture_from_random_weights(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen3")
    with Node(init(tmp_path / "a", "--config", base, **FEW_STEPS)) as founder:
        founder.wait_ready()
        founder.wait_epoch(2)
        assert founder.stop() == 0


def test_another_base_than_the_runs_is_refused_in_one_line(tmp_path: Path) -> None:
    base, other = make_base(tmp_path / "base", "llama"), make_base(tmp_path / "other", "llama", seed=2)
    home = init(tmp_path / "a", "--base", base, **FEW_STEPS)
    done = tapestry("start", "--home", home, "--base", other, "--data", "stdlib:1/3", "--http", "127.0.0.1:0")
    assert done.returncode == 2
    assert "other holds other weights" in done.stderr and "Traceback" not in done.stderr


def _three_epochs_with_one_digest(first: Node, second: Node) -> None:
    digests = Digests(first, second)
    begin = second.status()["epoch"]
    digests.wait("three epochs", lambda: second.status()["epoch"] >= begin + 3)
    digests.wait("an epoch on both", lambda: any(len(names) == 2 for names in digests.shared.values()))


def _export(out: Path, home: Path) -> None:
    """The epoch of the home's newest checkpoint: a node that stops may be an update ahead of it."""
    epoch = _newest_checkpoint(home).name.split("-")[0]
    done = tapestry("export", out, "--home", home, "--epoch", int(epoch))
    assert done.returncode == 0, done.stderr


def _newest_checkpoint(home: Path) -> Path:
    return max((home / "checkpoints").glob("*.safetensors"), key=lambda p: int(p.name.split("-")[0]))


def _logits_of(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True))


def _logits_of_home(home: Path) -> torch.Tensor:
    """Of the network that the run trains, with the parameters of the newest checkpoint."""
    with safe_open(_newest_checkpoint(home), framework="pt") as file:
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
