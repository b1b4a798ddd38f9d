"""Real daemons on loopback under real faults, until time is up; then peace, and everything is compared.

    .venv/bin/python -P scripts/chaos.py --nodes 5 --minutes 10 --seed 1 [--json FILE]

A fault is drawn at random, with a node to bear it: SIGKILL of the node, its trainer or its p2pd, SIGSTOP
and SIGCONT, a restart with its home, without it, or with its newest checkpoint corrupted, an orderly stop
and start. For each, the time to the next committed epoch anywhere is taken. Meanwhile every node is asked
for its state digest: no epoch may have two (unless parts went on apart: the chain then has forced records).

At the end all nodes must come to one head and digest within SETTLE_S, the chain on each disk must be whole,
and replaying the updates from the oldest checkpoint must give the digest; nothing may be left running. Exit
1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import psutil
import torch
from e2e.harness import Node, init

from tapestry.dht.identity import Identity
from tapestry.node.crypto import NodeCrypto
from tapestry.node.home import Home
from tapestry.node.protocol.chain import Chain
from tapestry.node.runspec import RunSpec
from tapestry.node.state.checkpoints import Checkpoints, restore
from tapestry.node.state.model import Arithmetic, ModelState
from tapestry.node.state.store import Store

POLL_S = 0.05
SETTLE_S = 90.0  # for the last restarts (imports and tokens) and the way to one head
QUIET_S = 4.0  # between a recovery and the next fault, on average


@dataclass
class Watch:
    """Polls every node, each from a thread of its own, so that a frozen one holds up nobody else."""

    nodes: list[Node]
    epoch: int = 0  # the highest that any node has shown
    commits: list[float] = field(default_factory=list)  # when the highest epoch rose
    digests: dict[int, dict[str, str]] = field(default_factory=dict)  # epoch -> digest -> who showed it first
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        for node in self.nodes:
            threading.Thread(target=self._poll, args=(node,), daemon=True).start()

    def _poll(self, node: Node) -> None:
        while not self.stop.wait(POLL_S):
            try:
                status = node.status()
            except (OSError, ValueError, KeyError):
                continue
            with self.lock:
                if status["state_digest"] and status["phase"] != "joining":
                    shown = self.digests.setdefault(status["epoch"], {})
                    shown.setdefault(status["state_digest"], node.home.name)
                if status["epoch"] > self.epoch:
                    self.epoch = status["epoch"]
                    self.commits.append(time.monotonic())

    def gaps(self) -> list[float]:
        return [b - a for a, b in pairwise(self.commits)]


class Chaos:
    def __init__(self, folder: Path, count: int, seed: int) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        home = init(folder / "n0", inner_steps="20", shard_elements="4096", checkpoint_every_epochs="10")
        self.nodes = [Node(home)]
        self.nodes += [Node(folder / f"n{i}", data=f"stdlib:{i % 3 + 1}/3") for i in range(1, count)]
        self.watch = Watch(self.nodes)
        self.times: dict[str, list[float]] = {}
        self.children: list[psutil.Process] = []
        self.log: list[str] = []

    def say(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {text}"
        self.log.append(line)
        print(line, flush=True)

    # --- life ----------------------------------------------------------------------------------

    def start_all(self) -> None:
        self.nodes[0].start().wait_ready()
        for node in self.nodes[1:]:
            node.start("--peer", self.nodes[0].address)
        founder, count = self.nodes[0], len(self.nodes)
        for node in self.nodes[1:]:
            node.wait_ready()
        founder.wait("an electorate of all", lambda: founder.electorate() == count)

    def restart(self, node: Node) -> None:
        """Start it again, towards some node that is up; alone, as its home's run, if none is."""
        up = [n for n in self.nodes if n is not node and alive(n) and (n.home / "node.json").exists()]
        node.start(*(("--peer", self.rng.choice(up).address) if up else ()))

    def run(self, minutes: float) -> None:
        self.watch.start()
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            node = self.rng.choice(self.nodes)
            fault = self.rng.choice(list(FAULTS))
            self.say(f"fault={fault} node={node.home.name} epoch={self.watch.epoch}")
            count, began = len(self.watch.commits), time.monotonic()
            undo = FAULTS[fault](self, node)
            while len(self.watch.commits) == count and time.monotonic() < began + 60:
                time.sleep(POLL_S / 2)
            took = ([*self.watch.commits, time.monotonic()])[count] - began
            self.times.setdefault(fault, []).append(took)
            self.say(f"fault={fault} next_epoch_after_s={took:.2f}")
            if undo is not None:
                time.sleep(self.rng.uniform(0, 6))
                undo()
            time.sleep(self.rng.expovariate(1 / QUIET_S))

    def settle(self) -> None:
        """Peace: everyone at one head and digest, and two epochs further."""
        for node in self.nodes:
            if not alive(node):
                self.restart(node)
        goal = self.watch.epoch + 2
        end = time.monotonic() + SETTLE_S
        while True:
            seen = []
            for node in self.nodes:
                try:
                    status = node.status()
                    seen.append((status["epoch"], status["head"], status["state_digest"]))
                except (OSError, ValueError, KeyError):
                    seen.append((-1, "", ""))
            if len(set(seen)) == 1 and seen[0][0] >= goal:
                self.say(f"settled epoch={seen[0][0]} head={seen[0][1][:12]} digest={seen[0][2][:12]}")
                return
            if time.monotonic() > end:
                raise AssertionError(f"no common head: {[(e, h[:8]) for e, h, _ in seen]}")
            time.sleep(POLL_S)

    def stop(self) -> None:
        pids = [psutil.Process(n.pid) for n in self.nodes if alive(n)]
        children = [c for p in pids for c in [p, *p.children(recursive=True)]]
        codes = [n.stop(30) for n in self.nodes if alive(n)]
        assert codes == [0] * len(codes), f"exit codes {codes}"
        left = [p for p in children if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert not left, f"left behind: {left}"

    # --- proof ---------------------------------------------------------------------------------

    def prove(self) -> None:
        """Chains whole, digests single, and the oldest checkpoint plus updates is the newest state."""
        forced = 0
        for node in self.nodes:
            home = Home(node.home)
            store = Store(home, NodeCrypto(Identity.load(home.identity_key)))
            loaded = store.load()
            assert loaded.genesis is not None
            chain = Chain(loaded.genesis)
            for record in loaded.records:
                chain.check(record, NodeCrypto(Identity.load(home.identity_key)))
                chain.append(record)
            forced = max(forced, sum(r.body.forced for r in chain.records))
            self._replay(home, store, chain)
        double = {e: d for e, d in self.watch.digests.items() if len(d) > 1}
        assert not double or forced, f"epochs with two digests: {double}"
        apart = len(double)
        self.say(f"proved nodes={len(self.nodes)} epochs={chain.epoch} forced={forced} seen_apart={apart}")

    def _replay(self, home: Home, store: Store, chain: Chain) -> None:
        spec = RunSpec.from_canonical(chain.genesis.spec.encode())
        n = chain.genesis.params
        checkpoints = Checkpoints(home.checkpoints, chain.genesis.run_id, spec.limits.checkpoints_kept)
        checkpoints.load()
        digests = []
        for epoch in (min(c.epoch for c in checkpoints.list()), chain.epoch):
            state = ModelState(
                torch.zeros(n), chain.genesis.schema, Arithmetic.of(spec, n), 0, chain.genesis.run_id
            )
            assert checkpoints.load_newest(chain, epoch, state) is not None
            for record in chain.records[state.epoch :]:
                payloads = store.read_update(record.body.epoch, record.head, record.body.result)
                state.apply(payloads, record.body.epoch, record.head)
            digests.append(state.digest())
        assert digests[0] == digests[1], f"{home.path.name}: replay gives another state"
        assert restore(chain, chain.epoch, store, checkpoints, state) is not None

    # --- faults: each returns how to undo it, if it is to be undone ------------------------------

    def kill_node(self, node: Node) -> Callable[[], None]:
        if alive(node):
            node.kill()
        return lambda: self.restart(node)

    def lose_home(self, node: Node) -> Callable[[], None]:
        self.kill_node(node)

        def back() -> None:
            shutil.rmtree(node.home, ignore_errors=True)
            self.restart(node)

        return back

    def corrupt_checkpoint(self, node: Node) -> Callable[[], None]:
        self.kill_node(node)

        def back() -> None:
            files = sorted((node.home / "checkpoints").glob("*.safetensors"))
            if files:
                with files[-1].open("r+b") as file:
                    file.seek(-200, os.SEEK_END)
                    file.write(b"\xff" * 100)
            self.restart(node)

        return back

    def stop_and_start(self, node: Node) -> Callable[[], None]:
        if alive(node):
            node.stop(30)
        return lambda: self.restart(node)

    def kill_trainer(self, node: Node) -> None:
        self._kill_child(node, "trainer.worker")

    def kill_p2pd(self, node: Node) -> None:
        self._kill_child(node, "p2pd")

    def freeze(self, node: Node) -> Callable[[], None] | None:
        process = node.process
        if process is None or not alive(node):
            return None
        process.send_signal(signal.SIGSTOP)
        return lambda: process.send_signal(signal.SIGCONT)

    def _kill_child(self, node: Node, name: str) -> None:
        if not alive(node):
            return
        for child in node.children():
            try:
                if name in " ".join(child.cmdline()):
                    child.kill()
            except psutil.Error:
                continue


def alive(node: Node) -> bool:
    return node.process is not None and node.process.poll() is None


FAULTS: dict[str, Callable[[Chaos, Node], Callable[[], None] | None]] = {
    "kill_node": Chaos.kill_node,
    "kill_trainer": Chaos.kill_trainer,
    "kill_p2pd": Chaos.kill_p2pd,
    "freeze": Chaos.freeze,
    "stop_and_start": Chaos.stop_and_start,
    "lose_home": Chaos.lose_home,
    "corrupt_checkpoint": Chaos.corrupt_checkpoint,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--keep", type=Path, help="leave homes and logs in this new folder")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="tapestry-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    chaos = Chaos(folder, options.nodes, options.seed)
    try:
        chaos.start_all()
        chaos.run(options.minutes)
        chaos.settle()
        chaos.watch.stop.set()
        chaos.stop()
        chaos.prove()
    except AssertionError as error:
        chaos.say(f"FAILED {error}")
        return 1
    finally:
        chaos.watch.stop.set()
        for node in chaos.nodes:
            if node.process is not None and alive(node):
                node.process.send_signal(signal.SIGCONT)
            node.end()
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    report(chaos, options.json)
    return 0


def report(chaos: Chaos, path: Path | None) -> None:
    gaps = chaos.watch.gaps()
    figures = {
        "epochs": chaos.watch.epoch,
        "median_epoch_s": round(statistics.median(gaps), 2),
        "faults": {
            name: {
                "count": len(times),
                "median_s": round(statistics.median(times), 2),
                "worst_s": round(max(times), 2),
            }
            for name, times in sorted(chaos.times.items())
        },
    }
    print(f"{figures['epochs']} epochs, one every {figures['median_epoch_s']} s (median)")
    print(f"{'fault':20} {'count':>5} {'median s':>9} {'worst s':>8}")
    for name, row in figures["faults"].items():
        print(f"{name:20} {row['count']:5} {row['median_s']:9.2f} {row['worst_s']:8.2f}")
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
