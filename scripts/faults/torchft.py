"""SIGKILL of one of 4 replicas of torchft, beside ours: managed allreduce over gloo."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import statistics
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from faults.row import Row
from faults.swarm import NORMAL_ROUNDS, WAIT_S

TRAIN_S = 1.0  # a replica, between two averages


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
