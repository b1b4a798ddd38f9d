"""What rounds cost the training, with and without `train.overlap`: tokens per second, loss at equal tokens.

    sudo .venv/bin/python -P scripts/bench_overlap.py --nodes 2 --link 100mbit --preset small
    .venv/bin/python -P scripts/bench_overlap.py --link none --preset tiny     on loopback, without root
    .venv/bin/python -P scripts/bench_overlap.py --simulate 0,0.1,0.25,1 --preset tiny --inner-steps 64

Three runs, one after the other, each with one trainer of one thread per node:

    alone      the trainers without nodes: nothing but steps, all at the same time
    waiting    nodes with overlap = false: a trainer waits while its contribution is averaged
    overlap    nodes with overlap = true

Nodes of both runs have the same identities, so the same windows, and start from the same parameters; no round
starts without all. The figures are taken from the second commit to the last but one: before, the first
node has waited for the others.

A trainer loses time in three ways, which are told apart: it has no step to take (`waited`, from
tapestry_train_waiting_seconds_total); it measures the validation loss (`validating`: how often, times what
one takes the trainers alone); and, where there are no more cores than trainers, somebody else has its core:
`nodes' cores` is the processor time of the nodes and their p2pd per second, `tokens per cpu s` what a
trainer makes of its own. A trainer on a device of its own loses nothing in the third way.

With --simulate, members train in turn in this process, without codec or network, and take the given share of
their steps before they are told the new base: what staleness alone does to the loss.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import psutil
import torch
from _bench import into, machine, table, write_json
from _netns import Net, parse_link
from e2e.harness import Node

from tapestry.dht.identity import Identity
from tapestry.node.disk.held import open_run
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import NodeCrypto
from tapestry.node.spec.data import DataSettings, resolved_data
from tapestry.node.spec.run import RunSpec, preset_spec, training_spec
from tapestry.node.spec.training import TrainSpec, WorkerSettings
from tapestry.node.state.outer import make_outer
from tapestry.node.trainer.data.corpus import Corpus, load_corpus
from tapestry.node.trainer.gradients import Windows
from tapestry.node.trainer.inner import InnerLoop
from tapestry.node.trainer.messages import Progress, Validation
from tapestry.node.trainer.models.llama import build_model, initial_state, model_layout
from tapestry.node.trainer.process import TrainerProcess

START_S = 300.0  # imports, tokens, joining
FIRST_EPOCH = 2  # from when on figures are taken
SETTLED = 3  # reports of a trainer alone, before it is timed
HELD_OUT_WINDOWS = 128  # for the loss


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    if options.simulate:
        with tempfile.TemporaryDirectory(prefix="tapestry-bench-") as folder:
            simulate(options, Path(folder))
        return
    with tempfile.TemporaryDirectory(prefix="tapestry-bench-") as folder, network(options) as net:
        spec = make_spec(options, overlap=False)
        say(f"alone, {options.alone_s:g} s")
        alone = asyncio.run(Alone(options, spec, Path(folder)).run())
        keys = make_keys(options.nodes, Path(folder) / "keys")
        runs = {}
        for name in ("waiting", "overlap"):
            say(name)
            home = Path(folder) / name
            runs[name] = run_nodes(options, make_spec(options, overlap=name == "overlap"), keys, home, net)
        shown = {1, 2, options.epochs // 2, options.epochs}
        losses = {name: losses_of(spec, Path(folder) / name / "n0", shown) for name in runs}
    results = {
        "machine": machine(),
        "options": {k: v for k, v in vars(options).items() if k != "json"},
        "alone": alone,
        "runs": runs,
        "losses": losses,
    }
    write_json(options.json, results)
    report(results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--link", default="100mbit", help="what each node may send; none: loopback")
    parser.add_argument("--max-upload", default="", help="the nodes' own cap, where links cannot be limited")
    parser.add_argument("--preset", default="small", choices=["nano", "tiny", "small"])
    parser.add_argument("--inner-steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the trainers")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--alone-s", type=float, default=40.0, help="how long the trainers alone are timed")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--simulate", type=lambda text: [float(word) for word in text.split(",")], metavar="A,B"
    )
    return parser.parse_args()


def network(options: argparse.Namespace) -> contextlib.AbstractContextManager[Net | None]:
    if options.link == "none":
        return contextlib.nullcontext(None)
    return Net(options.nodes, parse_link(options.link))


def make_spec(options: argparse.Namespace, overlap: bool) -> RunSpec:
    plain = preset_spec(options.preset, "bench").to_dict()
    plain["train"] |= {
        "inner_steps": options.inner_steps,
        "batch_size": options.batch_size,
        "overlap": overlap,
    }
    plain["round"] |= {"min_members": options.nodes, "straggler_wait_s": 600.0, "stall_s": 60.0}
    return RunSpec.from_dict(plain)


def make_keys(count: int, folder: Path) -> list[Path]:
    """Identities, so that both runs draw the same windows."""
    folder.mkdir()
    keys = [folder / f"{i}.key" for i in range(count)]
    for key in keys:
        Identity.load_or_create(key)
    return keys


def data_part(options: argparse.Namespace, index: int) -> str:
    return f"stdlib:{index + 1}/{max(options.nodes, 3)}"


# ---- trainers alone ----------------------------------------------------------------------------------


class Alone:
    """As many trainers as there will be nodes, that only take steps."""

    def __init__(self, options: argparse.Namespace, spec: RunSpec, folder: Path) -> None:
        self.options = options
        self.folder = folder
        training = training_spec(spec)
        self.training = dataclasses.replace(
            training, train=dataclasses.replace(training.train, inner_steps=100_000)
        )
        self.progress: dict[int, tuple[float, int]] = {}
        self.validated: dict[int, float] = {}
        self.all_validated, self.all_stepping = asyncio.Event(), asyncio.Event()
        self.stepped = [0] * options.nodes

    async def run(self) -> dict[str, Any]:
        async with contextlib.AsyncExitStack() as stack:
            trainers = [await self._start(i, stack) for i in range(self.options.nodes)]
            await trainers[0].initialise()
            for trainer in trainers[1:]:
                trainer.params.copy_(trainers[0].params)
            began = time.monotonic()
            for trainer in trainers:
                trainer.evaluate(0)
            await self.all_validated.wait()
            for trainer in trainers:
                trainer.begin(0)
            await self.all_stepping.wait()
            first, cpu_first = dict(self.progress), self._cpu(trainers)
            await asyncio.sleep(self.options.alone_s)
            last, cpu_last = dict(self.progress), self._cpu(trainers)
        tokens = [last[i][1] - first[i][1] for i in last]
        return {
            "tokens_per_s": [n / (last[i][0] - first[i][0]) for i, n in enumerate(tokens)],
            "tokens_per_cpu_s": sum(tokens) / (cpu_last - cpu_first),
            "validation_s": statistics.mean(self.validated.values()) - began,
        }

    async def _start(self, index: int, stack: contextlib.AsyncExitStack) -> TrainerProcess:
        settings = WorkerSettings(
            training=self.training,
            data=resolved_data(DataSettings(paths=(data_part(self.options, index),)), ""),
            cache_dir=str(self.folder / f"cache-{index}"),
            inner_state_path=str(self.folder / f"inner-{index}"),
            cursor_path=str(self.folder / f"cursor-{index}.json"),
            node_seed=index,
            codec="int8-block",
            shard_elements=1 << 18,
            residual=False,
            device=self.options.device,
        )
        trainer = await TrainerProcess.start(settings, lambda event: self._on_event(index, event))
        stack.push_async_callback(trainer.stop, 0)
        return trainer

    def _on_event(self, index: int, event: object) -> None:
        if isinstance(event, Progress):
            self.progress[index] = time.monotonic(), event.tokens
            self.stepped[index] += 1
            if min(self.stepped) >= SETTLED:
                self.all_stepping.set()
        elif isinstance(event, Validation):
            self.validated[index] = time.monotonic()
            if len(self.validated) == self.options.nodes:
                self.all_validated.set()

    def _cpu(self, trainers: list[TrainerProcess]) -> float:
        return sum(cpu_s(psutil.Process(trainer.pid)) for trainer in trainers)


# ---- nodes -------------------------------------------------------------------------------------------


def run_nodes(
    options: argparse.Namespace, spec: RunSpec, keys: list[Path], folder: Path, net: Net | None
) -> dict[str, Any]:
    nodes: list[Node] = []
    try:
        for i, key in enumerate(keys):
            home = folder / f"n{i}"
            home.mkdir(parents=True)
            shutil.copy(key, home / "identity.key")
            (home / "node.toml").write_text(f'threads = 1\ndevice = "{options.device}"\n')
            if not i:
                others = tuple(Identity.load(other).peer_id for other in keys[1:])
                founded = dataclasses.replace(
                    spec, members=dataclasses.replace(spec.members, founders=others)
                )
                (home / "run.toml").write_text(founded.to_toml())
            place = {} if net is None else {"prefix": net.prefix(i), "address": net.address(i)}
            peer = ("--peer", nodes[0].address) if i else ()
            cap = ("--max-upload", options.max_upload) if options.max_upload else ()
            node = Node(home, "--epochs", options.epochs, *peer, *cap, data=data_part(options, i), **place)
            nodes.append(node.start().wait_ready())
        nodes[0].wait_epoch(FIRST_EPOCH, START_S)
        first = [Mark.of(node) for node in nodes]
        nodes[0].wait_epoch(options.epochs - 1, 3600.0)
        last = [Mark.of(node) for node in nodes]
        for node in nodes:
            assert node.process is not None
            assert node.process.wait(600) == 0, node.tail()
    finally:
        for node in nodes:
            node.end()
    spans = [b - a for a, b in zip(first, last, strict=True)]
    wall_s = statistics.mean(span.clock_s for span in spans)
    return {
        "tokens_per_s": [span.tokens / span.clock_s for span in spans],
        "waited_share": sum(span.waited_s for span in spans) / (wall_s * len(spans)),
        "validations": sum(span.validations for span in spans),
        "node_s": wall_s * len(spans),
        "node_cores": sum(span.node_cpu_s for span in spans) / wall_s,
        "tokens_per_cpu_s": sum(span.tokens for span in spans) / sum(span.trainer_cpu_s for span in spans),
        "epoch_s": wall_s / (options.epochs - 1 - FIRST_EPOCH),
        "round_s": sum(span.round_s for span in spans) / sum(span.rounds for span in spans),
    }


@dataclasses.dataclass(frozen=True)
class Mark:
    """What a node has used and done up to now; the difference of two is a span."""

    clock_s: float
    tokens: float
    waited_s: float
    round_s: float
    rounds: float
    validations: int
    node_cpu_s: float  # and its p2pd's
    trainer_cpu_s: float

    @classmethod
    def of(cls, node: Node) -> Mark:
        text = node.get("/metrics")
        clock_s = time.monotonic()
        trainer_s = node_s = 0.0
        trainer = node.trainer()
        for process in (psutil.Process(node.pid), *node.children()):
            if process == trainer:
                trainer_s += cpu_s(process)
            else:
                node_s += cpu_s(process)
        return cls(
            clock_s,
            metric(text, "tapestry_train_tokens_total"),
            metric(text, "tapestry_train_waiting_seconds_total"),
            metric(text, "tapestry_round_seconds_sum"),
            metric(text, "tapestry_round_seconds_count"),
            node.log.read_text().count("validation_loss="),
            node_s,
            trainer_s,
        )

    def __sub__(self, other: Mark) -> Mark:
        before, after = dataclasses.astuple(other), dataclasses.astuple(self)
        return Mark(*(b - a for a, b in zip(before, after, strict=True)))


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def metric(text: str, name: str) -> float:
    match = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert match is not None, name
    return float(match[1])


# ---- staleness alone ---------------------------------------------------------------------------------


def simulate(options: argparse.Namespace, folder: Path) -> None:
    spec = make_spec(options, overlap=True)
    curves = {}
    for share in options.simulate:
        curves[share] = list(stale_curve(options, spec, share, folder))
        say(f"{share:.0%} ahead: {curves[share][-1]:.4f}")
    rows = [
        [epoch + 1, *(f"{curve[epoch]:.4f}" for curve in curves.values())] for epoch in range(options.epochs)
    ]
    print(table(["epoch", *(f"{share:.0%} ahead" for share in curves)], rows))


def stale_curve(options: argparse.Namespace, spec: RunSpec, share: float, folder: Path) -> Iterator[float]:
    """The loss of the shared base after every epoch."""
    inner, length = spec.train, spec.data.sequence_length
    loops = []
    for index in range(options.nodes):
        corpus = load_corpus([data_part(options, index)], folder, length, seed=index)
        net = build_model(spec.model, spec.data.sequence_length)
        draw = functools.partial(draw_windows, corpus, inner)
        loops.append(InnerLoop(net, model_layout(net), inner, draw, torch.device("cpu")))
    judge, windows = make_judge(spec, folder)
    params, outer = initial_state(spec.model, spec.data.sequence_length), make_outer(spec.outer)
    buffers = {name: torch.zeros_like(params) for name in outer.buffer_names}
    for epoch in range(options.epochs):
        contributions = []
        for loop in loops:
            loop.begin(epoch, params, follows=True)
            while not loop.done:
                loop.step()
            contributions.append(torch.empty_like(params))
            loop.finish(params, into(contributions[-1]))
            loop.go_on()
            for _ in range(round(share * inner.inner_steps)):
                loop.step()
        outer.step(params, buffers, torch.stack(contributions).mean(0), 0, params.numel(), epoch + 1)
        yield judge.evaluate(params, windows)


def draw_windows(corpus: Corpus, inner: TrainSpec, epoch: int, step: int) -> Windows:
    return Windows(corpus.windows_at((epoch * inner.batches + step) * inner.batch_size, inner.batch_size))


# ---- loss --------------------------------------------------------------------------------------------


def losses_of(spec: RunSpec, home: Path, epochs: set[int]) -> dict[int, float]:
    """Of the shared base after these epochs, on windows held out of all parts."""
    judge, windows = make_judge(spec, home / "cache")
    found = enumerate(states(spec, home), start=1)
    return {epoch: judge.evaluate(params, windows) for epoch, params in found if epoch in epochs}


def make_judge(spec: RunSpec, cache: Path) -> tuple[InnerLoop, Windows]:
    net = build_model(spec.model, spec.data.sequence_length)
    windows = load_corpus(["stdlib"], cache, spec.data.sequence_length).validation_windows(HELD_OUT_WINDOWS)
    judge = InnerLoop(net, model_layout(net), spec.train, no_draw, torch.device("cpu"))
    return judge, Windows(windows)


def states(spec: RunSpec, home: Path) -> Iterator[torch.Tensor]:
    """The parameters after every epoch, replayed from the update log."""
    run = open_run(Home(home), NodeCrypto(Identity.load(Home(home).identity_key)))
    assert run is not None
    state = run.state(initial_state(spec.model, spec.data.sequence_length))
    for _ in run.replay(state):
        yield state.params


def no_draw(epoch: int, step: int) -> Any:
    raise AssertionError("nobody trains here")


# ---- report ------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> None:
    options, alone = results["options"], results["alone"]
    print(
        f"{results['machine']}; {options['nodes']} nodes on {options['device']}, link {options['link']}, "
        f"cap {options['max_upload'] or 'none'}, preset {options['preset']}, "
        f"{options['inner_steps']} steps of {options['batch_size']} windows an epoch"
    )
    base = statistics.mean(alone["tokens_per_s"])
    rows: list[list[object]] = [
        ["alone", base, 1.0, None, None, 1.0, None, alone["tokens_per_cpu_s"], None, None]
    ]
    for name, run in results["runs"].items():
        rate = statistics.mean(run["tokens_per_s"])
        validating = run["validations"] * alone["validation_s"] / run["node_s"]
        rows.append(
            [
                name,
                rate,
                rate / base,
                run["waited_share"],
                validating,
                rate / base / (1 - validating),
                run["node_cores"],
                run["tokens_per_cpu_s"],
                run["epoch_s"],
                run["round_s"],
            ]
        )
    head = ["run", "tokens/s of a node", "to alone", "waited", "validating", "to alone without validating"]
    print(table([*head, "nodes' cores", "tokens per cpu s", "s per epoch", "s per round"], rows))
    waiting, overlap = results["losses"]["waiting"], results["losses"]["overlap"]
    rows = [
        [epoch, f"{loss:.4f}", f"{overlap[epoch]:.4f}", f"{overlap[epoch] / loss:.4f}"]
        for epoch, loss in waiting.items()
    ]
    print(table(["epoch", "loss waiting", "loss overlap", "to waiting"], rows))


def say(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
