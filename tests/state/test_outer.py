"""The outer optimizers, against a reference that rounds every operation, and against torch.optim."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tapestry.node.spec.run import AdamWSpec, NesterovSpec, OuterSpec
from tapestry.node.state import outer
from tapestry.node.state.outer import Outer, make_outer, power

NESTEROV = NesterovSpec(lr=0.7, momentum=0.9)
ADAMW = AdamWSpec(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
SPECS = [NESTEROV, NesterovSpec(lr=0.31, momentum=0.0), ADAMW, AdamWSpec()]
N = 3 * outer.PIECE // 2 + 13


def _means(n: int, epochs: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(7)
    scales = 10.0 ** torch.randint(-30, 15, (n,), generator=rng)
    return [torch.randn(n, generator=rng) * scales for _ in range(epochs)]


def _start(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(8))


def _run(spec: OuterSpec, means: list[Tensor], cuts: tuple[int, ...] = ()) -> list[Tensor]:
    """Parameters and buffers after one step for each mean; cut into shards."""
    step: Outer = make_outer(spec)
    params = _start(means[0].numel())
    buffers = {name: torch.zeros_like(params) for name in step.buffer_names}
    bounds = [0, *cuts, params.numel()]
    for epoch, mean in enumerate(means, 1):
        for start, stop in pairwise(bounds):
            step.step(params, buffers, mean[start:stop], start, stop, epoch)
    return [params, *buffers.values()]


def _reference(spec: OuterSpec, means: list[Tensor]) -> list[np.ndarray]:
    """numpy rounds each operation to f32 by itself, and has no fused ones."""
    f = np.float32
    p = _start(means[0].numel()).numpy()
    m, v = np.zeros_like(p), np.zeros_like(p)
    for epoch, mean in enumerate(means, 1):
        g = mean.numpy()
        if isinstance(spec, NesterovSpec):
            m = f(spec.momentum) * m + g
            p = p - f(spec.lr) * (g + f(spec.momentum) * m)
            continue
        b1, b2 = spec.betas
        if spec.weight_decay:
            p = p * f(1.0 - spec.lr * spec.weight_decay)
        m = f(b1) * m + f(1.0 - b1) * g
        v = f(b2) * v + f(1.0 - b2) * (g * g)
        denominator = np.sqrt(v) / f(math.sqrt(1.0 - power(b2, epoch))) + f(spec.eps)
        p = p - f(spec.lr / (1.0 - power(b1, epoch))) * (m / denominator)
    return [p, m] if isinstance(spec, NesterovSpec) else [p, m, v]


def _same(ours: list[Tensor], theirs: list[np.ndarray]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(np.array_equal(a.numpy().view(np.uint32), b.view(np.uint32)) for a, b in pairs)


@pytest.mark.parametrize("spec", SPECS)
def test_every_operation_is_rounded_by_itself(spec: OuterSpec) -> None:
    means = _means(N, 4)
    assert _same(_run(spec, means), _reference(spec, means))


def test_the_reference_tells_a_fused_operation_apart() -> None:
    means = _means(N, 2)
    fused = _start(N)
    fused.add_(means[0], alpha=-0.7 * 1.9)
    assert not _same([fused], _reference(NESTEROV, means[:1])[:1])


@pytest.mark.parametrize("spec", SPECS)
def test_shards_in_any_cut_give_the_bits_of_the_whole(spec: OuterSpec) -> None:
    means = _means(N, 3)
    whole, cut = _run(spec, means), _run(spec, means, cuts=(1, 256, 5000, outer.PIECE + 3))
    assert _same(cut, [tensor.numpy() for tensor in whole])


@pytest.mark.parametrize("spec", SPECS)
def test_the_number_of_threads_changes_no_bit(spec: OuterSpec) -> None:
    means = _means(N, 3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _run(spec, means)
        torch.set_num_threads(3)
        three = _run(spec, means)
    finally:
        torch.set_num_threads(threads)
    assert _same(three, [tensor.numpy() for tensor in one])


@pytest.mark.parametrize("spec", SPECS)
def test_it_is_the_optimizer_of_that_name_in_torch(spec: OuterSpec) -> None:
    rng = torch.Generator().manual_seed(9)
    means = [torch.randn(1000, generator=rng) for _ in range(5)]
    parameter = torch.nn.Parameter(_start(1000))
    optimizer: torch.optim.Optimizer
    if isinstance(spec, NesterovSpec):
        optimizer = torch.optim.SGD(
            [parameter], lr=spec.lr, momentum=spec.momentum, nesterov=bool(spec.momentum)
        )
    else:
        optimizer = torch.optim.AdamW(
            [parameter], lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay
        )
    for mean in means:
        parameter.grad = mean.clone()
        optimizer.step()
    torch.testing.assert_close(_run(spec, means)[0], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_power_is_that_of_arithmetic() -> None:
    assert power(0.5, 10) == 2.0**-10
    assert power(0.9, 0) == 1.0
    assert power(0.95, 1000) == pytest.approx(0.95**1000, rel=1e-13)
