"""Time, bytes and tokens to a validation loss: Tapestry, hivemind.Optimizer, DistributedDataParallel, alone.

    sudo .venv/bin/python -P scripts/bench_training.py --nodes 4 --link 100mbit --minutes 4 --png curves.png
    .venv/bin/python -P scripts/bench_training.py --quality --seeds 3     8 bits against float32; no network

Every system runs in its turn in the same network namespaces: the same model and initial parameters, the
same AdamW (no warmup, no clipping, for not every system has them), the standard library's sources in
disjoint parts, one training process per node with one torch thread.

    tapestry-diloco     inner AdamW for --inner-steps, then an outer Nesterov step on the 8-bit mean
    tapestry-gradient   inner_steps = 0: AdamW on the 8-bit mean gradient of --accumulation batches
    hivemind            hivemind.Optimizer: Uniform8BitQuantization, --hivemind-accumulation batches
    hivemind-local      the same with use_local_updates: parameters averaged every --inner-steps batches
    ddp                 DistributedDataParallel over gloo: the same mean gradient in float32
    alone               one process in one namespace, one batch per step, until tapestry-diloco's tokens

Nothing is measured inside the training: workers leave their parameters in files, Tapestry its update log,
and every system's loss is taken afterwards, on the same windows held out of all parts. The clock of the
baselines starts when all are connected. A Tapestry node trains as soon as it is up and waits for the
others, so the first epoch is counted with the median duration of the later ones.

With --quality, members train in turn in this process, with the product's inner loop, codec, mean and outer
step; the other half of the runs is the same but for the codec, which is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from _bench import environment, extra_packages, into, machine, table, write_json
from torch import Tensor, nn

from tapestry.compression.codecs import get_codec
from tapestry.compression.reduce import reduce_shard
from tapestry.node.spec.run import RunSpec, preset_spec, training_spec
from tapestry.node.state.outer import f32, make_outer
from tapestry.node.trainer.data.corpus import Corpus, load_corpus
from tapestry.node.trainer.gradients import Windows
from tapestry.node.trainer.inner import InnerLoop
from tapestry.node.trainer.models.llama import build_model, initial_state, model_layout
from tapestry.node.trainer.worker import NICENESS

HELD_OUT_TOKENS = 4096  # of each part
SNAPSHOTS_MAX = 150  # of one system
START_S = 180.0  # for imports, tokens and joining
CALM_S = 3.0  # between two systems
BASELINES = ("hivemind", "hivemind-local", "ddp", "alone")
SYSTEMS = ("tapestry-diloco", "tapestry-gradient", *BASELINES)


@dataclass(frozen=True)
class Plan:
    """What all systems share; crosses to the workers as JSON."""

    folder: str
    nodes: int
    preset: str
    minutes: float
    inner_steps: int
    batch_size: int
    accumulation: int
    hivemind_accumulation: int
    lr: float
    seed: int
    snapshot_s: float
    addresses: tuple[str, ...] = ()

    def spec(self, inner_steps: int) -> RunSpec:
        """The run spec: AdamW is the inner optimizer with inner steps, and the outer one without."""
        adamw = {"lr": self.lr, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}
        plain = preset_spec(self.preset, "bench").to_dict()
        plain["model"]["seed"] = self.seed
        plain["train"] |= adamw | {
            "inner_steps": inner_steps,
            "batch_size": self.batch_size,
            "accumulation": self.accumulation,
            "warmup_steps": 0,
            "grad_clip": 1e9,
        }
        if not inner_steps:
            plain["outer"] = adamw | {"optimizer": "adamw"}
            plain["limits"]["checkpoint_every_epochs"] = 100  # an epoch is a fraction of a second
        plain["limits"]["updates_kept_epochs"] = 1_000_000  # the curve is made from them
        plain["round"]["min_members"] = self.nodes
        return RunSpec.from_dict(plain)

    def corpus(self, part: int) -> Corpus:
        length = self.spec(1).data.sequence_length
        return load_corpus(
            [f"stdlib:{part + 1}/{self.nodes}"], Path(self.folder) / "cache", length, self.seed
        )


@dataclass
class Curve:
    """What is known of one system's run; times in seconds from its start."""

    system: str
    times: list[float] = field(default_factory=list)  # of the snapshots
    tokens: list[int] = field(default_factory=list)  # of all nodes, at the snapshots
    steps: list[int] = field(default_factory=list)  # optimizer steps or epochs
    files: list[Path] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)  # snapshot -> loss
    sent: list[tuple[float, float]] = field(default_factory=list)  # (time, bytes sent per node)
    notes: dict[str, Any] = field(default_factory=dict)

    def points(self) -> list[int]:
        return sorted(self.losses)

    def bytes_at(self, at_s: float) -> float:
        times, sent = zip(*self.sent, strict=True)
        return float(np.interp(at_s, times, sent))


def main() -> int:
    options = parse()
    if options.worker is not None:
        plan = Plan(**json.loads((options.worker / "plan.json").read_text()))
        WORKERS[options.systems[0]](plan, options.rank, Trail(plan, options.systems[0], options.rank))
        return 0
    if options.draw is not None:
        draw(json.loads(options.draw.read_text()), options.png)
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tapestry-bench-") as folder:
        if options.quality:
            quality(options, folder)
        else:
            compare(options, folder)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--link", default="100mbit", help="what each node may send")
    parser.add_argument("--minutes", type=float, default=4.0, help="for each system")
    parser.add_argument("--systems", type=lambda text: text.split(","), default=list(SYSTEMS), metavar="A,B")
    parser.add_argument("--preset", default="tiny", choices=["nano", "tiny", "small"])
    parser.add_argument("--inner-steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4, help="windows of a batch")
    parser.add_argument("--accumulation", type=int, default=1, help="batches of a node in a mean gradient")
    parser.add_argument(
        "--hivemind-accumulation",
        type=int,
        default=16,
        help="for hivemind, which needs epochs of seconds: in shorter ones its peers lose each other",
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the initial parameters")
    parser.add_argument("--target", type=float, help="loss; default: the best that the worst one reaches")
    parser.add_argument("--points", type=int, default=24, help="of a curve; around the target there are more")
    parser.add_argument("--quality", action="store_true", help="the codec against float32, without a network")
    parser.add_argument("--seeds", type=int, default=3, help="with --quality")
    parser.add_argument("--epochs", type=int, default=10, help="with --quality")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    for hidden in ("--worker", "--draw"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [name for name in options.systems if name not in SYSTEMS]
    if unknown:
        parser.error(f"no system is called {unknown[0]}; there are {', '.join(SYSTEMS)}")
    return options


def make_plan(options: argparse.Namespace, folder: str, addresses: tuple[str, ...] = ()) -> Plan:
    return Plan(
        folder=folder,
        nodes=options.nodes,
        preset=options.preset,
        minutes=options.minutes,
        inner_steps=options.inner_steps,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        hivemind_accumulation=options.hivemind_accumulation,
        lr=options.lr,
        seed=options.seed,
        snapshot_s=max(1.0, options.minutes * 60 / SNAPSHOTS_MAX),
        addresses=addresses,
    )


# ---- the comparison ----------------------------------------------------------------------------------


def compare(options: argparse.Namespace, folder: str) -> None:
    from _netns import Net, parse_link

    with Net(options.nodes, parse_link(options.link)) as net:
        plan = make_plan(options, folder, tuple(net.address(i) for i in range(options.nodes)))
        judge = Judge(plan)
        curves: dict[str, Curve] = {}
        for system in options.systems:
            print(f"# {system}", file=sys.stderr, flush=True)
            if system in BASELINES:
                until = curves["tapestry-diloco"].tokens[-1] if "tapestry-diloco" in curves else None
                curve = run_baseline(system, plan, net, until if system == "alone" else None)
            else:
                curve = run_tapestry(system, plan, net)
            judge.evaluate(curve, options.points)
            print(f"# {system}: loss {curve.losses[curve.points()[-1]]:.4f}", file=sys.stderr, flush=True)
            curves[system] = curve
            time.sleep(CALM_S)
        target = options.target or max(min(c.losses.values()) for c in curves.values())
        results = {
            "machine": machine(),
            "plan": asdict(plan) | {"link": options.link, "parameters": judge.layout.n},
            "target": target,
            "systems": {name: summary(c, target, judge) for name, c in curves.items()},
        }
    report(results)
    write_json(options.json, results)
    if options.png is not None:
        draw_elsewhere(results, options.png, folder)


class Judge:
    """The same held-out windows for everybody, and the model to take their loss with."""

    def __init__(self, plan: Plan) -> None:
        self._model = build_model(plan.spec(1).model, plan.spec(1).data.sequence_length)
        self.layout = model_layout(self._model)
        corpora = [plan.corpus(i) for i in range(plan.nodes)]
        windows = [c.validation_windows(HELD_OUT_TOKENS // c.use.sequence_length) for c in corpora]
        self._windows = torch.from_numpy(np.concatenate(windows))

    def evaluate(self, curve: Curve, points: int) -> None:
        for index in np.unique(np.linspace(0, len(curve.files) - 1, points).astype(int)):
            self.loss_at(curve, int(index))

    def loss_at(self, curve: Curve, index: int) -> float:
        if index not in curve.losses:
            curve.losses[index] = self.loss_of(torch.load(curve.files[index]))
        return curve.losses[index]

    def loss_of(self, flat: Tensor) -> float:
        load(self._model, self.layout.views(flat))
        self._model.eval()
        with torch.no_grad():
            losses = [mean_loss(self._model, part).item() * len(part) for part in self._windows.split(16)]
        return math.fsum(losses) / len(self._windows)

    def first_at(self, curve: Curve, target: float) -> int | None:
        """The first snapshot at or below the target, among all those around the point where it is passed."""
        points = curve.points()
        reached = next((i for i in points if curve.losses[i] <= target), None)
        if reached is None or reached == points[0]:
            return reached
        low = max(i for i in points if i < reached)
        while reached - low > 1:
            middle = (low + reached) // 2
            low, reached = (low, middle) if self.loss_at(curve, middle) <= target else (middle, reached)
        return reached


def summary(curve: Curve, target: float, judge: Judge) -> dict[str, Any]:
    at = judge.first_at(curve, target)
    points = curve.points()
    last = points[-1]
    return {
        "seconds": curve.times[last],
        "tokens": curve.tokens[last],
        "steps": curve.steps[last],
        "loss": curve.losses[last],
        "sent_bytes_per_node": curve.bytes_at(curve.times[last]),
        "target_s": None if at is None else curve.times[at],
        "target_tokens": None if at is None else curve.tokens[at],
        "target_bytes_per_node": None if at is None else curve.bytes_at(curve.times[at]),
        "curve": [[round(curve.times[i], 2), curve.tokens[i], round(curve.losses[i], 4)] for i in points],
        **curve.notes,
    }


def report(results: dict[str, Any]) -> None:
    plan, systems = results["plan"], results["systems"]
    print(f"{results['machine']}; {plan['nodes']} nodes, {plan['link']}, {plan['parameters']:,} parameters")
    fastest = systems.get("tapestry-diloco", {}).get("target_s")
    rows = [
        [
            name,
            s["tokens"] / 1e6,
            s["steps"],
            f"{s['loss']:.3f}",
            s["target_s"],
            s["target_s"] / fastest if s["target_s"] and fastest else None,
            s["target_bytes_per_node"] / 1e6 if s["target_bytes_per_node"] is not None else None,
            s["seconds"] / s["steps"],
        ]
        for name, s in systems.items()
    ]
    head = ["system", "Mtokens", "steps", "loss at the end", f"s to {results['target']:.3f}", "times"]
    print(table([*head, "MB sent per node till then", "s per step"], rows))
    for name, s in systems.items():
        for note in ("averaging", "agreement"):
            if note in s:
                print(f"{name} {note}: {json.dumps(s[note])}")


# ---- Tapestry ----------------------------------------------------------------------------------------


def run_tapestry(system: str, plan: Plan, net: Any) -> Curve:
    """Real daemons, as an operator starts them. The curve comes from the founder's update log."""
    from tapestry.dht.identity import Identity

    spec = plan.spec(plan.inner_steps if system == "tapestry-diloco" else 0)
    folder = Path(plan.folder) / system
    homes = [folder / f"n{i}" for i in range(plan.nodes)]
    for home in homes:
        home.mkdir(parents=True)
        (home / "node.toml").write_text("threads = 1\n")
    others = tuple(Identity.load_or_create(home / "identity.key").peer_id for home in homes[1:])
    spec = dataclasses.replace(spec, members=dataclasses.replace(spec.members, founders=others))
    (homes[0] / "run.toml").write_text(spec.to_toml())
    nodes: list[subprocess.Popen[bytes]] = []
    with ended(nodes):
        for i, home in enumerate(homes):
            peer = ("--peer", node_json(homes[0])["addresses"][0]) if i else ()
            nodes.append(start_node(i, home, plan, net, *peer))
            if not i:
                wait("the founder", lambda: node_json(homes[0]), nodes, folder)
        wait("the first epoch", lambda: len(commits(homes[0])) > 0, nodes, folder)
        before = averaging_times(homes[0], net)
        samples = sample_bytes(nodes, time.time() + 60 * plan.minutes)
        after = averaging_times(homes[0], net)
    curve = tapestry_curve(system, plan, spec, homes[0])
    origin = curve.notes.pop("origin")
    told = [at for at in curve.notes.pop("commits") if at <= after["clock"]]
    per_epoch = statistics.median(b - a for a, b in pairwise(told))
    begin, end = samples[0], samples[-1]
    rate = (end[1] - begin[1]) / (end[0] - begin[0])
    missed = rate * (begin[0] - origin)  # what was sent for the first epoch, before the counting began
    curve.sent = [(0.0, 0.0), *((at - origin, sent - begin[1] + missed) for at, sent in samples)]
    curve.notes["averaging"] = averaging_share(before, after, told[-1] - told[0]) | {
        "epoch_s": round(per_epoch, 3)
    }
    return curve


def start_node(i: int, home: Path, plan: Plan, net: Any, *more: str) -> subprocess.Popen[bytes]:
    command = [*net.prefix(i), sys.executable, "-P", "-m", "tapestry.node.cli", "start", "--home", str(home)]
    command += ["--data", f"stdlib:{i + 1}/{plan.nodes}", "--listen", f"/ip4/{plan.addresses[i]}/tcp/0"]
    command += ["--http", "127.0.0.1:0", "--log-format", "json", *more]
    with (home.parent / f"n{i}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment())


def node_json(home: Path) -> Any:
    try:
        return json.loads((home / "node.json").read_text())
    except (OSError, ValueError):
        return None


def commits(home: Path) -> list[tuple[float, int]]:
    """(when, tokens of that epoch) of every commit, from the node's log."""
    found = []
    for line in (home.parent / f"{home.name}.log").read_text(errors="replace").splitlines():
        if '"committed epoch=' in line:
            entry = json.loads(line)
            assert entry["epoch"] == len(found) + 1, "the log leaves out an epoch"
            found.append((datetime.fromisoformat(entry["time"]).timestamp(), entry["weight"]))
    return found


def tapestry_curve(system: str, plan: Plan, spec: RunSpec, home: Path) -> Curve:
    """Replay the update log from the initial parameters: the state of every epoch, to the bit."""
    from tapestry.dht.identity import Identity
    from tapestry.node.disk.held import open_run
    from tapestry.node.home import Home
    from tapestry.node.lineage.crypto import NodeCrypto

    run = open_run(Home(home), NodeCrypto(Identity.load(Home(home).identity_key)))
    assert run is not None
    params = initial_state(dataclasses.replace(spec.model, seed=plan.seed), spec.data.sequence_length)
    state = run.state(params)
    assert state.digest() == run.chain.genesis.state_digest, (
        "the run did not begin with the common parameters"
    )
    told = commits(home)
    per_epoch = statistics.median(b[0] - a[0] for a, b in pairwise(told))
    curve = Curve(system, notes={"origin": told[0][0] - per_epoch, "commits": [at for at, _ in told]})
    keep = Keep(curve, plan)
    keep(0.0, 0, 0, params)
    tokens = 0
    for (at, weight), epoch in zip(told, run.replay(state), strict=False):
        tokens += weight
        keep(at - curve.notes["origin"], tokens, epoch, params)
    return curve


class Keep:
    """Writes a snapshot when snapshot_s have gone by since the last one."""

    def __init__(self, curve: Curve, plan: Plan) -> None:
        self._curve = curve
        self._every_s = plan.snapshot_s
        self._folder = Path(plan.folder) / curve.system

    def __call__(self, at_s: float, tokens: int, step: int, flat: Tensor) -> None:
        curve = self._curve
        if curve.times and at_s - curve.times[-1] < self._every_s:
            return
        path = self._folder / f"state-{step}.pt"
        torch.save(flat, path)
        for values, value in ((curve.times, at_s), (curve.tokens, tokens), (curve.steps, step)):
            values.append(value)
        curve.files.append(path)


def averaging_times(home: Path, net: Any) -> dict[str, float]:
    """Seconds of every phase so far, and the clock, of the founder."""
    code = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())"
    url = node_json(home)["http"].rstrip("/") + "/metrics"
    command = [*net.prefix(0), sys.executable, "-P", "-c", code, url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    times = {"clock": time.time()}
    for line in text.splitlines():
        if line.startswith("tapestry_round_phase_seconds_sum"):
            times[line.split('"')[1]] = float(line.split()[-1])
    return times


def averaging_share(before: dict[str, float], after: dict[str, float], wall_s: float) -> dict[str, float]:
    """Shares of the founder's time from its first commit to its last: a phase is told when it ends.

    `ready` is for a good part waiting for slower members to finish their inner steps.
    """
    shares = {name: round((after[name] - before[name]) / wall_s, 4) for name in after if name != "clock"}
    shares["between_rounds"] = round(1 - sum(shares.values()), 4)
    return shares


# ---- the baselines -----------------------------------------------------------------------------------


def run_baseline(system: str, plan: Plan, net: Any, until_tokens: int | None) -> Curve:
    """One worker per node, each this script in its namespace; all go when all are connected."""
    folder = Path(plan.folder) / system
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(asdict(plan)))
    workers: list[subprocess.Popen[bytes]] = []
    minutes = plan.minutes if until_tokens is None else 3 * plan.minutes
    with ended(workers):
        for rank in range(1 if system == "alone" else plan.nodes):
            command = [*net.prefix(rank), sys.executable, "-P", __file__, "--worker", str(folder)]
            command += ["--systems", system, "--rank", str(rank)]
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


def mean_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Scalar: cross entropy in nats per predicted token. windows: int64 (batch, sequence_length + 1)."""
    logits = model(input_ids=windows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def load(model: nn.Module, named: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(named[name])


# ---- processes ---------------------------------------------------------------------------------------


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


# ---- quality -----------------------------------------------------------------------------------------


def quality(options: argparse.Namespace, folder: str) -> None:
    rows: list[list[Any]] = []
    for seed in range(options.seeds):
        plan = make_plan(argparse.Namespace(**{**vars(options), "seed": seed}), folder)
        losses = [virtual_run(plan, options.epochs, codec) for codec in (None, "int8-block")]
        rows.append([str(seed), *losses, 100 * (losses[1] / losses[0] - 1)])
        print(f"# seed {seed}: {losses}", file=sys.stderr, flush=True)
    means = [statistics.fmean(column) for column in list(zip(*rows, strict=True))[1:3]]
    rows.append(["mean", *means, 100 * (means[1] / means[0] - 1)])
    tokens = options.epochs * options.nodes * options.inner_steps * options.batch_size * 128
    print(
        f"{options.preset}, {options.nodes} members, {options.epochs} epochs of {options.inner_steps} steps"
    )
    shown = [[r[0], *(f"{x:.5f}" for x in r[1:3]), f"{r[3]:+.3f} %"] for r in rows]
    print(table(["seed", "float32", "int8-block", "difference"], shown))
    write_json(options.json, {"tokens": tokens, "epochs": options.epochs, "rows": rows})


def virtual_run(plan: Plan, epochs: int, codec_name: str | None) -> float:
    """The validation loss after `epochs` of DiLoCo by members that train in turn; deterministic."""
    spec = plan.spec(plan.inner_steps)
    settings = training_spec(spec)
    judge = Judge(plan)
    members = []
    for i in range(plan.nodes):
        corpus = plan.corpus(i)

        def windows(epoch: int, step: int, corpus: Corpus = corpus) -> Windows:
            batches = epoch * settings.train.batches + step
            return Windows(corpus.windows_at(batches * plan.batch_size, plan.batch_size))

        model = build_model(settings.model, settings.data.sequence_length)
        members.append(InnerLoop(model, model_layout(model), settings.train, windows, torch.device("cpu")))
    base = initial_state(dataclasses.replace(settings.model, seed=plan.seed), settings.data.sequence_length)
    n = base.numel()
    outer = make_outer(spec.outer)
    buffers = {name: torch.zeros(n) for name in outer.buffer_names}
    for epoch in range(epochs):
        vectors, weights = [], []
        for member in members:
            member.begin(epoch, base)
            while not member.done:
                member.step()
            vectors.append(torch.empty(n))
            weights.append(member.finish(base, into(vectors[-1])).weight)
        mean = mean_of(vectors, weights, codec_name)
        outer.step(base, buffers, mean, 0, n, epoch + 1)
    return judge.loss_of(base)


def mean_of(vectors: list[Tensor], weights: list[int], codec_name: str | None) -> Tensor:
    """The product's mean, of encoded vectors; without a codec the same sum in float32, encoded nowhere."""
    n = vectors[0].numel()
    if codec_name is not None:
        codec = get_codec(codec_name)
        return codec.decode(reduce_shard([codec.encode(v) for v in vectors], weights, codec, n), n)
    acc = torch.zeros(n)
    for vector, weight in zip(vectors, weights, strict=True):
        acc.add_(vector * f32(weight / sum(weights)))
    return acc


# ---- the picture -------------------------------------------------------------------------------------


def draw_elsewhere(results: dict[str, Any], png: Path, folder: str) -> None:
    """In a process that has matplotlib, which the project's environment has not."""
    path = Path(folder) / "results.json"
    path.write_text(json.dumps(results))
    command = [sys.executable, "-P", __file__, "--draw", str(path), "--png", str(png.resolve())]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(extra_packages())}, check=True)


def draw(results: dict[str, Any], png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for name, system in results["systems"].items():
        times, tokens, losses = zip(*system["curve"], strict=True)
        axes[0].plot(times, losses, label=name, linewidth=1.5)
        axes[1].plot([t / 1e6 for t in tokens], losses, label=name, linewidth=1.5)
    for axis, label in zip(axes, ("seconds", "million tokens, all nodes"), strict=True):
        axis.set_xlabel(label)
        axis.axhline(results["target"], color="grey", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss, nats per byte")
    axes[1].legend()
    plan = results["plan"]
    figure.suptitle(f"{plan['nodes']} nodes, {plan['link']}, {plan['parameters']:,} parameters")
    figure.savefig(png, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
