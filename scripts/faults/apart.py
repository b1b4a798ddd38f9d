"""Two of 4 nodes in network namespaces that cannot reach each other, for a minute."""

from __future__ import annotations

import random
import statistics
import time
from itertools import pairwise
from pathlib import Path

from _netns import Net, NetError

from faults.row import Row
from faults.swarm import STALL_S, Swarm

CUT_S = 60.0


def apart(folder: Path, repeat: int, rng: random.Random) -> list[Row]:
    """Two of four, as if a firewall had come between them, and gone."""
    lost = Row(
        "two of 4 out of each other's reach", "the slowest round: more than a normal one by", 2 * STALL_S
    )
    later = Row(
        "two of 4 out of each other's reach", "half a minute later: median, more than a normal one", 1.0
    )
    try:
        net = Net(4)
    except NetError as error:
        lost.missed.append(str(error))
        return [lost]
    with net:
        swarm = Swarm(folder, 4, net)
        try:
            for _ in range(repeat):
                _keep_apart(swarm, net, rng.sample(range(4), 2), lost, later)
        finally:
            swarm.close()
    return [lost, later]


def _keep_apart(swarm: Swarm, net: Net, pair: list[int], lost: Row, later: Row) -> None:
    normal_s, _, epoch = swarm.normal_rounds()
    began = time.monotonic()
    for a, b in (pair, pair[::-1]):
        net.cut(a, b)
    time.sleep(CUT_S)
    newest = swarm.tails[swarm.nodes[0]].epoch
    records = [r for e in range(epoch, newest + 1) if (r := swarm.first_commit(e, swarm.nodes)) is not None]
    for a, b in (pair, pair[::-1]):
        net.join(a, b)
    gaps = [(b.at - began, b.at - a.at) for a, b in pairwise(records)]
    lost.add(max(gap for _, gap in gaps) - normal_s)
    later.add(statistics.median(gap for at, gap in gaps if at > CUT_S / 2) - normal_s)
    late = [r for r in records if r.at - began > CUT_S / 2]
    shares = [sum(r.weights.get(swarm.ids[swarm.nodes[i]], 0) > 0 for r in late) / len(late) for i in pair]
    later.notes.append(f"normal={normal_s:.2f} s rounds={len(records)} the two contributed to {shares}")
    later.check(min(shares) > 0.5, f"one of the two contributed to {min(shares):.0%} of the records")
