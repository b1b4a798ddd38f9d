"""Two members behind NAT, each behind a router of its own, and one public member train together.

    sudo .venv/bin/python -P scripts/check_nat.py [--epochs 3] [--kill-relay]

Everything lives in network namespaces (ip netns, nftables), which are removed at the end. What must hold, or
the exit code is 1: all three are in the electorate and contribute to `--epochs` epochs in a row; every epoch
has one state digest; the two behind NAT are linked with each other through a relay, and with the public
member directly; each says that it cannot be dialled, and the public one that it can. With --kill-relay there
are two public members, one of them is killed then, and the others must go on together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from _chains import ChainRecord, chain_record  # noqa: E402
from _netns import Nats, NetError  # noqa: E402
from _run import exit_by_signal  # noqa: E402
from e2e.harness import Digests, Node, init  # noqa: E402

DEADLINE_S = 180.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--kill-relay", action="store_true")
    parser.add_argument("--keep", type=Path, help="leave homes and logs in this new folder")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, exit_by_signal)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="tapestry-nat-"))
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if options.keep is None:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            net = stack.enter_context(Nats(public=2 if options.kill_relay else 1, private=2))
        except NetError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        try:
            check(net, folder, options.epochs, stack)
        except AssertionError as error:
            print(f"FAILED {error}")
            return 1
    print("passed")
    return 0


def check(net: Nats, folder: Path, epochs: int, stack: contextlib.ExitStack) -> None:
    """Raises AssertionError."""
    count = net.public + net.private
    nodes = [
        Node(folder / f"n{i}", data=f"stdlib:{i % 3 + 1}/3", prefix=net.prefix(i), address="0.0.0.0")
        for i in range(count)
    ]
    for node in nodes:
        stack.callback(node.end)
    began_at = time.monotonic()
    init(nodes[0].home)
    nodes[0].start().wait_ready(DEADLINE_S)
    entry = next(a for a in nodes[0].json()["addresses"] if net.address(0) in a)
    for node in nodes[1:]:
        node.home.mkdir()
        (node.home / "node.toml").write_text("threads = 1\n")
        node.start("--peer", nodes[0].invitation(entry))
    digests = Digests(*nodes)
    digests.wait(f"round of all {count}", lambda: nodes[0].electorate() == count, DEADLINE_S)
    first = nodes[0].status()["epoch"]
    say(f"all {count} are in one electorate after {time.monotonic() - began_at:.0f} s, at epoch {first}")
    private, public = nodes[net.public :], nodes[: net.public]
    digests.wait("route", lambda: routes_hold(private, public), DEADLINE_S)
    first = nodes[0].status()["epoch"]
    digests.wait("epochs of all", lambda: contributed_by_all(nodes, first, epochs), DEADLINE_S)
    say(f"all {count} contributed to {epochs} epochs in a row from {first + 1} on, one digest each")
    if net.public == 2:
        public.pop().kill()
        nodes.remove(nodes[1])
        first = nodes[0].status()["epoch"]
        digests = Digests(*nodes)
        digests.wait("route", lambda: routes_hold(private, public), DEADLINE_S)
        digests.wait("epoch", lambda: contributed_by_all(nodes, first, epochs), DEADLINE_S)
        say(f"one public member was killed: the others contributed to {epochs} epochs in a row after that")
    for node in nodes:
        code = node.stop(30.0)
        assert code == 0, f"{node.home.name} ended with exit code {code}"


def say(text: str) -> None:
    print(text, flush=True)


def routes_hold(private: list[Node], public: list[Node]) -> bool:
    """Whether each is linked with each, by the way that its NAT allows, and knows its own reach."""
    ids = {node.json()["peer_id"]: node for node in (*private, *public)}
    for node in ids.values():
        status, peers = node.status(), {p["peer_id"]: p for p in json.loads(node.get("/peers"))}
        if status["reachable"] is not (node in public):
            return False
        for other_id, other in ids.items():
            if other is not node:
                relayed = node in private and other in private
                if other_id not in peers or peers[other_id]["relayed"] is not relayed:
                    return False
    return True


def contributed_by_all(nodes: list[Node], first: int, epochs: int) -> bool:
    """Whether the records of `epochs` epochs in a row after `first` have a contribution of every node."""
    ids = {node.json()["peer_id"] for node in nodes}
    row = 0
    for record in records(nodes[0].home):
        if record.epoch > first:
            row = row + 1 if record.contributors == ids else 0
            if row >= epochs:
                return all(node.status()["epoch"] >= record.epoch for node in nodes)
    return False


def records(home: Path) -> list[ChainRecord]:
    """Of HOME/chain.jsonl; a line that is being written is left for the next look."""
    return [chain_record(line) for line in (home / "chain.jsonl").read_bytes().split(b"\n")[:-1]]


if __name__ == "__main__":
    sys.exit(main())
