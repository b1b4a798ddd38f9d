"""The targets of scripts/fuzz.py: each takes its inputs, and refuses what is near them as it should."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fuzz.py"
MUTATIONS = 1500


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    return module


TARGETS = loaded().targets()


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(changed):
            changed[at] = rng.choice([0, 1, 0x7F, 0x80, 0xC0, 0xC1, 0xFF, rng.randrange(256)])
        elif kind == 1:
            del changed[at : at + rng.randint(1, 8)]
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.randint(1, 4))
        else:
            begin = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[begin : begin + rng.randint(1, 64)]
    return bytes(changed)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_near_a_good_input_is_taken_or_refused(name: str) -> None:
    target, rng = TARGETS[name], random.Random(name)
    for data in target.inputs:
        for number in range(MUTATIONS):
            case = mutated(data, rng) if number else data
            try:
                target.run(case)
            except target.refuses:
                assert number or name in ("record", "stop", "relay"), "its own input is refused"
