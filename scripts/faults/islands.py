"""5 nodes in network namespaces, cut into 2 and 3 for a while, and joined again."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

from _netns import Net, NetError
from e2e.harness import Node, tapestry

from faults.row import Row
from faults.swarm import WAIT_S, Swarm, metric

CUT_S = 60.0
PARTED_S = 300.0  # links are given up after 120 s without a sign of the peer, presence expires after 60 s


def islands(folder: Path, repeat: int, rng: random.Random) -> list[Row]:
    return _islands(folder, repeat, rng, "islands of 2 and 3 for a minute", CUT_S, 30.0)


def parted(folder: Path, repeat: int, rng: random.Random) -> list[Row]:
    return _islands(folder, repeat, rng, "islands of 2 and 3 for five minutes", PARTED_S, 60.0)


def _islands(
    folder: Path, repeat: int, rng: random.Random, fault: str, cut_s: float, limit_s: float
) -> list[Row]:
    """Two and three, apart for so long."""
    meet = Row(fault, "one head for all, from the join", limit_s)
    says = Row(fault, "what was dropped is in log, metrics and status", None)
    try:
        net = Net(5)
    except NetError as error:
        meet.missed.append(str(error))
        return [meet]
    with net:
        swarm = Swarm(folder, 5, net)
        try:
            for _ in range(repeat):
                _part_and_meet(swarm, net, cut_s, meet, says, rng)
        finally:
            swarm.close()
    return [meet, says]


def _part_and_meet(swarm: Swarm, net: Net, cut_s: float, meet: Row, says: Row, rng: random.Random) -> None:
    swarm.normal_rounds()
    few = sorted(rng.sample(range(5), 2))
    many = [i for i in range(5) if i not in few]
    pairs = [pair for a in few for b in many for pair in ((a, b), (b, a))]
    begun = max(tail.epoch for tail in swarm.tails.values())
    dropped = {i: metric(swarm.nodes[i], "tapestry_dropped_records_total") for i in range(5)}
    marks = {i: swarm.nodes[i].log.stat().st_size for i in range(5)}
    for a, b in pairs:
        net.cut(a, b)
    time.sleep(cut_s)
    alone = swarm.tails[swarm.nodes[few[0]]].epoch
    ahead = swarm.tails[swarm.nodes[many[0]]].epoch
    for a, b in pairs:
        net.join(a, b)
    began = time.monotonic()
    goal = max(alone, ahead) + 1

    def met() -> bool:
        return all(tail.epoch >= goal for tail in swarm.tails.values()) and swarm.one_head(swarm.nodes)

    swarm.nodes[0].wait("one head", met, WAIT_S)
    meet.add(time.monotonic() - began)
    meet.notes.append(f"few={few} epochs: cut at {begun}, 2 reached {alone}, 3 reached {ahead}")
    for i in few if alone > begun + 1 else []:
        _check_told(swarm.nodes[i], dropped[i], marks[i], says)


def _check_told(node: Node, before: float, mark: int, row: Row) -> None:
    """Of a node that went on alone: its log, its metrics and `tapestry status` say what it gave up."""
    with node.log.open("rb") as log:
        log.seek(mark)
        text = log.read().decode(errors="replace")
    lost = re.search(r"fork=left common_epoch=\d+ dropped_records=(\d+) dropped_tokens=(\d+)", text)
    count = metric(node, "tapestry_dropped_records_total") - before
    row.check(lost is not None, f"{node.home.name}: nothing in the log")
    row.check(count > 0 and lost is not None, f"{node.home.name}: the metric shows {count:g} dropped records")
    kept = tapestry("log", "--branches", "--home", node.home).stdout
    row.check("it lost: " in kept, f"{node.home.name}: `tapestry log --branches` does not list it")
    with node.network():
        shown = tapestry("status", "--home", node.home).stdout
    field = re.search(r"^dropped +(\d+)$", shown, re.MULTILINE)
    row.check(
        field is not None and int(field[1]) > 0, f"{node.home.name}: `tapestry status` does not show it"
    )
    row.notes.append(f"{node.home.name}: {lost[0] if lost else 'nothing'}; metric +{count:g}")
