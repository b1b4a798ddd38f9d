"""The examples, with real nodes: two members of one digest, a restart, an exception, a Trainer."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from e2e.harness import LOOPBACK, TAPESTRY, environment, tapestry

from tapestry.node.home import Home

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DEADLINE_S = 180.0  # on two cores that other tests use as well

RAISES = """
import sys
import torch
from tapestry.node import Swarm

module = torch.nn.Linear(64, 10)
optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
flags = ["--listen=/ip4/127.0.0.1/tcp/0"]
with Swarm(module, optimizer, home=sys.argv[1], inner_steps=2, flags=flags) as swarm:
    while True:
        module(torch.ones(1, 64)).sum().backward()
        optimizer.step()
        if swarm.step() and swarm.epoch >= 2:
            raise KeyError("the loop broke")
"""


def start(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed; it must have done well, and left nothing behind."""
    try:
        out, errors = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    return out


def nodes_of(home: Path) -> list[psutil.Process]:
    return [
        one for one in psutil.process_iter(["cmdline"]) if f"--home={home}" in (one.info["cmdline"] or [])
    ]


def wait_until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_two_scripts_train_one_module_and_go_on_where_they_were(tmp_path: Path) -> None:
    homes = tmp_path / "a", tmp_path / "b"
    first = start(EXAMPLES / "digits.py", "--home", homes[0], "--part", "1/2")
    assert first.stdout is not None
    said_first = (re.search("--peer (.*)", line) for line in first.stdout)
    line = next(filter(None, said_first))
    second = start(EXAMPLES / "digits.py", "--home", homes[1], "--part", "2/2", "--peer", line[1])
    said = [finish(one) for one in (first, second)]
    digests = [re.findall("digest ([0-9a-f]{64})", out) for out in said]
    assert digests[0] == digests[1] and len(digests[0]) == 1, said
    assert all(out.count("epoch 3") == 1 for out in said)
    assert not any(map(nodes_of, homes)), "the nodes end with their scripts"
    assert (homes[0] / "trainer" / "inner.safetensors").exists(), "the optimizer's state is kept"

    again = start(EXAMPLES / "digits.py", "--home", homes[0], "--part", "1/2", "--epochs", 3)
    out = finish(again)
    assert re.findall("digest ([0-9a-f]{64})", out) == digests[0], (
        "the module of a restarted script has the base"
    )

    other = start("-c", RAISES.replace("64", "63"), homes[0])
    _, errors = other.communicate(timeout=DEADLINE_S)
    assert "the module is not the run's: weight 10x63 here, 0.weight 64x64 in the run" in errors
    refused = tapestry("start", "--home", homes[0], "--data", "stdlib:1/3", "--http", "127.0.0.1:0")
    assert "this run trains a module that each member's script brings" in refused.stderr


def test_an_exception_in_the_loop_leaves_the_swarm_in_good_order(tmp_path: Path) -> None:
    script = start("-c", RAISES, tmp_path / "a")
    _, errors = script.communicate(timeout=DEADLINE_S)
    assert script.returncode == 1 and "KeyError: 'the loop broke'" in errors
    assert not nodes_of(tmp_path / "a")
    log = (tmp_path / "a" / "node.log").read_text()
    assert "stopping" in log and "Traceback" not in log
    assert not (tmp_path / "a" / "node.json").exists()


def test_the_node_of_a_script_that_is_killed_while_it_joins_ends_in_good_order(tmp_path: Path) -> None:
    home = tmp_path / "a"
    script = start("-c", RAISES, home)
    wait_until(lambda: nodes_of(home))
    script.kill()
    script.communicate()
    wait_until(lambda: not nodes_of(home))
    log = (home / "node.log").read_text()
    assert "the script that started this node has left" in log and "ended exit_code=0" in log
    assert "Traceback" not in log + (home / "node.out").read_text()


def test_two_members_average_gradients(tmp_path: Path) -> None:
    digests = re.findall("epoch 5, digest ([0-9a-f]{16})", finish(start(EXAMPLES / "two_on_one_machine.py")))
    assert len(digests) == 2 and len(set(digests)) == 1


def test_scripts_come_and_go_and_the_node_stays(tmp_path: Path) -> None:
    """`start --external`: a node of its own, which each script finds by its home."""
    home, out = tmp_path / "a", tmp_path / "node.out"
    train = (EXAMPLES / "digits.py", "--home", home, "--members", 1)
    finish(start(*train, "--epochs", 1))  # founds the run, and takes its own node along
    with out.open("wb") as said:
        node = subprocess.Popen(
            [*TAPESTRY, "start", "--home", str(home), "--external", *LOOPBACK],
            stdout=said,
            stderr=said,
            env=environment(),
        )
    try:
        wait_until(lambda: Home(home).trainer_socket.exists())
        for before, epochs in ((1, 2), (2, 4)):
            said_by = finish(start(*train, "--epochs", epochs))
            seen = [int(epoch) for epoch in re.findall("^epoch ([0-9]+)", said_by, re.MULTILINE)]
            assert seen[-1] == epochs and min(seen) >= before, "it goes on from the node's state"
            assert node.poll() is None, out.read_text()
            wait_until(lambda: "no script trains here" in out.read_text())
            status = json.loads(tapestry("status", "--home", home, "--json").stdout)
            assert status["epoch"] >= epochs and status["phase"] != "stopped"
            assert status["state_digest"] in said_by, "the node holds what the script trained"
        assert tapestry("stop", "--home", home).returncode == 0
        assert node.wait(DEADLINE_S) == 0, out.read_text()
    finally:
        node.kill()
        node.wait()
    assert "Traceback" not in out.read_text()


@pytest.mark.long
def test_the_other_examples_run(tmp_path: Path) -> None:
    assert "epoch 2 after" in finish(start(EXAMPLES / "hf_trainer.py", tmp_path / "t"))
    assert "epoch 2 after" in finish(start(EXAMPLES / "lightning_trainer.py", tmp_path / "l"))
    out = finish(start(EXAMPLES / "notebook.py", tmp_path / "n", tmp_path / "loss.png"))
    assert "the node ended with exit code 0" in out
    assert (tmp_path / "loss.png").stat().st_size > 5000


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed: extra sovereign")
def test_trls_trainer_is_a_member(tmp_path: Path) -> None:
    out = finish(start(EXAMPLES / "trl_trainer.py", tmp_path / "a"))
    assert "epoch 2 after 10 steps" in out, "two rounds of five of its steps"
    records = tapestry("log", "--home", tmp_path / "a", "--json").stdout.splitlines()
    assert len(records) == 2
