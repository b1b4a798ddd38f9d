"""Sovereign Build from end to end on real daemons; what is checked is in scripts/sovereign_story.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from e2e.harness import environment

pytestmark = [pytest.mark.e2e, pytest.mark.long]
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sovereign_story.py"


def test_a_model_of_ones_own_follows_the_base_and_all_of_it_is_verified_offline(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", SCRIPT, "--keep", tmp_path / "story"],
        capture_output=True,
        text=True,
        timeout=1800,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-2000:]}"
    assert done.stdout.count("it holds") == 5, "three homes, the exit and the export of the base"
    assert "verify base: it holds, tensors proven" in done.stdout
    assert "verify model: no file is damaged, but tensors NOT proven: what a derivative says" in done.stdout
    assert (tmp_path / "story" / "out" / "derivatives" / "ours" / "derivative.json").exists()
