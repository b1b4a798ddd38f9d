"""node/imports.py, each case in an interpreter of its own: what is imported stays imported."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def test_what_lasts_is_never_collected_again() -> None:
    program = """
import gc
from tapestry.node.trainer import imports
before = gc.get_freeze_count()
try:
    with imports.lasting():
        assert not gc.isenabled()
        raise KeyError
except KeyError:
    print(gc.isenabled(), gc.get_freeze_count() > before, len(gc.get_objects()) < gc.get_freeze_count())
gc.disable()
with imports.lasting():
    pass
print(gc.isenabled())
"""
    assert run(program) == "True True True\nFalse"


def test_a_package_that_we_do_without_is_not_there() -> None:
    program = """
import importlib.util, sys
from tapestry.node.trainer import imports
imports.do_without("scipy")
print(importlib.util.find_spec("scipy"))
try:
    import scipy
except ImportError:
    print("refused")
import wave
imports.do_without("wave")
print(sys.modules["wave"] is wave)
"""
    assert run(program) == "None\nrefused\nTrue"


def test_submodules_come_without_the_package() -> None:
    program = """
import sys
from tapestry.node.trainer import imports
imports.submodules_only("hivemind")
imports.submodules_only("hivemind")
import tapestry.dht.swarm
names = "hivemind.dht.node", "hivemind.p2p", "hivemind.optim", "hivemind.averaging", "scipy"
print(*[name for name in names if name in sys.modules])
"""
    assert run(program) == "hivemind.dht.node hivemind.p2p"


def test_a_package_that_is_there_already_stays_whole() -> None:
    program = """
import json
from tapestry.node.trainer import imports
imports.submodules_only("json")
import json
print(json.dumps(1))
"""
    assert run(program) == "1"


def test_a_package_that_is_nowhere_is_named() -> None:
    from tapestry.node.trainer import imports

    with pytest.raises(ModuleNotFoundError, match="'no_such_package'"):
        imports.submodules_only("no_such_package")
