"""Processes of a run in their network namespaces: awaited, ended, and what they have sent."""

from __future__ import annotations

import contextlib
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

START_S = 180.0  # for imports, tokens and joining


def sample_bytes(
    processes: list[subprocess.Popen[bytes]], end_s: float, done: Callable[[], object] = lambda: False
) -> list[tuple[float, float]]:
    """Until `end_s`, every second: the time, and what a node has sent, on average and with all headers."""
    samples = []
    while True:
        sent = [interface_bytes(process.pid) for process in processes]
        samples.append((time.time(), statistics.fmean(sent)))
        if time.time() >= end_s or done():
            return samples
        dead = [process for process in processes if process.poll() is not None]
        if dead:
            raise SystemExit(f"error: a process ended with {dead[0].returncode}")
        time.sleep(1.0)


def interface_bytes(pid: int) -> int:
    """What has left the interface of the process's namespace."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        if line.strip().startswith("eth0:"):
            return int(line.split(":")[1].split()[8])
    raise SystemExit(f"error: process {pid} has no eth0")


def wait(
    what: str, holds: Callable[[], object], processes: list[subprocess.Popen[bytes]], logs: Path
) -> None:
    end = time.monotonic() + START_S
    while not holds():
        dead = next((i for i, process in enumerate(processes) if process.poll() is not None), None)
        if dead is not None or time.monotonic() > end:
            tail = (logs / f"n{dead or 0}.log").read_text(errors="replace")[-2000:]
            raise SystemExit(f"{tail}\nerror: {what} did not come")
        time.sleep(0.2)


@contextlib.contextmanager
def ended(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """All are told to end, and killed with all they started if they do not."""
    try:
        yield
    finally:
        import psutil

        children = [c for p in processes if p.poll() is None for c in psutil.Process(p.pid).children(True)]
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(children, timeout=5)
