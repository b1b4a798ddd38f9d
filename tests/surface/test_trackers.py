"""Trackers: every point arrives in order, and none that fails or is slow holds the node up."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from tapestry.node.errors import UserError
from tapestry.node.surface import trackers as trackers_module
from tapestry.node.surface.trackers import POINTS_WAITING_MAX, Trackers, open_trackers


class Kept:
    """A tracker that keeps its points, after `gate` has opened."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        self._gate = gate

    def write(self, step: int, point: Mapping[str, float]) -> None:
        if self._gate is not None:
            assert self._gate.wait(10)
        self.points.append((step, dict(point)))

    def close(self) -> None:
        self.closed = True


class Broken:
    def write(self, step: int, point: Mapping[str, float]) -> None:
        raise ConnectionError("the server is gone")

    def close(self) -> None:
        raise AssertionError("a tracker that was left is not called again")


def test_points_arrive_in_order_without_what_is_no_number() -> None:
    kept = Kept()
    trackers = Trackers({"kept": kept})
    trackers.put(1, {"train/loss": 2.5, "validation/loss": None})
    trackers.put(2, {"train/loss": math.nan})
    trackers.put(3, {"train/loss": 2})
    trackers.close()
    assert kept.points == [(1, {"train/loss": 2.5}), (3, {"train/loss": 2.0})]
    assert kept.closed


def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    trackers = Trackers({"broken": Broken(), "kept": kept})
    with caplog.at_level(logging.WARNING, "tapestry.trackers"):
        for step in range(3):
            trackers.put(step, {"x": 1.0})
        trackers.close()
    assert len(kept.points) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "tracker=broken left reason='the server is gone'; mend it and start the node again to have it back"
    ]


def test_a_slow_tracker_holds_nobody_up_and_loses_the_oldest_points() -> None:
    gate = threading.Event()
    kept = Kept(gate)
    trackers = Trackers({"kept": kept})
    for step in range(POINTS_WAITING_MAX + 10):
        trackers.put(step, {"x": float(step)})
    gate.set()
    trackers.close()
    steps = [step for step, _ in kept.points]
    assert len(steps) <= POINTS_WAITING_MAX + 1
    assert steps == sorted(steps) and steps[-1] == POINTS_WAITING_MAX + 9


def test_a_library_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*_: object) -> Kept:
        raise ImportError("No module named 'wandb'")

    monkeypatch.setitem(trackers_module.KINDS, "wandb", missing)
    with pytest.raises(UserError, match=r"trackers: wandb is not installed") as caught:
        open_trackers(["wandb"], tmp_path, "run", {})
    assert caught.value.hint == "pip install 'tapestry-node[wandb]'"


def test_tensorboard_writes_event_files_that_hold_the_points(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = open_trackers(["tensorboard"], tmp_path, "run", {"params": 9})
    for step in range(3):
        trackers.put(step, {"train/loss": 3.0 - step})
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (0, 3.0),
        (1, 2.0),
        (2, 1.0),
    ]


def test_without_trackers_there_is_no_thread() -> None:
    before = threading.active_count()
    trackers = Trackers({})
    trackers.put(1, {"x": 1.0})
    trackers.close()
    assert threading.active_count() == before
