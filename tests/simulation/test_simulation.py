"""The protocol under faults: every seed is a world of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from simulation.plants import PLANTS, planted
from simulation.world import Faults, Violation, World

SEEDS = 40  # scripts/test runs those from here to 160 beside it
SIMULATE = Path(__file__).resolve().parent.parent.parent / "scripts" / "simulate.py"


def simulate(*flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(SIMULATE), *flags]
    environment = os.environ | env
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_healthy_swarm_commits_every_round_with_everyone():
    world = World(1, peers=5, faults=Faults()).run()
    assert world.outcomes.get("aborted", 0) == 0
    assert world.outcomes["committed"] > 5 * world.outcomes.get("missed", 0)


def test_safety_and_liveness_hold_for_every_seed():
    for seed in range(SEEDS):
        World(seed).run()


@pytest.mark.parametrize("peers", [24])
def test_a_swarm_may_be_large(peers):
    assert World(4, peers=peers, epochs=1).run().furthest >= 1


def test_the_same_seed_is_the_same_trace_whatever_the_hash_seed():
    traces = []
    for hash_seed in ("1", "4711"):
        done = simulate("--seeds", "9:12", "--trace", PYTHONHASHSEED=hash_seed)
        traces.append(done.stdout.split())
    assert traces[0] == traces[1] and len(set(traces[0])) == 3


@pytest.mark.long
def test_a_compiled_world_is_the_same_world():
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to compile the simulator with")
    traces = []
    for flags in ([], ["--compiled"]):
        done = simulate("--seeds", "40:52", "--trace", *flags)
        assert done.returncode == 0, done.stderr
        traces.append(done.stdout.split())
    assert traces[0] == traces[1] and len(set(traces[0])) == 12


# --- it can fail ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_caught(name):
    with planted(name), pytest.raises(Violation) as caught:
        World(PLANTS[name].caught_by).run()
    assert "raised" not in str(caught.value)  # by an invariant, not by accident
    World(PLANTS[name].caught_by).run()  # and it is the bug that is caught


def test_there_are_fifteen_planted_bugs_each_within_2000_seeds():
    assert len(PLANTS) >= 15
    assert all(plant.caught_by < 2000 for plant in PLANTS.values())


# --- the script -------------------------------------------------------------------------------------


def test_the_script_counts_and_exits_0():
    done = simulate("--seeds", "0:3", "--peers", "3", "--json")
    tally = json.loads(done.stdout)
    assert done.returncode == 0
    assert list(tally) == ["seeds", "violations", "epochs", "seeds_per_s", "first_failing_seed"]
    assert tally["seeds"] == 3 and tally["violations"] == 0 and tally["epochs"] > 3
    assert tally["first_failing_seed"] is None


def test_the_script_tells_the_story_of_a_failing_seed_and_exits_1():
    seed = PLANTS["accepted_value_ignored"].caught_by
    done = simulate("--seeds", f"{seed - 3}:2000", "--plant", "accepted_value_ignored")
    assert done.returncode == 1 and f"first_failing_seed={seed}" in done.stdout
    for word in ("READY", "COMMIT", "BROKEN: seed", "consensus: two decisions"):
        assert word in done.stdout
    failed = json.loads(
        simulate("--seeds", f"{seed}:{seed + 1}", "--plant", "accepted_value_ignored", "--json").stdout
    )
    assert failed["violations"] == 1 and failed["first_failing_seed"] == seed


def test_the_script_lists_its_plants_and_refuses_what_it_does_not_know():
    listed = simulate("--plant", "list").stdout
    assert all(name in listed for name in PLANTS)
    for flags in (["--seeds", "5"], ["--seeds", "5:5"], ["--peers", "65"], ["--plant", "none"]):
        assert simulate(*flags).returncode == 2
