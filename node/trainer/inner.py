"""The inner loop: base parameters and local text -> one contribution.

With `inner_steps` = H > 0 this is DiLoCo (2311.08105, algorithm 1): H AdamW steps from the base, then the
pseudo-gradient, base minus local. With `inner_steps` = 0 it is the mean gradient of `accumulation` batches.
Contribution weight = tokens trained on. A loss or vector that is not finite raises Diverged and is never
a contribution.

The model's parameters are views into one flat vector, and so are their gradients: loading the base, AdamW
and the snapshot are each one operation on f32 (n,). The contribution is made piece by piece, as whoever
encodes it asks (trainer/encoder.py). The base of the difference is read again from the CPU, where it lies in
shared memory: on a GPU that costs 4 bytes a parameter up the bus once an epoch, where a copy kept there would
cost 4 bytes of its memory all the time. AdamW's moments live on from
epoch to epoch, as in DiLoCo. The moments with which an epoch began are kept until the next begins, so an
epoch that is begun again, after an aborted round or a restart, gives the same bits again.

With overlap the loop need not wait for the round: after `finish` it may `go_on` with the steps of the next
epoch, from where it is. It is then *ahead* of its base. `begin` with the base that follows moves all by the
same vector: local = base + (local - where it went on from), so steps taken meanwhile are kept; any other
`begin` drops them. What is ahead has no base, so it never is a contribution (docs/decisions/004-overlap.md).

Nothing here knows of processes, pipes or clocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tapestry.compression.refusals import RefusedVector
from tapestry.compression.shards import Layout
from tapestry.node.spec.training import TrainSpec
from tapestry.node.trainer.encoder import Write
from tapestry.node.trainer.moments import Moments, Snapshot, read_snapshot, write_snapshot


class Diverged(ArithmeticError):
    """A loss or a vector is not finite; there is no contribution."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is told of a contribution; the vector itself went to who encoded it."""

    weight: int  # tokens trained on
    norm: float  # L2, as the encoder computed it: in f64
    loss: float  # mean over the batches
    batches: int


class InnerLoop:
    """One model, its flat parameters, and the inner optimizer.

    Call `begin`, then `step` until `done` or until it is time to `finish`; then perhaps `go_on`, and `step`
    until the next `begin`. `draw(epoch, step)` gives the batch of that step, int64 (batch,
    sequence_length + 1).
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        settings: TrainSpec,
        draw: Callable[[int, int], np.ndarray],
        device: torch.device,
    ) -> None:
        self._model = model.to(device)
        self._settings = settings
        self._draw = draw
        self._device = device
        self._schema = layout.schema_hash
        self._local = nn.Parameter(torch.zeros(layout.n, device=device))
        self._local.grad = torch.zeros(layout.n, device=device)
        _make_views(model, layout, self._local.data, self._local.grad)
        self._moments = Moments(self._local) if settings.inner_steps else None
        self._snapshots: dict[int, Snapshot] = {}  # by epoch: of the one that goes on; ahead, of two
        self._epoch: int | None = None
        self._finished: int | None = None  # the epoch that has just ended in a contribution
        self._ahead = False
        self._left: Tensor | None = None  # f32 (n,), local parameters when we went on; made at the first need
        self._losses: list[float] = []
        self._tokens = 0

    def begin(
        self,
        epoch: int,
        base: Tensor,  # f32 (n,), CPU
        follows: bool = False,
    ) -> bool:
        """Start the epoch from the base; drops whatever epoch was going on.

        If the base `follows` the one of the last contribution, the steps with which we went on are kept.
        Returns whether we had gone on so.
        """
        keeps = follows and self._ahead and self._epoch == epoch
        self._ahead, self._finished = False, None
        if keeps:
            self._rebase(epoch, base)
            return True
        if self._moments is not None:
            self._take_moments_of(epoch)
        self._local.data.copy_(base)
        self._gradient.zero_()
        self._epoch, self._losses, self._tokens = epoch, [], 0
        return False

    def go_on(self) -> None:
        """After `finish`: take the steps of the next epoch from where we are, until its base is there."""
        if self._finished is None or self._moments is None:
            raise RuntimeError("nothing to go on from")
        epoch, self._finished = self._finished + 1, None
        if self._left is None:
            self._left = torch.empty_like(self._local.data)
        self._left.copy_(self._local.data)
        self._snapshots[epoch] = self._moments.snapshot(epoch)
        self._epoch, self._losses, self._tokens, self._ahead = epoch, [], 0, True

    def _rebase(
        self,
        epoch: int,
        base: Tensor,  # f32 (n,), CPU
    ) -> None:
        assert self._left is not None
        self._local.data.sub_(self._left).add_(base.to(self._device))
        self._snapshots = {epoch: self._snapshots[epoch]}

    def _take_moments_of(self, epoch: int) -> None:
        """Take up the moments with which the epoch began, if it has before; else those of now are they."""
        assert self._moments is not None
        kept = self._snapshots.get(epoch)
        if kept is None:
            kept = self._moments.snapshot(epoch)
        else:
            self._moments.restore(kept)
        self._snapshots = {epoch: kept}

    def step(self) -> float:
        """One batch; returns its loss, f32 mean over its tokens. Raises Diverged."""
        if self._epoch is None:
            raise RuntimeError("step before begin")
        windows = torch.from_numpy(self._draw(self._epoch, len(self._losses))).to(self._device)
        if self._moments is not None:
            self._gradient.zero_()
        self._model.train()
        loss = _mean_loss(self._model, windows)
        loss.backward()  # type: ignore[no-untyped-call]
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(f"epoch {self._epoch}, batch {len(self._losses) + 1}: the loss is {value}")
        if self._moments is not None:
            nn.utils.clip_grad_norm_([self._local], self._settings.grad_clip)
            self._moments.step(self._settings)
        self._losses.append(value)
        self._tokens += windows.shape[0] * (windows.shape[1] - 1)
        return value

    def finish(
        self,
        base: Tensor,  # f32 (n,), CPU: the same that was begun with
        encode: Callable[[Write], float],  # gives the norm; raises RefusedVector for what is not finite
    ) -> Outcome:
        """Have the contribution encoded; at least one step must have been done. Raises Diverged."""
        batches = len(self._losses)
        if self._epoch is None or self._ahead or not batches:
            raise RuntimeError("finish before the first step, or before begin")
        write = self._mean_gradient(batches) if self._moments is None else self._pseudo_gradient(base)
        try:
            norm = encode(write)
        except RefusedVector as refused:
            if refused.reason != "not_finite":
                raise  # our bug
            raise Diverged(f"epoch {self._epoch}: the contribution is not finite") from refused
        self._epoch, self._finished = None, self._epoch
        return Outcome(self._tokens, norm, math.fsum(self._losses) / batches, batches)

    def _pseudo_gradient(
        self,
        base: Tensor,  # f32 (n,), CPU
    ) -> Write:
        local = self._local.data

        def write(start: int, stop: int, out: Tensor) -> None:
            torch.sub(base[start:stop].to(out.device), local[start:stop].to(out.device), out=out)

        return write

    def _mean_gradient(self, batches: int) -> Write:
        gradient, count = self._gradient, self._gradient.new_full((1,), batches)

        def write(start: int, stop: int, out: Tensor) -> None:
            # By a tensor: torch on CUDA multiplies by the reciprocal of a number.
            torch.div(gradient[start:stop].to(out.device), count.to(out.device), out=out)

        return write

    def abandon(self) -> None:
        """Forget the epoch that is going on, if any."""
        self._epoch, self._finished, self._ahead = None, None, False

    def evaluate(
        self,
        base: Tensor,  # f32 (n,), CPU
        windows: np.ndarray,  # int64 (count, sequence_length + 1)
    ) -> float:
        """Mean loss of the base on the windows; an epoch that is going on is not disturbed."""
        aside = self._local.detach().clone() if self._epoch is not None else None
        self._local.data.copy_(base)
        self._model.eval()
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(windows), self._settings.batch_size):
                batch = torch.from_numpy(windows[start : start + self._settings.batch_size]).to(self._device)
                total += _mean_loss(self._model, batch).item() * len(batch)
        if aside is not None:
            self._local.data.copy_(aside)
        return total / len(windows)

    @property
    def epoch(self) -> int | None:
        """The epoch that is going on."""
        return self._epoch

    @property
    def finished(self) -> int | None:
        """The epoch that has just ended in a contribution, while we have not gone on."""
        return self._finished

    @property
    def ahead(self) -> bool:
        """Whether the epoch that is going on has no base yet."""
        return self._ahead

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do before the next `begin`."""
        return self._epoch is None or (self._ahead and self.done)

    @property
    def batches(self) -> int:
        """Batches done in this epoch."""
        return len(self._losses)

    @property
    def tokens(self) -> int:
        """Tokens trained on in this epoch."""
        return self._tokens

    @property
    def loss(self) -> float:
        """Of the latest batch."""
        return self._losses[-1]

    @property
    def done(self) -> bool:
        """Whether the epoch has had all its batches."""
        return len(self._losses) >= self._settings.batches

    def save(self, path: Path, epoch: int) -> None:
        """Atomically write the inner optimizer as it is, or was, at the beginning of `epoch`.

        Without an inner optimizer (`inner_steps` = 0) there is nothing to save. Raises OSError.
        """
        if self._moments is None:
            return
        kept = self._snapshots.get(epoch)
        if kept is None:
            kept = self._moments.snapshot(epoch)
        write_snapshot(path, kept, self._schema)

    def load(self, path: Path) -> int | None:
        """Take up a saved inner optimizer; its epoch, or None if there is no file. Raises InnerStateError."""
        if self._moments is None or not path.exists():
            return None
        snapshot = read_snapshot(path, self._local.numel(), self._schema)
        self._moments.restore(snapshot)
        self._snapshots = {snapshot.epoch: snapshot}
        return snapshot.epoch

    @property
    def _gradient(self) -> Tensor:
        assert self._local.grad is not None
        return self._local.grad


def _make_views(
    model: nn.Module,
    layout: Layout,
    flat: Tensor,  # f32 (n,)
    flat_gradient: Tensor,  # f32 (n,)
) -> None:
    """Point every parameter and its gradient into the flat vectors; backward then adds in place."""
    parameters = dict(model.named_parameters())
    for name, shape, offset in zip(layout.names, layout.shapes, layout.offsets, strict=True):
        place = slice(offset, offset + math.prod(shape))
        parameters[name].data = flat[place].view(shape)
        parameters[name].grad = flat_gradient[place].view(shape)


def _mean_loss(
    model: nn.Module,
    windows: Tensor,  # int64 (batch, sequence_length + 1)
) -> Tensor:
    """Scalar: cross entropy in nats per predicted token."""
    logits = model(input_ids=windows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
