"""Whether the egress ledger, the metrics and a counter of the kernel agree on what has left a node.

    sudo .venv/bin/python -P scripts/bench/egress.py [--preset small] [--epochs 6]

Three real nodes, each in a network namespace of its own, train; a joiner fetches the state meanwhile. Then
they stop, and of each a line says, in MB:

    ledger     the lines of HOME/egress.jsonl, added up
    metric     tapestry_network_bytes_total, sent, as it was just before the stop
    link       bytes that left the interface, with the headers of TCP and IP and all that libp2p adds: its
               encryption, its own talk, the DHT, and acknowledgements of what came in
    acks       of these, what went out on behalf of what came in: packets without any bytes of TCP

`link` is compared without the acknowledgements; the goal is 3 %. Needs Linux, root, iproute2 and nftables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parent.parent),
    str(Path(__file__).resolve().parent.parent.parent / "tests"),
]

from _netns import Net, NetError  # noqa: E402
from _nodes import network_bytes  # noqa: E402
from _run import work_folder  # noqa: E402
from e2e.harness import Node, init  # noqa: E402

from tapestry.node.home import Home  # noqa: E402
from tapestry.node.lineage.egress import Totals, read_egress  # noqa: E402

DEADLINE_S = 900.0
# What leaves eth0, and of that the packets of TCP that carry nothing: 20 bytes of IP and 32 of TCP, or 40 and
# more where a selective acknowledgement tells of gaps.
COUNTERS = """
table inet egress {
    counter sent { }
    counter acks { }
    chain out {
        type filter hook output priority 0;
        oifname "eth0" counter name "sent"
        oifname "eth0" meta l4proto tcp meta length <= 92 tcp flags == ack counter name "acks"
    }
}
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small")
    parser.add_argument("--inner-steps", default="4")
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    try:
        with Net(4) as net, work_folder(None, "tapestry-egress-") as folder:
            _measure(options, net, folder)
    except NetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(options: argparse.Namespace, net: Net, folder: Path) -> None:
    nodes = [
        Node(folder / f"n{i}", data=f"stdlib:{i + 1}/4", prefix=net.prefix(i), address=net.address(i))
        for i in range(4)
    ]
    changes = {"inner_steps": options.inner_steps, "batch_size": "1", "sequence_length": "64"}
    init(nodes[0].home, "--preset", options.preset, is_open=True, **changes)
    for node in nodes:
        subprocess.run([*node.prefix, "nft", "-f", "-"], input=COUNTERS, text=True, check=True)
    try:
        nodes[0].start().wait_ready(DEADLINE_S)
        for node in nodes[1:]:
            node.home.mkdir()
            (node.home / "node.toml").write_text("threads = 1\n")
            node.start("--peer", nodes[0].address).wait_ready(DEADLINE_S)
        nodes[0].wait_epoch(nodes[0].status()["epoch"] + options.epochs, DEADLINE_S)
        _tell(nodes)
    finally:
        for node in nodes:
            node.end()


def _tell(nodes: list[Node]) -> None:
    """Of each node: the metric and the link together, and then the ledger, which is two seconds behind."""
    for node in nodes:
        metric = sum(network_bytes(node.get("/metrics"), "sent").values())
        counts = _counters(node)
        node.stop(60.0)
        totals = Totals()
        for entry in read_egress(Home(node.home)):
            totals.add(entry)
        link = counts["sent"] - counts["acks"]
        print(
            f"{node.home.name}: ledger {totals.bytes / 1e6:.2f}, metric {metric / 1e6:.2f}, "
            f"link {link / 1e6:.2f} (and acks {counts['acks'] / 1e6:.2f}): "
            f"ledger / metric {totals.bytes / metric:.4f}, ledger / link {totals.bytes / link:.4f}",
            flush=True,
        )


def _counters(node: Node) -> dict[str, int]:
    done = subprocess.run(
        [*node.prefix, "nft", "-j", "list", "counters"], capture_output=True, text=True, check=True
    )
    found = [item["counter"] for item in json.loads(done.stdout)["nftables"] if "counter" in item]
    return {one["name"]: one["bytes"] for one in found}


if __name__ == "__main__":
    sys.exit(main())
