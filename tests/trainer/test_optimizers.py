"""The inner optimizers: what each steps how, against plain references, and what they keep."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tapestry.compression.shards import Layout
from tapestry.node.lineage.leave import LEFT_OUT
from tapestry.node.spec.training import TrainSpec
from tapestry.node.trainer.optimizers import adamw8bit, muon_f32
from tapestry.node.trainer.optimizers.muon_f32 import Matrix, MuonF32
from tapestry.node.trainer.optimizers.parts import Kind, Part, flat_parts, joined, kinds_of
from tapestry.node.trainer.optimizers.registry import InnerOptimizer, make_optimizer
from tapestry.node.trainer.optimizers.state import (
    Identity,
    InnerStateError,
    put_back,
    read_snapshot,
    take_snapshot,
    write_snapshot,
)
from tapestry.node.trainer.optimizers.unavailable import OptimizerUnavailable

SETTINGS = TrainSpec(lr=0.01, weight_decay=0.1, muon_lr=0.02)
NAMES = ("adamw", "muon", "adamw8bit")


class Experts(nn.Module):
    """As transformers stacks them."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(3, 8, 16))


class Scan(nn.Module):
    """As a state-space model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.randn(8, 4))
        self.A_log._no_weight_decay = True  # type: ignore[attr-defined]
        self.conv1d = nn.Conv1d(8, 8, 4, groups=8)


class Net(nn.Module):
    """One of each that a language model is made of; the output layer is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.up = nn.Linear(8, 600)
        self.norm = nn.LayerNorm(8)
        self.experts = Experts()
        self.scan = Scan()
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head


KINDS = {
    "embed.weight": Kind.DECAYED,
    "up.weight": Kind.MATRIX,
    "up.bias": Kind.PLAIN,
    "norm.weight": Kind.PLAIN,
    "norm.bias": Kind.PLAIN,
    "experts.down_proj": Kind.MATRIX,
    "scan.A_log": Kind.PLAIN,
    "scan.conv1d.weight": Kind.DECAYED,
    "scan.conv1d.bias": Kind.PLAIN,
}


@pytest.fixture
def flat() -> tuple[Layout, Tensor, Tensor]:
    """The net's layout, parameters f32 (n,), a gradient f32 (n,)."""
    torch.manual_seed(3)
    net = Net()
    named = dict(net.named_parameters())
    layout = Layout.from_named((name, value.shape) for name, value in named.items())
    values = layout.flatten(named)
    return layout, values, torch.randn(layout.n)


def parts_of(flat: tuple[Layout, Tensor, Tensor]) -> list[Part]:
    layout, values, gradient = flat
    return flat_parts(KINDS, layout, values, gradient)


def steps_of(optimizer: InnerOptimizer, count: int) -> None:
    for _ in range(count):
        optimizer.step(0.5)


def test_every_parameter_is_of_the_kind_that_is_usual() -> None:
    assert kinds_of(Net()) == KINDS


def test_an_output_layer_of_its_own_is_no_matrix_of_the_network() -> None:
    net = Net()
    net.head.weight = nn.Parameter(torch.zeros(40, 8))
    assert kinds_of(net)["head.weight"] is Kind.DECAYED


def test_neighbours_that_decay_alike_are_stepped_as_one_vector(flat: tuple[Layout, Tensor, Tensor]) -> None:
    layout, values, gradient = flat
    parts = parts_of(flat)
    runs = joined(parts)
    assert len(runs) < len(parts)
    assert sum(run.parameter.numel() for run in runs) == layout.n
    assert torch.equal(torch.cat([run.parameter.detach() for run in runs]), values)
    assert torch.equal(torch.cat([run.parameter.grad for run in runs]), gradient)  # type: ignore[misc]
    runs[0].parameter.data.fill_(7.0)
    assert values[0] == 7.0
    separate = [Part(part.name, part.kind, nn.Parameter(part.parameter.clone())) for part in parts[:2]]
    for part in separate:
        part.parameter.grad = torch.zeros_like(part.parameter)
    assert len(joined(separate)) == 2


def test_adamw_is_torchs_own_and_decays_no_bias_and_no_norm(flat: tuple[Layout, Tensor, Tensor]) -> None:
    layout, values, gradient = flat
    references = {name: nn.Parameter(view.clone()) for name, view in layout.views(values).items()}
    plain = torch.optim.AdamW(
        [
            {
                "params": [references[name] for name in layout.names if KINDS[name].decays == decays],
                "weight_decay": 0.1 if decays else 0.0,
            }
            for decays in (True, False)
        ],
        lr=0.005,
        betas=SETTINGS.betas,
        eps=SETTINGS.eps,
    )
    for name, view in layout.views(gradient).items():
        references[name].grad = view.clone()
    for _ in range(3):
        plain.step()
    steps_of(make_optimizer(SETTINGS, parts_of(flat)), 3)
    torch.testing.assert_close(values, layout.flatten(references), rtol=1e-5, atol=1e-6)


def test_muon_steps_the_matrices_inside_alone_each_expert_by_itself(
    flat: tuple[Layout, Tensor, Tensor],
) -> None:
    layout, values, gradient = flat
    before, slopes = layout.views(values.clone()), layout.views(gradient)
    settings = dataclasses.replace(SETTINGS, optimizer="muon")
    steps_of(make_optimizer(settings, parts_of(flat)), 1)
    expected = values.clone()
    adamw = values.clone().copy_(torch.cat([before[name].flatten() for name in layout.names]))
    steps_of(make_optimizer(SETTINGS, flat_parts(KINDS, layout, adamw, gradient)), 1)
    for name, view in layout.views(expected).items():
        if KINDS[name] is not Kind.MATRIX:
            torch.testing.assert_close(view, layout.views(adamw)[name])
            continue
        pairs = (
            zip(before[name], slopes[name], strict=True)
            if view.dim() == 3
            else [(before[name], slopes[name])]
        )
        plain = torch.stack([torchs_muon(value, slope) for value, slope in pairs]).view(view.shape)
        moved = (plain - before[name]).abs().max()
        assert (view - plain).abs().max() < 0.05 * moved  # torch's is in bf16, through fifteen products


def test_on_a_processor_muon_steps_as_its_formula_in_f64_says() -> None:
    """Of several shapes and kinds, over steps that remember: what is stepped together is not mixed up."""
    rng = torch.Generator().manual_seed(4)
    shapes = [(6, 20), (20, 6), (6, 20), (8, 8)]
    matrices = [Matrix(*(torch.randn(shape, generator=rng) for _ in range(3))) for shape in shapes]
    expected = [tuple(t.double().clone() for t in (m.value, m.gradient, m.momentum)) for m in matrices]
    optimizer = MuonF32(matrices, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.step(0.02)
        for value, gradient, kept in expected:
            kept.mul_(0.9).add_(gradient, alpha=0.1)
            scale = 0.2 * max(value.shape) ** 0.5
            value.mul_(1 - 0.02 * 0.1).sub_(orthogonal(0.1 * gradient + 0.9 * kept), alpha=0.02 * scale)
    for matrix, (value, _, kept) in zip(matrices, expected, strict=True):
        torch.testing.assert_close(matrix.value, value.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(matrix.momentum, kept.float())


def orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz, by the singular values alone: the vectors stay."""
    left, values, right = torch.linalg.svd(x / x.norm(), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


def test_matrices_are_stepped_together_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step, however many there are in a group."""
    rng = torch.Generator().manual_seed(5)
    parts = [[torch.randn(4, 6, generator=rng) for _ in range(3)] for _ in range(5)]
    stepped = []
    for limit in (1, 48, 10_000):
        monkeypatch.setattr(muon_f32, "GROUP_ELEMENTS", limit)
        matrices = [Matrix(*(tensor.clone() for tensor in part)) for part in parts]
        MuonF32(matrices, momentum=0.9, weight_decay=0.0).step(0.1)
        stepped.append(torch.stack([matrix.value for matrix in matrices]))
    torch.testing.assert_close(stepped[0], stepped[2])
    torch.testing.assert_close(stepped[1], stepped[2])


def torchs_muon(value: Tensor, slope: Tensor) -> Tensor:
    parameter = nn.Parameter(value.clone())
    parameter.grad = slope.clone()
    torch.optim.Muon(
        [parameter], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    ).step()
    return parameter.detach()


def test_adamw8bit_keeps_codes_for_the_large_and_is_near_adamw(flat: tuple[Layout, Tensor, Tensor]) -> None:
    layout, values, gradient = flat
    exact = values.clone()
    steps_of(make_optimizer(SETTINGS, flat_parts(KINDS, layout, exact, gradient)), 3)
    start = values.clone()
    optimizer = make_optimizer(dataclasses.replace(SETTINGS, optimizer="adamw8bit"), parts_of(flat))
    steps_of(optimizer, 3)
    kept = optimizer.tensors()
    assert kept["up.weight.state1"].dtype == torch.uint8
    assert kept["norm.weight.state1"].dtype == torch.float32
    moved = (exact - start).norm()
    assert 0 < (values - exact).norm() < 0.05 * moved


def test_where_bitsandbytes_cannot_one_line_says_so(
    flat: tuple[Layout, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(bitsandbytes: object, device: torch.device) -> None:
        raise RuntimeError("no kernel for this\nsecond line")

    monkeypatch.setattr(adamw8bit, "_try", broken)
    with pytest.raises(OptimizerUnavailable, match=r"adamw8bit.*on cpu: no kernel for this; start") as caught:
        make_optimizer(dataclasses.replace(SETTINGS, optimizer="adamw8bit"), parts_of(flat))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_put_back_gives_the_same_steps_again(
    flat: tuple[Layout, Tensor, Tensor], name: str, tmp_path: Path
) -> None:
    """From memory and from a file, in the same optimizer and in a new one: to the bit."""
    layout, values, gradient = flat
    settings = dataclasses.replace(SETTINGS, optimizer=name)
    optimizer = make_optimizer(settings, parts_of(flat))
    steps_of(optimizer, 2)
    here, identity = values.clone(), Identity(name, layout.schema_hash)
    snapshot = take_snapshot(optimizer.tensors(), epoch=4, steps=2)
    write_snapshot(tmp_path / "inner", snapshot, identity)
    steps_of(optimizer, 2)
    expected = values.clone()
    values.copy_(here)
    put_back(snapshot, optimizer.tensors())
    optimizer.resume(2)
    steps_of(optimizer, 2)
    assert torch.equal(values, expected)

    values.copy_(here)
    fresh = make_optimizer(settings, parts_of((layout, values, gradient)))
    read = read_snapshot(tmp_path / "inner", fresh.tensors(), identity)
    assert (read.epoch, read.steps) == (4, 2)
    put_back(read, fresh.tensors())
    fresh.resume(read.steps)
    steps_of(fresh, 2)
    assert torch.equal(values, expected)


def test_a_writer_that_was_killed_leaves_one_file_which_the_next_one_takes_over(
    flat: tuple[Layout, Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kill left another, of 8 bytes a parameter."""
    path, identity = tmp_path / "inner.safetensors", Identity("adamw", flat[0].schema_hash)
    snapshot = take_snapshot(make_optimizer(SETTINGS, parts_of(flat)).tensors(), 4, 2)
    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                write_snapshot(path, snapshot, identity)
    (left,) = tmp_path.iterdir()
    assert LEFT_OUT(str(tmp_path), [left.name]) == {left.name}, "`exit` does not take it along"
    write_snapshot(path, snapshot, identity)
    assert [*tmp_path.iterdir()] == [path]


def test_a_saved_state_of_another_optimizer_or_of_other_shapes_is_refused(
    flat: tuple[Layout, Tensor, Tensor], tmp_path: Path
) -> None:
    layout, path = flat[0], tmp_path / "inner"
    optimizer = make_optimizer(SETTINGS, parts_of(flat))
    live = optimizer.tensors()
    mine = Identity("adamw", layout.schema_hash)
    write_snapshot(path, take_snapshot(live, 4, 2), mine)
    refusals: list[tuple[dict[str, Tensor], Identity, str]] = [
        (live, Identity("muon", layout.schema_hash), "of adamw, not of muon"),
        (live, Identity("adamw", "0" * 64), "another model"),
        ({"first": live["first"]}, mine, "its tensors are not those of adamw"),
        ({**live, "first": torch.zeros(3)}, mine, "first is not F32"),
        ({**live, "first": live["first"].to(torch.uint8)}, mine, "first is not U8"),
    ]
    for expected, identity, words in refusals:
        with pytest.raises(InnerStateError, match=words):
            read_snapshot(path, expected, identity)
    assert read_snapshot(path, live, mine).epoch == 4
