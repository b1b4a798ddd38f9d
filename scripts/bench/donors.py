"""What members that train pay while a newcomer fetches the state from them.

    .venv/bin/python -P scripts/bench/donors.py [--preset small] [--joins 3] [--cap 40mbit]

Three real nodes on loopback train; then, --joins times, a newcomer with an empty home comes, and is killed
when it has the state. Compared are the tokens that the three train on, per second, while they give the state,
with as long a time after. On a machine with few cores the newcomer takes what the trainers had: it is started
with nice 19 and fetches at --cap, and the processor time of everyone is told, so that what giving costs can
be told apart from that:

    ratio       tokens per second while the state is given, by those after; of all three together
    donors      processor seconds of the three nodes and their p2pd for each GB of the state, over what they
                take in as long a time after
    newcomer    of a core, while it fetches: what is missing in `ratio` beside the donors' part

Medians of the joins. A step of the trainer should be short beside a fetch.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests"))

from e2e.harness import Node, init

DEADLINE_S = 600.0
NICE = ("nice", "-n", "19")


@dataclass(frozen=True, slots=True)
class Look:
    """At the three, at one moment."""

    at_s: float
    tokens: float
    given_bytes: float
    giving_cpu_s: float  # nodes and p2pd, without trainers

    @classmethod
    def at(cls, nodes: Sequence[Node]) -> Look:
        texts = [node.get("/metrics") for node in nodes]
        return cls(
            time.monotonic(),
            sum(_figure(text, r"tapestry_train_tokens_total") for text in texts),
            sum(
                _figure(text, r'tapestry_network_bytes_total\{direction="sent",kind="state"\}')
                for text in texts
            ),
            sum(map(_giving_cpu_s, nodes)),
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small")
    parser.add_argument("--joins", type=int, default=3)
    parser.add_argument("--cap", default="40mbit", help="of what the newcomer receives")
    parser.add_argument("--inner-steps", default="1000", help="long rounds: what rounds cost is not asked")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tapestry-donors-") as folder:
        _measure(options, Path(folder))
    return 0


def _measure(options: argparse.Namespace, folder: Path) -> None:
    changes = {"inner_steps": options.inner_steps, "batch_size": "1", "sequence_length": "64"}
    home = init(folder / "first", "--preset", options.preset, is_open=True, **changes)
    with Node(home) as first:
        first.wait_ready(DEADLINE_S)
        others = [
            Node(folder / f"other{n}", "--peer", first.address, data=f"stdlib:{n + 2}/3") for n in range(2)
        ]
        with others[0], others[1]:
            nodes = [first, *others]
            for node in nodes:
                node.wait("training", lambda node=node: _tokens(node) > 0, DEADLINE_S)
            found = [_join(nodes, options, folder / "newcomer") for _ in range(options.joins)]
    for ratio, per_gb, newcomer, seconds, megabytes in found:
        print(
            f"ratio {ratio:.3f}, donors {per_gb:.1f} s a GB, newcomer {newcomer:.2f} of a core, "
            f"{megabytes:.0f} MB in {seconds:.1f} s"
        )
    ratio, per_gb, newcomer = (statistics.median(one[n] for one in found) for n in range(3))
    print(f"median: ratio {ratio:.3f}, donors {per_gb:.1f} s a GB, newcomer {newcomer:.2f} of a core")


def _join(nodes: Sequence[Node], options: argparse.Namespace, home: Path) -> tuple[float, ...]:
    """Ratio, the donors' seconds a GB, the newcomer's share of a core, seconds, MB."""
    shutil.rmtree(home, ignore_errors=True)
    flags = ("--peer", nodes[0].address, "--max-download", options.cap)
    before = Look.at(nodes)
    newcomer = Node(home, *flags)
    newcomer.program, newcomer.forked = (*NICE, *newcomer.program), False
    try:
        with newcomer:
            begin = _until(nodes, lambda look: look.given_bytes > before.given_bytes + (1 << 20))
            cpu_s = _cpu_s(newcomer)
            newcomer.wait("state", lambda: "state=fetched" in newcomer.log.read_text(), DEADLINE_S)
            end, used_s = Look.at(nodes), _cpu_s(newcomer) - cpu_s
            newcomer.kill()
    finally:
        newcomer.log.unlink(missing_ok=True)
    seconds = end.at_s - begin.at_s
    time.sleep(2.0)  # the links notice that it is gone
    quiet = Look.at(nodes)
    time.sleep(seconds)
    after = Look.at(nodes)
    rate = (after.tokens - quiet.tokens) / (after.at_s - quiet.at_s)
    idle = (after.giving_cpu_s - quiet.giving_cpu_s) / (after.at_s - quiet.at_s)
    given = end.given_bytes - begin.given_bytes
    extra_s = end.giving_cpu_s - begin.giving_cpu_s - idle * seconds
    ratio = (end.tokens - begin.tokens) / seconds / rate
    return ratio, extra_s / given * 1e9, used_s / seconds, seconds, given / 1e6


def _until(nodes: Sequence[Node], holds: Callable[[Look], bool]) -> Look:
    deadline_s = time.monotonic() + DEADLINE_S
    while not holds(look := Look.at(nodes)):
        if time.monotonic() > deadline_s:
            raise SystemExit("the newcomer was given no state")
        time.sleep(0.1)
    return look


def _tokens(node: Node) -> float:
    return _figure(node.get("/metrics"), "tapestry_train_tokens_total")


def _figure(text: str, pattern: str) -> float:
    found = re.search(rf"^{pattern} (\S+)", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _giving_cpu_s(node: Node) -> float:
    p2pd = node.p2pd()
    return sum(_times_s(one) for one in (psutil.Process(node.pid), p2pd) if one is not None)


def _cpu_s(node: Node) -> float:
    return sum(_times_s(one) for one in (psutil.Process(node.pid), *node.children()))


def _times_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    sys.exit(main())
