"""What a node that was away fetches, and how long it takes to be back.

    sudo .venv/bin/python -P scripts/bench/missed.py [--missed 1,10,50] [--preset tiny] [--link 100mbit]

Three real nodes, each in a network namespace with a link of its own, train; one is stopped, the others make
so many epochs, and it is started again. A line for each:

    missed     epochs that it lacked when it held the newest state again: some go by while it comes back
    updates    MB of state that it received for that, and by how much that is more than `missed` updates as
               they lie on the disk
    received   MB of everything that came in on its link meanwhile, by the kernel's counter
    at head    seconds from its endpoint's being up (imports and the model are behind it) to the newest state
    back       seconds from there to the first record that has its contribution

Needs Linux, root and iproute2.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parent.parent),
    str(Path(__file__).resolve().parent.parent.parent / "tests"),
]

from _chains import ChainRecord, chain_record  # noqa: E402
from _netns import Net, NetError, parse_link  # noqa: E402
from _nodes import network_bytes  # noqa: E402
from _run import work_folder  # noqa: E402
from e2e.harness import Node, init  # noqa: E402

DEADLINE_S = 600.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--missed", default="1,10,50", help="epochs, several with commas")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--inner-steps", default="4")
    parser.add_argument("--link", default="100mbit", help="what each node can send")
    options = parser.parse_args()
    try:
        with Net(3, parse_link(options.link)) as net, work_folder(None, "tapestry-missed-") as folder:
            _measure(options, net, folder)
    except NetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(options: argparse.Namespace, net: Net, folder: Path) -> None:
    nodes = [
        Node(folder / f"n{i}", data=f"stdlib:{i + 1}/3", prefix=net.prefix(i), address=net.address(i))
        for i in range(3)
    ]
    first, _, away = nodes
    init(first.home, "--preset", options.preset, is_open=True, inner_steps=options.inner_steps)
    try:
        first.start().wait_ready(DEADLINE_S)
        for node in nodes[1:]:
            node.home.mkdir()
            (node.home / "node.toml").write_text("threads = 1\n")
            node.start("--peer", first.address).wait_ready(DEADLINE_S)
        for node in nodes:
            _wait_contribution(node, 0)
        for count in map(int, options.missed.split(",")):
            _be_away(first, away, net, count)
    finally:
        for node in nodes:
            node.end()


def _be_away(first: Node, away: Node, net: Net, count: int) -> None:
    away.stop(60.0)
    left = len(_chain(away))
    first.wait_epoch(left + count, DEADLINE_S)
    link_before = net.received_bytes(2)
    away.start("--peer", first.address).wait_ready(DEADLINE_S)
    up_at = time.monotonic()
    away.wait("newest state", lambda: _at_head(away, first), DEADLINE_S)
    head_s = time.monotonic() - up_at
    received = network_bytes(away.get("/metrics"), "received")
    link, missed = net.received_bytes(2) - link_before, len(_chain(away)) - left
    _wait_contribution(away, left)
    update = statistics.mean(path.stat().st_size for path in first.home.glob("updates/*"))
    print(
        f"missed {missed} (away for {count}): updates {received['state'] / 1e6:.2f} MB, "
        f"{received['state'] / (missed * update):.3f} of {missed} x {update / 1e6:.3f} MB, "
        f"received {link / 1e6:.2f} MB, at head {head_s:.1f} s, "
        f"back {time.monotonic() - up_at - head_s:.1f} s",
        flush=True,
    )


def _at_head(node: Node, other: Node) -> bool:
    """It holds the state of the newest record that the other has."""
    there, here = other.status()["epoch"], node.status()
    return here["epoch"] >= there and here["phase"] not in ("joining", "syncing", "starting")


def _wait_contribution(node: Node, after: int) -> None:
    peer = node.json()["peer_id"]
    node.wait(
        f"contribution after epoch {after}",
        lambda: any(peer in record.contributors for record in _chain(node)[after:]),
        DEADLINE_S,
    )


def _chain(node: Node) -> list[ChainRecord]:
    return [chain_record(line) for line in (node.home / "chain.jsonl").read_bytes().split(b"\n")[:-1]]


if __name__ == "__main__":
    sys.exit(main())
