"""The job on an open base, with real daemons: continue it together, and export what others load.

One architecture is tested each time; `scripts/test -m long tests/e2e/test_base.py` does the others.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bases import FAMILIES, make_base
from e2e.exports import export, logits_of, logits_of_home
from e2e.harness import Digests, Node, init, tapestry

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
        with Node(
            tmp_path / "b", "--peer", founder.invitation(), "--base", base, data="stdlib:2/3"
        ) as second:
            second.wait_ready()
            _three_epochs_with_one_digest(founder, second)
            assert "nothing is downloaded for it" in second.log.read_text()
            assert second.stop() == 0
            epoch = founder.status()["epoch"]
            second.start().wait_ready()
            second.wait_epoch(epoch)
            assert [second.stop(), founder.stop()] == [0, 0], second.tail()
    exported = tmp_path / "model"
    export(exported, home)
    torch.testing.assert_close(logits_of(exported), logits_of_home(home), rtol=0, atol=1e-5)
    assert (exported / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_joiner_needs_one_line_and_no_files(tmp_path: Path) -> None:
    """LoRA: the frozen base comes from the peer too, and an epoch sends adapters alone."""
    base = make_base(tmp_path / "base", "llama")
    home = init(tmp_path / "a", "--base", base, "--lora", 4, **FEW_STEPS)
    with Node(home) as founder:
        founder.wait_ready()
        with Node(tmp_path / "b", "--peer", founder.invitation(), data="stdlib:2/3") as second:
            second.wait_ready()
            _three_epochs_with_one_digest(founder, second)
            whole = sum(path.stat().st_size for path in base.glob("*.safetensors"))
            assert founder.status()["params"] * 4 < whole
            assert [second.stop(), founder.stop()] == [0, 0], second.tail()
    names = sorted(path.name for path in (home / "base").iterdir())
    for name in names:
        assert (second.home / "base" / name).read_bytes() == (home / "base" / name).read_bytes()
    merged = tmp_path / "merged"
    export(merged, second.home)
    torch.testing.assert_close(logits_of(merged), logits_of_home(second.home), rtol=1e-4, atol=1e-4)


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
