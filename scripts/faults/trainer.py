"""SIGKILL of a trainer, and a trainer that runs out of memory."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from e2e.harness import Node

from faults.row import Row
from faults.swarm import WAIT_S, Swarm, metric
from faults.tail import POLL_S


def trainer(folder: Path, repeat: int, rng: random.Random) -> list[Row]:
    """A trainer that is killed, and one that may allocate no more."""
    killed = Row("SIGKILL of a trainer", "contributes again, from the kill", None)
    memory = Row("trainer out of memory", "contributes again, from its death", None)
    swarm = Swarm(folder, 4)
    try:
        for index in range(repeat):
            for row, harm in ((killed, _kill_trainer), (memory, _starve_trainer)):
                swarm.normal_rounds()
                _lose_trainer(swarm, swarm.nodes[index % 4], row, harm)
    finally:
        swarm.close()
    return [killed, memory]


def _lose_trainer(swarm: Swarm, victim: Node, row: Row, harm: Callable[[Node], None]) -> None:
    restarts = metric(victim, "tapestry_trainer_restarts_total")
    harm(victim)
    victim.wait("a dead trainer", lambda: metric(victim, "tapestry_trainer_up") == 0, WAIT_S)
    began, newest = time.monotonic(), swarm.tails[victim].epoch
    said = ""
    while metric(victim, "tapestry_trainer_up") == 0:
        said = said or _not_ready(victim)
        time.sleep(POLL_S)
    up_at = time.monotonic()
    # One round may have been under way with what it had contributed whole before it died.
    false = [
        r.epoch
        for r in swarm.tails[victim].records.values()
        if newest + 1 < r.epoch and r.at < up_at and r.weights.get(swarm.ids[victim])
    ]
    row.check(not false, f"epochs {false} count a contribution of a node without a trainer")
    row.check("not contributing" in said, f"/readyz said {said!r}")
    row.check(metric(victim, "tapestry_trainer_restarts_total") == restarts + 1, "restarts were not counted")
    row.add(swarm.wait_contribution(victim, newest + 1, swarm.nodes).at - began)
    row.notes.append(f"trainer up after {up_at - began:.2f} s; /readyz: {said[:120]}")


def _not_ready(node: Node) -> str:
    try:
        node.get("/readyz")
    except OSError as error:  # urllib's HTTPError is one
        body = getattr(error, "read", lambda: b"")()
        return str(body.decode())
    return ""


def _trainer_of(node: Node) -> psutil.Process:
    process = node.trainer()
    assert process is not None, f"{node.home.name} has no trainer"
    return process


def _kill_trainer(node: Node) -> None:
    _trainer_of(node).kill()


def _starve_trainer(node: Node) -> None:
    """No more memory than it has: the next allocation fails."""
    process = _trainer_of(node)
    size = process.memory_info().vms
    resource.prlimit(process.pid, resource.RLIMIT_AS, (size // 2, size // 2))
