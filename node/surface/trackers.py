"""Experiment trackers: what /metrics tells, as curves over epochs and tokens in the tool that a team uses.

`trackers = ["tensorboard"]` in node.toml. Each kind is a class below and a line in `KINDS`; the libraries are
extras and are imported when a node asks for them. A point is a flat table of names and numbers, with the
epoch as its step. Trackers are fed from a thread of their own, so that a slow disk or a slow server never
holds the node up; one that fails is told of once and left, and the run goes on without it.

Names, as /metrics has them where it has them:

    train/loss, train/tokens_per_second, train/tokens, data/passes
    validation/loss/NAME                     for each validation set
    round/seconds, round/PHASE_seconds, round/members
    agreement/cosine, agreement/sign, agreement/norm_kept
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from tapestry.node.errors import UserError

POINTS_WAITING_MAX = 1024  # guess: epochs that a server may be away for; older points go first
CLOSE_S = 3.0  # a stop takes ten seconds at most, and this is the least of it

_log = logging.getLogger("tapestry.trackers")


class Tracker(Protocol):
    """One tool. Called from one thread; what it raises ends it."""

    def write(self, step: int, point: Mapping[str, float]) -> None:
        """A point of every curve that is named."""

    def close(self) -> None:
        """Nothing more comes: write what is left."""


class TensorBoard:
    """Event files in HOME/tensorboard: `tensorboard --logdir HOME/tensorboard`."""

    def __init__(self, folder: Path, run_name: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("run", f"{run_name}\n\n" + "\n".join(f"{k}: {v}" for k, v in config.items()))

    def write(self, step: int, point: Mapping[str, float]) -> None:
        """See Tracker."""
        for name, value in point.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See Tracker."""
        self._writer.close()


class _RunOfLibrary:
    """wandb, and trackio, which has the same interface."""

    def __init__(self, library: Any, folder: Path, run_name: str, config: Mapping[str, Any]) -> None:
        options = {"dir": str(folder)} if library.__name__ == "wandb" else {}
        self._run: Any = library.init(project=run_name, config=dict(config), **options)

    def write(self, step: int, point: Mapping[str, float]) -> None:
        """See Tracker."""
        self._run.log(dict(point), step=step)

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


def _wandb(folder: Path, run_name: str, config: Mapping[str, Any]) -> Tracker:
    import wandb

    return _RunOfLibrary(wandb, folder, run_name, config)


def _trackio(folder: Path, run_name: str, config: Mapping[str, Any]) -> Tracker:
    import trackio

    return _RunOfLibrary(trackio, folder, run_name, config)


Open = Callable[[Path, str, Mapping[str, Any]], Tracker]  # home, run's name, what to say of the run
KINDS: dict[str, Open] = {"tensorboard": TensorBoard, "wandb": _wandb, "trackio": _trackio}


def open_trackers(names: Sequence[str], folder: Path, run_name: str, config: Mapping[str, Any]) -> Trackers:
    """Those that node.toml names. Raises UserError for one whose library is not installed."""
    opened: dict[str, Tracker] = {}
    for name in names:
        try:
            opened[name] = KINDS[name](folder, run_name, config)
        except ImportError as error:
            raise UserError(
                f"trackers: {name} is not installed ({error})", hint=f"pip install 'tapestry-node[{name}]'"
            ) from error
    return Trackers(opened)


class Trackers:
    """Feeds each tracker from one thread. Without any it does nothing."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)
        self._points: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(POINTS_WAITING_MAX)
        self._thread = threading.Thread(target=self._feed, name="trackers", daemon=True)
        if self._trackers:
            self._thread.start()

    def put(self, step: int, point: Mapping[str, float | None]) -> None:
        """Numbers of one epoch; what is None or no number is left out. Never blocks."""
        known = {name: float(v) for name, v in point.items() if v is not None and math.isfinite(v)}
        if self._trackers and known:
            self._put((step, known))

    def close(self) -> None:
        """Write what waits, for a bounded time."""
        if self._thread.is_alive():
            self._put(None)
            self._thread.join(CLOSE_S)

    def _put(self, item: tuple[int, dict[str, float]] | None) -> None:
        while True:
            try:
                self._points.put_nowait(item)
                return
            except queue.Full:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        try:
            self._points.get_nowait()
        except queue.Empty:
            return

    def _feed(self) -> None:
        while (item := self._points.get()) is not None:
            step, point = item
            self._each("write", step, point)
        self._each("close")

    def _each(self, method: Literal["write", "close"], *arguments: Any) -> None:
        for name, tracker in [*self._trackers.items()]:
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # whatever a library raises: it must not end the run
                del self._trackers[name]
                _log.warning(
                    "tracker=%s left reason=%r; mend it and start the node again to have it back",
                    name,
                    str(error),
                )
