"""SIGSTOP of one of 4 nodes while it exchanges shards; then SIGCONT."""

from __future__ import annotations

import random
import signal
import time
from itertools import pairwise
from pathlib import Path

from faults.row import Row
from faults.swarm import STALL_S, Swarm


def freeze(folder: Path, repeat: int, rng: random.Random) -> list[Row]:
    """SIGSTOP in the middle of a round; SIGCONT."""
    first = Row("SIGSTOP of one of 4", "the round commits: more than a normal round by", STALL_S + 2)
    later = Row("SIGSTOP of one of 4", "later rounds without it: slowest, more than a normal one by", 2.0)
    back = Row("SIGCONT", "contributes again by itself, from SIGCONT to the record that counts it", 10.0)
    swarm = Swarm(folder, 4)
    try:
        for index in range(repeat):
            victim = swarm.nodes[index % 4]
            survivors = swarm.others(victim)
            normal_s, _, _ = swarm.normal_rounds()
            epoch, led = swarm.catch_exchanging(victim)
            process = victim.process
            assert process is not None
            process.send_signal(signal.SIGSTOP)
            commits = [swarm.wait_commit(epoch + k, survivors) for k in range(8)]
            gaps = [b.at - a.at for a, b in pairwise(commits)]
            # The round that it is in may be decided already; then the next one pays.
            slow = 0 if gaps[0] >= gaps[1] else 1
            first.add(gaps[slow] - normal_s)
            first.notes.append(f"normal={normal_s:.2f} s led={led} rounds={[round(g, 2) for g in gaps]}")
            later.add(max(gaps[slow + 1 :]) - normal_s)
            newest = commits[-1].epoch
            began = time.monotonic()
            process.send_signal(signal.SIGCONT)
            back.add(swarm.wait_contribution(victim, newest, survivors).at - began)
    finally:
        swarm.close()
    return [first, later, back]
