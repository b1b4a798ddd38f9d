"""The outer optimizers: the step that everyone takes, on the averaged contribution, after a round.

In place, on flat f32 vectors on the CPU, in pieces that fit the cache. Everybody must get the same bits
(G1), so every operation is one elementwise IEEE operation (+, -, *, /, sqrt), rounded to f32 by itself: no
`alpha=`, addcmul, addcdiv or lerp, which may fuse. The number of threads cannot matter, for no element
depends on another. Constants are computed in f64 by +, -, *, / and sqrt alone (never pow or exp, which
differ from one C library to the next) and rounded once to f32.

torch.sqrt is no such operation: torch 2.13 on x86-64 hands it to MKL's vector library, which rounds 0.7 % of
the results the wrong way. numpy uses the processor's instruction, which IEEE 754 requires to be exact.

`nesterov` is torch.optim.SGD(nesterov=True, dampening=0), as in DiLoCo (2311.08105, section 2):

    m = momentum * m + g
    p = p - lr * (g + momentum * m)

`adamw` is torch.optim.AdamW (Loshchilov and Hutter, 1711.05101), its step count the epoch, from 1:

    p = p * (1 - lr * weight_decay)                             left out if weight_decay is 0
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    p = p - lr / (1 - beta1**epoch) * (m / (sqrt(v) / sqrt(1 - beta2**epoch) + eps))

g is the mean of what members contributed: a pseudo-gradient, base minus local parameters, or a gradient.
Both point uphill, so the step subtracts.

Must not import: anything that does I/O; asyncio; hivemind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tapestry.node.spec.run import AdamWSpec, NesterovSpec, OuterSpec

PIECE = 128 * 1024  # elements: 512 kB a vector. The fastest of 16k..256k on 2 MiB of level 2 cache


class Outer(Protocol):
    """An outer optimizer. Keeps scratch memory: one step at a time."""

    @property
    def buffer_names(self) -> tuple[str, ...]:
        """Its state: one f32 vector as long as the parameters for each name, zeros at epoch 0."""

    def step(
        self,
        params: Tensor,  # f32 (n,), changed between start and stop
        buffers: Mapping[str, Tensor],  # f32 (n,) each, changed between start and stop
        mean: Tensor,  # f32 (stop - start,)
        start: int,
        stop: int,
        epoch: int,  # of the state that this step makes; >= 1
    ) -> None:
        """The elements from start to stop of one step; shards may come in any order."""


def make_outer(spec: OuterSpec) -> Outer:
    """The outer optimizer that the run spec names."""
    return Nesterov(spec) if isinstance(spec, NesterovSpec) else AdamW(spec)


class Nesterov:
    """SGD with Nesterov momentum; see the module for the formula."""

    buffer_names = ("momentum",)

    def __init__(self, spec: NesterovSpec) -> None:
        self._lr = f32(spec.lr)
        self._momentum = f32(spec.momentum)
        self._scratch = torch.empty(PIECE)

    def step(
        self, params: Tensor, buffers: Mapping[str, Tensor], mean: Tensor, start: int, stop: int, epoch: int
    ) -> None:
        """See Outer."""
        for at, piece in _pieces(start, stop):
            p, m, g = params[at], buffers["momentum"][at], mean[piece]
            step = self._scratch[: g.numel()]
            m.mul_(self._momentum)
            m.add_(g)
            torch.mul(m, self._momentum, out=step)
            step.add_(g)
            step.mul_(self._lr)
            p.sub_(step)


class AdamW:
    """AdamW with decoupled weight decay; see the module for the formula."""

    buffer_names = ("m", "v")

    def __init__(self, spec: AdamWSpec) -> None:
        self._spec = spec
        self._scratch = torch.empty(PIECE)
        self._denominator = torch.empty(PIECE)

    def step(
        self, params: Tensor, buffers: Mapping[str, Tensor], mean: Tensor, start: int, stop: int, epoch: int
    ) -> None:
        """See Outer."""
        spec = self._spec
        beta1, beta2 = spec.betas
        lr = f32(spec.lr / (1.0 - power(beta1, epoch)))
        root = f32(math.sqrt(1.0 - power(beta2, epoch)))
        decay, eps = f32(1.0 - spec.lr * spec.weight_decay), f32(spec.eps)
        for at, piece in _pieces(start, stop):
            p, m, v, g = params[at], buffers["m"][at], buffers["v"][at], mean[piece]
            step, denominator = self._scratch[: g.numel()], self._denominator[: g.numel()]
            if spec.weight_decay:
                p.mul_(decay)
            m.mul_(f32(beta1))
            m.add_(torch.mul(g, f32(1.0 - beta1), out=step))
            torch.mul(g, g, out=step)
            v.mul_(f32(beta2))
            v.add_(step.mul_(f32(1.0 - beta2)))
            np.sqrt(v.numpy(), out=denominator.numpy())
            denominator.div_(root)
            denominator.add_(eps)
            torch.div(m, denominator, out=step)
            p.sub_(step.mul_(lr))


def power(base: float, exponent: int) -> float:
    """base ** exponent in f64 by repeated squaring: the same on every machine, as libm's pow is not."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def f32(value: float) -> float:
    """The nearest f32."""
    return float(np.float32(value))


def _pieces(start: int, stop: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the whole vector, and the same ones of the mean, which begins at `start`."""
    for at in range(start, stop, PIECE):
        end = min(at + PIECE, stop)
        yield slice(at, end), slice(at - start, end - start)
