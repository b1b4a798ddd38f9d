"""Half a minute of real faults on real daemons; what is checked at the end is in scripts/chaos.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.harness import environment

pytestmark = [pytest.mark.e2e, pytest.mark.long]
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "chaos.py"


def test_four_nodes_survive_half_a_minute_of_faults_with_one_state(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-P", SCRIPT, "--nodes", "4", "--minutes", "0.5", "--seed", "3", "--json", figures],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-2000:]}"
    assert json.loads(figures.read_text())["epochs"] > 3
