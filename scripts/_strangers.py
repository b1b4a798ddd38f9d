"""Strangers attack one of several members: quiet times, times under attack, and what the member did.

For scripts/attack.py. Quiet times and times under attack alternate; in the quiet ones runs a process of the
same priority that reaches nobody: what it takes from a round is no attack's doing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import psutil
from _members import (
    Node,
    ended_or_broken,
    founder_in,
    in_words,
    member_in,
    refusals,
    rounds_s,
    slower,
    window,
)
from _processes import end_with_parent
from strangers.target import BEGUN, BUSY, Target

HOSTILE = Path(__file__).with_name("strangers") / "hostile.py"
WAIT_S = 120.0
MEMORY_MAX = 100 << 20  # Guess: what a member may grow under attack
SETTLE_S = 2.0
Answer = TypeVar("Answer")


@dataclass(slots=True)
class Outcome:
    """What an attack did."""

    name: str
    quiet_round_s: float  # median
    attacked_round_s: float
    slower: float  # a share of the round; negative: faster
    grown_mb: float
    banned: int
    refused: dict[str, int]
    faults: list[str]
    rounds: tuple[int, int] = (0, 0)  # that were measured, of either kind
    cores: tuple[float, float] = (0.0, 0.0)  # that the daemon and its p2pd took, of either kind


@contextlib.contextmanager
def attacked(name: str, node: Node, folder: Path, options: argparse.Namespace) -> Iterator[None]:
    """A hostile process attacks `node` inside: it has begun."""
    about = node.json()
    folder.mkdir(exist_ok=True)
    begun = folder / BEGUN
    begun.unlink(missing_ok=True)
    target = Target(node.address, about["run_id"], about["http"], options.strength, folder)
    table = json.dumps({**asdict(target), "folder": str(folder)})
    with (folder / "hostile.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", HOSTILE, name, table, str(options.nice)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=end_with_parent,
            start_new_session=True,  # whose priority is its own, where the kernel groups by sessions
        )
    try:
        node.wait(f"beginning of {name}", begun.exists, WAIT_S)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measured(name: str, members: list[Node], folder: Path, options: argparse.Namespace) -> Outcome:
    """Quiet, attacked, quiet, attacked ..."""
    node = members[0]
    process = psutil.Process(node.pid)
    quiet: list[float] = []
    under: list[float] = []
    cores: tuple[list[float], list[float]] = ([], [])
    banned = 0
    before = process.memory_info().rss
    most = before

    def watch(rounds: list[float], cores: list[float]) -> None:
        used_s = cpu_s(node)
        began, ended = window(node, options.seconds)
        rounds += rounds_s(node, began, ended)
        cores.append((cpu_s(node) - used_s) / (ended - began))

    for _ in range(options.repeat):
        with attacked(BUSY, node, folder, options):
            watch(quiet, cores[0])
        with attacked(name, node, folder, options):
            watch(under, cores[1])
            most = max(most, process.memory_info().rss)
            banned = max(banned, banned_by(node))
        time.sleep(SETTLE_S)
    calm_s, busy_s = (statistics.median(some) if some else math.nan for some in (quiet, under))
    outcome = Outcome(name, calm_s, busy_s, slower(quiet, under), (most - before) / 1e6, banned, {}, [])
    outcome.rounds = len(quiet), len(under)
    outcome.cores = statistics.median(cores[0]), statistics.median(cores[1])
    outcome.refused = answered(node, lambda: refusals(members[:1]))
    outcome.faults = faults_of(outcome, members, options.slower_max)
    return outcome


def answered(node: Node, ask: Callable[[], Answer]) -> Answer:
    """What `ask` gets of the endpoint: one under attack may turn us away too, and is asked again."""
    answers: list[Answer] = []

    def asked() -> bool:
        answers.append(ask())
        return True

    node.wait("answer", asked, WAIT_S)
    return answers[0]


def banned_by(node: Node) -> int:
    """How many peers."""
    peers = answered(node, lambda: json.loads(node.get("/peers")))
    return sum(peer["phase"] == "banned" for peer in peers)


def cpu_s(node: Node) -> float:
    """Of the daemon and its p2pd, since their start: not of the trainer, whose work is no stranger's."""
    p2pd = node.p2pd()
    processes = [psutil.Process(node.pid), *([p2pd] if p2pd is not None else [])]
    times = [process.cpu_times() for process in processes]
    return sum(one.user + one.system for one in times)


def faults_of(outcome: Outcome, members: list[Node], slower_max: float) -> list[str]:
    faults = ended_or_broken(members)
    if not outcome.slower <= slower_max:
        faults.append(f"a round was {outcome.slower:.0%} slower, at most {slower_max:.0%} is wanted")
    if outcome.grown_mb > MEMORY_MAX / 1e6:
        faults.append(f"the member grew by {outcome.grown_mb:.0f} MB")
    return faults


def run(names: list[str], options: argparse.Namespace, place: Path) -> list[Outcome]:
    """Attacks by strangers, all on the same members."""
    outcomes, count = [], options.members or 2
    with contextlib.ExitStack() as stack:
        founder = founder_in(place, count, is_open=options.open)
        members = [stack.enter_context(founder).wait_ready()]
        for index in range(1, count):
            line = founder.address if options.open else founder.invitation()
            node = member_in(place, index, count, line)
            members.append(stack.enter_context(node).wait_ready())
        for node in members:
            node.wait_epoch(3, WAIT_S)
            node.wait("a run of members", lambda node=node: node.status()["members"] == count, WAIT_S)
        for name in names:
            outcomes.append(measured(name, members, place / f"hostile-{name}", options))
            say(outcomes[-1])
    return outcomes


def say(outcome: Outcome) -> None:
    lengths = f"a round {outcome.quiet_round_s:.2f} -> {outcome.attacked_round_s:.2f} s"
    print(
        f"{outcome.name:14} {lengths} ({outcome.slower:+.1%}; medians of {outcome.rounds[0]} and "
        f"{outcome.rounds[1]}), {outcome.cores[0]:.0%} -> {outcome.cores[1]:.0%} of a core, "
        f"memory {outcome.grown_mb:+.0f} MB, banned {outcome.banned}, "
        f"refused so far: {in_words(outcome.refused)}",
        flush=True,
    )
    for fault in outcome.faults:
        print(f"  FAULT: {fault}", flush=True)
