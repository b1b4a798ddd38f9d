"""SIGKILL of two of 3 nodes at once, with either policy; then both are started again."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

from e2e.harness import Node

from faults.row import Row
from faults.swarm import QUORUM_LOSS_S, STALL_S, WAIT_S, Swarm, metric


def quorum(folder: Path, repeat: int, rng: random.Random) -> list[Row]:
    """Two of three at once."""
    says = Row("SIGKILL of two of 3", "the last one says degraded, and why", STALL_S + 5)
    alone = Row("SIGKILL of two of 3", "on_quorum_loss=continue: goes on alone", QUORUM_LOSS_S + STALL_S + 5)
    waits = Row("SIGKILL of two of 3", "on_quorum_loss=wait: stands still for as long as was looked", None)
    meet = {
        policy: Row("both started again", f"on_quorum_loss={policy}: one head for all, from exec", 30.0)
        for policy in ("continue", "wait")
    }
    folder.mkdir()
    for index in range(repeat):
        for policy in ("continue", "wait"):
            swarm = Swarm(folder / f"{policy}{index}", 3, on_quorum_loss=f'"{policy}"')
            try:
                _lose_quorum(swarm, policy, index, says, alone if policy == "continue" else waits)
                _come_back(swarm, index, meet[policy])
            finally:
                swarm.close()
    return [says, alone, waits, *meet.values()]


def _lose_quorum(swarm: Swarm, policy: str, index: int, says: Row, then: Row) -> None:
    last = swarm.nodes[index % 3]
    swarm.normal_rounds()
    for node in swarm.others(last):
        assert node.process is not None
        node.process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    for node in swarm.others(last):
        assert node.process is not None
        node.process.wait()
    last.wait("degraded", lambda: last.status()["phase"] == "degraded", WAIT_S)
    says.add(time.monotonic() - began)
    last.wait("a reason", lambda: "of the electorate alive" in last.status()["reason"], 10)
    says.notes.append(last.status()["reason"])
    epoch = swarm.tails[last].epoch
    if policy == "continue":
        record = swarm.wait_commit(epoch + 1, [last])
        then.add(record.at - began)
        then.check(record.forced, f"epoch {record.epoch} is not marked forced")
        forced = 'tapestry_rounds_total{outcome="forced"}'
        last.wait("a forced round counted", lambda: metric(last, forced) >= 1, 10)
        swarm.wait_commit(epoch + 3, [last])
    else:
        time.sleep(QUORUM_LOSS_S + 10)
        then.add(time.monotonic() - began)
        then.check(swarm.tails[last].epoch == epoch, "it went on without a quorum")
        then.check(last.status()["phase"] == "degraded", f"phase {last.status()['phase']}")


def _come_back(swarm: Swarm, index: int, row: Row) -> None:
    last = swarm.nodes[index % 3]
    others = swarm.others(last)
    epoch = swarm.tails[last].epoch
    began = time.monotonic()
    for node in others:
        node.start("--peer", last.address)

    ready_at: list[float] = []

    def met() -> bool:
        if not ready_at and all(n.json()["pid"] == n.pid for n in others):
            ready_at.append(time.monotonic())
        return all(_same_record(swarm, n, last, epoch + 1) for n in others) and swarm.one_head(swarm.nodes)

    last.wait("one head", met, WAIT_S)
    row.add(time.monotonic() - began)
    last.wait("contributions of all", lambda: swarm.contributors(last) == len(swarm.nodes), WAIT_S)
    started_s = ready_at[0] - began if ready_at else 0.0
    row.notes.append(
        f"started after {started_s:.2f} s, all contribute after {time.monotonic() - began:.2f} s"
    )


def _same_record(swarm: Swarm, a: Node, b: Node, epoch: int) -> bool:
    records = [swarm.tails[n].records.get(epoch) for n in (a, b)]
    return all(r is not None for r in records) and records[0].weights == records[1].weights  # type: ignore[union-attr]
