"""Small real text, nano settings, and one built model per session: importing transformers takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapestry.node.spec.data import DataSettings, resolved_data
from tapestry.node.spec.training import PRESETS, WorkerSettings
from tapestry.node.trainer.data.sources import located_in


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("".join(f"line {i}: the square of {i} is {i * i}\n" for i in range(2000)))
    return path


@pytest.fixture
def worker_settings(text_file: Path, tmp_path: Path) -> WorkerSettings:
    data = resolved_data(DataSettings(paths=(str(text_file),)), "")
    return WorkerSettings(
        training=PRESETS["nano"],
        data=data,
        located=located_in(data),
        cache_dir=str(tmp_path / "cache"),
        inner_state_path=str(tmp_path / "inner.safetensors"),
        cursor_path=str(tmp_path / "cursor.json"),
        node_seed=7,
        codec="int8-block",
        shard_elements=16_384,
        residual=False,
        device="cpu",
        validation_windows=8,
    )
