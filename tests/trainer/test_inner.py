"""The inner loop against plain references, and what it keeps over a restart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tapestry.compression.refusals import RefusedVector
from tapestry.node.spec.size import llama_parameters
from tapestry.node.spec.training import AS_USUAL, PRESETS, Changed, LocalTraining, TrainSpec
from tapestry.node.trainer.encoder import Write
from tapestry.node.trainer.gradients import Batch, Gradients, Windows
from tapestry.node.trainer.inner import Diverged, InnerLoop
from tapestry.node.trainer.memory import OutOfMemory
from tapestry.node.trainer.models.llama import build_model, initial_state, model_layout
from tapestry.node.trainer.optimizers.state import InnerStateError

MODEL = dataclasses.replace(PRESETS["nano"].model, seed=5)
LENGTH = 16
DILOCO = dataclasses.replace(PRESETS["nano"].train, inner_steps=3, batch_size=2)
GRADIENT = dataclasses.replace(DILOCO, inner_steps=0, accumulation=3)


@pytest.fixture(scope="module")
def base() -> Tensor:
    return initial_state(MODEL, LENGTH)


def test_the_initial_state_is_a_function_of_its_seed(base: Tensor) -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert torch.equal(initial_state(MODEL, LENGTH), base)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(initial_state(dataclasses.replace(MODEL, seed=6), LENGTH), base)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("tie", [False, True])
def test_the_parameter_count_is_that_of_the_model(preset: str, tie: bool) -> None:
    settings = dataclasses.replace(PRESETS[preset].model, tie_embeddings=tie)
    with torch.device("meta"):
        model = build_model(settings, LENGTH)
    assert model_layout(model).n == llama_parameters(settings)


def test_a_layout_from_the_meta_device_is_that_of_the_real_model() -> None:
    with torch.device("meta"):
        layout = model_layout(build_model(MODEL, LENGTH))
    assert layout == model_layout(build_model(MODEL, LENGTH))


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
    assert loop.finish(base, keep(out)).weight == 2 * 2 * 16
    torch.testing.assert_close(out, _reference_gradient(base, 2), rtol=1e-4, atol=1e-7)


def test_a_record_may_change_how_many_steps_an_epoch_takes_and_their_rate(base: Tensor) -> None:
    loop, out, by_spec = _loop(DILOCO), torch.empty_like(base), torch.empty_like(base)
    loop.begin(4, base, changed=Changed(lr=DILOCO.lr / 2, batches=5))
    outcome = _finish_epoch(loop, base, out)
    assert outcome.batches == loop.batches_wanted == 5
    spec = dataclasses.replace(DILOCO, lr=DILOCO.lr / 2, inner_steps=5)
    _run_epoch(_loop(spec), base, by_spec)
    torch.testing.assert_close(out, by_spec, rtol=1e-4, atol=1e-7)
    loop.begin(5, base)
    assert loop.batches_wanted == DILOCO.inner_steps


def test_an_epoch_begun_again_gives_the_same_bits(base: Tensor) -> None:
    loop, first, second = _loop(DILOCO), torch.empty_like(base), torch.empty_like(base)
    _run_epoch(loop, base, torch.empty_like(base), epoch=3)
    _run_epoch(loop, base, first, epoch=4)
    loop.begin(4, base)
    loop.step()
    _run_epoch(loop, base, second, epoch=4)
    assert torch.equal(first, second)


def test_what_was_learnt_of_states_that_are_undone_is_forgotten(base: Tensor) -> None:
    loop, fresh = _loop(DILOCO), _loop(DILOCO)
    first, second, again = (torch.empty_like(base) for _ in range(3))
    _run_epoch(loop, base, torch.empty_like(base), epoch=3)
    _run_epoch(loop, base, again, epoch=4)
    loop.forget()
    _run_epoch(loop, base, first, epoch=4)
    _run_epoch(fresh, base, second, epoch=4)
    assert torch.equal(first, second) and not torch.equal(first, again)


# ---- ahead of the base ---------------------------------------------------------------------------------


def test_steps_taken_ahead_are_kept_and_the_contribution_is_measured_from_the_new_base(base: Tensor) -> None:
    loop, twin, out = _loop(DILOCO), _loop(DILOCO), torch.empty_like(base)
    left, ahead = _one_step_ahead(loop, base), _one_step_ahead(twin, base)
    torch.testing.assert_close(left, ahead, rtol=0, atol=0)
    moved = loop._held.pieces[0].values - left
    assert moved.abs().max() > 0
    after = base + 0.01 * torch.sin(torch.arange(base.numel()))
    loop.begin(5, after, follows=True)
    torch.testing.assert_close(loop._held.pieces[0].values, after + moved, rtol=0, atol=1e-7)
    assert (loop.epoch, loop.batches, loop.tokens, loop.ahead) == (5, 1, 2 * 16, False)

    outcome = _finish_epoch(loop, after, out)
    assert (outcome.weight, outcome.batches) == (3 * 2 * 16, 3)
    torch.testing.assert_close(out, after - loop._held.pieces[0].values, rtol=0, atol=0)
    # The same by hand: the twin's step, then two plain ones from where it is moved to.
    twin._held.pieces[0].values.add_(after - ahead)
    twin._ahead = False
    by_hand = torch.empty_like(base)
    _finish_epoch(twin, after, by_hand)
    torch.testing.assert_close(out, by_hand, rtol=1e-3, atol=1e-6)


def test_with_no_step_ahead_the_epoch_is_that_of_a_loop_that_waited(base: Tensor) -> None:
    loop, waiting = _loop(DILOCO), _loop(DILOCO)
    got, expected, after = torch.empty_like(base), torch.empty_like(base), base * 1.01
    for one in (loop, waiting):
        _run_epoch(one, base, torch.empty_like(base))
    loop.go_on()
    loop.begin(5, after, follows=True)
    _finish_epoch(loop, after, got)
    _run_epoch(waiting, after, expected, epoch=5)
    assert torch.equal(got, expected)


def test_windows_are_drawn_once_each_whether_ahead_or_not(base: Tensor) -> None:
    drawn: list[tuple[int, int]] = []

    def draw(epoch: int, step: int) -> Windows:
        drawn.append((epoch, step))
        return _draw(epoch, step)

    loop, out = _loop(DILOCO, draw=draw), torch.empty_like(base)
    _run_epoch(loop, base, out, epoch=0)
    for epoch, ahead in enumerate((0, 2, 3, 1), start=1):
        loop.go_on()
        for _ in range(ahead):
            loop.step()
        loop.begin(epoch, base, follows=True)
        _finish_epoch(loop, base, out)
    assert drawn == [(epoch, step) for epoch in range(5) for step in range(3)]


def test_what_is_ahead_of_its_base_is_no_contribution_and_waits_when_all_is_done(base: Tensor) -> None:
    loop, out = _loop(DILOCO), torch.empty_like(base)
    _one_step_ahead(loop, base)
    assert loop.ahead and not loop.idle
    loop.step()
    loop.step()
    assert loop.done and loop.idle
    with pytest.raises(RuntimeError, match="before begin"):
        loop.finish(base, keep(out))
    loop.begin(5, base, follows=True)
    assert not loop.idle
    assert loop.finish(base, keep(out)).weight == 3 * 2 * 16


@pytest.mark.parametrize("case", ["another head", "a later epoch", "the same epoch again", "after an abort"])
def test_a_begin_that_does_not_follow_drops_what_was_ahead(base: Tensor, case: str) -> None:
    """As a worker that waited: same parameters, and the moments of before where that epoch had begun."""
    epoch = {"a later epoch": 6, "the same epoch again": 4}.get(case, 5)
    loop, waiting = _loop(DILOCO), _loop(DILOCO)
    got, expected, other = torch.empty_like(base), torch.empty_like(base), base * 0.99
    _one_step_ahead(loop, base)
    if case == "after an abort":
        loop.abandon()
        assert loop.idle
    follows = case != "another head"  # even if it is said: only the epoch that was gone on with is kept
    loop.begin(epoch, other, follows=follows)
    assert (loop.batches, loop.ahead) == (0, False)
    assert torch.equal(loop._held.pieces[0].values, other)
    if case == "a later epoch":
        return  # the moments are what they are
    _finish_epoch(loop, other, got)
    _run_epoch(waiting, base, torch.empty_like(base))
    _run_epoch(waiting, other, expected, epoch=epoch)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("epoch", [4, 5])
@pytest.mark.parametrize("begun", [False, True])
def test_the_inner_state_saved_ahead_is_that_of_either_epochs_beginning(
    base: Tensor, tmp_path: Path, epoch: int, begun: bool
) -> None:
    """A stop between contribution and commit leaves it open which epoch the restart begins with."""
    path, expected, got = tmp_path / "inner", torch.empty_like(base), torch.empty_like(base)
    loop, waiting = _loop(DILOCO), _loop(DILOCO)
    _one_step_ahead(loop, base)
    if begun:
        loop.begin(5, base, follows=True)
    loop.save(path, epoch)
    fresh = _loop(DILOCO)
    fresh.load(path)
    _run_epoch(fresh, base, got, epoch=epoch)
    _run_epoch(waiting, base, expected)
    if epoch == 5:
        _run_epoch(waiting, base, expected, epoch=5)
    if begun and epoch == 4:
        assert len(loop._snapshots) == 1  # epoch 5 has its base: nobody goes back to 4
    else:
        assert torch.equal(got, expected)


def test_an_evaluation_does_not_disturb_what_is_ahead(base: Tensor) -> None:
    loop, out = _loop(DILOCO), torch.empty_like(base)
    left = _one_step_ahead(loop, base)
    before = loop._held.pieces[0].values.clone()
    assert loop.evaluate(base, _draw(0, 0)) == pytest.approx(_reference_loss(base, _ids(0, 0)), rel=1e-5)
    assert torch.equal(loop._held.pieces[0].values, before)
    loop.begin(5, left, follows=True)
    _finish_epoch(loop, left, out)


def test_nobody_goes_on_from_nothing_or_from_a_gradient(base: Tensor) -> None:
    loop = _loop(DILOCO)
    with pytest.raises(RuntimeError):
        loop.go_on()
    gradient = _loop(GRADIENT)
    _run_epoch(gradient, base, torch.empty_like(base))
    with pytest.raises(RuntimeError):
        gradient.go_on()


def _one_step_ahead(loop: InnerLoop, base: Tensor) -> Tensor:
    """Epoch 4 and a step of epoch 5; where the loop went on from."""
    _run_epoch(loop, base, torch.empty_like(base))
    left = loop._held.pieces[0].values.clone()
    loop.go_on()
    loop.step()
    return left


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
        loop._optimizer.tensors()["first"][7] = float("nan")  # type: ignore[union-attr]
    loop.save(path, 4)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "another model":
        loop = _loop(DILOCO, tie_embeddings=False)
    with pytest.raises(InnerStateError):
        loop.load(path)


def test_all_sets_are_measured_on_the_base_of_the_beginning(base: Tensor) -> None:
    """The node goes on to the next base while a large model is measured on the first set."""
    loop, shared, windows = _loop(DILOCO), base.clone(), [_draw(0, 0), _draw(0, 1)]

    def one_after_another() -> Iterator[Batch]:
        for batch in windows:
            yield batch
            shared.mul_(3.0)

    found = loop.losses(shared, one_after_another())
    assert found == [loop.evaluate(base, batch) for batch in windows]


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
    assert (
        inside == loop.evaluate(base, windows) == pytest.approx(_reference_loss(base, windows.ids), rel=1e-5)
    )


@pytest.mark.parametrize("settings", [DILOCO, GRADIENT], ids=["diloco", "gradient"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_never_become_a_contribution(
    base: Tensor, settings: TrainSpec, poison: float
) -> None:
    loop, bad = _loop(settings), base.clone()
    bad[100] = poison
    with pytest.raises(Diverged):
        _run_epoch(loop, bad, torch.empty_like(base))


def test_a_last_step_that_overflows_never_becomes_a_contribution(base: Tensor) -> None:
    """Every loss is finite here; only the check of the vector can notice."""
    loop = _loop(dataclasses.replace(DILOCO, inner_steps=1))
    loop.begin(4, base)
    loop.step()
    loop._held.pieces[0].values[3] = float("nan")
    with pytest.raises(Diverged, match="the contribution is not finite"):
        loop.finish(base, keep(torch.empty_like(base)))


def keep(out: Tensor) -> Callable[[Write], float]:
    """For an encoder: takes the contribution as it is, f32 (n,)."""

    def encode(write: Write) -> float:
        for start in range(0, out.numel(), 1000):
            write(start, min(start + 1000, out.numel()), out[start : start + 1000])
        if not out.isfinite().all():
            raise RefusedVector("not_finite", "as a codec says")
        return out.double().norm().item()

    return encode


def _draw(epoch: int, step: int) -> Windows:
    return Windows(_ids(epoch, step))


def _ids(epoch: int, step: int) -> np.ndarray:
    return np.random.default_rng([epoch, step]).integers(0, 256, size=(2, LENGTH + 1))


def _loop(
    settings: TrainSpec,
    draw: Callable[[int, int], Windows] = _draw,
    local: LocalTraining = AS_USUAL,
    tell: Callable[[str], None] = lambda text: None,
    attention_dropout: float = 0.0,
    **model_changes: bool,
) -> InnerLoop:
    model = build_model(dataclasses.replace(MODEL, **model_changes), LENGTH)  # type: ignore[arg-type]
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.self_attn.attention_dropout = attention_dropout
    return InnerLoop(model, model_layout(model), settings, draw, torch.device("cpu"), local, tell)


def _run_epoch(loop: InnerLoop, base: Tensor, out: Tensor, epoch: int = 4):  # type: ignore[no-untyped-def]
    loop.begin(epoch, base)
    return _finish_epoch(loop, base, out)


def _finish_epoch(loop: InnerLoop, base: Tensor, out: Tensor):  # type: ignore[no-untyped-def]
    while not loop.done:
        loop.step()
    return loop.finish(base, keep(out))


def _reference_model(base: Tensor) -> tuple[torch.nn.Module, Callable[[], Tensor]]:
    """A model with parameters of its own, and what flattens them."""
    model = build_model(MODEL, LENGTH)
    layout = model_layout(model)
    for name, view in layout.views(base.clone()).items():
        model.get_parameter(name).data.copy_(view)
    return model, lambda: layout.flatten(dict(model.named_parameters()))


def _reference_adamw(base: Tensor, settings: TrainSpec) -> tuple[Tensor, list[float]]:
    model, flatten = _reference_model(base)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        betas=settings.betas,
        eps=settings.eps,
    )
    losses = []
    for step in range(settings.inner_steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (step + 1) / settings.warmup_steps)  # it starts afresh
        optimizer.zero_grad()
        windows = torch.from_numpy(_ids(4, step))
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    return flatten(), losses


def _reference_gradient(base: Tensor, batches: int) -> Tensor:
    model, _ = _reference_model(base)
    for step in range(batches):
        windows = torch.from_numpy(_ids(4, step))
        (model(input_ids=windows, labels=windows).loss / batches).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]


def _reference_loss(base: Tensor, windows: np.ndarray) -> float:
    model, _ = _reference_model(base)
    ids = torch.from_numpy(windows)
    return float(model.eval()(input_ids=ids, labels=ids).loss.detach())


# ---- what a member chooses for itself ------------------------------------------------------------------


@pytest.mark.parametrize("settings", [DILOCO, GRADIENT], ids=["diloco", "gradient"])
def test_what_a_member_chooses_leaves_its_contribution_as_it_is(base: Tensor, settings: TrainSpec) -> None:
    plain, other = torch.empty_like(base), torch.empty_like(base)
    expected = _run_epoch(_loop(settings), base, plain)
    got = _run_epoch(_loop(settings, local=LocalTraining(micro_batch=1, checkpointing=True)), base, other)
    assert (got.weight, got.batches) == (expected.weight, expected.batches)
    assert got.loss == pytest.approx(expected.loss, rel=1e-5)
    torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("settings", [DILOCO, GRADIENT], ids=["diloco", "gradient"])
def test_a_step_that_does_not_fit_is_done_again_with_less_where_the_member_allows_it(
    base: Tensor, settings: TrainSpec
) -> None:
    """The second batch does not fit at first: the sum of a mean gradient must begin again."""
    plain, small, told = torch.empty_like(base), torch.empty_like(base), []
    expected = _run_epoch(_loop(settings), base, plain)
    loop = _loop(settings, local=LocalTraining(on_out_of_memory="adapt"), tell=told.append)
    loop._gradients = Starving(loop._gradients, [None, (1, True)])  # type: ignore[assignment]
    got = _run_epoch(loop, base, small)
    assert (got.weight, got.batches) == (expected.weight, expected.batches)
    torch.testing.assert_close(small, plain, rtol=1e-3, atol=1e-6)
    assert [text.partition(": ")[2].partition(";")[0] for text in told] == [
        "going on with micro_batch = 1, checkpointing = false",
        "going on with micro_batch = 1, checkpointing = true",
    ]


def test_a_step_that_does_not_fit_says_what_would(base: Tensor) -> None:
    loop = _loop(DILOCO)
    loop._gradients = Starving(loop._gradients, [(1, False)])  # type: ignore[assignment]
    loop.begin(4, base)
    with pytest.raises(OutOfMemory, match=r"micro_batch = 1, checkpointing = false in node\.toml"):
        loop.step()


def test_where_nothing_smaller_is_left_the_loop_gives_up(base: Tensor) -> None:
    loop = _loop(DILOCO, local=LocalTraining(on_out_of_memory="adapt"))
    loop._gradients = Starving(loop._gradients, [(0, False)])  # type: ignore[assignment]
    loop.begin(4, base)
    with pytest.raises(OutOfMemory, match="nothing smaller is left"):
        loop.step()


class Starving:
    """Gradients whose memory holds, for each batch in turn, no more than that; the last one for the rest."""

    def __init__(self, inner: Gradients, rooms: list[tuple[int, bool] | None]) -> None:
        self._inner = inner
        self._rooms = rooms

    def add(self, batch: Windows) -> tuple[float, int]:
        found = self._inner.add(batch)
        room, footing = self._rooms[0], self._inner.footing
        if room is not None and (footing.micro_batch > room[0] or footing.checkpointing < room[1]):
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(self._rooms) > 1:
            self._rooms.pop(0)
        return found

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


# ---- the schedule --------------------------------------------------------------------------------------


def test_a_late_epoch_is_late_in_the_schedule_whoever_takes_its_steps(base: Tensor) -> None:
    """A joiner with no warm-up to do takes the steps that the others take: lr comes from the epoch."""
    settings = dataclasses.replace(
        DILOCO, warmup_steps=0, schedule="wsd", schedule_steps=30, decay_share=0.5, min_lr_ratio=0.0
    )
    norms = {}
    for epoch in (0, 9, 10):
        norms[epoch] = _run_epoch(_loop(settings), base, torch.empty_like(base), epoch=epoch).norm
    assert norms[9] < 0.3 * norms[0]
    assert norms[10] == 0.0


def test_what_is_dropped_at_random_is_dropped_alike_when_an_epoch_is_begun_again(base: Tensor) -> None:
    loop, first, second = _loop(DILOCO, attention_dropout=0.5), torch.empty_like(base), torch.empty_like(base)
    _run_epoch(loop, base, first)
    torch.manual_seed(12345)
    _run_epoch(loop, base, second)
    plain = torch.empty_like(base)
    _run_epoch(_loop(DILOCO), base, plain)
    assert torch.equal(first, second) and not torch.equal(first, plain)
