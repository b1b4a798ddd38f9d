"""Tokens a second of our trainer against `transformers.Trainer`: same model, windows, optimizer, device.

    .venv/bin/python -P scripts/bench/trainer_speed.py --base DIR [--batch 4] [--length 256] [--steps 8]

DIR is a Hugging Face directory; its weights are not needed, both begin from random parameters. The two take
turns, each in a process of its own; a turn is `--steps` optimizer steps (AdamW, clipping to 1) after two that
are not counted, and its figure is the median step. Told are the median of the turns, the ratio within each
turn, and the largest memory of each process. Ours is `InnerLoop`, which the daemon's trainer runs, without
the node beside it.

`--bf16` autocasts both, `--checkpointing` recomputes activations in both.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

UNCOUNTED = 2
VOCABULARY = 256  # of the windows: every model has as many ids
SIDES = ("ours", "transformers.Trainer")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.side:
        print(json.dumps(SIDE[options.side](options)))
        return 0
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(options.turns):
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            turns[side].append(in_own_process(side, arguments))
            print(f"turn {turn + 1}  {side:<22}{said(turns[side][-1])}", flush=True)
    for side in SIDES:
        middle = {key: statistics.median(turn[key] for turn in turns[side]) for key in turns[side][0]}
        print(f"median  {side:<22}{said(middle)}")
    rates = [[turn["tokens_per_second"] for turn in turns[side]] for side in SIDES]
    ratios = [ours / theirs for ours, theirs in zip(*rates, strict=True)]
    by_turn = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"ours / theirs, by turn: {by_turn}; median {statistics.median(ratios):.3f}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def in_own_process(side: str, arguments: Sequence[str] | None) -> dict[str, float]:
    own = sys.argv[1:] if arguments is None else arguments
    done = subprocess.run(
        [sys.executable, "-P", __file__, *own, "--side", side], stdout=subprocess.PIPE, text=True, check=True
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def said(figures: dict[str, float]) -> str:
    return "{tokens_per_second:9.1f} tokens/s  {memory_bytes:6.2f} GB  loss {loss:.3f}".format(
        **{**figures, "memory_bytes": figures["memory_bytes"] / 1e9}
    )


def windows(options: argparse.Namespace) -> np.ndarray:  # int64 (steps, batch, length + 1)
    shape = (UNCOUNTED + options.steps, options.batch, options.length + 1)
    return np.random.default_rng(1).integers(0, VOCABULARY, shape)


def figures(options: argparse.Namespace, marks_s: Sequence[float], loss: float) -> dict[str, float]:
    """`marks_s`: the clock before the first step and after each."""
    steps_s = np.diff(marks_s)[UNCOUNTED:]
    return {
        "tokens_per_second": options.batch * options.length / float(np.median(steps_s)),
        "memory_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        "loss": loss,
    }


def clock(device: str) -> float:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(options: argparse.Namespace) -> dict[str, float]:
    import torch

    from tapestry.compression.shards import Layout
    from tapestry.node.spec.training import LocalTraining, TrainSpec, TransformersSpec
    from tapestry.node.trainer.gradients import Windows
    from tapestry.node.trainer.inner import InnerLoop
    from tapestry.node.trainer.models import registry
    from tapestry.node.trainer.models.pretrained import check_base

    facts = check_base(str(options.base), need_weights=False, lora=False)
    spec = TransformersSpec("transformers", (), "", facts.parameters, 1)
    net = registry.build(spec, options.base, options.length)
    layout: Layout = registry.layout_of(net)
    base = torch.empty(layout.n)
    registry.initial_state(spec, options.base, options.length, base)
    ids = windows(options)
    loop = InnerLoop(
        net,
        layout,
        TrainSpec(batch_size=options.batch, inner_steps=len(ids), lr=1e-4, warmup_steps=0),
        lambda epoch, step: Windows(ids[step]),
        torch.device(options.device),
        LocalTraining(
            precision="bf16" if options.bf16 else "f32",
            checkpointing=options.checkpointing,
        ),
    )
    loop.begin(0, base)
    marks_s = [clock(options.device)]
    for _ in ids:
        loss = loop.step()
        marks_s.append(clock(options.device))
    return figures(options, marks_s, loss)


def theirs(options: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(1)
    net = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.base), dtype=torch.float32)
    ids = windows(options)
    rows = [
        {"input_ids": row, "labels": row} for row in torch.from_numpy(ids.reshape(-1, ids.shape[2])[:, :-1])
    ]
    marks_s: list[float] = []

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **named: Any) -> None:
            marks_s.append(clock(options.device))

        def on_step_end(self, *args: Any, **named: Any) -> None:
            marks_s.append(clock(options.device))

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=net,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=options.batch,
                max_steps=len(ids),
                learning_rate=1e-4,
                lr_scheduler_type="constant",
                weight_decay=0.1,
                max_grad_norm=1.0,
                optim="adamw_torch",
                bf16=options.bf16,
                activation_checkpointing=options.checkpointing,
                use_cpu=options.device == "cpu",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=options.device != "cpu",
            ),
            train_dataset=rows,
            callbacks=[Marks()],
        )
        loss = trainer.train().training_loss
    return figures(options, marks_s, loss)


SIDE: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = dict(
    zip(SIDES, (ours, theirs), strict=True)
)


if __name__ == "__main__":
    sys.exit(main())
