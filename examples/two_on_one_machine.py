"""Two members on one machine, in one script: the second joins by an invitation of the first.

    python examples/two_on_one_machine.py

Each has one half of a line's points; only together they know where it bends. Gradients are averaged
(inner_steps=0): there is no optimizer in the loop, the run's own takes the steps.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tapestry.node import Swarm


def train(home: Path, peer: str, low: float, high: float, epochs: int, lines: Any, results: Any) -> None:
    """One member, in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    run = {"round": {"min_members": 2}, "outer": {"optimizer": "adamw", "lr": 0.01}}
    flags = ["--listen=/ip4/127.0.0.1/tcp/0"]
    with Swarm(module, home=home, peer=peer, name="line", inner_steps=0, run=run, flags=flags) as swarm:
        if not peer:
            lines.put(swarm.invite())
        while swarm.epoch < epochs:
            x = torch.empty(64, 1).uniform_(low, high)
            loss = (module(x) - x.abs()).square().mean()
            loss.backward()
            swarm.step(loss, samples=len(x))
        results.put((home.name, swarm.epoch, swarm.status()["state_digest"]))


def main(epochs: int = 5) -> None:
    context = multiprocessing.get_context("spawn")
    lines, results = context.Queue(), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        first = context.Process(
            target=train, args=(Path(folder) / "first", "", -1.0, 0.0, epochs, lines, results)
        )
        first.start()
        line = lines.get(timeout=60)
        second = context.Process(
            target=train, args=(Path(folder) / "second", line, 0.0, 1.0, epochs, lines, results)
        )
        second.start()
        for _ in range(2):
            name, epoch, digest = results.get(timeout=120)
            print(f"{name}: epoch {epoch}, digest {digest[:16]}", flush=True)
        for member in (first, second):
            member.join(60)
        if first.exitcode or second.exitcode:
            raise SystemExit("a member failed")


if __name__ == "__main__":
    main()
