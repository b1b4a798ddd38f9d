"""How long real daemons take to recover from one fault at a time, and whether they do what is guaranteed.

    .venv/bin/python -P scripts/recovery.py [--only kill,freeze,...] [--repeat 4] [--json FILE] [--keep DIR]

Nodes are the founder of a run and those whom it invited, on loopback with the default timings (stall_s 5,
quorum_loss_s 30), the model `nano`, and epochs of about a second. Times are taken where they count: at the
moment in which a record is on a node's disk. What a round normally takes is the median of the rounds before
the fault, in the same run. The scenarios:

    kill      SIGKILL of one of 4 nodes while it exchanges shards; then its restart
    freeze    SIGSTOP of one of 4 nodes while it exchanges shards; then SIGCONT
    trainer   SIGKILL of a trainer; a trainer that runs out of memory
    quorum    SIGKILL of two of 3 nodes at once, with either policy; then both are started again
    apart     two of 4 nodes in network namespaces cannot reach each other, for a minute (needs root)
    islands   5 nodes in network namespaces, cut into 2 and 3 for a minute, and joined again (needs root)
    parted    the same for five minutes: longer than links are kept up and presence lasts
    torchft   SIGKILL of one of 4 torchft replicas, beside ours; with --torchft PYTHON, which can import it

Exit 1 if a guarantee did not hold or a limit was passed; what and how far is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import psutil
from _netns import Net, NetError
from _run import exit_by_signal, work_folder
from e2e.harness import Node, init, tapestry

POLL_S = 0.01
NORMAL_ROUNDS = 8  # before each fault
INNER_STEPS = "50"  # of nano: a second on a machine with other work to do
SHARDS = "4096"  # elements: 12 shards, so that every node has some to reduce
STALL_S, QUORUM_LOSS_S = 5.0, 30.0  # the defaults of run.toml
WAIT_S = 240.0
CUT_S = 60.0
PARTED_S = 300.0  # links are given up after 120 s without a sign of the peer, presence expires after 60 s
TRAIN_S = 1.0  # a replica of torchft, between two averages
# Of 4, each sends 3/4 of a vector; a quarter of it goes once more to 2 of 3: 1.22. All of it again: 1.89.
MOVED_MAX = 1.45


@dataclass(frozen=True, slots=True)
class Committed:
    """A record as it came to lie on a node's disk."""

    at: float
    epoch: int
    weights: dict[str, int]  # peer -> weight
    forced: bool


class Tail:
    """Follows a node's chain.jsonl, whoever writes it: when each record came, and how long the chain was."""

    def __init__(self, node: Node) -> None:
        self.path = node.home / "chain.jsonl"
        self.records: dict[int, Committed] = {}
        self.stop = threading.Event()
        self._read = 0
        threading.Thread(target=self._follow, daemon=True).start()

    @property
    def epoch(self) -> int:
        return max(self.records, default=0)

    def _follow(self) -> None:
        while not self.stop.wait(POLL_S):
            with contextlib.suppress(OSError):
                self._look()

    def _look(self) -> None:
        size = self.path.stat().st_size
        if size < self._read:  # a fork was left
            self._read = 0
        if size == self._read:
            return
        now = time.monotonic()
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            found = [_committed(line, now) for line in whole.splitlines()]
        except (ValueError, KeyError):
            self._read = 0  # rewritten under our eyes
            return
        self._read += len(whole)
        for record in found:
            known = self.records.get(record.epoch)
            if known is None or known.weights != record.weights:
                self.records[record.epoch] = record
        if found:
            for epoch in [e for e in self.records if e > found[-1].epoch]:
                del self.records[epoch]


def _committed(line: bytes, now: float) -> Committed:
    body = json.loads(line)["value"]["body"]
    weights = {peer: weight for peer, weight, *_ in body["members"]}
    return Committed(now, body["epoch"], weights, body["forced"])


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


# --- results ----------------------------------------------------------------------------------------


@dataclass
class Row:
    """One measured time, and what it may be at most."""

    fault: str
    guarantee: str
    limit_s: float | None
    times_s: list[float] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, time_s: float) -> None:
        self.times_s.append(round(time_s, 2))
        if self.limit_s is not None and time_s > self.limit_s:
            self.missed.append(f"{time_s:.2f} s is more than {self.limit_s:g} s")

    def check(self, holds: object, what: str) -> None:
        if not holds:
            self.missed.append(what)

    def line(self) -> str:
        times = self.times_s
        figures = (
            f"{len(times)} | {statistics.median(times):.2f} | {max(times):.2f}" if times else "0 | - | -"
        )
        limit = "-" if self.limit_s is None else f"{self.limit_s:g}"
        held = f"missed {len(self.missed)}" if self.missed else "held"
        return f"| {self.fault} | {self.guarantee} | {figures} | {limit} | {held} |"


# --- scenarios --------------------------------------------------------------------------------------


def kill(folder: Path, repeat: int, rng: random.Random) -> list[Row]:
    """SIGKILL in the middle of a round, and the restart."""
    # Up to the kill the round was a normal one: what comes after bounds what the death has cost.
    died = Row("SIGKILL of one of 4", "the same round commits without it, from the kill", 2.0)
    moved = Row(
        "SIGKILL of one of 4", "only its shards move: bytes sent, as a share of a normal round's", None
    )
    back = Row("restart after SIGKILL", "contributes again, from exec to the record that counts it", 10.0)
    swarm = Swarm(folder, 4)
    try:
        for index in range(repeat):
            victim = swarm.nodes[index % 4]
            survivors = swarm.others(victim)
            normal_s, normal_bytes, begun = swarm.normal_rounds()
            before = sent_bytes(swarm.nodes)
            epoch, led = swarm.catch_exchanging(victim)
            process = victim.process
            assert process is not None
            process.send_signal(signal.SIGKILL)
            killed_at = time.monotonic()
            process.wait()
            record, last = swarm.wait_commit(epoch + 1, survivors), swarm.first_commit(epoch, swarm.nodes)
            assert last is not None
            after = sent_bytes(survivors)
            if record.at < killed_at:
                died.notes.append("killed too late: the round was over")
            else:
                died.add(record.at - killed_at)
                counted = bool(record.weights.get(swarm.ids[victim]))
                whole_s = record.at - last.at
                died.notes.append(
                    f"round={whole_s:.2f} s normal={normal_s:.2f} s led={led} counted={counted}"
                )
                usual = normal_bytes * 3 / 4  # of three of four
                share = sum(after[n] - before[n] for n in survivors) / usual - (epoch - begun)
                moved.add(share)
                moved.check(share < MOVED_MAX, f"{share:.2f} times the bytes: more than its shards moved")
            time.sleep(rng.uniform(0, 3))
            newest = max(swarm.tails[n].epoch for n in survivors)
            began = time.monotonic()
            victim.start("--peer", survivors[0].address)
            back.add(swarm.wait_contribution(victim, newest, survivors).at - began)
            victim.wait_ready()
    finally:
        swarm.close()
    return [died, moved, back]


def freeze(folder: Path, repeat: int, rng: random.Random) -> list[Row]:
    """SIGSTOP in the middle of a round; SIGCONT."""
    first = Row("SIGSTOP of one of 4", "the round commits: more than a normal round by", STALL_S + 2)
    later = Row("SIGSTOP of one of 4", "later rounds without it: slowest, more than a normal one by", 2.0)
    back = Row("SIGCONT", "contributes again by itself, from SIGCONT to the record that counts it", 10.0)
    swarm = Swarm(folder, 4)
    try:
        for index in range(repeat):
            victim = swarm.nodes[index % 4]
            survivors = swarm.others(victim)
            normal_s, _, _ = swarm.normal_rounds()
            epoch, led = swarm.catch_exchanging(victim)
            process = victim.process
            assert process is not None
            process.send_signal(signal.SIGSTOP)
            commits = [swarm.wait_commit(epoch + k, survivors) for k in range(8)]
            gaps = [b.at - a.at for a, b in pairwise(commits)]
            # The round that it is in may be decided already; then the next one pays.
            slow = 0 if gaps[0] >= gaps[1] else 1
            first.add(gaps[slow] - normal_s)
            first.notes.append(f"normal={normal_s:.2f} s led={led} rounds={[round(g, 2) for g in gaps]}")
            later.add(max(gaps[slow + 1 :]) - normal_s)
            newest = commits[-1].epoch
            began = time.monotonic()
            process.send_signal(signal.SIGCONT)
            back.add(swarm.wait_contribution(victim, newest, survivors).at - began)
    finally:
        swarm.close()
    return [first, later, back]


def trainer(folder: Path, repeat: int, rng: random.Random) -> list[Row]:
    """A trainer that is killed, and one that may allocate no more."""
    killed = Row("SIGKILL of a trainer", "contributes again, from the kill", None)
    memory = Row("trainer out of memory", "contributes again, from its death", None)
    swarm = Swarm(folder, 4)
    try:
        for index in range(repeat):
            for row, harm in ((killed, _kill_trainer), (memory, _starve_trainer)):
                swarm.normal_rounds()
                _lose_trainer(swarm, swarm.nodes[index % 4], row, harm)
    finally:
        swarm.close()
    return [killed, memory]


def _lose_trainer(swarm: Swarm, victim: Node, row: Row, harm: Callable[[Node], None]) -> None:
    restarts = metric(victim, "tapestry_trainer_restarts_total")
    harm(victim)
    victim.wait("a dead trainer", lambda: metric(victim, "tapestry_trainer_up") == 0, WAIT_S)
    began, newest = time.monotonic(), swarm.tails[victim].epoch
    said = ""
    while metric(victim, "tapestry_trainer_up") == 0:
        said = said or _not_ready(victim)
        time.sleep(POLL_S)
    up_at = time.monotonic()
    # One round may have been under way with what it had contributed whole before it died.
    false = [
        r.epoch
        for r in swarm.tails[victim].records.values()
        if newest + 1 < r.epoch and r.at < up_at and r.weights.get(swarm.ids[victim])
    ]
    row.check(not false, f"epochs {false} count a contribution of a node without a trainer")
    row.check("not contributing" in said, f"/readyz said {said!r}")
    row.check(metric(victim, "tapestry_trainer_restarts_total") == restarts + 1, "restarts were not counted")
    row.add(swarm.wait_contribution(victim, newest + 1, swarm.nodes).at - began)
    row.notes.append(f"trainer up after {up_at - began:.2f} s; /readyz: {said[:120]}")


def _not_ready(node: Node) -> str:
    try:
        node.get("/readyz")
    except OSError as error:  # urllib's HTTPError is one
        body = getattr(error, "read", lambda: b"")()
        return str(body.decode())
    return ""


def _trainer_of(node: Node) -> psutil.Process:
    process = node.trainer()
    assert process is not None, f"{node.home.name} has no trainer"
    return process


def _kill_trainer(node: Node) -> None:
    _trainer_of(node).kill()


def _starve_trainer(node: Node) -> None:
    """No more memory than it has: the next allocation fails."""
    process = _trainer_of(node)
    size = process.memory_info().vms
    resource.prlimit(process.pid, resource.RLIMIT_AS, (size // 2, size // 2))


def quorum(folder: Path, repeat: int, rng: random.Random) -> list[Row]:
    """Two of three at once."""
    says = Row("SIGKILL of two of 3", "the last one says degraded, and why", STALL_S + 5)
    alone = Row("SIGKILL of two of 3", "on_quorum_loss=continue: goes on alone", QUORUM_LOSS_S + STALL_S + 5)
    waits = Row("SIGKILL of two of 3", "on_quorum_loss=wait: stands still for as long as was looked", None)
    meet = {
        policy: Row("both started again", f"on_quorum_loss={policy}: one head for all, from exec", 30.0)
        for policy in ("continue", "wait")
    }
    folder.mkdir()
    for index in range(repeat):
        for policy in ("continue", "wait"):
            swarm = Swarm(folder / f"{policy}{index}", 3, on_quorum_loss=f'"{policy}"')
            try:
                _lose_quorum(swarm, policy, index, says, alone if policy == "continue" else waits)
                _come_back(swarm, index, meet[policy])
            finally:
                swarm.close()
    return [says, alone, waits, *meet.values()]


def _lose_quorum(swarm: Swarm, policy: str, index: int, says: Row, then: Row) -> None:
    last = swarm.nodes[index % 3]
    swarm.normal_rounds()
    for node in swarm.others(last):
        assert node.process is not None
        node.process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    for node in swarm.others(last):
        assert node.process is not None
        node.process.wait()
    last.wait("degraded", lambda: last.status()["phase"] == "degraded", WAIT_S)
    says.add(time.monotonic() - began)
    last.wait("a reason", lambda: "of the electorate alive" in last.status()["reason"], 10)
    says.notes.append(last.status()["reason"])
    epoch = swarm.tails[last].epoch
    if policy == "continue":
        record = swarm.wait_commit(epoch + 1, [last])
        then.add(record.at - began)
        then.check(record.forced, f"epoch {record.epoch} is not marked forced")
        forced = 'tapestry_rounds_total{outcome="forced"}'
        last.wait("a forced round counted", lambda: metric(last, forced) >= 1, 10)
        swarm.wait_commit(epoch + 3, [last])
    else:
        time.sleep(QUORUM_LOSS_S + 10)
        then.add(time.monotonic() - began)
        then.check(swarm.tails[last].epoch == epoch, "it went on without a quorum")
        then.check(last.status()["phase"] == "degraded", f"phase {last.status()['phase']}")


def _come_back(swarm: Swarm, index: int, row: Row) -> None:
    last = swarm.nodes[index % 3]
    others = swarm.others(last)
    epoch = swarm.tails[last].epoch
    began = time.monotonic()
    for node in others:
        node.start("--peer", last.address)

    ready_at: list[float] = []

    def met() -> bool:
        if not ready_at and all(n.json()["pid"] == n.pid for n in others):
            ready_at.append(time.monotonic())
        return all(_same_record(swarm, n, last, epoch + 1) for n in others) and swarm.one_head(swarm.nodes)

    last.wait("one head", met, WAIT_S)
    row.add(time.monotonic() - began)
    last.wait("contributions of all", lambda: swarm.contributors(last) == len(swarm.nodes), WAIT_S)
    started_s = ready_at[0] - began if ready_at else 0.0
    row.notes.append(
        f"started after {started_s:.2f} s, all contribute after {time.monotonic() - began:.2f} s"
    )


def _same_record(swarm: Swarm, a: Node, b: Node, epoch: int) -> bool:
    records = [swarm.tails[n].records.get(epoch) for n in (a, b)]
    return all(r is not None for r in records) and records[0].weights == records[1].weights  # type: ignore[union-attr]


def apart(folder: Path, repeat: int, rng: random.Random) -> list[Row]:
    """Two of four, as if a firewall had come between them, and gone."""
    lost = Row(
        "two of 4 out of each other's reach", "the slowest round: more than a normal one by", 2 * STALL_S
    )
    later = Row(
        "two of 4 out of each other's reach", "half a minute later: median, more than a normal one", 1.0
    )
    try:
        net = Net(4)
    except NetError as error:
        lost.missed.append(str(error))
        return [lost]
    with net:
        swarm = Swarm(folder, 4, net)
        try:
            for _ in range(repeat):
                _keep_apart(swarm, net, rng.sample(range(4), 2), lost, later)
        finally:
            swarm.close()
    return [lost, later]


def _keep_apart(swarm: Swarm, net: Net, pair: list[int], lost: Row, later: Row) -> None:
    normal_s, _, epoch = swarm.normal_rounds()
    began = time.monotonic()
    for a, b in (pair, pair[::-1]):
        net.cut(a, b)
    time.sleep(CUT_S)
    newest = swarm.tails[swarm.nodes[0]].epoch
    records = [r for e in range(epoch, newest + 1) if (r := swarm.first_commit(e, swarm.nodes)) is not None]
    for a, b in (pair, pair[::-1]):
        net.join(a, b)
    gaps = [(b.at - began, b.at - a.at) for a, b in pairwise(records)]
    lost.add(max(gap for _, gap in gaps) - normal_s)
    later.add(statistics.median(gap for at, gap in gaps if at > CUT_S / 2) - normal_s)
    late = [r for r in records if r.at - began > CUT_S / 2]
    shares = [sum(r.weights.get(swarm.ids[swarm.nodes[i]], 0) > 0 for r in late) / len(late) for i in pair]
    later.notes.append(f"normal={normal_s:.2f} s rounds={len(records)} the two contributed to {shares}")
    later.check(min(shares) > 0.5, f"one of the two contributed to {min(shares):.0%} of the records")


def islands(folder: Path, repeat: int, rng: random.Random) -> list[Row]:
    return _islands(folder, repeat, rng, "islands of 2 and 3 for a minute", CUT_S, 30.0)


def parted(folder: Path, repeat: int, rng: random.Random) -> list[Row]:
    return _islands(folder, repeat, rng, "islands of 2 and 3 for five minutes", PARTED_S, 60.0)


def _islands(
    folder: Path, repeat: int, rng: random.Random, fault: str, cut_s: float, limit_s: float
) -> list[Row]:
    """Two and three, apart for so long."""
    meet = Row(fault, "one head for all, from the join", limit_s)
    says = Row(fault, "what was dropped is in log, metrics and status", None)
    try:
        net = Net(5)
    except NetError as error:
        meet.missed.append(str(error))
        return [meet]
    with net:
        swarm = Swarm(folder, 5, net)
        try:
            for _ in range(repeat):
                _part_and_meet(swarm, net, cut_s, meet, says, rng)
        finally:
            swarm.close()
    return [meet, says]


def _part_and_meet(swarm: Swarm, net: Net, cut_s: float, meet: Row, says: Row, rng: random.Random) -> None:
    swarm.normal_rounds()
    few = sorted(rng.sample(range(5), 2))
    many = [i for i in range(5) if i not in few]
    pairs = [pair for a in few for b in many for pair in ((a, b), (b, a))]
    begun = max(tail.epoch for tail in swarm.tails.values())
    dropped = {i: metric(swarm.nodes[i], "tapestry_dropped_records_total") for i in range(5)}
    marks = {i: swarm.nodes[i].log.stat().st_size for i in range(5)}
    for a, b in pairs:
        net.cut(a, b)
    time.sleep(cut_s)
    alone = swarm.tails[swarm.nodes[few[0]]].epoch
    ahead = swarm.tails[swarm.nodes[many[0]]].epoch
    for a, b in pairs:
        net.join(a, b)
    began = time.monotonic()
    goal = max(alone, ahead) + 1

    def met() -> bool:
        return all(tail.epoch >= goal for tail in swarm.tails.values()) and swarm.one_head(swarm.nodes)

    swarm.nodes[0].wait("one head", met, WAIT_S)
    meet.add(time.monotonic() - began)
    meet.notes.append(f"few={few} epochs: cut at {begun}, 2 reached {alone}, 3 reached {ahead}")
    for i in few if alone > begun + 1 else []:
        _check_told(swarm.nodes[i], dropped[i], marks[i], says)


def _check_told(node: Node, before: float, mark: int, row: Row) -> None:
    """Of a node that went on alone: its log, its metrics and `tapestry status` say what it gave up."""
    with node.log.open("rb") as log:
        log.seek(mark)
        text = log.read().decode(errors="replace")
    lost = re.search(r"fork=left common_epoch=\d+ dropped_records=(\d+) dropped_tokens=(\d+)", text)
    count = metric(node, "tapestry_dropped_records_total") - before
    row.check(lost is not None, f"{node.home.name}: nothing in the log")
    row.check(count > 0 and lost is not None, f"{node.home.name}: the metric shows {count:g} dropped records")
    kept = tapestry("log", "--branches", "--home", node.home).stdout
    row.check("it lost: " in kept, f"{node.home.name}: `tapestry log --branches` does not list it")
    with node.network():
        shown = tapestry("status", "--home", node.home).stdout
    field = re.search(r"^dropped_records +(\d+)$", shown, re.MULTILINE)
    row.check(
        field is not None and int(field[1]) > 0, f"{node.home.name}: `tapestry status` does not show it"
    )
    row.notes.append(f"{node.home.name}: {lost[0] if lost else 'nothing'}; metric +{count:g}")


def torchft(folder: Path, repeat: int, rng: random.Random) -> list[Row]:
    """SIGKILL of one of 4 replicas of torchft: managed allreduce over gloo, its lighthouse as it comes."""
    row = Row("torchft: SIGKILL of one of 4", "the next average commits: more than a normal step by", None)
    folder.mkdir()
    for index in range(repeat):
        with contextlib.ExitStack() as stack:
            place = folder / str(index)
            place.mkdir()
            _lose_replica(place, rng, row, stack)
    return [row]


def _lose_replica(folder: Path, rng: random.Random, row: Row, stack: contextlib.ExitStack) -> None:
    python, ports = Path(os.environ["TORCHFT_PYTHON"]), _free_ports(5)

    def start(log: str, *command: object) -> subprocess.Popen[bytes]:
        with (folder / log).open("wb") as out, (folder / f"{log}.err").open("wb") as err:
            process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=err)
        stack.callback(process.wait)
        stack.callback(process.kill)
        return process

    lighthouse = python.with_name("torchft_lighthouse")
    start("lighthouse", lighthouse, "--min_replicas", 2, "--bind", f"127.0.0.1:{ports[4]}")
    replica = Path(__file__).with_name("_torchft_replica.py")
    url = f"http://127.0.0.1:{ports[4]}"
    replicas = [start(f"r{i}", python, "-P", replica, f"r{i}", ports[i], url, TRAIN_S) for i in range(4)]

    def steps() -> list[tuple[float, int]]:
        lines = (folder / "r0").read_text().splitlines()
        return [(float(at), int(count)) for at, count in (line.split() for line in lines)]

    _until("averages of all", lambda: sum(count == 4 for _, count in steps()) > NORMAL_ROUNDS)
    normal_s = statistics.median(b[0] - a[0] for a, b in pairwise(steps()[-NORMAL_ROUNDS:]))
    time.sleep(rng.uniform(0, normal_s))
    replicas[3].kill()
    killed_at = time.monotonic()
    _until("an average of the others", lambda: any(at > killed_at and count == 3 for at, count in steps()))
    last = max(at for at, _ in steps() if at <= killed_at)
    first = min(at for at, count in steps() if at > killed_at and count == 3)
    row.add(first - last - normal_s)
    row.notes.append(f"normal={normal_s:.2f} s")


def _until(what: str, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"no {what}"
        time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


Scenario = Callable[[Path, int, random.Random], list[Row]]
SCENARIOS: dict[str, Scenario] = {
    "kill": kill,
    "freeze": freeze,
    "trainer": trainer,
    "quorum": quorum,
    "apart": apart,
    "islands": islands,
    "parted": parted,
}
COMPARISONS: dict[str, Scenario] = {"torchft": torchft}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SCENARIOS), help="scenarios, with commas between")
    parser.add_argument("--repeat", type=int, default=4, help="how often each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torchft", type=Path, help="the python of an environment that has torchft")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--keep", type=Path, help="leave homes and logs in this new folder")
    options = parser.parse_args()
    names = options.only.split(",")
    scenarios = SCENARIOS
    if options.torchft:
        os.environ["TORCHFT_PYTHON"] = str(options.torchft)
        scenarios = SCENARIOS | COMPARISONS
    if not all(name in scenarios for name in names):
        parser.error(f"scenarios are {', '.join(scenarios)}")
    signal.signal(signal.SIGTERM, exit_by_signal)
    rows: list[Row] = []
    with work_folder(options.keep, "tapestry-recovery-") as folder:
        for name in names:
            load = os.getloadavg()[0]
            began = time.monotonic()
            try:
                found = scenarios[name](folder / name, options.repeat, random.Random(options.seed))
            except AssertionError as error:
                found = [Row(name, "ran to its end", None, missed=[str(error)])]
            print(f"# {name}: {time.monotonic() - began:.0f} s, load before {load:.1f}", flush=True)
            for row in found:
                print(
                    row.line(), *(f"    {text}" for text in (*row.notes, *row.missed)), sep="\n", flush=True
                )
            rows += found
    print("\n| fault | what is guaranteed | times | median s | worst s | limit s | |")
    print("|---|---|---:|---:|---:|---:|---|")
    for row in rows:
        print(row.line())
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if any(row.missed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
