"""scripts/attack.py of strangers against real nodes: one attack here, all of them with `-m long`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "attack.py"


def attack(*arguments: str, prefix: tuple[str, ...] = (), timeout_s: float) -> str:
    done = subprocess.run(
        [*prefix, sys.executable, "-P", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.e2e
def test_a_thousand_idle_connections_do_not_end_a_node_with_1024_descriptors() -> None:
    """It ended with "Too many open files" while it wrote a vote. How slow rounds are is the long test's."""
    few = ("prlimit", "--nofile=1024:1024")
    quick = ("--members", "1", "--seconds", "2", "--repeat", "1", "--slower-max", "100")
    said = attack("http-idle", "--strength", "1000", *quick, prefix=few, timeout_s=90.0)
    assert "FAULT" not in said


@pytest.mark.long
def test_no_attack_of_a_stranger_slows_rounds_by_a_tenth() -> None:
    said = attack("strangers", timeout_s=3600.0)
    assert "FAULT" not in said


def test_every_attack_says_what_it_does() -> None:
    lines = attack("list", timeout_s=60.0).splitlines()
    assert len(lines) >= 10 and all(len(line.split(maxsplit=1)) == 2 for line in lines)
