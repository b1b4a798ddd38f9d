"""How rounds, messages, connections and memory grow with the number of nodes.

    .venv/bin/python -P scripts/bench_scale.py [--real 2,4,8,16,32] [--simulated 10,50,100,...] [--json FILE]

Real: daemons of preset `nano` on this machine's loopback, all of them sharing its cores, so that a round's
time says more of the machine than of the protocol. Nodes are added while memory lasts.

Simulated: the same core in virtual time, without faults and without tensors: what is sent in an epoch, by
kind, with the bytes of the frames that it would be. All links are up and all have the first state from the
start, so joining is not in the figures; nor is a network's delay above 30 ms. A size that takes longer than
--limit-s of processor time ends the series.

Growth is fitted as c * n ** p by least squares on logarithms.
"""

from __future__ import annotations

import argparse
import gc
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import psutil
from _bench import machine, table, write_json
from e2e.harness import Node, init
from simulation.faults import Faults
from simulation.world import Node as SimNode
from simulation.world import World

from tapestry.node.net.vocabulary import encode_message
from tapestry.node.net.wire import FRAME
from tapestry.node.protocol import record as record_module
from tapestry.node.protocol.canon import MEMBERS_MAX
from tapestry.node.protocol.context import PeerView
from tapestry.node.protocol.messages import Message, Status
from tapestry.node.protocol.rules import Rules

REAL = (2, 4, 8, 16, 32)
SIMULATED = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
MEMORY_KEPT_BYTES = 3 << 30  # of the machine's, for everybody else
WARM_ROUNDS = 2  # of all nodes before that
START_S = 600.0  # for all nodes of a size: two imports of torch each, on all cores
SIM_TRAIN_S = (1.0, 2.0)  # virtual; an epoch takes little longer
SIM_WARM_EPOCHS = 1  # the founder's to decide, alone
SIM_EPOCHS = 2
SIM_SHARDS = 4
START_SPREAD_S = 0.5
BULK = ("Shard", "Result")
LEADERS = ("Call", "Closing", "Roster", "Propose", "Commit")  # what the leader says to everybody
MEMORY_KINDS = ("pss", "node_rss", "trainer_rss", "p2pd_rss")


def main() -> int:
    options = parse()
    results: dict[str, Any] = {"machine": machine(), "real": [], "simulated": []}
    print(results["machine"])
    for count in options.real:
        row = measure_real(count, options.rounds)
        results["real"].append(row)
        print(f"# real {row}", file=sys.stderr, flush=True)
        if "stopped" in row:
            break
    for count in options.simulated:
        row = simulate(count, options.limit_s)
        results["simulated"].append(row)
        print(f"# simulated {row}", file=sys.stderr, flush=True)
        if "stopped" in row:
            break
    show(results)
    write_json(options.json, results)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", type=sizes, default=REAL, metavar="N,N", help='"" for none')
    parser.add_argument("--rounds", type=int, default=6, help="epochs of real nodes that are looked at")
    parser.add_argument("--simulated", type=sizes, default=SIMULATED, metavar="N,N", help='"" for none')
    parser.add_argument("--limit-s", type=float, default=180.0, help="processor time for a simulated size")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


# ---- real nodes --------------------------------------------------------------------------------------


def measure_real(count: int, rounds: int) -> dict[str, Any]:
    """Start that many, let them commit, and ask each what it cost. Ends early where memory does."""
    with tempfile.TemporaryDirectory(prefix="tapestry-scale-") as text:
        folder = Path(text)
        home = init(
            folder / "n0",
            is_open=True,
            inner_steps="20",
            shard_elements="4096",
            max_peers=str(max(64, count)),
        )
        nodes = [Node(home, data="stdlib:1/3")]
        try:
            nodes[0].start()
            up(nodes[0])
            for i in range(1, count):
                if psutil.virtual_memory().available < MEMORY_KEPT_BYTES:
                    return {"nodes": count, "stopped": f"memory, after {i} nodes"}
                node = Node(folder / f"n{i}", "--peer", nodes[0].address, data=f"stdlib:{i % 3 + 1}/3")
                nodes.append(node)
                node.home.mkdir()
                (node.home / "node.toml").write_text("threads = 1\n")
                node.start()
                if i % 4 == 0:  # two cores import torch for a few at a time
                    up(node)
            for node in nodes:
                up(node)
            founder = nodes[0]
            founder.wait("an electorate of all", lambda: founder.electorate() == count, START_S)
            founder.wait_epoch(founder.status()["epoch"] + WARM_ROUNDS, START_S)
            return {"nodes": count} | between(nodes, rounds)
        except AssertionError as error:
            return {"nodes": count, "stopped": str(error).splitlines()[0]}
        finally:
            for node in nodes:
                if node.process is not None and node.process.poll() is None:
                    node.process.terminate()
            for node in nodes:
                if node.process is not None:
                    try:
                        node.process.wait(30)
                    except Exception:  # it must not outlive us, whatever it was doing
                        node.kill()


def up(node: Node) -> None:
    """Wait until node.json is this process's."""
    node.wait("node.json", lambda: node.json()["pid"] == node.pid, START_S)


def between(nodes: list[Node], rounds: int) -> dict[str, Any]:
    """The means over the nodes of what so many epochs cost."""
    founder = nodes[0]
    before, began = [Counters.of(node) for node in nodes], time.monotonic()
    first = founder.status()["epoch"]
    founder.wait_epoch(first + rounds, START_S)
    after, took_s = [Counters.of(node) for node in nodes], time.monotonic() - began
    costs = [b.since(a) for a, b in zip(before, after, strict=True)]
    memory = [memory_of(node) for node in nodes]
    members = [line for line in founder.tail(400).splitlines() if "committed epoch=" in line][-1]
    return {
        "contributions": int(re.findall(r"contributions=(\d+)", members)[0]),
        "epoch_s": took_s / rounds,
        "round_s": statistics.fmean(c["round_s"] for c in costs),
        "exchange_s": statistics.fmean(c["exchange_s"] for c in costs),
        "control_bytes": statistics.fmean(c["control_bytes"] for c in costs),
        "data_bytes": statistics.fmean(c["data_bytes"] for c in costs),
        "node_cpu_s": statistics.fmean(c["cpu_s"] for c in costs),
        "lost_rounds": sum(c["lost_rounds"] for c in costs),
        "connections": statistics.fmean(m["connections"] for m in memory),
        **{
            key: statistics.fmean(m[key] for m in memory)
            for key in ("pss", "node_rss", "trainer_rss", "p2pd_rss")
        },
    }


@dataclass
class Counters:
    """A node's /metrics at one moment."""

    values: dict[str, float]

    @classmethod
    def of(cls, node: Node) -> Counters:
        lines = (line.rpartition(" ") for line in node.get("/metrics").splitlines() if line[:1] != "#")
        return cls({name: float(value) for name, _, value in lines})

    def since(self, before: Counters) -> dict[str, float]:
        """For each epoch of this node's."""
        gone = {name: value - before.values.get(name, 0.0) for name, value in self.values.items()}
        epochs = max(gone["tapestry_epoch"], 1.0)

        def total(*parts: str) -> float:
            return sum(v for name, v in gone.items() if all(part in name for part in parts))

        sent = "tapestry_network_bytes_total", 'direction="sent"'
        lost = [total("tapestry_rounds_total", outcome) for outcome in ("aborted", "missed", "forced")]
        phases = [total("phase_seconds_sum", f'"{phase}"') for phase in ("exchanging", "accepted")]
        return {
            "round_s": gone["tapestry_round_seconds_sum"] / max(gone["tapestry_round_seconds_count"], 1.0),
            "exchange_s": sum(phases) / epochs,
            "control_bytes": total(*sent, 'kind="control"') / epochs,
            "data_bytes": (total(*sent, 'kind="contribution"') + total(*sent, 'kind="result"')) / epochs,
            "cpu_s": gone["process_cpu_seconds_total"] / epochs,
            "lost_rounds": sum(lost),
        }


def memory_of(node: Node) -> dict[str, float]:
    """Bytes of the node's processes. PSS shares out what several of them map: torch's code, above all."""
    rss = {"node_rss": 0, "trainer_rss": 0, "p2pd_rss": 0}
    pss = connections = 0
    p2pd, trainer = node.p2pd(), node.trainer()
    for process in [psutil.Process(node.pid), *node.children()]:
        kind = "p2pd" if process == p2pd else "trainer" if process == trainer else "node"
        full = process.memory_full_info()
        rss[f"{kind}_rss"] += full.rss
        pss += full.pss
        if kind == "p2pd":
            connections += sum(c.status == "ESTABLISHED" for c in process.net_connections("tcp"))
    return {"pss": pss, "connections": connections, **rss}


# ---- simulated nodes ---------------------------------------------------------------------------------


@dataclass
class Sent:
    """Messages and bytes, by kind."""

    messages: dict[str, int] = field(default_factory=dict)
    size_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, message: Message, count: int) -> None:
        kind = type(message).__name__
        size = self._size(message)
        self.messages[kind] = self.messages.get(kind, 0) + count
        self.size_bytes[kind] = self.size_bytes.get(kind, 0) + count * size

    def __post_init__(self) -> None:
        self._last: tuple[Message | None, int] = (None, 0)

    def _size(self, message: Message) -> int:
        """Of the frame without a payload; a broadcast is encoded once, as the links do."""
        if message is not self._last[0]:
            self._last = (message, FRAME.size + len(encode_message(message)))
        return self._last[1]


class Late(Exception):
    """The time for this size is over."""


class Peaceful(World):
    """A world without faults, whose peers know each other from the start, that counts what they send."""

    def __init__(self, peers: int, until: float) -> None:
        super().__init__(seed=0, peers=peers, faults=Faults(), rules=None)
        self.rules = Rules(
            run_id=self.genesis.run_id, shard_count=SIM_SHARDS, peers_max=max(64, peers), straggler_wait_s=5.0
        )
        self.invariants.table_max = 4 * self.rules.peers_max
        self.train_s = SIM_TRAIN_S
        self.sent = Sent()
        self.steps = 0
        self.until = until

    def send(self, sender: SimNode, to: str, message: Message, bulk: bool = False) -> None:
        self.sent.add(message, 1)
        super().send(sender, to, message, bulk)

    def heartbeat(self, sender: SimNode, peers: tuple[str, ...], status: Status) -> None:
        self.sent.add(status, len(peers))
        super().heartbeat(sender, peers, status)

    def link_up(self, a: SimNode, b: SimNode) -> None:
        """Nothing: `begin` has done it for all, and without the n * n events."""

    def begin(self) -> None:
        state = self.nodes["p0"].disk.states[self.genesis.run_id]
        for node in self.nodes.values():
            node.disk.states[self.genesis.run_id] = state
            node.disk.state_head = self.genesis.run_id
            self.later(START_SPREAD_S * self.rng.random(), None, lambda node=node: self._start(node))

    def _start(self, node: SimNode) -> None:
        node.start()
        assert node.core is not None
        peers = node.core.ctx.peers
        for name in self.nodes:
            if name != node.name:
                peers[name] = PeerView(up=True, heard_at=self.now + START_SPREAD_S)

    def commit(self, epochs: int) -> None:
        """Run until the first node has that many epochs. Raises Late."""
        first = self.nodes["p0"].disk.records
        while len(first) < epochs:
            self.step()
            self.steps += 1
            if self.steps % 256 == 0 and time.process_time() > self.until:
                raise Late


def simulate(count: int, limit_s: float) -> dict[str, Any]:
    """What an epoch sends, for each node, when all are members."""
    began = time.process_time()
    record_module.MEMBERS_MAX = max(MEMBERS_MAX, count)  # beyond it, what the law would be
    row: dict[str, Any] = {"nodes": count}
    gc.disable()
    try:
        world = Peaceful(count, began + limit_s)
        world.begin()
        world.commit(SIM_WARM_EPOCHS)
        virtual_s = world.now
        world.sent = sent = Sent()
        world.commit(SIM_WARM_EPOCHS + SIM_EPOCHS)
        records = world.nodes["p0"].disk.records[SIM_WARM_EPOCHS:]
        ballots = [record.ballot for record in records]
        epochs = len(records)
    except Late:
        return row | {"stopped": f"not within {limit_s:g} s of processor time", "members": members_of(world)}
    finally:
        gc.enable()
    each = count * epochs
    control = [kind for kind in sent.messages if kind not in BULK]
    heartbeats = sent.messages.get("Status", 0)
    row |= {
        "members": members_of(world),
        "epoch_s": (world.now - virtual_s) / epochs,
        "extra_ballots": sum(ballots),
        "aborted": world.outcomes.get("aborted", 0),
        "control_messages": sum(sent.messages[kind] for kind in control) / each,
        "status_messages": heartbeats / each,
        "round_messages": sum(sent.messages[kind] for kind in control if kind != "Status") / each,
        "bulk_messages": sum(sent.messages.get(kind, 0) for kind in BULK) / each,
        "control_bytes": sum(sent.size_bytes[kind] for kind in control) / each,
        "round_bytes": sum(sent.size_bytes[kind] for kind in control if kind != "Status") / each,
        "leader_bytes": sum(sent.size_bytes.get(kind, 0) for kind in LEADERS) / epochs,
        "kinds": {kind: round(n / each, 2) for kind, n in sorted(sent.messages.items())},
        "kind_bytes": {kind: round(n / each, 1) for kind, n in sorted(sent.size_bytes.items())},
        "cpu_s": time.process_time() - began,
    }
    del world
    gc.collect()
    return row


def members_of(world: World) -> int:
    records = world.nodes["p0"].disk.records
    return len(records[-1].body.members) if records else 0


# ---- the tables --------------------------------------------------------------------------------------


def show(results: dict[str, Any]) -> None:
    for title, columns in (("real", REAL_COLUMNS), ("simulated", SIM_COLUMNS)):
        rows = [row for row in results[title] if "stopped" not in row]
        if rows:
            print(f"\n{title}: for an epoch and a node")
            print(
                table(list(columns), [[scale(row[key]) for key, scale in columns.values()] for row in rows])
            )
            results[f"{title}_growth"] = {}
            for name, (key, scale) in columns.items():
                law = growth([row["nodes"] for row in rows], [row[key] for row in rows])
                if law is not None and key != "nodes":
                    results[f"{title}_growth"][key] = law
                    print(f"  {name}: {scale(law['factor']):.3g} * n ** {law['power']:.2f}")
        for row in results[title]:
            if "stopped" in row:
                print(f"{row['nodes']} nodes: {row['stopped']}")


def growth(counts: Sequence[int], values: Sequence[float]) -> dict[str, float] | None:
    """c and p of c * n ** p, by least squares on logarithms; None for what does not grow or is not there."""
    points = [(math.log(n), math.log(v)) for n, v in zip(counts, values, strict=True) if v > 0]
    if len(points) < 3 or len(points) < len(counts):
        return None
    xs, ys = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(xs, ys)
    return {"factor": math.exp(intercept), "power": slope}


def plain(value: Any) -> Any:
    return value


def kilo(value: float) -> float:
    return value / 1e3


def mebi(value: float) -> float:
    return value / 2**20


REAL_COLUMNS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "nodes": ("nodes", plain),
    "contributions": ("contributions", plain),
    "epoch s": ("epoch_s", plain),
    "round s": ("round_s", plain),
    "of it exchange s": ("exchange_s", plain),
    "rounds lost": ("lost_rounds", plain),
    "control kB": ("control_bytes", kilo),
    "data kB": ("data_bytes", kilo),
    "node CPU s": ("node_cpu_s", plain),
    "connections": ("connections", plain),
    "PSS MiB": ("pss", mebi),
    "RSS: node": ("node_rss", mebi),
    "trainer": ("trainer_rss", mebi),
    "p2pd": ("p2pd_rss", mebi),
}
SIM_COLUMNS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "nodes": ("nodes", plain),
    "members": ("members", plain),
    "epoch s (virtual)": ("epoch_s", plain),
    "more ballots": ("extra_ballots", plain),
    "control messages": ("control_messages", plain),
    "STATUS": ("status_messages", plain),
    "the round's": ("round_messages", plain),
    "bulk frames": ("bulk_messages", plain),
    "control kB": ("control_bytes", kilo),
    "the round's kB": ("round_bytes", kilo),
    "the leader's kB": ("leader_bytes", kilo),
    "CPU s": ("cpu_s", plain),
}


if __name__ == "__main__":
    sys.exit(main())
