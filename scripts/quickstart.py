"""The main job: three nodes on this machine train one language model, and one of them is killed.

The nodes are daemons like any other, started with `tapestry start` on loopback with free ports, each on
another third of the Python standard library's sources. This script knows them from outside only: by their
HOME/node.json, /status, /metrics, HOME/chain.jsonl and exit codes. What it demands of them is in `verdict`.

Run by scripts/quickstart, which makes the environment. Exit codes: 0 all held; 1 something did not, said in
one line; 2 the command line is wrong; 128 + n ended by signal n.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from blake3 import blake3
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tapestry.node.disk.files import unseal
from tapestry.node.protocol.chain import body_from_dict, body_to_dict, canonical

NODES = 3
SWEEP_S = 0.5  # between two looks at the nodes
HTTP_TIMEOUT_S = 3.0
HTTP_BYTES_MAX = 4 * 2**20
READY_S = 90.0  # to import, start p2pd and join: 10 s on two cores; a slow machine takes longer
PROGRESS_S = 90.0  # for what takes two or three epochs of 5 s each
STOP_S = 12.0  # the daemon promises 10
GONE_S = 5.0  # after kill -9 of a node, for its own children to be gone
ENDING_S = 40.0  # of the whole time, for stopping, exporting and sampling: 20 s on two cores
EPOCHS_BEFORE_KILL = 3
EPOCHS_WITHOUT = 2
LOSS_FALL_MIN = 0.30
INT8_BLOCK_BYTES_PER_VALUE = 1 + 4 / 256  # a code each, and a float32 scale per block of 256
FLOAT32_BYTES_PER_VALUE = 4
SAMPLE_BYTES = 200
PR_SET_PDEATHSIG = 1  # prctl(2)


def main(arguments: Sequence[str]) -> int:
    options = parsed(arguments)
    signals = Signals()
    with contextlib.ExitStack() as stack:
        try:
            show = stack.enter_context(opened_show(options))
            place = stack.enter_context(opened_place(options.keep))
            swarm = Swarm(options, place, show)
            stack.callback(swarm.stop_all, signals)
            swarm.tell_story()
            return conclude(swarm, signals)
        except Failed as failure:
            show.event(f"FAILED: {failure}", bad=True)
            for line in failure.details:
                show.event(f"  {line}")
            return 1
        except Ended as end:
            show.event(f"ended by {signal.Signals(end.number).name}: stopping the nodes")
            return 128 + end.number


class Failed(Exception):
    """Something that was promised did not hold; one line, and perhaps more that explain it."""

    def __init__(self, line: str, details: Sequence[str] = ()) -> None:
        self.details = tuple(details)
        super().__init__(line)


class Ended(BaseException):
    """A signal asked us to end. Like KeyboardInterrupt no Exception, so that nothing on the way eats it."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


class Signals:
    """The first SIGINT, SIGTERM or SIGHUP raises Ended; further ones only count, and hasten the stopping."""

    def __init__(self) -> None:
        self.count = 0
        self.raised = 0
        self.ending = False  # the nodes are being stopped: a signal hastens that and no more
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.count += 1
        if not self.raised and not self.ending:
            self.raised = 1
            raise Ended(number)

    @property
    def hasten(self) -> bool:
        return self.count > self.raised


@dataclass(frozen=True)
class Options:
    minutes: float
    keep: Path | None
    seed: int
    plain: bool
    tapestry: tuple[str, ...]


def parsed(arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart",
        description="Three nodes on this machine train one model; one is killed and comes back.",
    )
    parser.add_argument("--minutes", type=float, default=3.5, help="the whole length, about (default: 3.5)")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="put homes, logs and model there, and leave them"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the model, of who is killed and when (default: 0, kills node 2)",
    )
    parser.add_argument("--plain", action="store_true", help="plain lines also on a terminal")
    parser.add_argument(
        "--tapestry", metavar="COMMAND", help="the command to run (default: the installed one)"
    )
    given = parser.parse_args(arguments)
    if not (math.isfinite(given.minutes) and 0 <= given.minutes <= 24 * 60):
        parser.error("--minutes: from 0 to 1440")
    if not 0 <= given.seed < 2**32:
        parser.error("--seed: from 0 to 4294967295")
    if (
        given.keep is not None
        and given.keep.exists()
        and (not given.keep.is_dir() or any(given.keep.iterdir()))
    ):
        parser.error(f"--keep: {given.keep} is there already: name a new or an empty folder")
    installed = (sys.executable, "-P", "-m", "tapestry.node.cli")
    tapestry = tuple(shlex.split(given.tapestry)) if given.tapestry else installed
    return Options(given.minutes, given.keep, given.seed, given.plain, tapestry)


@contextlib.contextmanager
def opened_place(keep: Path | None) -> Iterator[Path]:
    """Where the homes, the logs and the model lie: removed afterwards unless it is to be kept."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
        return
    place = Path(tempfile.mkdtemp(prefix="tapestry-quickstart-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


# ---- the story ---------------------------------------------------------------------------------------


class Swarm:
    """The three nodes, what was seen of them, and the story they are taken through."""

    def __init__(self, options: Options, place: Path, show: Show) -> None:
        self.options = options
        self.place = place
        self.show = show
        self.began_s = time.monotonic()
        self.random = random.Random(options.seed)
        self.nodes = [Node(number, place, options.tapestry) for number in range(1, NODES + 1)]
        self.digests: dict[int, dict[str, int]] = {}  # epoch -> state digest -> the node that showed it first

    def tell_story(self) -> None:
        self._start_all()
        self._train_together()
        victim = self.random.choice(self.nodes)
        self._kill(victim)
        self._go_on_without(victim)
        self._bring_back(victim)
        self._train_until_time_is_up()

    def _start_all(self) -> None:
        founder = self.nodes[0]
        founder.make_home_of_founder(self.options.seed)
        self._start(founder, [])
        address = founder.address
        for node in self.nodes[1:]:
            node.make_home_of_joiner()
            self._start(node, [address], wait=False)
        for node in self.nodes[1:]:
            self._wait_ready(node)

    def _start(self, node: Node, peers: list[str], *, wait: bool = True) -> None:
        self.show.event(f"node {node.number}: {node.start(peers)}")
        if wait:
            self._wait_ready(node)

    def _wait_ready(self, node: Node) -> None:
        self._wait(lambda: node.ready, f"node {node.number} to be ready", READY_S)

    def _train_together(self) -> None:
        def together() -> bool:
            return sum(len(record.contributors) == NODES for record in self.records()) >= EPOCHS_BEFORE_KILL

        self._wait(
            together, f"{EPOCHS_BEFORE_KILL} epochs with contributions of all three", READY_S + PROGRESS_S
        )

    def _kill(self, victim: Node) -> None:
        self._sleep(self.random.uniform(0.0, 3.0))  # so that it falls into any phase of a round
        family = victim.kill()
        self.show.event(f"node {victim.number}: killed with SIGKILL at epoch {victim.epoch}", bad=True)
        self._wait(lambda: not alive(family), f"the children of node {victim.number} to be gone", GONE_S)

    def _go_on_without(self, victim: Node) -> None:
        epoch = max(node.epoch for node in self.nodes)
        others = [node for node in self.nodes if node is not victim]

        def went_on() -> bool:
            without = [
                r for r in self.records(others[0]) if r.epoch > epoch and victim.peer_id not in r.contributors
            ]
            return len(without) >= EPOCHS_WITHOUT and all(
                n.epoch >= without[EPOCHS_WITHOUT - 1].epoch for n in others
            )

        self._wait(went_on, f"{EPOCHS_WITHOUT} epochs of the other two", PROGRESS_S)
        numbers = " and ".join(str(node.number) for node in others)
        self.show.event(
            f"nodes {numbers}: went on by themselves to epoch {min(node.epoch for node in others)}"
        )

    def _bring_back(self, victim: Node) -> None:
        """The same command again. A founder names one of the others: it has no peer to start from."""
        others = [node for node in self.nodes if node is not victim]
        self._start(victim, victim.peers or [others[0].address])
        epoch = max(node.epoch for node in others)

        def caught_up() -> bool:
            return victim.epoch >= epoch and victim.digest in self.digests.get(victim.epoch, {})

        self._wait(caught_up, f"node {victim.number} to catch up with epoch {epoch}", PROGRESS_S)
        self.show.event(
            f"node {victim.number}: caught up at epoch {victim.epoch}, the same bits as the others"
        )

        def contributes() -> bool:
            return any(r.epoch > epoch and victim.peer_id in r.contributors for r in self.records(others[0]))

        self._wait(contributes, f"a contribution of node {victim.number}", PROGRESS_S)
        self.show.event(f"node {victim.number}: contributes again")

    def _train_until_time_is_up(self) -> None:
        end_s = self.began_s + self.options.minutes * 60 - ENDING_S
        self._wait(lambda: time.monotonic() >= end_s, "the time to be up", 24 * 3600.0)
        self._wait(self.agreed, "all three to show one epoch and one state digest", PROGRESS_S)
        self.show.event(f"all three: epoch {self.nodes[0].epoch}, state digest {self.nodes[0].digest}")

    def agreed(self) -> bool:
        return len({(node.epoch, node.digest) for node in self.nodes}) == 1 and bool(self.nodes[0].digest)

    def records(self, node: Node | None = None) -> list[ChainRecord]:
        return (node or self.nodes[0]).records()

    # -- looking

    def _wait(self, condition: Callable[[], bool], what: str, limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        while True:
            self.sweep()
            if condition():
                return
            if time.monotonic() >= deadline_s:
                raise Failed(f"waited {limit_s:.0f} s in vain for {what}", self.last_words())
            time.sleep(SWEEP_S)

    def _sleep(self, duration_s: float) -> None:
        end_s = time.monotonic() + duration_s
        while (left_s := end_s - time.monotonic()) > 0:
            self.sweep()
            time.sleep(min(SWEEP_S, left_s))

    def sweep(self) -> None:
        """Look at every node once; an end that nobody asked for, or a second digest of an epoch, raises."""
        for node in self.nodes:
            code = node.ended()
            if code is not None:
                raise Failed(f"node {node.number} ended with exit code {code}", node.log_tail())
            node.look()
            self._compare(node)
        self.show.update(self.nodes, time.monotonic() - self.began_s)

    def _compare(self, node: Node) -> None:
        if not node.digest:
            return
        seen = self.digests.setdefault(node.epoch, {})
        seen.setdefault(node.digest, node.number)
        if len(seen) > 1:
            both = " and ".join(f"{digest[:16]} (node {number})" for digest, number in seen.items())
            raise Failed(f"epoch {node.epoch} has two state digests: {both}")

    def last_words(self) -> list[str]:
        return [line for node in self.nodes for line in node.log_tail(8)]

    def stop_all(self, signals: Signals) -> None:
        """SIGTERM, and SIGKILL for who does not end in time or when a second signal says to hurry."""
        signals.ending = True  # what follows must run to its end
        for node in self.nodes:
            node.terminate()
        deadline_s = time.monotonic() + STOP_S
        while any(node.running for node in self.nodes) and time.monotonic() < deadline_s:
            if signals.hasten:
                break
            time.sleep(0.05)
        for node in self.nodes:
            if node.running:
                self.show.event(f"node {node.number}: does not end, killed with SIGKILL", bad=True)
                node.killed_at_end = True
                node.kill()
        self._kill_orphans()

    def _kill_orphans(self) -> None:
        families = {member for node in self.nodes for member in node.family}
        deadline_s = time.monotonic() + GONE_S
        while alive(families) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        for pid, start_ticks in alive(families):
            if start_ticks_of(pid) == start_ticks:
                self.show.event(f"process {pid} outlived its node: killed", bad=True)
                self.nodes[0].orphans += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


# ---- one node ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChainRecord:
    """A line of HOME/chain.jsonl."""

    epoch: int
    prev: str
    head: str
    state_digest: str  # of the state before
    contributors: frozenset[str]
    forced: bool


@dataclass
class Node:
    """One daemon, as it is seen from outside."""

    number: int
    place: Path
    tapestry: tuple[str, ...]
    peers: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    info: dict[str, Any] = field(default_factory=dict)  # node.json
    status: dict[str, Any] = field(default_factory=dict)
    family: set[tuple[int, int]] = field(default_factory=set)  # (pid, start) of every process of this node
    expected_end: bool = True
    killed_at_end: bool = False
    orphans: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)  # (epoch, validation loss), first and last
    sent: dict[str, float] = field(default_factory=dict)  # bytes by kind, of the process that runs
    sent_before: dict[str, float] = field(default_factory=dict)  # of those that ran before

    @property
    def home(self) -> Path:
        return self.place / f"node{self.number}"

    @property
    def log(self) -> Path:
        return self.place / f"node{self.number}.log"

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def ready(self) -> bool:
        return self.running and bool(self.info) and bool(self.status)

    @property
    def address(self) -> str:
        return str(self.info["addresses"][0])

    @property
    def peer_id(self) -> str:
        return str(self.info["peer_id"])

    @property
    def epoch(self) -> int:
        epoch = self.status.get("epoch")
        return epoch if isinstance(epoch, int) else -1

    @property
    def digest(self) -> str:
        return str(self.status.get("state_digest") or "")

    @property
    def bytes_sent(self) -> dict[str, float]:
        kinds = dict.fromkeys([*self.sent_before, *self.sent])
        return {kind: self.sent_before.get(kind, 0) + self.sent.get(kind, 0) for kind in kinds}

    def make_home_of_founder(self, seed: int) -> None:
        init = [*self.tapestry, "init", str(self.home), "--preset", "tiny", "--name", "quickstart"]
        done = subprocess.run(
            init, capture_output=True, text=True, timeout=READY_S, env=environment(), check=False
        )
        if done.returncode:
            raise Failed(f"tapestry init ended with exit code {done.returncode}", done.stderr.splitlines())
        replace_key(self.home / "node.toml", "threads", 1)
        replace_key(self.home / "run.toml", "seed", seed)

    def make_home_of_joiner(self) -> None:
        """It takes the run spec from its peer; its own affairs need one line."""
        self.home.mkdir(mode=0o700)
        (self.home / "node.toml").write_text("threads = 1  # three nodes share this machine\n")

    def start(self, peers: list[str]) -> str:
        """Start the daemon; returns the command as one would type it."""
        self.peers = peers
        arguments = ["start", "--home", str(self.home), "--data", f"stdlib:{self.number}/{NODES}"]
        arguments += ["--listen", "/ip4/127.0.0.1/tcp/0", "--http", "127.0.0.1:0"]
        for peer in peers:
            arguments += ["--peer", peer]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.tapestry, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,  # Ctrl-C comes to us alone, and we stop them
                preexec_fn=end_with_parent,
            )
        self.expected_end = False
        self.info, self.status = {}, {}
        return shlex.join(["tapestry", *arguments])

    def look(self) -> None:
        """Read node.json, /status and /metrics. A node that does not answer keeps what it said before."""
        if not self.running:
            return
        assert self.process is not None
        self.family |= family_of(self.process.pid)
        if not self.info:
            self.info = self._read_info()
            if not self.info:
                return
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            status = json.loads(fetched(f"{self.info['http']}/status"))
            self.sent = sent_bytes(fetched(f"{self.info['http']}/metrics").decode())
            self.status = status
            self._keep_loss()

    def _read_info(self) -> dict[str, Any]:
        """node.json, if the process that runs now has written it: the file of a killed one stays behind."""
        assert self.process is not None
        try:
            info = json.loads((self.home / "node.json").read_bytes())
            if info["pid"] != self.process.pid or not info["addresses"] or not info["http"]:
                return {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return dict(info)

    def _keep_loss(self) -> None:
        loss = self.status.get("val_loss")
        if isinstance(loss, int | float):
            self.losses = [*self.losses[:1], (self.epoch, float(loss))]

    def ended(self) -> int | None:
        """The exit code, if the daemon has ended and should not have."""
        if self.process is None or self.expected_end:
            return None
        return self.process.poll()

    def kill(self) -> set[tuple[int, int]]:
        """SIGKILL for the daemon alone; returns the processes that should die with it."""
        assert self.process is not None
        self.expected_end = True
        family = family_of(self.process.pid)
        self.family |= family
        self.process.kill()
        self.process.wait()
        for kind, count in self.sent.items():
            self.sent_before[kind] = self.sent_before.get(kind, 0) + count
        self.sent = {}
        self.status = {**self.status, "phase": "killed", "tokens_per_second": None, "peers": None}
        self.info = {**self.info, "http": ""}
        return family

    def terminate(self) -> None:
        self.expected_end = True
        if self.running:
            assert self.process is not None
            self.family |= family_of(self.process.pid)
            self.process.terminate()

    def records(self) -> list[ChainRecord]:
        """HOME/chain.jsonl so far. A line that is being written is left for the next look."""
        try:
            lines = (self.home / "chain.jsonl").read_bytes().split(b"\n")[:-1]
        except OSError:
            return []
        try:
            return [chain_record(line) for line in lines]
        except ValueError as error:
            raise Failed(f"{self.home / 'chain.jsonl'}: {error}") from error

    def log_tail(self, count: int = 15) -> list[str]:
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").splitlines()[-count:]
            return [f"node {self.number} | {line}" for line in lines]
        return []


def chain_record(line: bytes) -> ChainRecord:
    """Raises ValueError for a line that is not whole, or holds no record."""
    body = body_from_dict(unseal(line)["body"])
    return ChainRecord(
        epoch=body.epoch,
        prev=body.prev,
        head=blake3(canonical(body_to_dict(body))).hexdigest(),
        state_digest=body.state_digest,
        contributors=frozenset(member.peer for member in body.members if member.weight),
        forced=body.forced,
    )


def environment() -> dict[str, str]:
    """Ours, without what would configure the nodes; one thread each, for there may be but two cores."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TAPESTRY_")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def end_with_parent() -> None:
    """In the child: SIGTERM when this script dies in whatever way, so that no node stays behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def replace_key(path: Path, key: str, value: int) -> None:
    text, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", path.read_text())
    if count != 1:
        raise Failed(f"{path} has {count} keys {key}, expected one")
    path.write_text(text)


def fetched(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the node is local: no proxy
    with opener.open(url, timeout=HTTP_TIMEOUT_S) as response:
        return bytes(response.read(HTTP_BYTES_MAX))


def sent_bytes(metrics: str) -> dict[str, float]:
    """kind -> bytes, from tapestry_network_bytes_total{direction="sent",kind=...}."""
    pattern = r'^tapestry_network_bytes_total\{direction="sent",kind="(\w+)"\} (\S+)$'
    return {kind: float(value) for kind, value in re.findall(pattern, metrics, re.MULTILINE)}


# ---- processes ---------------------------------------------------------------------------------------


def family_of(pid: int) -> set[tuple[int, int]]:
    """The process and all below it, each with its start time: a pid alone may be used again."""
    children: dict[int, list[int]] = {}
    for other in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
        fields = stat_fields(other)
        if fields:
            children.setdefault(int(fields[1]), []).append(other)
    members, queue = set(), [pid]
    while queue:
        member = queue.pop()
        start_ticks = start_ticks_of(member)
        if start_ticks is not None:
            members.add((member, start_ticks))
        queue += children.get(member, [])
    return members


def alive(family: set[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(pid, start_ticks) for pid, start_ticks in sorted(family) if start_ticks_of(pid) == start_ticks]


def start_ticks_of(pid: int) -> int | None:
    """When the process began; None if it is gone or waits to be reaped."""
    fields = stat_fields(pid)
    return None if not fields or fields[0] in ("Z", "X") else int(fields[19])


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on. proc(5); the name before may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


# ---- the end -----------------------------------------------------------------------------------------


def conclude(swarm: Swarm, signals: Signals) -> int:
    """Stop the nodes, say what became of them, and judge."""
    agreed = swarm.nodes[0].epoch, swarm.nodes[0].digest
    swarm.show.finish()
    swarm.show.event("stopping the nodes")
    swarm.stop_all(signals)
    signals.ending = False
    chains = {node.number: node.records() for node in swarm.nodes}
    report(swarm, chains)
    faults = verdict(swarm, chains)
    if not faults:
        faults += sample_fault(swarm)
    if faults:
        raise Failed(faults[0], [*faults[1:], *swarm.last_words()])
    took_s = time.monotonic() - swarm.began_s
    swarm.show.event(
        f"OK: epoch {agreed[0]} has the same bits on all three nodes, as every epoch seen before it; "
        f"none was lost, the validation loss fell on all; {took_s:.0f} s in all"
    )
    return 0


def verdict(swarm: Swarm, chains: dict[int, list[ChainRecord]]) -> list[str]:
    """What did not hold, in one line each."""
    faults = [fault for number, chain in chains.items() for fault in chain_faults(number, chain, swarm)]
    shortest = min(len(chain) for chain in chains.values())
    heads = {tuple(record.head for record in chain[:shortest]) for chain in chains.values()}
    if len(heads) != 1:
        faults.append("the nodes' chains differ")
    faults += loss_faults(swarm.nodes)
    if any(node.killed_at_end for node in swarm.nodes):
        faults.append("a node did not end within its time after SIGTERM")
    if any(node.orphans for node in swarm.nodes):
        faults.append("a process outlived its node")
    return faults


def chain_faults(number: int, chain: list[ChainRecord], swarm: Swarm) -> list[str]:
    """A lost epoch is a gap, a break of the links, or an epoch that was shown and is not in the chain."""
    epochs = [record.epoch for record in chain]
    if epochs != list(range(1, len(chain) + 1)):
        return [f"node {number}: the epochs of its chain are not 1, 2, 3 ...: {epochs}"]
    shown = max(swarm.digests, default=0)
    if len(chain) < shown:
        return [f"node {number}: its chain ends at epoch {len(chain)}, epoch {shown} was shown"]
    run_id = swarm.nodes[0].info["run_id"]
    heads = [run_id, *(record.head for record in chain)]
    faults = [
        f"node {number}: record {record.epoch} does not follow the one before"
        for record, head in zip(chain, heads, strict=False)
        if record.prev != head
    ]
    return faults + [
        f"node {number}: state {record.epoch - 1} was shown with another digest than the signed one"
        for record in chain
        if record.state_digest not in swarm.digests.get(record.epoch - 1, {record.state_digest: 0})
    ]


def loss_faults(nodes: Sequence[Node]) -> list[str]:
    """Measured from the run's start: who joins later sees a model that has learned already."""
    if not all(node.losses for node in nodes):
        return [f"node {node.number}: never showed a validation loss" for node in nodes if not node.losses]
    _, start = min(node.losses[0] for node in nodes)
    return [
        f"node {node.number}: validation loss {node.losses[-1][1]:.3f} is not {LOSS_FALL_MIN:.0%} "
        f"below {start:.3f}"
        for node in nodes
        if not node.losses[-1][1] <= (1 - LOSS_FALL_MIN) * start
    ]


def report(swarm: Swarm, chains: dict[int, list[ChainRecord]]) -> None:
    show = swarm.show
    show.event("")
    for node in swarm.nodes:
        chain = chains[node.number]
        contributed = sum(node.peer_id in record.contributors for record in chain)
        losses = " -> ".join(f"{loss:.3f} (epoch {epoch})" for epoch, loss in node.losses)
        show.event(f"node {node.number}: validation loss {losses or 'never shown'}")
        show.event(f"        state digest {node.digest} at epoch {node.epoch}")
        show.event(f"        contributed to {contributed} of the {len(chain)} epochs in its chain")
        show.event(f"        sent {bytes_text(node.bytes_sent)}")
    forced = sum(record.forced for record in chains[1])
    show.event(f"epochs  {len(chains[1])} committed, {forced} of them without a quorum")
    payload = sum(node.bytes_sent.get(kind, 0) for node in swarm.nodes for kind in ("contribution", "result"))
    as_float32 = payload / INT8_BLOCK_BYTES_PER_VALUE * FLOAT32_BYTES_PER_VALUE
    show.event(
        f"bytes   contributions and results: {megabytes(payload)} sent in 8 bits; float32 would have been "
        f"{megabytes(as_float32)} (x {as_float32 / payload if payload else math.nan:.2f})"
    )
    show.event("        (sent bytes / 1.015625 bytes per value of int8-block * 4 bytes per float32; a killed")
    show.event("        process counts up to the last look at it)")


def sample_fault(swarm: Swarm) -> list[str]:
    """Export the shared base as a Hugging Face model and let it write; returns what went wrong."""
    out = swarm.place / "model"
    swarm.show.event("\nexporting the model of node 1, to let it write; some seconds")
    command = [*swarm.options.tapestry, "export", str(out), "--home", str(swarm.nodes[0].home)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=READY_S, env=environment(), check=False
        )
    except subprocess.TimeoutExpired:
        return [f"tapestry export took more than {READY_S:.0f} s"]
    if done.returncode:
        return [f"tapestry export ended with exit code {done.returncode}", *done.stderr.splitlines()]
    import torch

    from tapestry.node.lineage.huggingface import sample  # with torch and transformers 3 s to import

    torch.set_num_threads(1)  # for one byte after another, more threads cost more than they bring
    prompt = "def "
    text = sample(out, prompt, SAMPLE_BYTES, swarm.options.seed)
    swarm.show.event(f"\n{SAMPLE_BYTES} bytes of the exported model after {prompt!r}:\n\n{prompt}{text}\n")
    return []


def bytes_text(sent: dict[str, float]) -> str:
    parts = ", ".join(f"{kind} {megabytes(count)}" for kind, count in sent.items())
    return f"{megabytes(sum(sent.values()))} ({parts})"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


# ---- showing -----------------------------------------------------------------------------------------


class Show(Protocol):
    def update(self, nodes: Sequence[Node], elapsed_s: float) -> None: ...
    def event(self, text: str, *, bad: bool = False) -> None: ...
    def finish(self) -> None: ...


@contextlib.contextmanager
def opened_show(options: Options) -> Iterator[Show]:
    console = Console(highlight=False)
    if options.plain or not console.is_terminal:
        yield Lines()
        return
    with Live(console=console, auto_refresh=False) as live:  # no thread: we fork
        yield LiveTable(live)


class LiveTable:
    """One table that stays; events scroll by above it."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def update(self, nodes: Sequence[Node], elapsed_s: float) -> None:
        table = Table(title=f"Tapestry quickstart, {elapsed_s:.0f} s", title_justify="left")
        for column in ("node", "phase"):
            table.add_column(column)
        for column in ("epoch", "loss", "tokens/s", "peers", "sent", "state digest"):
            table.add_column(column, justify="right")
        for node in nodes:
            table.add_row(str(node.number), *cells(node))
        urls = [Text(f"node {n.number}  {n.info['http']}/metrics") for n in nodes if n.info.get("http")]
        self._live.update(Group(table, *urls), refresh=True)

    def event(self, text: str, *, bad: bool = False) -> None:
        self._live.console.print(Text(text, style="bold red" if bad else ""), soft_wrap=True)

    def finish(self) -> None:
        """The table stays as it is; what is said from now on comes below it."""
        self._live.stop()


class Lines:
    """A line for a node whenever its epoch moves or it appears, for logs and pipes."""

    def __init__(self) -> None:
        self._shown: dict[int, tuple[int, bool]] = {}

    def update(self, nodes: Sequence[Node], elapsed_s: float) -> None:
        for node in nodes:
            state = (node.epoch, bool(node.info.get("http")))
            if not node.status or self._shown.get(node.number) == state:
                continue
            if state[1] and not self._shown.get(node.number, (0, False))[1]:
                self.event(f"node {node.number}: metrics {node.info['http']}/metrics")
            self._shown[node.number] = state
            names = ("phase", "epoch", "loss", "tokens/s", "peers", "sent", "state digest")
            words = "  ".join(f"{name} {cell}" for name, cell in zip(names, cells(node), strict=True))
            self.event(f"{elapsed_s:6.1f} s  node {node.number}  {words}")

    def event(self, text: str, *, bad: bool = False) -> None:
        print(text, flush=True)

    def finish(self) -> None:
        pass


def cells(node: Node) -> list[str]:
    """phase, epoch, loss, tokens/s, peers, sent, state digest; "-" for what is not known."""
    status = node.status
    loss, speed, peers = status.get("loss"), status.get("tokens_per_second"), status.get("peers")
    return [
        str(status.get("phase") or ("starting" if node.running else "-")),
        str(node.epoch) if node.epoch >= 0 else "-",
        f"{loss:.3f}" if isinstance(loss, int | float) else "-",
        f"{speed:.0f}" if isinstance(speed, int | float) else "-",
        "-" if peers is None else str(len(peers) if isinstance(peers, list | dict) else peers),
        megabytes(sum(node.bytes_sent.values())),
        node.digest[:12] or "-",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
