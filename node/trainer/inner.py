"""The inner loop: base parameters and local text -> one contribution.

With `inner_steps` = H > 0 this is DiLoCo (2311.08105, algorithm 1): H optimizer steps from the base, then the
pseudo-gradient, base minus local. With `inner_steps` = 0 it is the mean gradient of `accumulation` batches.
Contribution weight = tokens trained on. A loss or vector that is not finite raises Diverged and is never
a contribution.

The model's parameters are views into one flat vector, and so are their gradients (`held`): loading the base,
clipping and the difference are each one operation on f32 (n,). Each process of a trainer of several holds a
share of every parameter; this loop runs in all of them, and they take the same steps (`group`). The
contribution is made piece by piece, as whoever encodes it asks (trainer/encoder.py). The base of the
difference is read again from the CPU, where it lies in shared memory: on a GPU that costs 4 bytes a parameter
up the bus once an epoch, where a copy kept there would cost 4 bytes of its memory all the time.

The inner optimizer's state lives on from epoch to epoch, as in DiLoCo. The state with which an epoch began is
kept until the next begins, so an epoch that is begun again, after an aborted round or a restart, gives the
same bits again; what a model draws at random, for dropout, is drawn from the step's number in the run.

What a member chooses for itself (`LocalTraining`) leaves the contribution as it is, to float error; in bf16,
to bf16's. A step that does not fit in memory raises OutOfMemory; where the member allows it, it is done
again with less at a time.

With overlap the loop need not wait for the round: after `finish` it may `go_on` with the steps of the next
epoch, from where it is. It is then *ahead* of its base. `begin` with the base that follows moves all by the
same vector: local = base + (local - where it went on from), so steps taken meanwhile are kept; any other
`begin` drops them. What is ahead has no base, so it never is a contribution (docs/decisions/004-overlap.md).

Nothing here knows of processes, pipes or clocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tapestry.compression.refusals import RefusedVector
from tapestry.compression.shards import Layout
from tapestry.node.spec.training import AS_USUAL, UNCHANGED, Changed, LocalTraining, TrainSpec
from tapestry.node.trainer.encoder import Write
from tapestry.node.trainer.gradients import Batch, Gradients
from tapestry.node.trainer.group import Group
from tapestry.node.trainer.held import all_of, share_of
from tapestry.node.trainer.memory import Footing, OutOfMemory, advice, is_out_of_memory
from tapestry.node.trainer.optimizers.registry import InnerOptimizer, make_optimizer
from tapestry.node.trainer.optimizers.state import (
    Identity,
    Snapshot,
    put_back,
    read_snapshot,
    take_snapshot,
    write_snapshot,
)
from tapestry.node.trainer.schedule import lr_factor, run_step


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
    until the next `begin`. `draw(epoch, step)` gives the batch of that step, the same whenever it is asked.
    `tell` takes what the member should read in its log. Raises OptimizerUnavailable.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        settings: TrainSpec,
        draw: Callable[[int, int], Batch],
        device: torch.device,
        local: LocalTraining = AS_USUAL,
        tell: Callable[[str], None] = lambda text: None,
        group: Group | None = None,
    ) -> None:
        self._settings = settings
        self._draw = draw
        self._device = device
        self._adapts = local.on_out_of_memory == "adapt"
        self._tell = tell
        self._group = group
        self._held = (
            all_of(model, layout, device) if group is None else share_of(model, layout, device, group)
        )
        self._gradients = Gradients(
            model,
            device,
            Footing(local.micro_batch or settings.batch_size, local.checkpointing),
            bf16=_is_bf16(local.precision, device),
            compiled=local.compile,
            group=group,
        )
        self._identity = Identity(settings.optimizer, layout.schema_hash)
        self._optimizer: InnerOptimizer | None = None
        if settings.inner_steps:
            self._optimizer = make_optimizer(settings, self._held.parts, alone=group is None)
        self._steps = 0  # of the optimizer
        self._snapshots: dict[int, Snapshot] = {}  # by epoch: of the one that goes on; ahead, of two
        self._epoch: int | None = None
        self._finished: int | None = None  # the epoch that has just ended in a contribution
        self._ahead = False
        self._now = settings  # as records have changed it
        self._left: list[Tensor] | None = None  # local parameters when we went on; made at the first need
        self._losses: list[float] = []
        self._tokens = 0

    def begin(
        self,
        epoch: int,
        base: Tensor,  # f32 (n,), CPU
        follows: bool = False,
        changed: Changed = UNCHANGED,
    ) -> bool:
        """Start the epoch from the base; drops whatever epoch was going on. `changed`: since the spec.

        If the base `follows` the one of the last contribution, the steps with which we went on are kept.
        Returns whether we had gone on so.
        """
        self._now = changed.of_spec(self._settings)
        keeps = follows and self._ahead and self._epoch == epoch
        self._ahead, self._finished = False, None
        if keeps:
            self._rebase(epoch, base)
            return True
        if self._optimizer is not None:
            self._take_state_of(epoch)
        self._held.take(base)
        self._held.forget_gradient()
        self._epoch, self._losses, self._tokens = epoch, [], 0
        return False

    def forget(self) -> None:
        """Begin the inner optimizer anew: what it has seen is undone."""
        if self._optimizer is not None:
            self._optimizer = None  # before there is another: it may be as large as the model
            alone = self._group is None
            self._optimizer = make_optimizer(self._settings, self._held.parts, alone=alone)
        self._steps, self._snapshots = 0, {}

    def go_on(self) -> None:
        """After `finish`: take the steps of the next epoch from where we are, until its base is there."""
        if self._finished is None or self._optimizer is None:
            raise RuntimeError("nothing to go on from")
        epoch, self._finished = self._finished + 1, None
        self._left = self._held.copy(self._left)
        self._snapshots[epoch] = self._snapshot(epoch)
        self._epoch, self._losses, self._tokens, self._ahead = epoch, [], 0, True

    def _rebase(
        self,
        epoch: int,
        base: Tensor,  # f32 (n,), CPU
    ) -> None:
        assert self._left is not None
        self._held.move(self._left, base)
        self._snapshots = {epoch: self._snapshots[epoch]}

    def _take_state_of(self, epoch: int) -> None:
        """Take up the state with which the epoch began, if it has begun before; else that of now is it."""
        kept = self._snapshots.get(epoch)
        if kept is None:
            kept = self._snapshot(epoch)
        else:
            self._restore(kept)
        self._snapshots = {epoch: kept}

    def _snapshot(self, epoch: int) -> Snapshot:
        assert self._optimizer is not None
        return take_snapshot(self._optimizer.tensors(), epoch, self._steps)

    def _restore(self, snapshot: Snapshot) -> None:
        assert self._optimizer is not None
        put_back(snapshot, self._optimizer.tensors())
        self._optimizer.resume(snapshot.steps)
        self._steps = snapshot.steps

    def step(self) -> float:
        """One batch; returns its loss, the mean over its tokens. Raises Diverged and OutOfMemory."""
        if self._epoch is None:
            raise RuntimeError("step before begin")
        value, tokens = self._fitting(self._add_gradient)
        if not math.isfinite(value):
            raise Diverged(f"epoch {self._epoch}, batch {len(self._losses) + 1}: the loss is {value}")
        if self._optimizer is not None:
            self._held.clip_gradient(self._settings.grad_clip)
            number = run_step(self._settings, self._epoch, len(self._losses), self._now.inner_steps)
            rate = self._now.lr / self._settings.lr
            self._optimizer.step(rate * lr_factor(self._settings, number, self._steps))
            self._steps += 1
        self._losses.append(value)
        self._tokens += tokens
        return value

    def _add_gradient(self) -> tuple[float, int]:
        assert self._epoch is not None
        if self._optimizer is not None:
            self._held.forget_gradient()
        step, rank = len(self._losses), 0 if self._group is None else self._group.rank
        torch.manual_seed((rank << 48) + (self._epoch << 24) + step)
        return self._gradients.add(self._draw(self._epoch, step))

    def _fitting(self, work: Callable[[], tuple[float, int]]) -> tuple[float, int]:
        """Do it; where that takes too much memory, and the member allows it, again with less at a time."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Not within `except`: the error holds on to what the step had made.
            self._make_room()

    def _make_room(self) -> None:
        footing = self._gradients.footing
        smaller = footing.smaller(self._gradients.can_checkpoint)
        if smaller is None or not self._adapts or self._group is not None:
            raise OutOfMemory(advice(footing, smaller))
        self._gradients.take(smaller)
        self._tell(
            f"a training step did not fit in memory with {footing}: going on with {smaller}; "
            "say so in node.toml's [training], and the next start does not try"
        )
        if self._optimizer is None:  # half a batch may be in the sum
            self._held.forget_gradient()
            self._losses, self._tokens = [], 0
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def finish(
        self,
        base: Tensor,  # f32 (n,), CPU: the same that was begun with
        encode: Callable[[Write], float],  # gives the norm; raises RefusedVector for what is not finite
    ) -> Outcome:
        """Have the contribution encoded; at least one step must have been done. Raises Diverged."""
        batches = len(self._losses)
        if self._epoch is None or self._ahead or not batches:
            raise RuntimeError("finish before the first step, or before begin")
        held = self._held
        write = held.mean_gradient(batches) if self._optimizer is None else held.pseudo_gradient(base)
        try:
            norm = encode(write)
        except RefusedVector as refused:
            if refused.reason != "not_finite":
                raise  # our bug
            raise Diverged(f"epoch {self._epoch}: the contribution is not finite") from refused
        self._epoch, self._finished = None, self._epoch
        return Outcome(self._tokens, norm, math.fsum(self._losses) / batches, batches)

    def abandon(self) -> None:
        """Forget the epoch that is going on, if any."""
        self._epoch, self._finished, self._ahead = None, None, False

    def tell_of_parts(self, on_part: Callable[[], None]) -> None:
        """Have `on_part` called after each forward pass, in a step or an evaluation: both may take long."""
        self._gradients.on_part = on_part

    def evaluate(
        self,
        base: Tensor,  # f32 (n,), CPU
        batch: Batch,
    ) -> float:
        """Mean loss of the base on all its windows; as `losses`."""
        return self.losses(base, [batch])[0]

    def losses(
        self,
        base: Tensor,  # f32 (n,), CPU
        batches: Iterable[Batch],
    ) -> list[float]:
        """Mean loss of the base on each; an epoch that is going on is not disturbed.

        The base is read once, at the beginning: the node may go on to the next while this measures, which
        takes minutes for a large model. Raises OutOfMemory.
        """
        goes_on = self._settings.overlap and self._finished is not None
        aside = self._held.copy() if self._epoch is not None or goes_on else None
        self._held.take(base)
        try:
            return [self._fitting(partial(self._gradients.loss, batch))[0] for batch in batches]
        finally:
            if aside is not None:
                self._held.put_back(aside)

    @property
    def steps(self) -> int:
        """That the inner optimizer has taken since it began."""
        return self._steps

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
    def batches_wanted(self) -> int:
        """That a whole epoch takes."""
        return self._now.batches

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
        return len(self._losses) >= self._now.batches

    def save(self, path: Path, epoch: int) -> None:
        """Atomically write the inner optimizer as it is, or was, at the beginning of `epoch`.

        Without an inner optimizer (`inner_steps` = 0) there is nothing to save. Raises OSError.
        """
        if self._optimizer is None:
            return
        kept = self._snapshots.get(epoch)
        write_snapshot(path, self._snapshot(epoch) if kept is None else kept, self._identity)

    def load(self, path: Path) -> int | None:
        """Take up a saved inner optimizer; its epoch, or None if there is no file. Raises InnerStateError."""
        if self._optimizer is None or not path.exists():
            return None
        snapshot = read_snapshot(path, self._optimizer.tensors(), self._identity)
        self._restore(snapshot)
        self._snapshots = {snapshot.epoch: snapshot}
        return snapshot.epoch


def _is_bf16(precision: str, device: torch.device) -> bool:
    """`auto`: on a GPU that has it. On most processors bf16 is slower than f32."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"
