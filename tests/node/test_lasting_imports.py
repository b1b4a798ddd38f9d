"""node/imports.py, each case in an interpreter of its own: what is imported stays imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_a_deferred_module_runs_when_it_is_first_asked_for_what_it_has(tmp_path: Path) -> None:
    package = tmp_path / "slow"
    package.mkdir()
    (package / "__init__.py").write_text("from slow import inner; print('ran'); answer = 42; mark = 'real'")
    (package / "part.py").write_text("share = 1")
    (package / "inner.py").write_text("print('inner'); depth = 2")
    program = f"""
import inspect, sys
sys.path.insert(0, {str(tmp_path)!r})
from tapestry.node.trainer import imports
imports.defer("slow", {{"mark": "stand-in"}}, parts=["part"])
import slow, slow.part
inspect.getmodule(run := lambda: None)  # looks through all modules
print(slow.mark, slow.part.share)
print(slow.answer, slow.mark, type(slow).__name__, sys.modules["slow"] is slow)
imports.run_deferred("slow")
try:
    slow.nothing
except AttributeError as error:
    print(error)
"""
    assert run(program).splitlines() == [
        "stand-in 1",
        "inner",
        "ran",
        "42 real module True",
        "module 'slow' has no attribute 'nothing'",
    ]


def test_a_deferred_package_runs_before_a_submodule_that_needs_it(tmp_path: Path) -> None:
    package = tmp_path / "slow"
    package.mkdir()
    (package / "__init__.py").write_text("print('package'); from slow import inner, other")
    (package / "inner.py").write_text("print('inner'); depth = 2")
    (package / "other.py").write_text("print('other')")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from tapestry.node.trainer import imports
imports.defer("slow")
from slow.inner import depth
import slow.other
print(depth, slow.inner is sys.modules["slow.inner"], slow.inner.__spec__.origin.endswith("inner.py"))
"""
    assert run(program).splitlines() == ["package", "inner", "other", "2 True True"]


def test_a_trainer_steps_without_the_compiler_and_compiles_all_the_same() -> None:
    program = """
import os, sys
from tapestry.node.trainer import imports
imports.spare_torch()
import torch
from transformers import LlamaConfig, LlamaForCausalLM

def heavy():
    names = ("sympy", "torch._dynamo.eval_frame", "torch.distributed.tensor._api", "scipy.optimize")
    return [n for n in (*names, "torch._decomp")
            if n in sys.modules]

config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters())
ids = torch.zeros(1, 4, dtype=torch.long)
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
print(heavy(), flush=True)

def compiles():
    assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2.0

def shards():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    assert not isinstance(ids, torch.distributed.tensor.DTensor)

def has_shapes():
    with imports.meta_device():
        ids = torch.zeros(1, 4, dtype=torch.long)
        assert LlamaForCausalLM(config)(input_ids=ids).logits.shape == (1, 4, 8)
    assert "torch._decomp" in heavy()

for use in compiles, shards, has_shapes:  # each the first to ask
    if not (pid := os.fork()):
        use()
        print(use.__name__, flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""
    assert run(program).splitlines() == ["[]", "compiles", "shards", "has_shapes"]
