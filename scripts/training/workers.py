"""One training process of a baseline: workers.py FOLDER SYSTEM RANK; FOLDER holds the plan."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from tapestry.node.trainer.data.corpus import Corpus
from tapestry.node.trainer.models.llama import build_model, initial_state, model_layout
from tapestry.node.trainer.worker import NICENESS
from training.model import load, mean_loss
from training.plan import Plan


class Trail:
    """What a worker leaves behind: snapshots by rank 0, and of every rank now and then for comparison."""

    def __init__(self, plan: Plan, system: str, rank: int) -> None:
        self.folder = Path(plan.folder) / system
        self._rank = rank
        self._every_s = plan.snapshot_s
        self._next_s = 0.0
        self._count = 0
        self._compared = 0

    def go(self, flat: Tensor) -> None:
        """Say that we are ready; returns when all are."""
        (self.folder / f"ready-{self._rank}").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.02)
        self.step(0, 0, lambda: flat)

    def step(self, step: int, tokens: int, flat: Callable[[], Tensor]) -> None:
        """After an optimizer step; `tokens` are this rank's."""
        now = time.time()
        if self._rank or now < self._next_s:
            return
        self._next_s = now + self._every_s
        name = f"state-{self._count}.pt"  # with local updates there are several of one epoch
        self._count += 1
        torch.save(flat(), self.folder / name)
        entry = {"time": now, "tokens": tokens, "step": step, "file": name}
        with (self.folder / "trail-0.jsonl").open("a") as trail:
            trail.write(json.dumps(entry) + "\n")

    def compare(self, step: int, every: int, flat: Callable[[], Tensor]) -> None:
        """Keep this rank's parameters at every so many steps."""
        if step // every > self._compared:
            self._compared = step // every
            if step % every == 0:
                torch.save(flat(), self.folder / f"at-{step}-{self._rank}.pt")


@dataclass
class Bench:
    """A worker's model with the common parameters, and its data."""

    plan: Plan
    rank: int
    model: nn.Module
    corpus: Corpus

    @classmethod
    def make(cls, plan: Plan, rank: int) -> Bench:
        torch.set_num_threads(1)
        os.nice(NICENESS)
        spec, length = plan.spec(1), plan.spec(1).data.sequence_length
        model = build_model(spec.model, length)
        seeded = dataclasses.replace(spec.model, seed=plan.seed)
        load(model, model_layout(model).views(initial_state(seeded, length)))
        model.train()
        return cls(plan, rank, model, plan.corpus(rank))

    def flat(self) -> Tensor:
        layout = model_layout(self.model)
        return layout.flatten(dict(self.model.named_parameters()))

    def adamw(self, params: Any) -> torch.optim.Optimizer:
        train = self.plan.spec(1).train
        return torch.optim.AdamW(
            params, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
        )

    def windows(self, step: int, corpus: Corpus | None = None) -> Tensor:
        count = self.plan.batch_size
        return torch.from_numpy((corpus or self.corpus).windows_at(step * count, count))

    @property
    def batch_tokens(self) -> int:
        return self.plan.batch_size * self.corpus.use.sequence_length


def work_ddp(plan: Plan, rank: int, trail: Trail) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    bench = Bench.make(plan, rank)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{plan.addresses[0]}:29500", rank=rank, world_size=plan.nodes
    )
    # Llama's only buffers are constants; broadcasting them before every step would slow DDP for nothing.
    net = DistributedDataParallel(bench.model, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = bench.adamw(net.parameters())
    trail.go(bench.flat())
    batch = 0
    for step in range(1, sys.maxsize):
        for i in range(plan.accumulation):
            last = i == plan.accumulation - 1
            with contextlib.nullcontext() if last else net.no_sync():
                (mean_loss(net, bench.windows(batch)) / plan.accumulation).backward()
            batch += 1
        optimizer.step()
        optimizer.zero_grad()
        trail.step(step, batch * bench.batch_tokens, bench.flat)
        trail.compare(step, 50, bench.flat)


def work_alone(plan: Plan, rank: int, trail: Trail) -> None:
    """All parts, one batch per step."""
    bench = Bench.make(plan, rank)
    corpora = [plan.corpus(i) for i in range(plan.nodes)]
    optimizer = bench.adamw(bench.model.parameters())
    trail.go(bench.flat())
    for step in range(1, sys.maxsize):
        mean_loss(bench.model, bench.windows(step, corpora[step % plan.nodes])).backward()
        optimizer.step()
        optimizer.zero_grad()
        trail.step(step, step * bench.batch_tokens, bench.flat)


def work_hivemind(plan: Plan, rank: int, trail: Trail) -> None:
    _work_hivemind(plan, rank, trail, plan.nodes * plan.hivemind_accumulation, local=False)


def work_hivemind_local(plan: Plan, rank: int, trail: Trail) -> None:
    _work_hivemind(plan, rank, trail, plan.nodes * plan.inner_steps, local=True)


def _work_hivemind(plan: Plan, rank: int, trail: Trail, batches: int, local: bool) -> None:
    """As in hivemind's own ALBERT example where that says something: float16 for parameters, every 5 epochs.

    Quicker than its defaults where a small swarm can be: the group's size is known, progress is fetched as
    often as asked for, matchmaking gets the shortest time that its documentation advises.
    """
    import hivemind
    from hivemind.compression import Float16Compression, Uniform8BitQuantization

    bench = Bench.make(plan, rank)
    door = trail.folder / "maddr"
    while rank and not door.exists():
        time.sleep(0.1)
    dht = hivemind.DHT(
        host_maddrs=[f"/ip4/{plan.addresses[rank]}/tcp/0"],
        initial_peers=door.read_text().split() if rank else [],
        start=True,
    )
    if not rank:
        door.with_suffix(".new").write_text("\n".join(map(str, dht.get_visible_maddrs())))
        door.with_suffix(".new").rename(door)
    optimizer = hivemind.Optimizer(
        dht=dht,
        run_id="bench",
        params=bench.model.parameters(),
        optimizer=bench.adamw,
        batch_size_per_step=plan.batch_size,
        target_batch_size=plan.batch_size * batches,
        use_local_updates=local,
        matchmaking_time=3.0,
        averaging_timeout=60.0,
        grad_compression=Uniform8BitQuantization(),
        state_averaging_compression=Float16Compression(),
        average_state_every=1 if local else 5,
        averager_opts={"target_group_size": plan.nodes},
        tracker_opts={"min_refresh_period": 0.1, "default_refresh_period": 0.5},
        verbose=True,
    )
    time.sleep(5.0)  # all have told of themselves
    trail.go(bench.flat())
    for batch in range(1, sys.maxsize):
        mean_loss(bench.model, bench.windows(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        trail.step(optimizer.local_epoch, batch * bench.batch_tokens, bench.flat)
        trail.compare(optimizer.local_epoch, 2 if local else 10, bench.flat)


WORKERS: dict[str, Callable[[Plan, int, Trail], None]] = {
    "ddp": work_ddp,
    "alone": work_alone,
    "hivemind": work_hivemind,
    "hivemind-local": work_hivemind_local,
}


def main() -> None:
    folder, system, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    plan = Plan(**json.loads((folder / "plan.json").read_text()))
    WORKERS[system](plan, rank, Trail(plan, system, rank))


if __name__ == "__main__":
    main()
