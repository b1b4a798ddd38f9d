"""The members of learning.py as one batch: a sketch of its rounds, several times as fast, to look for ideas.

    OMP_NUM_THREADS=1 .venv/bin/python -P scripts/bench/learning_sketch.py FOLDER... --variants VARIANT...

The same variants, texts, windows and outer step. Not the product's: the model is a small Llama written here,
with one more dimension for the members, the optimizers are written out, and nothing is encoded. Every
operation works on all members at once, so a step of four costs little more than that of one where models
are small. What is found here has to be shown again with learning.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from _bench import table
from learning import SCHEDULES, Text, Variant, elected_mean, load_text, orthogonal
from torch import Tensor
from torch.nn import functional

from tapestry.node.trainer.tokenizers.byte import ByteTokenizer

VOCABULARY = 259


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the model; half as many key and value heads as heads."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    length: int  # of a sequence

    @property
    def parameters(self) -> list[tuple[str, tuple[int, ...]]]:
        h, wide = self.hidden, self.intermediate
        found: list[tuple[str, tuple[int, ...]]] = [("embedding", (VOCABULARY, h))]
        for i in range(self.layers):
            found += [
                (f"{i}.qkv", (2 * h, h)),
                (f"{i}.out", (h, h)),
                (f"{i}.gate_up", (2 * wide, h)),
                (f"{i}.down", (h, wide)),
                (f"{i}.before", (h,)),
                (f"{i}.after", (h,)),
            ]
        return [*found, ("norm", (h,))]

    @property
    def n(self) -> int:
        return sum(math.prod(shape) for _, shape in self.parameters)

    def parts(self, name: str) -> list[int]:
        """The rows of each matrix that lies in this one: Muon takes them one by one."""
        if name.endswith("qkv"):
            return [self.hidden, self.hidden // 2, self.hidden // 2]
        return [self.intermediate] * 2 if name.endswith("gate_up") else []


class Net:
    """Models of one shape, as views of `flat`, f32 (count, n); their gradients are views of `gradient`."""

    def __init__(self, shape: Shape, count: int) -> None:
        self.shape = shape
        self.flat = torch.zeros(count, shape.n)
        self.gradient = torch.zeros(count, shape.n)
        self.places: dict[str, tuple[slice, tuple[int, ...]]] = {}
        self.views: dict[str, Tensor] = {}
        offset = 0
        for name, size in shape.parameters:
            place = slice(offset, offset + math.prod(size))
            offset = place.stop
            self.places[name] = place, size
            self.views[name] = self.flat[:, place].view(count, *size).detach().requires_grad_(True)
            self.views[name].grad = self.gradient[:, place].view(count, *size)
        self._first_rows = torch.arange(count)[:, None, None] * VOCABULARY
        self._turns = turns(shape)

    def losses(
        self,
        windows: Tensor,  # int64 (count, batch, length + 1)
    ) -> Tensor:  # f32 (count,)
        count, p, h = len(windows), self.views, self.shape.hidden
        rows = (windows[:, :, :-1] + self._first_rows[:count]).reshape(count, -1)
        x = functional.embedding(rows, p["embedding"].reshape(-1, h))
        for i in range(self.shape.layers):
            x = x + self._attention(i, normed(x, p[f"{i}.before"]), windows.shape[1])
            gate, up = (normed(x, p[f"{i}.after"]) @ p[f"{i}.gate_up"].mT).chunk(2, -1)
            x = x + (functional.silu(gate) * up) @ p[f"{i}.down"].mT
        logits = normed(x, p["norm"]) @ p["embedding"].mT
        targets = windows[:, :, 1:].reshape(-1)
        each = functional.cross_entropy(logits.reshape(-1, VOCABULARY), targets, reduction="none")
        return each.view(count, -1).mean(1)

    def _attention(self, layer: int, x: Tensor, batch: int) -> Tensor:
        shape, count = self.shape, len(x)
        h, size = shape.hidden, shape.hidden // shape.heads
        parts = (x @ self.views[f"{layer}.qkv"].mT).split([h, h // 2, h // 2], -1)
        q, k, v = (one.reshape(count * batch, shape.length, -1, size).transpose(1, 2) for one in parts)
        q, k = (one * self._turns[0] + half_turned(one) * self._turns[1] for one in (q, k))
        k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).reshape(count, -1, h) @ self.views[f"{layer}.out"].mT


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],)) * weight[:, None]


def turns(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embeddings, f32 (length, head size) each."""
    size = shape.hidden // shape.heads
    rates = 1 / 10_000 ** (torch.arange(0, size, 2) / size)
    angles = torch.outer(torch.arange(shape.length).float(), rates).repeat(1, 2)
    return angles.cos(), angles.sin()


def half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def initial(shape: Shape, seed: int) -> Tensor:  # f32 (n,)
    draws = torch.Generator().manual_seed(seed)
    parts = [
        torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size, generator=draws)
        for _, size in shape.parameters
    ]
    return torch.cat([part.flatten() for part in parts])


class Optimizer:
    """AdamW of all models, or Muon for the matrices of layers; gradients are clipped to norm 1."""

    def __init__(self, net: Net, variant: Variant, steps_max: int) -> None:
        self.net, self.variant, self.steps_max = net, variant, steps_max
        self.steps = self._fresh_steps = 0  # of the run, and since moments were zero
        self.first, self.second = torch.zeros_like(net.flat), torch.zeros_like(net.flat)
        self.matrices = (
            [name for name, (_, size) in net.places.items() if len(size) == 2 and name != "embedding"]
            if variant.optimizer == "muon"
            else []
        )
        self.momenta = {name: torch.zeros_like(net.views[name]) for name in self.matrices}
        self._rest = torch.ones(net.shape.n)  # 1 where AdamW is at work
        for name in self.matrices:
            self._rest[net.places[name][0]] = 0.0

    def step(self) -> None:
        variant, net = self.variant, self.net
        warm = min(1.0, (self.steps + 1) / variant.warmup) if variant.warmup else 1.0
        rate = warm * SCHEDULES[variant.schedule](self.steps / self.steps_max, variant.decay)
        self.steps += 1
        gradient = net.gradient
        gradient.mul_((1 / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp_max(1.0))
        self.first.lerp_(gradient, 0.1)
        self.second.mul_(variant.beta2).addcmul_(gradient, gradient, value=1 - variant.beta2)
        self._fresh_steps += 1
        root = math.sqrt(1 - variant.beta2**self._fresh_steps)
        scale = variant.lr * rate / (1 - 0.9**self._fresh_steps)
        update = self.first / (self.second.sqrt() / root).add_(variant.eps) * scale
        net.flat.mul_(1 - 0.1 * variant.lr * rate * self._rest).sub_(update.mul_(self._rest))
        for name in self.matrices:
            self._step_matrix(name, variant.muon_lr * rate)

    def _step_matrix(self, name: str, lr: float) -> None:
        place, size = self.net.places[name]
        gradient = self.net.gradient[:, place].view(-1, *size)
        kept = self.momenta[name].lerp_(gradient, 0.05)
        update = torch.lerp(gradient, kept, 0.95)
        parts = update.split(self.net.shape.parts(name) or [size[0]], 1)
        turned = [orthogonal(part) * (0.2 * math.sqrt(max(part.shape[1:]))) for part in parts]
        self.net.flat[:, place].view(-1, *size).mul_(1 - 0.1 * lr).sub_(torch.cat(turned, 1), alpha=lr)

    def settle(self) -> None:
        """After a round; see learning.py."""
        how = self.variant.moments
        together = [self.second] if how == "second" else [self.first, self.second, *self.momenta.values()]
        for moments in together if how != "keep" else []:
            moments.copy_(moments.mean(0, keepdim=True).clone() if how != "reset" else torch.zeros(1))
        if how == "reset":
            self._fresh_steps = 0


@dataclass(frozen=True, slots=True)
class Sketch:
    """The texts, the shape, a variant and a seed."""

    shape: Shape
    texts: Sequence[Text]
    variant: Variant
    seed: int
    windows_per_member: int
    validation: Tensor  # int64 (texts, count, length + 1)

    def draw(self, language: int, numbers: Sequence[int]) -> np.ndarray:
        seed = 1000 * self.seed + language
        return self.texts[language].windows(seed, np.array(numbers), self.shape.length + 1)

    def losses(self, flat: Tensor) -> list[float]:
        net = Net(self.shape, 1)
        net.flat.copy_(flat)
        with torch.no_grad():
            return [net.losses(one[None]).item() for one in self.validation]

    def run(self) -> tuple[list[float], list[float], list[float]]:
        """Losses of the languages; and for rounds the norm kept in each, and the losses of its quarters."""
        count, batch = len(self.texts), self.variant.batch
        steps = self.windows_per_member // batch
        if self.variant.kind == "pooled":
            end = self._train(1, steps * count, lambda step, _: self._pooled(step))
            return self.losses(end[0]), [], []
        if self.variant.kind == "alone":
            end = self._train(count, steps, self._own)
            return [self.losses(end[i])[i] for i in range(count)], [], []
        return self._rounds(steps, self._own if self.variant.kind == "members" else self._mixed)

    def _own(self, step: int, member: int) -> np.ndarray:
        batch = self.variant.batch
        return self.draw(member, range(step * batch, (step + 1) * batch))

    def _mixed(self, step: int, member: int) -> np.ndarray:
        batch, count = self.variant.batch, len(self.texts)
        numbers = range(step * batch, (step + 1) * batch)
        return np.concatenate([self.draw((number + member) % count, [number]) for number in numbers])

    def _pooled(self, step: int) -> np.ndarray:
        batch, count = self.variant.batch, len(self.texts)
        numbers = range(step * batch, (step + 1) * batch)
        return np.concatenate([self.draw(number % count, [number // count]) for number in numbers])

    def _train(self, models: int, steps: int, draw: Callable[[int, int], np.ndarray]) -> Tensor:
        net = Net(self.shape, models)
        net.flat.copy_(initial(self.shape, self.seed).expand_as(net.flat))
        optimizer = Optimizer(net, self.variant, steps)
        for step in range(steps):
            take_step(net, optimizer, [draw(step, i) for i in range(models)])
        return net.flat

    def _rounds(
        self, steps: int, draw: Callable[[int, int], np.ndarray]
    ) -> tuple[list[float], list[float], list[float]]:
        variant, members = self.variant, range(len(self.texts))
        net = Net(self.shape, len(members))
        optimizer = Optimizer(net, variant, steps)
        base = initial(self.shape, self.seed)
        momentum, kept, curve, done = torch.zeros_like(base), [], [], 0
        for length in variant.lengths(steps):
            net.flat.copy_(base.expand_as(net.flat))
            for step in range(done, done + length):
                take_step(net, optimizer, [draw(step, i) for i in members])
            vectors = base - net.flat
            mean = vectors.mean(0)
            kept.append(float(mean.norm() / vectors.norm(dim=1).mean()))
            if variant.merge == "elected":
                mean = elected_mean(vectors)
            elif variant.merge == "normed":
                mean = mean / kept[-1]
            optimizer.settle()
            if done < variant.plain * steps:
                base = base - mean
            else:
                momentum = variant.momentum * momentum + mean
                base = base - variant.outer_lr * (mean + variant.momentum * momentum)
            done += length
            if done >= (len(curve) + 1) * steps / 4:
                losses = self.losses(base)
                curve.append(statistics.fmean(losses))
        return losses, kept, curve


def take_step(net: Net, optimizer: Optimizer, windows: Sequence[np.ndarray]) -> None:
    net.gradient.zero_()
    net.losses(torch.from_numpy(np.stack(windows))).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def main(arguments: Sequence[str] | None = None) -> int:
    warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
    torch.set_num_threads(1)
    options = parse(arguments)
    shape = Shape(options.hidden, options.layers, 2, 3 * options.hidden, options.sequence_length)
    texts = [load_text(source, ByteTokenizer()) for source in options.sources]
    held_out = [text.validation(options.validation_windows, shape.length + 1) for text in texts]
    validation = torch.from_numpy(np.stack(held_out))
    rows = []
    for name in options.variants:
        for seed in options.seeds:
            variant = Variant.parse(name)
            began = time.process_time()
            sketch = Sketch(shape, texts, variant, seed, options.windows_per_member, validation)
            losses, kept, _ = sketch.run()
            shown = f"{kept[0]:.2f} {kept[-1]:.2f}" if kept else "-"
            loss = statistics.fmean(losses)
            seconds = time.process_time() - began
            rows.append([name, seed, f"{loss:.4f}", *(f"{x:.3f}" for x in losses), shown, f"{seconds:.0f}"])
            print(f"# {name} seed {seed}: {loss:.4f}", file=sys.stderr, flush=True)
    names = [source.name for source in options.sources]
    print(
        f"{shape.n:,} parameters\n\n{table(['variant', 'seed', 'loss', *names, 'norm kept', 'CPU s'], rows)}"
    )
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="FOLDER", help="or a text file: of a member")
    parser.add_argument("--variants", nargs="+", required=True, metavar="KIND:KEY=VALUE,...")
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=48)
    parser.add_argument("--windows-per-member", type=int, default=2560)
    parser.add_argument("--validation-windows", type=int, default=48, help="of each text")
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
