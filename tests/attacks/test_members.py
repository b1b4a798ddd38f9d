"""scripts/attack.py of members that lie: what it judges here, and real nodes with `-m long`."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "scripts"))  # where the liars are

from liars.registry import MODULES, load, what
from liars.seen import Seen, loss_fault, proof_fault, refused_fault

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"
LIE = """
import sys
sys.path.insert(0, sys.argv[1])
from liars.registry import MODULES, load
for name in MODULES:
    load(name).lie()
"""


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.parametrize("name", ["lying-reducer", "two-votes", "not-finite"])
def test_real_members_bear_one_that_lies(name: str) -> None:
    command = ["--members", "3", "--seconds", "5", "--no-alone"]
    done = subprocess.run(
        [sys.executable, "-P", SCRIPTS / "attack.py", name, *command],
        capture_output=True,
        text=True,
        timeout=900.0,
        check=False,
    )
    assert done.returncode == 0 and "FAULT" not in done.stdout, done.stdout + done.stderr
    assert "honest members at one head and digest: yes" in done.stdout


def test_every_liar_has_a_line_of_the_registry_and_a_promise() -> None:
    parts = {"__init__", "registry", "seen", "lying"}
    files = {path.stem for path in (SCRIPTS / "liars").glob("*.py")} - parts
    assert files == set(MODULES.values())
    for name in MODULES:
        assert what(name) and "\nPromise: " in load(name).__doc__, name


def test_what_every_liar_changes_is_there_to_be_changed() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", LIE, SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def seen() -> Seen:
    return Seen("x", "liar", honest=2, accusers=2, accused={"liar": "signed two values: round 3"})


def test_a_promise_of_proof_is_broken_where_one_member_lacks_it_or_the_liar_stays() -> None:
    good = seen()
    good.removed = {"liar": "proven to have signed two values"}
    assert proof_fault(good, "signed two values") == []
    assert proof_fault(good, "signed a wrong mean") == ["it was not accused: signed a wrong mean"]
    assert proof_fault(seen(), "signed two values") == ["it was not removed"]
    good.accusers = 1
    assert proof_fault(good, "signed two values") == ["1 of 2 honest members have the proof"]


def test_a_promise_of_refusal_or_loss_is_broken_by_the_figures() -> None:
    one = seen()
    assert refused_fault(one, "scale", "code") == ["nothing was refused as scale or code"]
    one.refused = {"code": 1}
    assert refused_fault(one, "scale", "code") == [] and math.isnan(one.worse) and loss_fault(one) == []
    one.loss, one.loss_without = 3.4, 3.0
    assert loss_fault(one) == ["the loss is 13% above that of the run without it, at most 10% is promised"]
