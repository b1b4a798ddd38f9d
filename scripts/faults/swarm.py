"""Real nodes of one run, and what is waited for: commits, contributions, an exchange under way."""

from __future__ import annotations

import signal
import statistics
import time
from pathlib import Path

from _netns import Net
from e2e.harness import Node, init

from faults.tail import Committed, Tail

NORMAL_ROUNDS = 8  # before each fault
INNER_STEPS = "50"  # of nano: a second on a machine with other work to do
SHARDS = "4096"  # elements: 12 shards, so that every node has some to reduce
STALL_S, QUORUM_LOSS_S = 5.0, 30.0  # the defaults of run.toml
WAIT_S = 240.0


class Swarm:
    """Nodes of one run, with a tail each."""

    def __init__(self, folder: Path, count: int, net: Net | None = None, **changes: str) -> None:
        folder.mkdir()
        self.nodes = [
            Node(
                folder / f"n{i}",
                data=f"stdlib:{i % 3 + 1}/3",
                prefix=net.prefix(i) if net else (),
                address=net.address(i) if net else "127.0.0.1",
            )
            for i in range(count)
        ]
        init(self.nodes[0].home, inner_steps=INNER_STEPS, shard_elements=SHARDS, **changes)
        self.tails = {node: Tail(node) for node in self.nodes}
        self.ids: dict[Node, str] = {}
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        first, count = self.nodes[0].start().wait_ready(WAIT_S), len(self.nodes)
        for node in self.nodes[1:]:
            node.start("--peer", first.invitation())
        for node in self.nodes:
            self.ids[node] = node.wait_ready(WAIT_S).json()["peer_id"]
        first.wait("contributions of all", lambda: self.contributors(first) == count, WAIT_S)

    def close(self) -> None:
        for tail in self.tails.values():
            tail.stop.set()
        for node in self.nodes:
            if node.process is not None and node.process.poll() is None:
                node.process.send_signal(signal.SIGCONT)
            node.end()

    def contributors(self, node: Node) -> int:
        """In the newest record."""
        tail = self.tails[node]
        record = tail.records.get(tail.epoch)
        return sum(w > 0 for w in record.weights.values()) if record else 0

    def others(self, victim: Node) -> list[Node]:
        return [n for n in self.nodes if n is not victim]

    def first_commit(self, epoch: int, among: list[Node]) -> Committed | None:
        found = [r for n in among if (r := self.tails[n].records.get(epoch)) is not None]
        return min(found, key=lambda r: r.at, default=None)

    def wait_commit(self, epoch: int, among: list[Node]) -> Committed:
        among[0].wait(f"record {epoch}", lambda: self.first_commit(epoch, among), WAIT_S)
        record = self.first_commit(epoch, among)
        assert record is not None
        return record

    def wait_contribution(self, of: Node, after: int, among: list[Node]) -> Committed:
        """The first record after epoch `after` that counts what `of` made."""
        peer = self.ids[of]

        def found() -> Committed | None:
            epochs = sorted({e for n in among for e in list(self.tails[n].records) if e > after})
            for epoch in epochs:
                record = self.first_commit(epoch, among)
                if record is not None and record.weights.get(peer):
                    return record
            return None

        among[0].wait(f"contribution of {of.home.name}", found, WAIT_S)
        record = found()
        assert record is not None
        return record

    def normal_rounds(self) -> tuple[float, float, int]:
        """With all contributing: the median round in seconds, and in bytes of contributions sent by all.

        Ends right after a commit; gives its epoch too.
        """
        first = self.nodes[0]
        epoch = self.tails[first].epoch
        first.wait("contributions of all", lambda: self.contributors(first) == len(self.nodes), WAIT_S)
        durations, sent = [], []
        before = None
        while len(durations) < NORMAL_ROUNDS:
            epoch = max(epoch, self.tails[first].epoch) + 1
            record, last = self.wait_commit(epoch, self.nodes), self.first_commit(epoch - 1, self.nodes)
            count = sent_bytes(self.nodes)
            whole = sum(w > 0 for w in record.weights.values()) == len(self.nodes)
            if last is not None and whole and before is not None and before[0] == epoch - 1:
                durations.append(record.at - last.at)
                sent.append(sum(count.values()) - before[1])
            before = (epoch, sum(count.values()))
        return statistics.median(durations), statistics.median(sent), epoch

    def catch_exchanging(self, victim: Node) -> tuple[int, bool]:
        """Wait until it exchanges shards: the epoch of the round, and whether it leads it."""
        seen: list[dict[str, object]] = []

        def exchanging() -> bool:
            round_ = victim.status()["round"]
            if round_ and round_["stage"] == "exchanging":
                seen.append(round_)
            return bool(seen)

        end = time.monotonic() + WAIT_S
        while not exchanging():
            assert time.monotonic() < end, "no exchange to be seen"
            time.sleep(0.002)
        return int(str(seen[0]["epoch"])), seen[0]["leader"] == self.ids[victim]

    def one_head(self, nodes: list[Node]) -> bool:
        states = {(s["head"], s["state_digest"]) for s in (n.status() for n in nodes)}
        return len(states) == 1


def sent_bytes(nodes: list[Node]) -> dict[Node, float]:
    """Of contributions, so far."""
    name = 'tapestry_network_bytes_total{direction="sent",kind="contribution"}'
    return {node: metric(node, name) for node in nodes}


def metric(node: Node, name: str) -> float:
    for line in node.get("/metrics").splitlines():
        if line.startswith(name + " "):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no metric {name}")
