"""Small real text, nano settings, and one built model per session: importing transformers takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapestry.node.spec.training import PRESETS, WorkerSettings


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("".join(f"line {i}: the square of {i} is {i * i}\n" for i in range(2000)))
    return path


@pytest.fixture
def worker_settings(text_file: Path, tmp_path: Path) -> WorkerSettings:
    return WorkerSettings(
        training=PRESETS["nano"],
        data=(str(text_file),),
        cache_dir=str(tmp_path / "cache"),
        inner_state_path=str(tmp_path / "inner.safetensors"),
        node_seed=7,
        codec="int8-block",
        shard_elements=16_384,
        residual=False,
        device="cpu",
        validation_windows=8,
    )
