"""Real daemons under real faults, until time is up; then peace, and everything is compared.

    .venv/bin/python -P scripts/chaos.py --nodes 5 --minutes 10 --seed 1 [--netns] [--json FILE]

A fault is drawn at random, with a node to bear it: SIGKILL of the node, its trainer or its p2pd, SIGSTOP
and SIGCONT, a restart with its home, without it, or with its newest checkpoint corrupted, an orderly stop
and start, a disk that is full until somebody makes room, a restart with a clock that is minutes wrong; the
founder removes a member and admits it again, or gives its seat to another key. With
--netns every node has a network namespace of its own, and links are cut one way, both ways, or between two
islands, and joined again. For each fault the time to the next committed epoch anywhere is taken. Meanwhile
every node is asked for its state digest: no epoch may have two (unless parts went on apart: the chain then
has forced records).

At the end all nodes must come to one head and digest within SETTLE_S, the chain on each disk must be whole,
and replaying the updates from the oldest checkpoint must give the digest; nothing may be left running, and no
node may have grown beyond MEMORY_GROWTH. Exit 1 if not.

Full disks need root, for each home gets a small tmpfs of its own; without it they are left out, and that is
said.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import psutil
from _netns import Net, NetError
from _run import exit_by_signal, work_folder
from e2e.harness import Node, init, tapestry

from tapestry.dht.identity import Identity
from tapestry.node.disk.held import HeldRun, open_run
from tapestry.node.disk.store import Store
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.protocol.chain import Chain

POLL_S = 0.05
START_S = 240.0  # for all at once, on a busy machine
SETTLE_S = 90.0  # for the last restarts (imports and tokens) and the way to one head
QUIET_S = 4.0  # between a recovery and the next fault, on average
UNDO_S = 6.0  # at most, from the next epoch to the end of a fault
CUT_S = 45.0  # the same for cut links: now and then longer than quorum_loss_s
DISK_BYTES = 192 * 2**20  # of a node's disk: a thousand epochs of `nano` take 60 MB
ELECTORATE_S = 10.0  # to see a round's electorate: there is none between two
FULL_S = 30.0  # to notice a full disk
FORCED = re.compile(r"committed epoch=(\d+) .*forced=true")
CLOCK_S = 600.0  # how wrong a clock may be
MEMORY_GROWTH = (1.25, 64 * 2**20)  # guess: of a node and its children at the end, factor and bytes


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
    def __init__(self, folder: Path, count: int, seed: int, net: Net | None, disks: bool) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        self.net = net
        self.disks = disks
        self.nodes = [self._make_node(index) for index in range(count)]
        changes = {"inner_steps": "20", "shard_elements": "4096", "checkpoint_every_epochs": "10"}
        init(self.nodes[0].home, **changes)
        self.out: set[str] = set()  # peer ids that the founder removed
        self.watch = Watch(self.nodes)
        self.times: dict[str, list[float]] = {}
        self.memory: list[tuple[int, int]] = []  # of each node: bytes at the start and at the end
        self.forced = self.apart = 0
        self.settled_s = 0.0
        self.log: list[str] = []

    def _make_node(self, index: int) -> Node:
        disk = self.folder / f"disk{index}"
        disk.mkdir()
        if self.disks:
            _run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=755", "tmpfs", disk)
        prefix = self.net.prefix(index) if self.net else ()
        address = self.net.address(index) if self.net else "127.0.0.1"
        node = Node(disk / f"n{index}", data=f"stdlib:{index % 3 + 1}/3", prefix=prefix, address=address)
        node.log = self.folder / f"n{index}.log"  # not on the disk that gets full
        return node

    def close(self) -> None:
        """End what still runs, and take the disks away."""
        self.watch.stop.set()
        for node in self.nodes:
            if node.process is not None and alive(node):
                node.process.send_signal(signal.SIGCONT)
            node.end()
        for node in self.nodes if self.disks else []:
            _run("umount", "--lazy", node.home.parent)

    def say(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {text}"
        self.log.append(line)
        print(line, flush=True)

    # --- life ----------------------------------------------------------------------------------

    def start_all(self) -> None:
        founder, count = self.nodes[0], len(self.nodes)
        founder.start().wait_ready(START_S)
        for node in self.nodes[1:]:
            node.start("--peer", founder.invitation())
        for node in self.nodes[1:]:
            node.wait_ready(START_S)
        founder.wait("an electorate of all", lambda: founder.electorate() == count, START_S)
        self.memory = [(resident(node), 0) for node in self.nodes]

    def restart(self, node: Node) -> None:
        """Start it again, towards some node that is up; alone, as its home's run, if none is."""
        up = [n for n in self.nodes if n is not node and alive(n) and (n.home / "node.json").exists()]
        node.start(*(("--peer", self._line(self.rng.choice(up))) if up else ()))
        node.environment.clear()  # the next start has the right time

    def _line(self, node: Node) -> str:
        """The founder's invitation, by way of this node."""
        return self.nodes[0].invitation(node.address)

    def ask(self, *words: object) -> bool:
        """A command to the founder's node. False if it is not there, or says no."""
        founder = self.nodes[0]
        done = tapestry(*words, "--no-wait", "--home", founder.home)
        self.say(f"asked={' '.join(map(str, words[:2]))} exit={done.returncode} {done.stderr.strip()[-100:]}")
        return done.returncode == 0

    def run(self, minutes: float, only: str) -> None:
        self.watch.start()
        while not self.watch.epoch:
            time.sleep(POLL_S)
        end = time.monotonic() + 60 * minutes
        faults = {
            **FAULTS,
            **(DISK_FAULTS if self.disks else {}),
            **(LINK_FAULTS if self.net else {}),
        }
        faults = {name: fault for name, fault in faults.items() if not only or name in only.split(",")}
        while time.monotonic() < end:
            node = self.rng.choice(self.nodes)
            fault = self.rng.choice(list(faults))
            self.say(f"fault={fault} node={node.home.name} epoch={self.watch.epoch}")
            count, began = len(self.watch.commits), time.monotonic()
            undo = faults[fault](self, node)
            while len(self.watch.commits) == count and time.monotonic() < began + 60:
                time.sleep(POLL_S / 2)
            took = ([*self.watch.commits, time.monotonic()])[count] - began
            self.times.setdefault(fault, []).append(took)
            self.say(f"fault={fault} next_epoch_after_s={took:.2f}")
            if undo is not None:
                time.sleep(self.rng.uniform(0, CUT_S if fault in LINK_FAULTS else UNDO_S))
                undo()
                self.say(f"fault={fault} over epoch={self.watch.epoch}")
            time.sleep(self.rng.expovariate(1 / QUIET_S))

    def settle(self) -> None:
        """Peace: everyone at one head and digest, and two epochs further."""
        for node in self.nodes:
            if not alive(node):
                self.restart(node)
        self.nodes[0].wait_ready(START_S)
        for peer in sorted(self.out):
            self.ask("admit", peer)
        goal = self.watch.epoch + 2
        began = time.monotonic()
        end = began + SETTLE_S
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
                self.settled_s = time.monotonic() - began
                return
            if time.monotonic() > end:
                raise AssertionError(f"no common head: {[(e, h[:8]) for e, h, _ in seen]}")
            time.sleep(POLL_S)

    def weigh(self) -> None:
        """No node has grown much since all had begun, whatever it went through."""
        factor, allowance = MEMORY_GROWTH
        self.memory = [
            (start, resident(node)) for (start, _), node in zip(self.memory, self.nodes, strict=True)
        ]
        text = " ".join(f"{start >> 20}->{end >> 20}" for start, end in self.memory)
        self.say(f"memory_mb {text}")
        assert all(end <= factor * start + allowance for start, end in self.memory), f"memory grew: {text}"

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
        for node in self.nodes:
            run = open_run(Home(node.home), crypto_of(node))
            assert run is not None
            chain = Chain(run.chain.genesis)
            for record in run.chain.records:
                chain.check(record, crypto_of(node))
                chain.append(record)
            self._replay(node.home.name, run)
        # What an island forced may have been dropped since: the logs still have it.
        forced = {r.body.epoch for r in chain.records if r.body.forced}
        forced |= {int(e) for n in self.nodes for e in FORCED.findall(n.log.read_text(errors="replace"))}
        self.forced = len(forced)
        double = {e: d for e, d in self.watch.digests.items() if len(d) > 1}
        unexplained = {e: d for e, d in double.items() if not any(f <= e for f in forced)}
        assert not unexplained, f"epochs with two digests: {unexplained}"
        self.apart = len(double)
        counts = f"epochs={chain.epoch} forced={self.forced} seen_apart={self.apart}"
        self.say(f"proved nodes={len(self.nodes)} {counts}")

    def _replay(self, name: str, run: HeldRun) -> None:
        digests = []
        for epoch in (min(c.epoch for c in run.checkpoints.list()), run.chain.epoch):
            state = run.state()
            assert run.checkpoints.load_newest(run.chain, epoch, state) is not None
            for _ in run.replay(state):
                pass
            digests.append(state.digest())
        assert digests[0] == digests[1], f"{name}: replay gives another state"
        assert run.restore(state, run.chain.epoch) is not None

    # --- faults: each returns how to undo it, if it is to be undone ------------------------------

    def kill_node(self, node: Node) -> Callable[[], None]:
        if alive(node):
            node.kill()
        return lambda: self.restart(node)

    def lose_home(self, node: Node) -> Callable[[], None]:
        """The disk of one of many: it comes back as another, by invitation. Of the founder's key there is a
        copy, for nobody else admits."""
        keeps = not self._all_decide()
        self.kill_node(node)

        def back() -> None:
            if not keeps:
                self._empty(node)
            self.restart(node)

        return back

    def remove_and_admit(self, node: Node) -> Callable[[], None] | None:
        """The founder puts one out of the run, and lets it in again. Not one of too few, and not itself."""
        if node is self.nodes[0] or not Home(node.home).identity_key.exists() or not self._all_decide():
            return None
        peer = peer_of(node)
        if not self.ask("remove", peer, "--why", "chaos"):
            return None
        self.out.add(peer)

        def back() -> None:
            if self.ask("admit", peer):
                self.out.discard(peer)

        return back

    def lose_key(self, node: Node) -> Callable[[], None]:
        """Its disk, and another key takes its seat. Of the founder, and of too few: only a restart."""
        keeps = node is self.nodes[0] or not self._all_decide() or not Home(node.home).identity_key.exists()
        old = "" if keeps else peer_of(node)
        self.kill_node(node)

        def back() -> None:
            if not keeps:
                self._empty(node)
                new = tapestry("id", "--home", node.home).stdout.strip()
                self.ask("propose", "rekey", old, new)
            self.restart(node)

        return back

    def _empty(self, node: Node) -> None:
        key = node.home / "identity.key"
        kept = key.read_bytes() if node is self.nodes[0] and key.exists() else b""
        shutil.rmtree(node.home, ignore_errors=True)
        if kept:
            node.home.mkdir(mode=0o700)
            with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                file.write(kept)

    def _all_decide(self) -> bool:
        """Whether the loss of one for good leaves a quorum."""
        end = time.monotonic() + ELECTORATE_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError, ValueError, KeyError):
                if any(n.electorate() == len(self.nodes) for n in self.nodes if alive(n)):
                    return True
            time.sleep(POLL_S)
        return False

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
        self._kill_child(node, Node.trainer)

    def kill_p2pd(self, node: Node) -> None:
        self._kill_child(node, Node.p2pd)

    def freeze(self, node: Node) -> Callable[[], None] | None:
        process = node.process
        if process is None or not alive(node):
            return None
        process.send_signal(signal.SIGSTOP)
        return lambda: process.send_signal(signal.SIGCONT)

    def wrong_clock(self, node: Node) -> Callable[[], None]:
        """A restart with another time of day; the start after that has the right one again."""
        self.kill_node(node)

        def back() -> None:
            shift_s = self.rng.uniform(-CLOCK_S, CLOCK_S)
            node.shift_clock(shift_s)
            self.say(f"node={node.home.name} clock_shift_s={shift_s:.0f}")
            self.restart(node)

        return back

    def full_disk(self, node: Node) -> Callable[[], None]:
        """Not a byte left. A node that had something to write has said so and gone; it lost nothing."""
        if not alive(node):
            return lambda: self.restart(node)
        process, epoch = node.process, node_epoch(node)
        filler = node.home.with_name("filler")
        fill(filler)
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(FULL_S)
            said = "No space left" in node.tail(5)
            assert code > 0 and said, f"{node.home.name}: exit {code} on a full disk:\n{node.tail(5)}"
        if alive(node):
            moved = node_epoch(node) - epoch
            assert moved <= 1, f"{node.home.name}: {moved} epochs further with a full disk"

        def back() -> None:
            filler.unlink()
            if not alive(node):
                kept = Store(Home(node.home), crypto_of(node)).load().epoch
                assert kept >= epoch, f"{node.home.name}: epoch {epoch} shown, {kept} on its disk"
                self.restart(node)

        return back

    def cut_one_way(self, node: Node) -> Callable[[], None]:
        """Nothing of what one sends reaches another; the way back is open."""
        other = self.rng.choice([n for n in self.nodes if n is not node])
        return self._cut([(self.nodes.index(node), self.nodes.index(other))])

    def cut_both_ways(self, node: Node) -> Callable[[], None]:
        other = self.rng.choice([n for n in self.nodes if n is not node])
        a, b = self.nodes.index(node), self.nodes.index(other)
        return self._cut([(a, b), (b, a)])

    def islands(self, node: Node) -> Callable[[], None]:
        """The node and perhaps others on one side, the rest on the other."""
        indices = list(range(len(self.nodes)))
        self.rng.shuffle(indices)
        first = self.nodes.index(node)
        size = self.rng.randint(1, len(indices) // 2)
        here = [first, *(i for i in indices if i != first)][:size]
        there = [i for i in indices if i not in here]
        return self._cut([pair for a in here for b in there for pair in ((a, b), (b, a))])

    def _cut(self, pairs: list[tuple[int, int]]) -> Callable[[], None]:
        assert self.net is not None
        net = self.net
        self.say(f"cut={pairs}")
        for a, b in pairs:
            net.cut(a, b)

        def back() -> None:
            for a, b in pairs:
                net.join(a, b)

        return back

    def _kill_child(self, node: Node, child_of: Callable[[Node], psutil.Process | None]) -> None:
        if not alive(node):
            return
        with contextlib.suppress(psutil.Error):  # it has just gone by itself
            if child := child_of(node):
                child.kill()


def alive(node: Node) -> bool:
    return node.process is not None and node.process.poll() is None


def node_epoch(node: Node) -> int:
    """What the node shows; 0 while it does not answer."""
    try:
        return int(node.status()["epoch"])
    except (OSError, ValueError, KeyError):
        return 0


def peer_of(node: Node) -> str:
    return Identity.load(Home(node.home).identity_key).peer_id


def crypto_of(node: Node) -> NodeCrypto:
    return NodeCrypto(Identity.load(Home(node.home).identity_key))


def resident(node: Node) -> int:
    """Bytes of memory of the node, its trainer and its p2pd; what they share counts in each."""
    return sum(p.memory_info().rss for p in [psutil.Process(node.pid), *node.children()])


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**20))
    with path.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1))
        except OSError as error:
            assert error.errno == errno.ENOSPC


def _run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, stdin=subprocess.DEVNULL)


Fault = Callable[[Chaos, Node], Callable[[], None] | None]
FAULTS: dict[str, Fault] = {
    "kill_node": Chaos.kill_node,
    "kill_trainer": Chaos.kill_trainer,
    "kill_p2pd": Chaos.kill_p2pd,
    "freeze": Chaos.freeze,
    "stop_and_start": Chaos.stop_and_start,
    "lose_home": Chaos.lose_home,
    "lose_key": Chaos.lose_key,
    "remove_and_admit": Chaos.remove_and_admit,
    "corrupt_checkpoint": Chaos.corrupt_checkpoint,
    "wrong_clock": Chaos.wrong_clock,
}
DISK_FAULTS: dict[str, Fault] = {"full_disk": Chaos.full_disk}
LINK_FAULTS: dict[str, Fault] = {
    "cut_one_way": Chaos.cut_one_way,
    "cut_both_ways": Chaos.cut_both_ways,
    "islands": Chaos.islands,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--netns", action="store_true", help="a network namespace per node; cut links")
    parser.add_argument("--only", default="", metavar="FAULT,...", help="no other faults than these")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--keep", type=Path, help="leave homes and logs in this new folder")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, exit_by_signal)
    with contextlib.ExitStack() as stack:
        try:
            net = stack.enter_context(Net(options.nodes)) if options.netns else None
        except NetError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        folder = stack.enter_context(work_folder(options.keep, "tapestry-chaos-"))
        chaos = Chaos(folder, options.nodes, options.seed, net, disks=os.geteuid() == 0)
        if not chaos.disks:
            chaos.say("no full disks: they need root")
        stack.callback(chaos.close)
        failure = ""
        try:
            chaos.start_all()
            chaos.run(options.minutes, options.only)
            chaos.settle()
            chaos.watch.stop.set()
            chaos.weigh()
            chaos.stop()
            chaos.prove()
        except AssertionError as error:
            failure = str(error)
            chaos.say(f"FAILED {failure}")
        report(chaos, options, failure)
        if options.keep and chaos.disks:
            for node in chaos.nodes:  # the disks go
                shutil.copytree(node.home, folder / "homes" / node.home.name, ignore_dangling_symlinks=True)
    return 1 if failure else 0


def report(chaos: Chaos, options: argparse.Namespace, failure: str) -> None:
    gaps = chaos.watch.gaps()
    figures = {
        "nodes": options.nodes,
        "minutes": options.minutes,
        "seed": options.seed,
        "netns": options.netns,
        "failure": failure,
        "epochs": chaos.watch.epoch,
        "median_epoch_s": round(statistics.median(gaps or [0.0]), 2),
        "forced": chaos.forced,
        "seen_apart": chaos.apart,
        "settled_s": round(chaos.settled_s, 1),
        "memory_mb": [[start >> 20, end >> 20] for start, end in chaos.memory],
        "faults": {
            name: {
                "count": len(times),
                "median_s": round(statistics.median(times), 2),
                "worst_s": round(max(times), 2),
                "all_s": [round(t, 2) for t in times],
            }
            for name, times in sorted(chaos.times.items())
        },
    }
    print(f"{figures['epochs']} epochs, one every {figures['median_epoch_s']} s (median)")
    print(f"{'fault':20} {'count':>5} {'median s':>9} {'worst s':>8}")
    for name, row in figures["faults"].items():
        print(f"{name:20} {row['count']:5} {row['median_s']:9.2f} {row['worst_s']:8.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
