"""Learning where members differ: n members with one language each, against pooled training and each alone.

    OMP_NUM_THREADS=1 .venv/bin/python -P scripts/bench/learning.py FOLDER... --variants VARIANT...

Each FOLDER of .txt files (or one text file) is one member's data; docs/learning.md says where to get some
and what was found.
A variant is a kind and settings: `members:inner_steps=16,lr=1e-3`. Kinds:

    pooled    one model, one optimizer, the windows of all members in turn; `batch` windows in each step
    before    nothing is trained: what a base knows
    alone     each member by itself at its own tokens; its loss is that of its own language
    members   the product's rounds: inner loop, codec, reduce and outer step, without a network
    mixed     the same, but every member draws from all texts: what is lost although nobody differs

All see the same windows, --windows-per-member of each text, none of them twice while there is more text:
so they have equal tokens and, but for the order, equal data. Settings, with their defaults:

    batch=4            windows of a step, of a member or of pooled training
    lr=1e-3 warmup=30 schedule=constant|cosine|wsd decay=0.1 beta2=0.99 eps=1e-8 weight_decay=0.1
                       optimizer=adamw|muon
                       the inner optimizer of any kind; schedules run over the whole run; muon is for the
                       matrices of layers (AdamW for the rest), in float32, its lr is `muon_lr`
    inner_steps=64     or by shares of the run: 4@0.25+16@0.5+64 (4 for its first quarter, 16 to the half)
    outer_lr=0.7 momentum=0.9 plain=0
                       the outer step; in the first `plain` of the run (a share): lr 1, momentum 0
    moments=keep|reset|mean|second  what becomes of the inner optimizer's moments after a round: kept by each,
                       forgotten, or averaged, both of them or the second alone (that of AdamW's part)
    merge=mean|normed|elected  normed: as [outer] norm = "members"; elected: TIES' signs
    codec=int8-block|none

With --base a base is continued in place of a preset, with --lora by adapters alone. Every loss is in nats
per token (of a preset: per byte), on windows that are spread evenly over each text and trained on by nobody.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from _bench import into, machine, table, write_json
from _subjects import Base, Preset, Subject
from torch import Tensor, nn

from tapestry.compression.agreement import agreement_sums
from tapestry.compression.codecs import get_codec
from tapestry.compression.reduce import reduce_shard
from tapestry.compression.shards import shard_bounds
from tapestry.node.errors import UserError
from tapestry.node.protocol.agreement import PPM, Agreement, ShardSums, agreement, lengthening
from tapestry.node.spec.run import NesterovSpec
from tapestry.node.spec.training import PRESETS, TrainSpec
from tapestry.node.state.outer import Nesterov, f32
from tapestry.node.trainer.data.corpus import Batch
from tapestry.node.trainer.inner import Diverged, InnerLoop
from tapestry.node.trainer.tokenizers.api import Tokenizer

HELD_OUT_EVERY = 50  # blocks: 2 %
BLOCK_TOKENS = 4096
CHARS_AT_ONCE = 1 << 20  # tokenized
SHARD_ELEMENTS = 1 << 20
KINDS = ("before", "pooled", "alone", "members", "mixed")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train; the module's docstring says what the settings mean."""

    kind: str
    batch: int = 4
    lr: float = 1e-3
    muon_lr: float = 5e-3
    optimizer: str = "adamw"
    warmup: int = 30
    schedule: str = "constant"
    decay: float = 0.1
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1
    inner_steps: str = "64"
    outer_lr: float = 0.7
    momentum: float = 0.9
    plain: float = 0.0
    moments: str = "keep"
    merge: str = "mean"
    codec: str = "int8-block"

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Raises ValueError, in one line."""
        kind, _, settings = text.partition(":")
        types = {item.name: type(item.default) for item in dataclasses.fields(cls) if item.name != "kind"}
        values: dict[str, Any] = {}
        for pair in filter(None, settings.split(",")):
            key, _, value = pair.partition("=")
            if key not in types:
                raise ValueError(f"{text}: no setting is called {key!r}; there are {', '.join(types)}")
            values[key] = types[key](value)
        return cls(kind, **values).checked(text)

    def checked(self, text: str) -> Variant:
        choices = {
            "kind": KINDS,
            "optimizer": ("adamw", "muon"),
            "schedule": tuple(SCHEDULES),
            "moments": ("keep", "reset", "mean", "second"),
            "merge": tuple(MERGES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{text}: {name} is one of {', '.join(allowed)}")
        self.lengths(1000)
        return self

    def lengths(self, steps: int) -> list[int]:
        """The inner steps of every round of a member that takes so many in all."""
        parts = [part.partition("@") for part in self.inner_steps.split("+")]
        plan = [(int(length), float(until or 1.0)) for length, _, until in parts]
        lengths: list[int] = []
        for length, until in plan:
            while sum(lengths) < round(until * steps):
                lengths.append(min(length, steps - sum(lengths)))
        return lengths


@dataclass
class Result:
    """What a variant came to, from one seed."""

    losses: list[float]  # of each language, at the end
    curve: list[tuple[float, float]]  # (share of the run, mean loss)
    rounds: int = 0
    cosine: list[float] = field(default_factory=list)  # of the rounds
    kept: list[float] = field(default_factory=list)
    signs: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    texts = [load_text(source, options.subject.tokenizer) for source in options.sources]
    results: dict[str, list[Result]] = {}
    for name, variant in options.variants.items():
        for seed in options.seeds:
            bench = Bench(options, texts, variant, seed)
            began = time.monotonic()
            try:
                result = RUNS[variant.kind](bench)
            except Diverged as error:
                print(f"# {name} seed {seed}: {error}", file=sys.stderr, flush=True)
                continue
            result.seconds = time.monotonic() - began
            results.setdefault(name, []).append(result)
            print(f"# {name} seed {seed}: {result.loss:.4f} in {result.seconds:.0f} s", file=sys.stderr)
            print("#   " + " ".join(f"{loss:.3f}" for _, loss in result.curve), file=sys.stderr, flush=True)
            write_json(options.json, as_json(options, results))
    print(f"{machine()}\n{options.subject.name}, {bench.tokens:,} tokens in all, {len(texts)} members\n")
    print(show(results, [source.name for source in options.sources], options.reference))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="FOLDER", help="or a text file: of a member")
    parser.add_argument("--variants", nargs="+", required=True, metavar="KIND:KEY=VALUE,...")
    parser.add_argument("--preset", default="tiny", choices=list(PRESETS))
    parser.add_argument("--hidden", type=int, help="a smaller or larger model of the preset's shape")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--base", type=Path, metavar="HFDIR", help="continue a base in place of a preset")
    parser.add_argument("--lora", type=int, default=0, metavar="R", help="with --base: adapters of rank R")
    parser.add_argument("--windows-per-member", type=int, default=5120, help="20 epochs of 64 steps of 4")
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--validation-windows", type=int, default=128, help="of each text")
    parser.add_argument("--points", type=int, default=4, help="of the loss's curve")
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0])
    parser.add_argument("--reference", help="the variant that gaps are taken from; default: best pooled one")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile: a minute, then 1.5 times as fast"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    try:
        options.variants = {text: Variant.parse(text) for text in options.variants}
        options.subject = subject_of(options)
    except (ValueError, UserError) as error:
        parser.error(str(error))
    if options.reference not in (None, *options.variants):
        parser.error(f"--reference {options.reference} is none of the variants")
    return options


def subject_of(options: argparse.Namespace) -> Subject:
    """Raises UserError."""
    if options.base:
        return Base(options.base, options.lora, options.sequence_length or 128)
    return Preset.of(options.preset, options.hidden, options.layers, options.sequence_length)


# ---- the text ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Text:
    """A member's tokens; held out are blocks that are spread evenly over all of it."""

    training: np.ndarray  # uint32 (count,)
    held_out: np.ndarray  # uint32 (count,)

    def windows(
        self,
        seed: int,
        numbers: np.ndarray,  # int64 (count,): the how-manieth windows that are drawn from this text
        length: int,
    ) -> np.ndarray:  # int64 (count, length)
        """None twice before all were drawn once."""
        fit = len(self.training) // length
        starts = np.array([_order(seed, number // fit, fit)[number % fit] * length for number in numbers])
        return _cut(self.training, starts, length)

    def validation(self, count: int, length: int) -> np.ndarray:  # int64 (count, length)
        starts = np.linspace(0, len(self.held_out) - length, count).astype(np.int64)
        return _cut(self.held_out, starts, length)


def load_text(source: Path, tokenizer: Tokenizer) -> Text:
    """A text file, or a folder's .txt files; an end of text after each."""
    parts: list[np.ndarray] = []
    for path in [source] if source.is_file() else sorted(source.rglob("*.txt")):
        text = path.read_text(errors="replace")
        parts += tokenizer.encode_batch(
            [text[start : start + CHARS_AT_ONCE] for start in range(0, len(text), CHARS_AT_ONCE)]
        )
        parts.append(np.array([tokenizer.eos_id], dtype=np.uint32))
    if not parts:
        raise SystemExit(f"error: {source} is no text file, nor a folder with .txt files")
    tokens = np.concatenate(parts, dtype=np.uint32)
    block = min(BLOCK_TOKENS, len(tokens) // HELD_OUT_EVERY)
    held = np.arange(len(tokens)) // block % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
    return Text(tokens[~held], tokens[held])


@functools.lru_cache(maxsize=64)
def _order(seed: int, turn: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, turn]).permutation(count)


def _cut(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    return tokens[starts[:, None] + np.arange(length)].astype(np.int64)


# ---- one run -----------------------------------------------------------------------------------------


class Bench:
    """The texts, a variant and a seed: what a run is made of."""

    def __init__(
        self, options: argparse.Namespace, texts: Sequence[Text], variant: Variant, seed: int
    ) -> None:
        self.options = options
        self.texts = texts
        self.variant = variant
        self.seed = seed
        self.length = 1 + options.subject.sequence_length
        self.base = options.subject.initial_state(seed)
        self.validation = [text.validation(options.validation_windows, self.length) for text in texts]

    @property
    def tokens(self) -> int:
        return len(self.texts) * self.options.windows_per_member * (self.length - 1)

    @property
    def member_steps(self) -> int:
        return int(self.options.windows_per_member) // self.variant.batch

    def draw(self, language: int, numbers: np.ndarray) -> np.ndarray:
        return self.texts[language].windows(1000 * self.seed + language, numbers, self.length)

    def draw_own(self, member: int, step: int) -> np.ndarray:
        return self.draw(member, step * self.variant.batch + np.arange(self.variant.batch))

    def draw_mixed(self, member: int, step: int) -> np.ndarray:
        numbers = step * self.variant.batch + np.arange(self.variant.batch)
        return np.concatenate([self.draw((w + member) % len(self.texts), np.array([w])) for w in numbers])

    def draw_pooled(self, step: int) -> np.ndarray:
        numbers = step * self.variant.batch + np.arange(self.variant.batch)
        n = len(self.texts)
        return np.concatenate([self.draw(w % n, np.array([w // n])) for w in numbers])

    def loop(self, draw: Callable[[int], np.ndarray], steps: int) -> tuple[InnerLoop, Optimizer]:
        """The product's inner loop with the variant's optimizer; `draw` is told the steps before this one."""
        variant = self.variant
        model, layout = self.options.subject.network(self.seed)
        if self.options.compile:
            model.compile()
        settings = TrainSpec(batch_size=variant.batch)
        loop = InnerLoop(
            model,
            layout,
            settings,
            lambda epoch, step: Batch(draw(optimizer.steps), None),
            torch.device("cpu"),
        )
        optimizer = Optimizer(model, loop, variant, steps)
        loop._optimizer = optimizer  # one whose moments can be settled between members
        return loop, optimizer

    def losses(self, loop: InnerLoop, base: Tensor) -> list[float]:
        return [loop.evaluate(base, Batch(windows, None)) for windows in self.validation]


def run_before(bench: Bench) -> Result:
    loop, _ = bench.loop(bench.draw_pooled, 1)
    return Result(bench.losses(loop, bench.base), [])


def run_pooled(bench: Bench) -> Result:
    steps = bench.member_steps * len(bench.texts)
    return run_one(bench, bench.draw_pooled, steps)


def run_alone(bench: Bench) -> Result:
    """Each member's loss of its own language."""
    own = []
    for member in range(len(bench.texts)):
        result = run_one(bench, lambda step, member=member: bench.draw_own(member, step), bench.member_steps)
        own.append(result.losses[member])
    return Result(own, [])


def run_one(bench: Bench, draw: Callable[[int], np.ndarray], steps: int) -> Result:
    loop, _ = bench.loop(draw, steps)
    base = bench.base.clone()
    curve = []
    points = {round(steps * (i + 1) / bench.options.points) for i in range(bench.options.points)}
    loop.begin(0, base)
    for step in range(1, steps + 1):
        loop.step()
        if step in points:
            losses = bench.losses(loop, torch.cat([part.flatten() for part in loop._held.copy()]))
            curve.append((step / steps, statistics.fmean(losses)))
    return Result(losses, curve)


def run_members(bench: Bench) -> Result:
    return run_rounds(bench, bench.draw_own)


def run_mixed(bench: Bench) -> Result:
    return run_rounds(bench, bench.draw_mixed)


def run_rounds(bench: Bench, draw: Callable[[int, int], np.ndarray]) -> Result:
    variant, steps = bench.variant, bench.member_steps
    base, n = bench.base.clone(), bench.base.numel()
    made = [bench.loop(lambda step, i=i: draw(i, step), steps) for i in range(len(bench.texts))]
    outer = Nesterov(NesterovSpec(lr=variant.outer_lr, momentum=variant.momentum))
    plain = Nesterov(NesterovSpec(lr=1.0, momentum=0.0))
    buffers = {"momentum": torch.zeros(n)}
    vectors = [torch.empty(n) for _ in made]
    lengths = variant.lengths(steps)
    points = [round(steps * (i + 1) / bench.options.points) for i in range(bench.options.points)]
    result, done = Result([], []), 0
    for epoch, length in enumerate(lengths):
        for (loop, _), vector in zip(made, vectors, strict=True):
            loop.begin(epoch, base)
            for _ in range(length):
                loop.step()
            loop.finish(base, into(vector))
        settle_moments([optimizer for _, optimizer in made], variant.moments)
        mean, figures = combine(vectors, variant)
        result.cosine.append(figures.cosine_ppm / PPM)
        result.kept.append(figures.norm_kept_ppm / PPM)
        result.signs.append(figures.sign_ppm / PPM)
        stepper = plain if done < variant.plain * steps else outer
        stepper.step(base, buffers, mean, 0, n, epoch + 1)
        done += length
        if done >= points[0]:
            points.pop(0)
            result.losses = bench.losses(made[0][0], base)
            result.curve.append((done / steps, statistics.fmean(result.losses)))
    result.rounds = len(lengths)
    return result


RUNS = {
    "before": run_before,
    "pooled": run_pooled,
    "alone": run_alone,
    "members": run_members,
    "mixed": run_mixed,
}


# ---- the round ---------------------------------------------------------------------------------------


def combine(
    vectors: Sequence[Tensor],  # f32 (n,) each
    variant: Variant,
) -> tuple[Tensor, Agreement]:  # f32 (n,)
    """What the outer step gets, as members would decode it; and how far the vectors agree."""
    n = vectors[0].numel()
    codec = get_codec("int8-block" if variant.codec == "none" else variant.codec)
    merge = MERGES[variant.merge]
    mean, sums = torch.empty(n), []
    for shard in shard_bounds(n, SHARD_ELEMENTS):
        payloads = [codec.encode(vector[shard.start : shard.stop]) for vector in vectors]
        reduced = reduce_shard(payloads, [1] * len(payloads), codec, shard.n)
        found = agreement_sums(payloads, reduced, codec, shard.n)
        sums.append(ShardSums(*dataclasses.astuple(found)))
        if variant.codec == "none":
            torch.stack([v[shard.start : shard.stop] for v in vectors]).mean(
                0, out=mean[shard.start : shard.stop]
            )
        elif merge is None:
            codec.decode(reduced, shard.n, mean[shard.start : shard.stop])
        else:
            decoded = torch.stack([codec.decode(payload, shard.n) for payload in payloads])
            mean[shard.start : shard.stop] = merge(decoded)
    figures = agreement(sums, [1] * len(vectors))
    if variant.merge == "normed":
        mean.div_(f32(lengthening(figures, len(vectors))))
    return mean, figures


def elected_mean(
    decoded: Tensor,  # f32 (members, n)
) -> Tensor:  # f32 (n,)
    """TIES (2306.01708) without its trimming: the mean of those that have the sign of the sum."""
    agrees = torch.sign(decoded) == torch.sign(decoded.sum(0))
    return (decoded * agrees).sum(0) / agrees.sum(0).clamp_min(1)


MERGES: dict[str, Callable[[Tensor], Tensor] | None] = {"mean": None, "normed": None, "elected": elected_mean}


# ---- inner optimizers --------------------------------------------------------------------------------


def constant(done: float, decay: float) -> float:
    return 1.0


def cosine(done: float, decay: float) -> float:
    """To `decay` of the rate."""
    return decay + (1 - decay) * (1 + math.cos(math.pi * done)) / 2


def wsd(done: float, decay: float) -> float:
    """Constant, then a straight line down to `decay` of the rate over the last 30 %."""
    return 1.0 if done < 0.7 else 1.0 - (1 - decay) * (done - 0.7) / 0.3


SCHEDULES = {"constant": constant, "cosine": cosine, "wsd": wsd}


FIRST, SECOND = "exp_avg", "exp_avg_sq"  # torch's names of AdamW's moments


class Optimizer:
    """In the place of the inner loop's moments: AdamW, or Muon for matrices; schedules over the run."""

    def __init__(self, model: nn.Module, loop: InnerLoop, variant: Variant, steps_max: int) -> None:
        self.steps = 0
        self._variant = variant
        self._steps_max = steps_max
        self._muon: Muon | None = None
        if variant.optimizer == "muon":
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            matrices = [p for name, p in named if p.dim() == 2 and ".layers." in name]
            rest = [p for name, p in named if not (p.dim() == 2 and ".layers." in name)]
            self._muon = Muon(matrices)
        else:
            rest = [p for p in model.parameters() if p.requires_grad]
        self._adamw = torch.optim.AdamW(
            rest,
            lr=0.0,
            betas=(0.9, variant.beta2),
            eps=variant.eps,
            weight_decay=variant.weight_decay,
            fused=True,
        )
        self._rest = rest

    def step(self, scale: float) -> None:
        variant = self._variant
        warm = min(1.0, (self.steps + 1) / variant.warmup) if variant.warmup else 1.0
        rate = warm * SCHEDULES[variant.schedule](self.steps / self._steps_max, variant.decay)
        self.steps += 1
        self._adamw.param_groups[0]["lr"] = variant.lr * rate
        self._adamw.step()
        if self._muon is not None:
            self._muon.step(variant.muon_lr * rate)

    def tensors(self) -> dict[str, Tensor]:
        """No epoch is begun twice here, so there is nothing to be copied."""
        return {}

    def resume(self, steps: int) -> None:
        """As `tensors` says: this does not come."""

    def moments(self, names: Sequence[str]) -> list[Tensor]:
        """Some of AdamW's moments, in an order that is the same for every member; with the first, Muon's."""
        states = [self._adamw.state[p] for p in self._rest]
        found = [state[name] for state in states for name in names]
        return found + (self._muon.momenta if self._muon is not None and FIRST in names else [])

    def forget_steps(self) -> None:
        """Moments that begin at zero are corrected for it, by how many steps ago that was."""
        for p in self._rest:
            self._adamw.state[p]["step"].zero_()


def settle_moments(optimizers: Sequence[Optimizer], how: str) -> None:
    """After a round: keep the moments, forget them, or give everybody the mean of both, or of the second."""
    if how == "keep":
        return
    names = [SECOND] if how == "second" else [FIRST, SECOND]
    for together in zip(*(optimizer.moments(names) for optimizer in optimizers), strict=True):
        new = torch.zeros_like(together[0]) if how == "reset" else torch.stack(list(together)).mean(0)
        for tensor in together:
            tensor.copy_(new)
    if how == "reset":
        for optimizer in optimizers:
            optimizer.forget_steps()


class Muon:
    """Muon (Jordan et al., 2024) in float32, matrices of one shape at a time; rates as in 2502.16982.

    torch.optim.Muon does the same in bfloat16, one by one: on a CPU without bfloat16 units many times slower.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], momentum: float = 0.95) -> None:
        shapes = sorted({tuple(p.shape) for p in matrices})
        self._groups = [[p for p in matrices if tuple(p.shape) == shape] for shape in shapes]
        self.momenta = [torch.zeros(len(group), *group[0].shape) for group in self._groups]
        self._momentum = momentum

    def step(self, lr: float, weight_decay: float = 0.1) -> None:
        for group, kept in zip(self._groups, self.momenta, strict=True):
            gradient = torch.stack([p.grad for p in group])  # type: ignore[misc]
            kept.lerp_(gradient, 1 - self._momentum)
            update = orthogonal(torch.lerp(gradient, kept, self._momentum))
            scale = 0.2 * math.sqrt(max(kept.shape[1:]))  # the root mean square of AdamW's updates
            for p, one in zip(group, update, strict=True):
                p.data.mul_(1 - lr * weight_decay).add_(one, alpha=-lr * scale)


def orthogonal(
    x: Tensor,  # f32 (count, rows, columns)
) -> Tensor:  # f32 (count, rows, columns)
    """The nearest matrices with singular values near 1: five Newton-Schulz steps, Muon's coefficients."""
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


# ---- what is shown -----------------------------------------------------------------------------------


def show(results: dict[str, list[Result]], names: Sequence[str], reference: str | None) -> str:
    mean = {name: statistics.fmean(result.loss for result in runs) for name, runs in results.items()}
    pooled = [name for name in results if name.startswith("pooled")]
    base = mean[reference] if reference else min((mean[name] for name in pooled), default=math.nan)
    before = mean.get("before")
    rows = []
    for name, runs in results.items():
        by_language = np.array([result.losses for result in runs]).mean(0)
        spread = max(r.loss for r in runs) - min(r.loss for r in runs) if len(runs) > 1 else None
        rows.append(
            [
                name,
                f"{mean[name]:.3f}",
                "-" if spread is None else f"{spread:.3f}",
                f"{100 * (mean[name] / base - 1):+.1f}",
                *([] if before is None else [f"{100 * (before - mean[name]) / (before - base):.0f}"]),
                *(f"{loss:.3f}" for loss in by_language),
                runs[0].rounds or "-",
                *(ends([getattr(r, key) for r in runs]) for key in ("cosine", "kept", "signs")),
                f"{statistics.fmean(r.seconds for r in runs):.0f}",
            ]
        )
    gain = [] if before is None else ["gain %"]  # of pooled training's
    head = [
        "variant",
        "loss",
        "spread",
        "gap %",
        *gain,
        *names,
        "rounds",
        "cosine",
        "norm kept",
        "signs",
        "s",
    ]
    return table(head, rows)


def ends(series: Sequence[Sequence[float]]) -> str:
    """The mean of the first and of the last tenth of the rounds."""
    if not series[0]:
        return "-"
    tenth = max(1, len(series[0]) // 10)
    first = statistics.fmean(x for one in series for x in one[:tenth])
    last = statistics.fmean(x for one in series for x in one[-tenth:])
    return f"{first:.2f} {last:.2f}"


def as_json(options: argparse.Namespace, results: dict[str, list[Result]]) -> dict[str, Any]:
    said = {key: str(value) for key, value in vars(options).items() if key != "variants"}
    return {
        "machine": machine(),
        "options": said,
        "variants": {name: dataclasses.asdict(variant) for name, variant in options.variants.items()},
        "results": {name: [dataclasses.asdict(result) for result in runs] for name, runs in results.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
