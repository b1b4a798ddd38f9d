"""Nodes as a script sees them: started, watched, compared, killed and cleaned up after.

A node is a daemon like any other, started with `tapestry start` on loopback with free ports. It is known
from outside only: by its HOME/node.json, /status, /metrics, HOME/chain.jsonl and exit code. `Watch` looks at
several of them, and ends the story when one ends unasked or when an epoch is shown with two state digests.

Imported by quickstart.py and quickstart_base.py; starts nothing and sets no signal handler by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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

SWEEP_S = 0.5  # between two looks at the nodes
HTTP_TIMEOUT_S = 3.0
HTTP_BYTES_MAX = 4 * 2**20
STOP_S = 12.0  # the daemon promises 10
COMMAND_S = 30.0  # of a command that does little
INVITE_S = 90.0  # it waits for a record, for 60 s at most
INIT_S = 180.0  # with a base of 135M parameters 15 s on two cores that do nothing else
EXPORT_S = 300.0  # the same: 20 s
GONE_S = 5.0  # after kill -9 of a node, for its own children to be gone
PR_SET_PDEATHSIG = 1  # prctl(2)
INSTALLED = (sys.executable, "-P", "-m", "tapestry.node.cli")


@dataclass(frozen=True)
class Options:
    """Of scripts/quickstart."""

    minutes: float
    base: Path | None  # absolute; None: the story without one
    epochs: int  # with a base
    keep: Path | None
    seed: int
    plain: bool
    tapestry: tuple[str, ...]


class Story(Protocol):
    """What `told` tells."""

    def tell(self, signals: Signals) -> None:
        """Raises Failed when something that was promised did not hold."""

    def stop(self, signals: Signals) -> None:
        """End all its nodes; may be called twice."""

    def conclude(self, signals: Signals) -> None:
        """Stop, report and judge. Raises Failed."""


def told(make: Callable[[Path, Show], Story], title: str, options: Options) -> int:
    """Tell a story to its end, whatever end that is, and leave nothing behind; returns the exit code."""
    signals = Signals()
    with contextlib.ExitStack() as stack:
        try:
            show = stack.enter_context(opened_show(title, options.plain))
            place = stack.enter_context(opened_place(options.keep))
            story = make(place, show)
            stack.callback(story.stop, signals)
            story.tell(signals)
            story.conclude(signals)
            return 0
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


# ---- several nodes -----------------------------------------------------------------------------------


class Watch:
    """Some nodes, and what was seen of them."""

    def __init__(self, nodes: Sequence[Node], show: Show, began_s: float, *, one_run: bool = True) -> None:
        self.nodes = nodes
        self.show = show
        self.began_s = began_s
        self.one_run = one_run  # else each trains alone, and their digests are not compared
        self.digests: dict[
            int, dict[str, list[str]]
        ] = {}  # epoch -> state digest -> the nodes that showed it

    def agreed(self) -> bool:
        return len({(node.epoch, node.digest) for node in self.nodes}) == 1 and bool(self.nodes[0].digest)

    def wait(self, condition: Callable[[], bool], what: str, limit_s: float) -> None:
        deadline_s = time.monotonic() + limit_s
        while True:
            self.sweep()
            if condition():
                return
            if time.monotonic() >= deadline_s:
                raise Failed(f"waited {limit_s:.0f} s in vain for {what}", self.last_words())
            time.sleep(SWEEP_S)

    def sleep(self, duration_s: float) -> None:
        end_s = time.monotonic() + duration_s
        while (left_s := end_s - time.monotonic()) > 0:
            self.sweep()
            time.sleep(min(SWEEP_S, left_s))

    def sweep(self) -> None:
        """Look at every node once; an end that nobody asked for, or a second digest of an epoch, raises."""
        for node in self.nodes:
            code = node.ended()
            if code is not None:
                raise Failed(f"{node.label} ended with exit code {code}", node.log_tail())
            node.look()
            if self.one_run:
                self._compare(node)
        self.show.update(self.nodes, time.monotonic() - self.began_s)

    def _compare(self, node: Node) -> None:
        if not node.digest:
            return
        seen = self.digests.setdefault(node.epoch, {})
        shown_by = seen.setdefault(node.digest, [])
        if node.label not in shown_by:
            shown_by.append(node.label)
        if len(seen) > 1:
            both = " and ".join(f"{digest[:16]} ({labels[0]})" for digest, labels in seen.items())
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
                self.show.event(f"{node.label}: does not end, killed with SIGKILL", bad=True)
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

    label: str  # "node 2", and node2 is its home's name
    place: Path
    tapestry: tuple[str, ...]
    flags: tuple[str, ...]  # of every `tapestry start`: what it trains on, and more
    ends_by_itself: bool = False  # so that only an exit code other than 0 is unexpected
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
        return self.place / self.label.replace(" ", "")

    @property
    def log(self) -> Path:
        return self.home.with_suffix(".log")

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

    def make_home(self, *options: str) -> None:
        """With `tapestry init`, for who founds a run; one thread, for others share this machine."""
        run_command([*self.tapestry, "init", str(self.home), *options], "tapestry init", INIT_S)
        replace_key(self.home / "node.toml", "threads", 1)

    def make_home_of_joiner(self) -> None:
        """It takes the run spec from its peer; its own affairs need one line."""
        self.home.mkdir(mode=0o700)
        (self.home / "node.toml").write_text("threads = 1  # three nodes share this machine\n")

    def invitation(self, uses: int) -> str:
        """A line with which so many join at once. The node must be ready."""
        command = [*self.tapestry, "invite", "--home", str(self.home), "--uses", str(uses)]
        return run_command(command, "tapestry invite", INVITE_S)

    def make_id(self) -> str:
        """Its peer id, before its first start."""
        return run_command([*self.tapestry, "id", "--home", str(self.home)], "tapestry id", COMMAND_S)

    def start(self, peers: list[str]) -> str:
        """Start the daemon; returns the command as one would type it."""
        self.peers = peers
        arguments = ["start", "--home", str(self.home), *self.flags]
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
            self.sent = network_bytes(fetched(f"{self.info['http']}/metrics").decode(), "sent")
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
        code = self.process.poll()
        return None if self.ends_by_itself and code == 0 else code

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
            return [f"{self.label} | {line}" for line in lines]
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


def replace_key(path: Path, key: str, value: object, section: str = "") -> None:
    """Change a number in a file that `tapestry init` wrote. Without a section the key must be the only one
    of its name. Raises Failed."""
    text = path.read_text()
    begin, end = 0, len(text)
    if section:
        match = re.search(rf"(?ms)^\[{section}\]$.*?(?=^\[|\Z)", text)
        begin, end = match.span() if match else (0, 0)
    part, count = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text[begin:end])
    if count != 1:
        raise Failed(f"{path} has {count} keys {key}, expected one")
    path.write_text(text[:begin] + part + text[end:])


def run_command(command: Sequence[str], what: str, limit_s: float) -> str:
    """What it says. Raises Failed, with what it said, when `what` does not end with 0 and in time."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, env=environment(), check=False
        )
    except subprocess.TimeoutExpired as late:
        raise Failed(f"{what} took more than {limit_s:.0f} s") from late
    if done.returncode:
        raise Failed(f"{what} ended with exit code {done.returncode}", done.stderr.splitlines())
    return done.stdout.strip()


def fetched(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the node is local: no proxy
    with opener.open(url, timeout=HTTP_TIMEOUT_S) as response:
        return bytes(response.read(HTTP_BYTES_MAX))


def network_bytes(metrics: str, direction: str) -> dict[str, float]:
    """kind -> bytes that were sent or received, from tapestry_network_bytes_total{direction=...,kind=...}."""
    pattern = rf'^tapestry_network_bytes_total\{{direction="{direction}",kind="(\w+)"\}} (\S+)$'
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


# ---- what they promised -------------------------------------------------------------------------------


def verdict(watch: Watch) -> list[str]:
    """What did not hold of what every run promises, in one line each. The nodes have been stopped."""
    chains = {node.label: node.records() for node in watch.nodes}
    run_id = watch.nodes[0].info["run_id"]
    faults = [
        fault
        for label, chain in chains.items()
        for fault in chain_faults(label, chain, run_id, watch.digests)
    ]
    shortest = min(len(chain) for chain in chains.values())
    heads = {tuple(record.head for record in chain[:shortest]) for chain in chains.values()}
    if len(heads) != 1:
        faults.append("the nodes' chains differ")
    return faults + end_faults(watch.nodes)


def end_faults(nodes: Sequence[Node]) -> list[str]:
    faults = []
    if any(node.killed_at_end for node in nodes):
        faults.append("a node did not end within its time after SIGTERM")
    if any(node.orphans for node in nodes):
        faults.append("a process outlived its node")
    return faults


def chain_faults(
    label: str, chain: list[ChainRecord], run_id: str, digests: Mapping[int, Collection[str]]
) -> list[str]:
    """A lost epoch is a gap, a break of the links, or an epoch that was shown and is not in the chain."""
    epochs = [record.epoch for record in chain]
    if epochs != list(range(1, len(chain) + 1)):
        return [f"{label}: the epochs of its chain are not 1, 2, 3 ...: {epochs}"]
    shown = max(digests, default=0)
    if len(chain) < shown:
        return [f"{label}: its chain ends at epoch {len(chain)}, epoch {shown} was shown"]
    heads = [run_id, *(record.head for record in chain)]
    faults = [
        f"{label}: record {record.epoch} does not follow the one before"
        for record, head in zip(chain, heads, strict=False)
        if record.prev != head
    ]
    return faults + [
        f"{label}: state {record.epoch - 1} was shown with another digest than the signed one"
        for record in chain
        if record.state_digest not in digests.get(record.epoch - 1, {record.state_digest})
    ]


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
def opened_show(title: str, plain: bool) -> Iterator[Show]:
    console = Console(highlight=False)
    if plain or not console.is_terminal:
        yield Lines()
        return
    with Live(console=console, auto_refresh=False) as live:  # no thread: we fork
        yield LiveTable(live, title)


class LiveTable:
    """One table that stays; events scroll by above it."""

    def __init__(self, live: Live, title: str) -> None:
        self._live = live
        self._title = title

    def update(self, nodes: Sequence[Node], elapsed_s: float) -> None:
        table = Table(title=f"{self._title}, {elapsed_s:.0f} s", title_justify="left")
        for column in ("node", "phase"):
            table.add_column(column)
        for column in ("epoch", "loss", "tokens/s", "peers", "sent", "state digest"):
            table.add_column(column, justify="right")
        for node in nodes:
            table.add_row(node.label.removeprefix("node "), *cells(node))
        urls = [Text(f"{n.label}  {n.info['http']}/metrics") for n in nodes if n.info.get("http")]
        self._live.update(Group(table, *urls), refresh=True)

    def event(self, text: str, *, bad: bool = False) -> None:
        self._live.console.print(Text(text, style="bold red" if bad else ""), soft_wrap=True)

    def finish(self) -> None:
        """The table stays as it is; what is said from now on comes below it."""
        self._live.stop()


class Lines:
    """A line for a node whenever its epoch moves or it appears, for logs and pipes."""

    def __init__(self) -> None:
        self._shown: dict[str, tuple[int, bool]] = {}

    def update(self, nodes: Sequence[Node], elapsed_s: float) -> None:
        for node in nodes:
            state = (node.epoch, bool(node.info.get("http")))
            if not node.status or self._shown.get(node.label) == state:
                continue
            if state[1] and not self._shown.get(node.label, (0, False))[1]:
                self.event(f"{node.label}: metrics {node.info['http']}/metrics")
            self._shown[node.label] = state
            names = ("phase", "epoch", "loss", "tokens/s", "peers", "sent", "state digest")
            words = "  ".join(f"{name} {cell}" for name, cell in zip(names, cells(node), strict=True))
            self.event(f"{elapsed_s:6.1f} s  {node.label}  {words}")

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
