"""A run of what Tapestry is compared with: workers.py in each namespace, and what they left behind."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _bench import environment
from torch import Tensor

from training.curve import Curve
from training.plan import Plan
from training.processes import ended, sample_bytes, wait

WORKERS = Path(__file__).with_name("workers.py")


def run_baseline(system: str, plan: Plan, net: Any, until_tokens: int | None) -> Curve:
    """One worker per node, in its namespace; all go when all are connected."""
    folder = Path(plan.folder) / system
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(asdict(plan)))
    workers: list[subprocess.Popen[bytes]] = []
    minutes = plan.minutes if until_tokens is None else 3 * plan.minutes
    with ended(workers):
        for rank in range(1 if system == "alone" else plan.nodes):
            command = [*net.prefix(rank), sys.executable, "-P", str(WORKERS), str(folder), system, str(rank)]
            with (folder / f"n{rank}.log").open("wb") as log:
                workers.append(
                    subprocess.Popen(
                        command,
                        stdout=log,
                        stderr=log,
                        stdin=subprocess.DEVNULL,
                        env=environment(extra=system.startswith("hivemind")) | {"GLOO_SOCKET_IFNAME": "eth0"},
                    )
                )
        wait("all workers", lambda: len(list(folder.glob("ready-*"))) == len(workers), workers, folder)
        (folder / "go").touch()
        origin = time.time()
        samples = sample_bytes(
            workers, origin + 60 * minutes, lambda: until_tokens and told_tokens(folder) >= until_tokens
        )
    curve = Curve(system)
    for line in (folder / "trail-0.jsonl").read_text().splitlines():
        entry = json.loads(line)
        curve.times.append(entry["time"] - origin)
        curve.tokens.append(entry["tokens"] * len(workers))
        curve.steps.append(entry["step"])
        curve.files.append(folder / entry["file"])
    curve.sent = [(at - origin, sent - samples[0][1]) for at, sent in samples]
    if system != "alone":
        curve.notes["agreement"] = agreement(folder, curve.files[0])
    return curve


def told_tokens(folder: Path) -> int:
    trail = folder / "trail-0.jsonl"
    lines = trail.read_text().splitlines() if trail.exists() else []
    return json.loads(lines[-1])["tokens"] if lines else 0


def agreement(folder: Path, first: Path) -> dict[str, float | None]:
    """Whether nodes have the same parameters after the same step: the proof that something was averaged.

    `apart`: the largest distance of two nodes' parameters, as a share of the way from the initial ones.
    """
    start = torch.load(first)
    at: dict[int, list[Tensor]] = {}
    for path in sorted(folder.glob("at-*.pt")):
        at.setdefault(int(path.stem.split("-")[1]), []).append(torch.load(path))
    both = {step: flats for step, flats in at.items() if len(flats) > 1}
    apart = [
        max(float((a - b).norm() / (a - start).norm()) for a in flats for b in flats if a is not b)
        for flats in both.values()
    ]
    logs = [path.read_text(errors="replace") for path in folder.glob("n*.log")]
    return {
        "compared_at": len(both),
        "apart_median": statistics.median(apart) if apart else None,
        "apart_max": max(apart, default=None),
        "rounds_of_all": sum(log.count(f"Averaged gradients with {len(logs)} peers") for log in logs),
        "local_fallbacks": sum(log.count("Proceeding with local gradients") for log in logs),
    }
