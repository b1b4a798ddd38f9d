"""What trl is told of the machine."""

from __future__ import annotations

from pathlib import Path

import trl

from tapestry.node.sovereign.recipe import Recipe
from tapestry.node.sovereign.training import _common, _on_one_device, _quietly


def test_where_several_gpus_are_visible_one_is_taken(tmp_path: Path) -> None:
    """trl refuses what transformers makes of them, and batches would be larger than the recipe says."""
    common = _common(Recipe("sft", "full", ("x",)), 32, tmp_path, 4, is_repair=False)
    with _quietly():
        configs = trl.SFTConfig(**common), trl.DPOConfig(**common)
    for made in configs:
        made._n_gpu = 8
        assert _on_one_device(made).n_gpu == 1
        assert made.train_batch_size == made.per_device_train_batch_size
