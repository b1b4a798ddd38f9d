"""A run of four epochs with checkpoints, and a disk that can be full."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from state.kit import Run


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other's pieces take ten times as long when the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Four epochs, checkpoints at 0 and 2."""
    made = Run(tmp_path / "home", n=700)
    made.save()
    made.advance(2)
    made.save()
    made.advance(2)
    return made


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """Within it no byte reaches the disk: a write is noticed at the latest when it is synced."""

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def context() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            yield

    return context
