"""The inner loop against plain references, and what it keeps over a restart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tapestry.node.trainer.inner import Diverged, InnerLoop, InnerStateError
from tapestry.node.trainer.model import build_model, initial_state, model_layout, parameter_count
from tapestry.node.trainer.settings import PRESETS, InnerSettings

MODEL = dataclasses.replace(PRESETS["nano"].model, sequence_length=16)
DILOCO = dataclasses.replace(PRESETS["nano"].inner, steps=3, batch_size=2)
GRADIENT = dataclasses.replace(DILOCO, steps=0, accumulation=3)


@pytest.fixture(scope="module")
def base() -> Tensor:
    return initial_state(MODEL, seed=5)


def test_the_initial_state_is_a_function_of_its_seed(base: Tensor) -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert torch.equal(initial_state(MODEL, seed=5), base)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(initial_state(MODEL, seed=6), base)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("tie", [False, True])
def test_the_parameter_count_is_that_of_the_model(preset: str, tie: bool) -> None:
    settings = dataclasses.replace(PRESETS[preset].model, tie_embeddings=tie)
    with torch.device("meta"):
        model = build_model(settings)
    assert model_layout(model).n == parameter_count(settings)


def test_a_layout_from_the_meta_device_is_that_of_the_real_model() -> None:
    with torch.device("meta"):
        layout = model_layout(build_model(MODEL))
    assert layout == model_layout(build_model(MODEL))


def test_the_pseudo_gradient_is_base_minus_a_plain_adamw_loop(base: Tensor) -> None:
    out = torch.empty_like(base)
    outcome = _run_epoch(_loop(DILOCO), base, out)
    local, losses = _reference_adamw(base, DILOCO)
    torch.testing.assert_close(out, base - local, rtol=1e-4, atol=1e-6)
    assert outcome.weight == 3 * 2 * 16
    assert outcome.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert outcome.norm == pytest.approx(out.double().norm().item(), rel=1e-12)


def test_the_gradient_is_the_mean_of_plain_autograd(base: Tensor) -> None:
    out = torch.empty_like(base)
    outcome = _run_epoch(_loop(GRADIENT), base, out)
    torch.testing.assert_close(out, _reference_gradient(base, GRADIENT.accumulation), rtol=1e-4, atol=1e-7)
    assert outcome.weight == 3 * 2 * 16


def test_a_gradient_closed_early_is_the_mean_of_what_was_done(base: Tensor) -> None:
    loop, out = _loop(GRADIENT), torch.empty_like(base)
    loop.begin(4, base)
    loop.step()
    loop.step()
    assert loop.finish(base, out).weight == 2 * 2 * 16
    torch.testing.assert_close(out, _reference_gradient(base, 2), rtol=1e-4, atol=1e-7)


def test_an_epoch_begun_again_gives_the_same_bits(base: Tensor) -> None:
    loop, first, second = _loop(DILOCO), torch.empty_like(base), torch.empty_like(base)
    _run_epoch(loop, base, torch.empty_like(base), epoch=3)
    _run_epoch(loop, base, first, epoch=4)
    loop.begin(4, base)
    loop.step()
    _run_epoch(loop, base, second, epoch=4)
    assert torch.equal(first, second)


@pytest.mark.parametrize("when", ["before the epoch", "in the middle of it"])
def test_a_restart_with_the_saved_inner_state_continues_bit_identically(
    base: Tensor, tmp_path: Path, when: str
) -> None:
    path, expected, got = tmp_path / "inner", torch.empty_like(base), torch.empty_like(base)
    loop = _loop(DILOCO)
    _run_epoch(loop, base, expected, epoch=3)
    if when == "before the epoch":
        loop.save(path, 4)
    loop.begin(4, base)
    loop.step()
    if when == "in the middle of it":
        loop.save(path, 4)
    _finish_epoch(loop, base, expected)

    fresh = _loop(DILOCO)
    assert fresh.load(path) == 4
    _run_epoch(fresh, base, got, epoch=4)
    assert torch.equal(expected, got)
    without = torch.empty_like(base)
    _run_epoch(_loop(DILOCO), base, without, epoch=4)
    assert not torch.equal(expected, without)
    assert [entry.name for entry in tmp_path.iterdir()] == ["inner"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "another model", "nan"])
def test_a_saved_inner_state_that_does_not_fit_is_refused(base: Tensor, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "inner"
    loop = _loop(DILOCO)
    if damage == "nan":
        loop._moments._state["exp_avg"][7] = float("nan")  # type: ignore[union-attr]
    loop.save(path, 4)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "another model":
        loop = _loop(DILOCO, tie_embeddings=False)
    with pytest.raises(InnerStateError):
        loop.load(path)


def test_no_saved_inner_state_is_no_error(tmp_path: Path) -> None:
    assert _loop(DILOCO).load(tmp_path / "nothing") is None


def test_an_evaluation_does_not_disturb_the_epoch(base: Tensor) -> None:
    plain, disturbed, windows = torch.empty_like(base), torch.empty_like(base), _draw(0, 0)
    _run_epoch(_loop(DILOCO), base, plain)
    loop = _loop(DILOCO)
    loop.begin(4, base)
    loop.step()
    inside = loop.evaluate(base, windows)
    _finish_epoch(loop, base, disturbed)
    assert torch.equal(plain, disturbed)
    assert inside == loop.evaluate(base, windows) == pytest.approx(_reference_loss(base, windows), rel=1e-5)


@pytest.mark.parametrize("settings", [DILOCO, GRADIENT], ids=["diloco", "gradient"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_never_become_a_contribution(
    base: Tensor, settings: InnerSettings, poison: float
) -> None:
    loop, bad = _loop(settings), base.clone()
    bad[100] = poison
    with pytest.raises(Diverged):
        _run_epoch(loop, bad, torch.empty_like(base))


def test_a_last_step_that_overflows_never_becomes_a_contribution(base: Tensor) -> None:
    """Every loss is finite here; only the check of the vector can notice."""
    loop = _loop(dataclasses.replace(DILOCO, steps=1))
    loop.begin(4, base)
    loop.step()
    loop._local.data[3] = float("nan")
    with pytest.raises(Diverged, match="the contribution is not finite"):
        loop.finish(base, torch.empty_like(base))


def _loop(settings: InnerSettings, **model_changes: bool) -> InnerLoop:
    model = build_model(dataclasses.replace(MODEL, **model_changes))  # type: ignore[arg-type]
    return InnerLoop(model, model_layout(model), settings, _draw, torch.device("cpu"))


def _draw(epoch: int, step: int) -> np.ndarray:
    return np.random.default_rng([epoch, step]).integers(0, 256, size=(2, MODEL.sequence_length + 1))


def _run_epoch(loop: InnerLoop, base: Tensor, out: Tensor, epoch: int = 4):  # type: ignore[no-untyped-def]
    loop.begin(epoch, base)
    return _finish_epoch(loop, base, out)


def _finish_epoch(loop: InnerLoop, base: Tensor, out: Tensor):  # type: ignore[no-untyped-def]
    while not loop.done:
        loop.step()
    return loop.finish(base, out)


def _reference_model(base: Tensor) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """A model with parameters of its own, and what flattens them."""
    model = build_model(MODEL)
    layout = model_layout(model)
    for name, view in layout.views(base.clone()).items():
        model.get_parameter(name).data.copy_(view)
    return model, lambda: layout.flatten(dict(model.named_parameters()))


def _reference_adamw(base: Tensor, settings: InnerSettings) -> tuple[Tensor, list[float]]:
    model, flatten = _reference_model(base)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    losses = []
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, (step + 1) / settings.warmup_steps)
        optimizer.zero_grad()
        windows = torch.from_numpy(_draw(4, step))
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        losses.append(loss.item())
    return flatten(), losses


def _reference_gradient(base: Tensor, batches: int) -> Tensor:
    model, _ = _reference_model(base)
    for step in range(batches):
        windows = torch.from_numpy(_draw(4, step))
        (model(input_ids=windows, labels=windows).loss / batches).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]


def _reference_loss(base: Tensor, windows: np.ndarray) -> float:
    model, _ = _reference_model(base)
    ids = torch.from_numpy(windows)
    return float(model.eval()(input_ids=ids, labels=ids).loss.detach())
