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
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from _bench import extra_packages, machine, table, write_json
from training.baselines import run_baseline
from training.curve import Curve, Judge, summary
from training.plan import Plan
from training.quality import virtual_run
from training.tapestry import run_tapestry

SNAPSHOTS_MAX = 150  # of one system
CALM_S = 3.0  # between two systems
BASELINES = ("hivemind", "hivemind-local", "ddp", "alone")
SYSTEMS = ("tapestry-diloco", "tapestry-gradient", *BASELINES)


def main() -> int:
    options = parse()
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


def draw_elsewhere(results: dict[str, Any], png: Path, folder: str) -> None:
    """In a process that has matplotlib, which the project's environment has not."""
    path = Path(folder) / "results.json"
    path.write_text(json.dumps(results))
    picture = Path(__file__).with_name("training") / "picture.py"
    command = [sys.executable, "-P", str(picture), str(path), str(png.resolve())]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(extra_packages())}, check=True)


if __name__ == "__main__":
    sys.exit(main())
