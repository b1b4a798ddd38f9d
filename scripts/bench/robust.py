"""What members that lie do to a run, under each mean: final losses beside the same run without the liars.

    OMP_NUM_THREADS=1 .venv/bin/python -P scripts/bench/robust.py [--liars 1/4 2/7 3/10] [--attacks NAME...]
        [--means NAME...] [--norm members] [--seeds 0,1] [--json FILE] [--data FOLDER...]

The product's inner loop, codec, means and outer step, without a network: --epochs rounds of a `nano` model
whose members each train on a part of the standard library's sources (or on the texts of a FOLDER each). The
last members of each run are the liars. They see what all others send before they send theirs, as no real one
does, and act as one:

    flip      their own contribution, with all signs flipped
    flip10    the same, ten times as long
    scale     their own, a hundred times as long
    noise     noise, a hundred times as long as their own
    alie      "a little is enough" (Baruch et al., 1902.06156): the others' mean, less z standard deviations
    ipm       inner product manipulation (Xie et al., 1903.03936): -0.5 times the others' mean
    ipm10     -10 times the others' mean
    huge      1e30 in every element
    free      nothing: zeros
    copy      what the first honest member sends
    labels    its own, trained on its text with every byte turned round (255 - b): a label flip

`gone` is the run of the honest members alone, `none` the run in which nobody lies. Beside each loss is by how
much it is above that of `gone` under the same mean. Losses are in nats per byte, on text that nobody trains
on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from _bench import into, machine, table, write_json
from torch import Tensor

from tapestry.compression.agreement import agreement_sums
from tapestry.compression.codecs import get_codec
from tapestry.compression.means.api import Mean
from tapestry.compression.means.registry import make_mean
from tapestry.compression.reduce import reduce_shard
from tapestry.compression.refusals import RefusedVector
from tapestry.compression.shards import shard_bounds
from tapestry.node.protocol.agreement import ShardSums, agreement, lengthening
from tapestry.node.spec.run import NesterovSpec
from tapestry.node.spec.training import PRESETS, LlamaSpec
from tapestry.node.state.outer import Nesterov, f32
from tapestry.node.trainer.data.corpus import Batch, Corpus, load_corpus
from tapestry.node.trainer.inner import Diverged, InnerLoop
from tapestry.node.trainer.models.llama import build_model, initial_state, model_layout

PRESET = PRESETS["nano"]
LENGTH = PRESET.data.sequence_length
SHARD_ELEMENTS = 262_144  # the run spec's default
NORM_MAX, TRIM = 1.5, 0.25
MEANS: dict[str, Callable[[], Mean]] = {
    "mean": lambda: make_mean("mean", {}),
    "clipped": lambda: make_mean("clipped", {"norm_max": NORM_MAX}),
    "aligned": lambda: make_mean("aligned", {"norm_max": NORM_MAX}),
    "trimmed": lambda: make_mean("trimmed", {"trim": TRIM}),
    "sign-elected": lambda: make_mean("sign-elected", {"norm_max": NORM_MAX}),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One run."""

    members: int  # liars included
    liars: int
    attack: str
    mean: str
    seed: int


ALPHABET = 256  # ids of bytes come first in the vocabulary
Attack = Callable[[Tensor, list[Tensor], torch.Generator], list[Tensor]]


def alie(honest: Tensor, own: list[Tensor], rng: torch.Generator) -> list[Tensor]:
    """As many honest members as a majority lacks lie beyond z; at least 0.3, or it would be their mean."""
    count, members = len(honest), len(honest) + len(own)
    lacking = members // 2 + 1 - len(own)
    z = max(0.3, NormalDist().inv_cdf((count - lacking) / count)) if lacking < count else 0.3
    return [honest.mean(0) - z * honest.std(0, unbiased=False)] * len(own)


def noise(honest: Tensor, own: list[Tensor], rng: torch.Generator) -> list[Tensor]:
    return [100 * x.norm() * torch.randn(x.numel(), generator=rng) / x.numel() ** 0.5 for x in own]


ATTACKS: dict[str, Attack] = {
    "flip": lambda honest, own, rng: [-x for x in own],
    "flip10": lambda honest, own, rng: [-10 * x for x in own],
    "scale": lambda honest, own, rng: [100 * x for x in own],
    "noise": noise,
    "alie": alie,
    "ipm": lambda honest, own, rng: [-0.5 * honest.mean(0)] * len(own),
    "ipm10": lambda honest, own, rng: [-10 * honest.mean(0)] * len(own),
    "huge": lambda honest, own, rng: [torch.full_like(x, 1e30) for x in own],
    "free": lambda honest, own, rng: [torch.zeros_like(x) for x in own],
    "copy": lambda honest, own, rng: [honest[0]] * len(own),
    "labels": lambda honest, own, rng: own,  # `loop` trains them so
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    losses: dict[Case, float] = {}
    for case in cases(options):
        began = time.monotonic()
        losses[case] = run(case, options)
        took_s = time.monotonic() - began
        print(f"# {case} {losses[case]:.4f} {took_s:.0f} s", file=sys.stderr, flush=True)
        write_json(options.json, [dataclasses.asdict(c) | {"loss": loss} for c, loss in losses.items()])
    settings = (
        f"nano, {options.epochs} rounds of {options.inner_steps} steps, outer lr {options.outer_lr:g}, "
    )
    settings += f"momentum {options.momentum:g}, norm {options.norm}, seeds {options.seeds}"
    print(f"{machine()}\n{settings}\n")
    print(show(losses))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--liars", nargs="+", type=_liars, default=[(2, 7)], metavar="F/N")
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS), metavar="NAME")
    parser.add_argument("--means", nargs="+", choices=list(MEANS), default=list(MEANS), metavar="NAME")
    parser.add_argument("--data", nargs="+", metavar="FOLDER", help="a member's text each; taken in turns")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--inner-steps", type=int, default=8)
    parser.add_argument("--outer-lr", type=float, default=1.0)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--norm", choices=["mean", "members"], default="mean", help="[outer] norm")
    parser.add_argument("--validation-windows", type=int, default=512)
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0])
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def _liars(text: str) -> tuple[int, int]:
    liars, _, members = text.partition("/")
    if not (liars.isdigit() and members.isdigit() and int(liars) < int(members)):
        raise argparse.ArgumentTypeError(f"{text!r} is not F/N, for example 2/7")
    return int(liars), int(members)


def cases(options: argparse.Namespace) -> list[Case]:
    """Attack by attack, so that what is known early is a whole column."""
    names = ["gone", "none", *options.attacks]
    return [
        Case(members, liars, attack, mean, seed)
        for seed in options.seeds
        for liars, members in options.liars
        for attack in names
        for mean in options.means
    ]


# ---- one run -----------------------------------------------------------------------------------------


def run(case: Case, options: argparse.Namespace) -> float:
    """The last loss; infinity for a run that diverged, or whose means no f32 holds."""
    honest = case.members - case.liars
    trained = honest if case.attack == "gone" else case.members
    corpora, validation = texts(case.members, tuple(options.data or ()), options.validation_windows)
    loops = [loop(case, i, corpora[i], options.inner_steps) for i in range(trained)]
    base = initial_state(dataclasses.replace(_llama(), seed=case.seed), LENGTH)
    n, mean = base.numel(), MEANS[case.mean]()
    outer = Nesterov(NesterovSpec(lr=options.outer_lr, momentum=options.momentum))
    buffers = {"momentum": torch.zeros(n)}
    rng = torch.Generator().manual_seed(case.seed)
    try:
        for epoch in range(options.epochs):
            vectors = train(loops, epoch, base, options.inner_steps)
            if case.attack in ATTACKS:
                lies = ATTACKS[case.attack](torch.stack(vectors[:honest]), vectors[honest:], rng)
                vectors = [*vectors[:honest], *lies]
            outer.step(base, buffers, combine(vectors, mean, options.norm), 0, n, epoch + 1)
        return loops[0].evaluate(base, validation)
    except (Diverged, RefusedVector):
        return float("inf")


def _llama() -> LlamaSpec:
    assert isinstance(PRESET.model, LlamaSpec)
    return PRESET.model


@functools.lru_cache(maxsize=4)
def texts(members: int, folders: tuple[str, ...], windows: int) -> tuple[list[Corpus], Batch]:
    """Each member's text, and windows of text that nobody trains on: of all of it, in equal shares."""
    trained = [f"stdlib:{i + 1}/{members + 1}" for i in range(members)]
    measured = [f"stdlib:{members + 1}/{members + 1}"]
    if folders:
        trained, measured = [folders[i % len(folders)] for i in range(members)], list(folders)
    with tempfile.TemporaryDirectory() as cache:
        corpora, held = (
            [load_corpus([part], Path(cache), LENGTH) for part in parts] for parts in (trained, measured)
        )
        each = windows // len(held)
        return corpora, Batch(np.concatenate([one.validation_windows(each) for one in held]), None)


def loop(case: Case, member: int, corpus: Corpus, inner_steps: int) -> InnerLoop:
    model = build_model(dataclasses.replace(_llama(), seed=case.seed), LENGTH)
    settings = dataclasses.replace(PRESET.train, inner_steps=inner_steps)
    batch = settings.batch_size
    first = 100 * member + 10_000 * case.seed

    turned = case.attack == "labels" and member >= case.members - case.liars

    def draw(epoch: int, step: int) -> Batch:
        ids = corpus.windows_at(first + (epoch * inner_steps + step) * batch, batch)
        return Batch(np.where(ids < ALPHABET, ALPHABET - 1 - ids, ids) if turned else ids, None)

    return InnerLoop(model, model_layout(model), settings, draw, torch.device("cpu"))


def train(loops: Sequence[InnerLoop], epoch: int, base: Tensor, steps: int) -> list[Tensor]:
    """Each member's contribution. Raises Diverged."""
    vectors = []
    for one in loops:
        one.begin(epoch, base)
        for _ in range(steps):
            one.step()
        vectors.append(torch.empty_like(base))
        one.finish(base, into(vectors[-1]))
    return vectors


def combine(vectors: Sequence[Tensor], mean: Mean, norm: str) -> Tensor:  # f32 (n,)
    """What the outer step gets, as members would decode it. Raises RefusedVector."""
    n, codec, weights = vectors[0].numel(), get_codec("int8-block"), [1] * len(vectors)
    result, sums = torch.empty(n), []
    for shard in shard_bounds(n, SHARD_ELEMENTS):
        payloads = [codec.encode(vector[shard.start : shard.stop]) for vector in vectors]
        reduced = reduce_shard(payloads, weights, codec, shard.n, mean=mean)
        codec.decode(reduced, shard.n, result[shard.start : shard.stop])
        if norm == "members":
            sums.append(ShardSums(*dataclasses.astuple(agreement_sums(payloads, reduced, codec, shard.n))))
    return result.div_(f32(lengthening(agreement(sums, weights), len(vectors)))) if sums else result


# ---- what is shown -----------------------------------------------------------------------------------


def show(losses: dict[Case, float]) -> str:
    """A row for each number of liars and attack; a column for each mean: loss, and % above `gone`."""
    means = list(dict.fromkeys(case.mean for case in losses))
    rows = []
    for liars, members, attack in dict.fromkeys((c.liars, c.members, c.attack) for c in losses):
        row: list[object] = [f"{liars} of {members}, {attack}"]
        for mean in means:
            found = _mean_loss(losses, liars, members, attack, mean)
            reference = _mean_loss(losses, liars, members, "gone", mean)
            row.append(f"{found:.3f} ({100 * (found / reference - 1):+.1f} %)" if found < 1e9 else "diverged")
        rows.append(row)
    return table(["liars", *means], rows)


def _mean_loss(losses: dict[Case, float], liars: int, members: int, attack: str, mean: str) -> float:
    wanted = (liars, members, attack, mean)
    return statistics.fmean(
        loss for c, loss in losses.items() if (c.liars, c.members, c.attack, c.mean) == wanted
    )


if __name__ == "__main__":
    sys.exit(main())
