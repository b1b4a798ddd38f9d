"""Processes as the kernel tells of them (proc(5)): a whole family, and which of it are still alive."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent() -> None:
    """In the child: SIGTERM when this script dies in whatever way, so that no node stays behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


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


def group_like_process(pid: int) -> None:
    """Gives the session of `pid` the priority of this process: where the kernel groups processes by session
    (sched(7), autogroup), niceness counts within one only."""
    with contextlib.suppress(OSError):  # it does not group
        Path(f"/proc/{pid}/autogroup").write_text(f"{os.nice(0)}")
