"""What scripts/attack.py sees of real members on loopback: how long a round takes, what they refuse.

Members are the daemons of tests/e2e/harness.py, of preset `nano`, founded and invited as anybody does it.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from e2e.harness import Digests as Digests
from e2e.harness import Node, init
from e2e.harness import tapestry as tapestry

WINDOW_S = 60.0
_COMMITTED = re.compile(r"^(\S+ \S+) info node committed epoch=(\d+) ", re.M)


def founder_in(folder: Path, count: int, *, is_open: bool = False, **changes: str) -> Node:
    """The first member, not started yet; it has one of `count` parts of the text. `changes`: of run.toml.

    To a run that `is_open` the others come by the address, and are members after one contribution.
    """
    home = init(folder / "a", "--preset", "nano", is_open=is_open, **changes)
    return Node(home, data=f"stdlib:1/{count}")


def member_in(folder: Path, index: int, count: int, line: str) -> Node:
    """Another, which comes by `line`, an invitation or an address; each has its own of `count` parts."""
    home = folder / "abcdefgh"[index]
    home.mkdir(mode=0o700)
    (home / "node.toml").write_text("threads = 1\n")
    return Node(home, "--peer", line, data=f"stdlib:{index + 1}/{count}")


def commits(node: Node) -> dict[int, float]:
    """Epoch -> when this node committed it, in seconds: what its log says."""
    found = _COMMITTED.findall(node.log.read_text(errors="replace"))
    return {int(epoch): datetime.fromisoformat(at).timestamp() for at, epoch in found}


def rounds_s(node: Node, since: float, until: float = math.inf) -> list[float]:
    """How long each round took that ended between these two moments (Unix time), in seconds."""
    times = sorted(at for at in commits(node).values() if since <= at <= until)
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def slower(quiet: Sequence[float], attacked: Sequence[float]) -> float:
    """By what share of its length the median round is longer; negative: shorter. NaN without rounds."""
    if not quiet or not attacked:
        return float("nan")
    return statistics.median(attacked) / statistics.median(quiet) - 1.0


def refusals(nodes: Sequence[Node]) -> dict[str, int]:
    """Reason -> how often these nodes refused something for it, all together."""
    counts: dict[str, int] = {}
    for node in nodes:
        for line in node.get("/metrics").splitlines():
            if line.startswith("tapestry_refused_total{"):
                reason, count = line.split('"')[1], int(float(line.rsplit(" ", 1)[1]))
                counts[reason] = counts.get(reason, 0) + count
    return {reason: count for reason, count in counts.items() if count}


def in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items()) or "nothing"


def ended_or_broken(nodes: Sequence[Node]) -> list[str]:
    """What no node may do, whatever is done to it."""
    faults = []
    for node in nodes:
        if node.process is None or node.process.poll() is not None:
            faults.append(f"{node.home.name} ended")
        if "Traceback" in node.log.read_text(errors="replace"):
            faults.append(f"{node.home.name} has a traceback in its log")
    return faults


def window(node: Node, seconds: float) -> tuple[float, float]:
    """Wait so long, and on a busy machine until there was a round, at most WINDOW_S: from when to when."""
    began = time.time()
    time.sleep(seconds)
    while not rounds_s(node, began) and time.time() - began < WINDOW_S:
        time.sleep(0.2)
    return began, time.time()
