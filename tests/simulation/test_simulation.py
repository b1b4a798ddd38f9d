"""The protocol under faults: every seed is a world of its own."""

from simulation.world import Faults, World

SEEDS = 500


def test_healthy_swarm_commits_every_round_with_everyone():
    world = World(1, peers=5, faults=Faults(), fault_s=20.0).run()
    assert world.outcomes.get("aborted", 0) == 0
    assert world.outcomes["committed"] > 5 * world.outcomes.get("missed", 0)


def test_safety_and_liveness_hold_for_every_seed():
    for seed in range(SEEDS):
        World(seed).run()
