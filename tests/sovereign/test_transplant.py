"""Transplants and merges against what they should be, entry by entry."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tapestry.node.errors import UserError
from tapestry.node.sovereign.derivative import Transplant
from tapestry.node.sovereign.transplant import dropped, elected_mean, joined, merge, transplant, trimmed

DELTA = torch.tensor([0.5, -0.1, 0.0, 2.0, -3.0, 0.2])


def _saved(folder: Path, **tensors: Tensor) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def _written(folder: Path) -> Tensor:
    tensor: Tensor = load_file(folder / "model.safetensors")["w"]
    return tensor


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path, Path, Path]:
    """New base, old base, derivative, and where to write."""
    old, move = torch.arange(6.0), torch.tensor([0.1, 1.0, 0.0, -3.0, 1.0, 0.1])
    out = tmp_path / "out"
    out.mkdir()
    return (
        _saved(tmp_path / "new", w=old + move),
        _saved(tmp_path / "old", w=old),
        _saved(tmp_path / "own", w=old + DELTA),
        out,
    )


def test_a_task_vector_is_the_new_base_and_the_scaled_difference(models: tuple[Path, ...]) -> None:
    new, old, own, out = models
    transplant(new, old, own, out, Transplant("task", scale=0.5))
    assert torch.allclose(_written(out), _written(new) + 0.5 * DELTA)


def test_ties_gives_way_where_the_base_moved_further_the_other_way(models: tuple[Path, ...]) -> None:
    new, old, own, out = models
    transplant(new, old, own, out, Transplant("ties", density=1.0))
    expected = torch.tensor(
        [0.5, 0.0, 0.0, 0.0, -3.0, 0.2]
    )  # -0.1 against +1, 2 against -3; -3 against +1 stays
    assert torch.allclose(_written(out) - _written(new), expected, atol=1e-6)


def test_a_derivative_without_a_difference_becomes_the_new_base_to_the_bit(models: tuple[Path, ...]) -> None:
    new, old, _, out = models
    for way in ("task", "ties", "dare"):
        transplant(new, old, old, out, Transplant(way))  # type: ignore[arg-type]
        assert torch.equal(_written(out), _written(new))
        (out / "model.safetensors").unlink()


def test_trimming_keeps_the_largest() -> None:
    assert trimmed(DELTA, 0.34).tolist() == [0.0, 0.0, 0.0, 2.0, -3.0, 0.0]
    assert torch.equal(trimmed(DELTA, 1.0), DELTA)


def test_dropping_is_drawn_by_seed_and_name_and_keeps_the_mean() -> None:
    ones, how = torch.ones(100_000), Transplant("dare", density=0.25, seed=7)
    kept = dropped(ones, how, "w")
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert abs(float(kept.mean()) - 1) < 0.03
    assert torch.equal(kept, dropped(ones, how, "w"))
    assert not torch.equal(kept, dropped(ones, how, "v"))


def test_an_elected_mean_leaves_out_the_sign_with_less_weight() -> None:
    deltas = [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([3.0, -3.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])]
    assert elected_mean(deltas, [1, 1, 1]).tolist() == [2.0, -3.0, 0.0]
    assert elected_mean(deltas, [3, 1, 2]).tolist() == [1.5, 1.0, 0.0]


def test_a_merge_of_task_vectors_is_their_weighted_sum() -> None:
    found = joined([DELTA, -DELTA, DELTA], [0.5, 0.25, 0.25], "w", Transplant("task", scale=2.0))
    assert torch.allclose(found, DELTA)


def test_models_of_another_shape_are_refused_by_name(tmp_path: Path, models: tuple[Path, ...]) -> None:
    other = _saved(tmp_path / "other", w=torch.zeros(7))
    with pytest.raises(UserError, match="are of different models: 1 tensors, as w"):
        merge(models[0], [other], [1.0], models[3], Transplant())
