"""The script's side of the talk between a node and its trainer (trainer/messages.py), between two steps.

There is no thread: commands are looked at when the script's loop comes by, in `step`, and while it waits. So
whatever the node does to the shared base, the module changes only inside `step`, and a node that asks for
something waits for the script, never the other way round but for the round's result.

    Begin      the module becomes the base; what was trained from an older one is dropped
    Close      the round is closing: contribute after this step what there is
    Abort      nothing will come of this epoch; `step` then waits for the next Begin
    Save       the optimizer's state to disk           Evaluate   measured with the next Begin
    Stop       the node ends

Knows of no process, and not how the node came to be there.
"""

from __future__ import annotations

import math
import os
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tapestry.compression.codecs import get_codec
from tapestry.compression.payloads import PayloadLayout
from tapestry.compression.refusals import RefusedVector
from tapestry.node.library.errors import SwarmError
from tapestry.node.library.module import Trained
from tapestry.node.library.optimizer import StateNotKept, load_state, save_state
from tapestry.node.spec.training import WorkerSettings
from tapestry.node.trainer.encoder import Encoder
from tapestry.node.trainer.messages import (
    TEXT_CHARS_MAX,
    Abort,
    Attach,
    Begin,
    Close,
    Command,
    Contribution,
    Evaluate,
    Hello,
    Initialise,
    Initialised,
    Notice,
    Progress,
    Save,
    Saved,
    Stop,
    Validation,
)
from tapestry.node.trainer.opening import ChannelClosed
from tapestry.node.trainer.shared import SLOTS, map_slot, map_vector
from tapestry.node.trainer.worker import Channel

PROGRESS_INTERVAL_S = 0.2
LOOK_S = 1.0  # between two signs of life, while waiting
EVALUATED = "script"  # name of the set that `evaluate` measures on


@dataclass(frozen=True, slots=True)
class Loop:
    """What the script brings."""

    trained: Trained
    optimizer: torch.optim.Optimizer | None
    evaluate: Callable[[], float] | None


class Member:
    """One script at one node. Every method may raise ChannelClosed: the node has gone, or wants us gone."""

    def __init__(
        self, connection: socket.socket, fds: dict[str, int], settings: WorkerSettings, loop: Loop
    ) -> None:
        self.epoch = -1  # of the base that the module began from
        self.inner_step = 0  # since then
        self._connection, self._channel, self._fds = connection, Channel(connection), fds
        self._loop, self._trained = loop, loop.trained
        self._train = settings.training.train
        self._batches = self._train.batches  # that the epoch takes, by the latest Begin
        self._state_path = Path(settings.inner_state_path)
        n = self._trained.layout.n
        self._payloads = PayloadLayout.of(get_codec(settings.codec), n, settings.shard_elements)
        self._encoder = Encoder(self._payloads, torch.device("cpu"), settings.residual)
        self._base: torch.Tensor  # f32 (n,), shared with the node, which writes it
        self._outs: list[torch.Tensor]  # uint8 (payloads.size,), of each slot; the node reads them
        self._begun: Begin | None = None
        self._begins = 0
        self._closing = False
        self._evaluating: int | None = None
        self._losses: list[float] = []
        self._samples = 0
        self._began_s = self._reported_s = 0.0
        self._waited_s = 0.0

    def say_hello(self) -> None:
        """Take up the optimizer's saved state, and say what there is to train."""
        self._trained.require_unchanged()
        note, epoch = "", None
        if self._loop.optimizer is not None:
            try:
                schema = self._trained.schema_of(self._loop.optimizer)
                epoch = load_state(self._state_path, self._loop.optimizer, schema)
            except StateNotKept as error:
                note = f"the optimizer starts afresh: {error}"[:TEXT_CHARS_MAX]
        self._channel.send(
            Hello(
                names=self._trained.layout.names,
                shapes=self._trained.layout.shapes,
                train_tokens=0,
                validation_tokens=0,
                device=f"{self._trained.device}, in the script of process {os.getpid()}",
                inner_epoch=-1 if epoch is None else epoch,
                note=note,
                sets=() if self._loop.evaluate is None else (EVALUATED,),
            )
        )

    def step(self, loss: float | None, samples: int, on_wait: Callable[[float], None]) -> bool:
        """The script has taken an inner step, or has gradients of a batch.

        Returns whether the module has been given a base. Raises SwarmError for what is not finite.
        """
        begins = self._begins
        while self._begins == begins and self._waiting(0):
            self._handle(self._receive())
        if self._begins != begins:  # what this step made was made of an older base
            return True
        if self._begun is None:
            self.wait_for_base(on_wait)
            return True
        self._count(loss, samples)
        self._report_progress()
        if self.inner_step < self._batches and not self._closing:
            return False
        self._contribute()
        self.wait_for_base(on_wait)
        return True

    def wait_for_base(self, on_wait: Callable[[float], None]) -> None:
        """Do what the node asks until it has given us the next base; `on_wait` gets the seconds so far."""
        begins, since_s = self._begins, time.monotonic()
        while self._begins == begins:
            if self._waiting(LOOK_S):
                self._handle(self._receive())
            else:
                on_wait(time.monotonic() - since_s)
        if self._begins > 1:  # to wait for the first base is no loss
            self._waited_s += time.monotonic() - since_s

    def serve_until_gone(self, timeout_s: float) -> None:
        """While the node leaves: it wants the optimizer's state saved. Then, or after that time, return."""
        end_s = time.monotonic() + timeout_s
        try:
            while (left_s := end_s - time.monotonic()) > 0:
                if self._waiting(left_s):
                    self._handle(self._receive(), training=False)
        except ChannelClosed:
            return

    def save(self, epoch: int) -> str:
        """The optimizer's state to disk; "" or why not."""
        if self._loop.optimizer is None:
            return ""
        try:
            schema = self._trained.schema_of(self._loop.optimizer)
            save_state(self._state_path, self._loop.optimizer, epoch, schema)
        except (StateNotKept, OSError) as error:
            return str(error)[:TEXT_CHARS_MAX]
        return ""

    # --- what the node says --------------------------------------------------------------------

    def _waiting(self, timeout_s: float) -> bool:
        return bool(select.select([self._connection], [], [], timeout_s)[0])

    def _receive(self) -> Command:
        command = self._channel.receive(wait=True)
        assert command is not None
        return command

    def _handle(self, command: Command, training: bool = True) -> None:
        if isinstance(command, Begin):
            if training:
                self._begin(command)
        elif isinstance(command, Close):
            self._closing = self._closing or (self._begun is not None and self._begun.epoch == command.epoch)
        elif isinstance(command, Abort):
            self._begun = None
        elif isinstance(command, Evaluate):
            self._evaluating = command.epoch
        elif isinstance(command, Save):
            self._channel.send(Saved(command.epoch, self.save(command.epoch)))
        elif isinstance(command, Initialise):
            self._trained.read(map_vector(self._fds["initial"], self._trained.layout.n, writable=True))
            self._channel.send(Initialised())
        elif isinstance(command, Attach):
            self._attach(command)
        elif isinstance(command, Stop):
            raise ChannelClosed

    def _attach(self, command: Attach) -> None:
        self._base = map_vector(self._fds["params"], command.n, writable=False)
        size, fd = self._payloads.size, self._fds["contribution"]
        self._outs = [map_slot(fd, size, slot, writable=True) for slot in range(SLOTS)]

    def _begin(self, command: Begin) -> None:
        self._encoder.settle(command.counted)
        self._trained.load(self._base)
        self._trained.forget_gradients()
        if command.afresh and self._loop.optimizer is not None:  # its moments are of states that are undone
            self._loop.optimizer.state.clear()
            self._state_path.unlink(missing_ok=True)
        self._begun, self.epoch, self.inner_step = command, command.epoch, 0
        self._begins += 1
        self._batches = command.batches or self._train.batches
        self._closing, self._losses, self._samples = False, [], 0
        self._began_s, self._reported_s = time.monotonic(), 0.0
        if self._evaluating == command.epoch:
            self._measure(command.epoch)

    def _measure(self, epoch: int) -> None:
        self._evaluating = None
        if self._loop.evaluate is None:
            return
        with self._trained.modes_kept():
            loss = float(self._loop.evaluate())
        if math.isfinite(loss):
            self._channel.send(Validation(epoch, loss, (EVALUATED,), (loss,)))
        else:
            self._channel.send(
                Notice(
                    f"the script's evaluate() gave {loss}; it is left out. Look at the script's data "
                    f"and at its loss"
                )
            )

    # --- what it is told -----------------------------------------------------------------------

    def _count(self, loss: float | None, samples: int) -> None:
        if loss is not None and not math.isfinite(loss):
            raise SwarmError(f"the loss of epoch {self.epoch} is {loss}: nothing of it is contributed")
        if not self._train.inner_steps:
            self._trained.add_gradients()
        self.inner_step += 1
        self._samples += samples
        if loss is not None:
            self._losses.append(loss)

    def _report_progress(self) -> None:
        now_s = time.monotonic()
        if now_s - self._reported_s < PROGRESS_INTERVAL_S and self.inner_step < self._batches:
            return
        self._reported_s = now_s
        begun = self._begun
        assert begun is not None
        self._channel.send(
            Progress(
                epoch=begun.epoch,
                generation=begun.generation,
                step=self.inner_step,
                steps=self._batches,
                loss=self._losses[-1] if self._losses else None,
                tokens=self._samples,
                tokens_per_second=self._samples / max(now_s - self._began_s, 1e-9),
            )
        )

    def _contribute(self) -> None:
        self._trained.require_unchanged()
        begun, self._begun = self._begun, None
        assert begun is not None
        trained = self._trained
        write = (
            trained.difference(self._base)
            if self._train.inner_steps
            else trained.mean_gradient(self.inner_step)
        )
        try:
            norm = self._encoder.encode(write, self._outs[begun.slot], begun.generation)
        except RefusedVector as refused:
            if refused.reason != "not_finite":
                raise  # our bug
            raise SwarmError(
                f"what epoch {begun.epoch} made of the module is not finite: nothing of it is contributed",
                "a smaller learning rate, or clipped gradients",
            ) from refused
        if not norm:
            what = f"what the script made of epoch {begun.epoch} is 0, and counts as a contribution"
            self._channel.send(Notice(f"{what}; look at its learning rate and at what requires a gradient"))
        self._channel.send(
            Contribution(
                epoch=begun.epoch,
                generation=begun.generation,
                weight=self._samples,
                norm=norm,
                loss=math.fsum(self._losses) / len(self._losses) if self._losses else None,
                tokens=self._samples,
                steps=self.inner_step,
                waited_s=self._waited_s,
            )
        )
        self._waited_s = 0.0
