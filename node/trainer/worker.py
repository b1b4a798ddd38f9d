"""The trainer worker: a child process that turns commands into encoded contributions.

`python -P -m tapestry.node.trainer.worker` is started by process.py with inherited descriptors: a
socket for messages, and the shared buffers. It does one thing at a time: it looks for commands between
two inner steps, so a `Close` or a newer `Begin` takes effect within one step; a `Stop` also between two
micro-batches, and after those `Save`s that came before it. With `overlap` it goes on with
the next epoch's steps once all have contributed, and when it has done them all it waits for their base.

It may die at any moment, and it never outlives its node: the kernel kills it when its parent is gone
(PR_SET_PDEATHSIG), and a closed socket ends it too. SIGINT is the node's to handle.

torch and transformers are imported only after that has been arranged: they take seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tapestry.node.spec.tables import TableError, read_table
from tapestry.node.spec.training import Changed, WorkerSettings
from tapestry.node.trainer import group, imports
from tapestry.node.trainer.messages import (
    HEADER,
    TEXT_CHARS_MAX,
    Abort,
    Alive,
    Attach,
    Begin,
    Close,
    Command,
    Configure,
    Contribution,
    Evaluate,
    Failed,
    GoOn,
    Hello,
    Initialise,
    Initialised,
    Judge,
    Judged,
    Notice,
    Progress,
    Report,
    Save,
    Saved,
    Stop,
    Validation,
    body_length,
    pack,
    unpack_command,
)
from tapestry.node.trainer.opening import (
    ChannelClosed,
    WorkerFailure,
    model_refused,
    open_training_corpus,
    sendable,
    weights_folder,
)
from tapestry.node.trainer.shared import BUFFERS, SLOTS, lock_for_gpu, map_slot, map_vector

if TYPE_CHECKING:
    import torch

    from tapestry.node.trainer.inner import InnerLoop


PR_SET_PDEATHSIG = 1  # linux/prctl.h
NICENESS = 10  # the node's loop answers its peers first; guess
AUTOGROUP = Path("/proc/self/autogroup")
PROGRESS_INTERVAL_S = 0.2
HEED_STOP_S = 1.0  # Guess: of the seconds that a node has to stop, one at most goes by unheard
ALIVE_S = 10.0  # far below ProcessLimits.silence_timeout_s
SUMMARY_LINES_MAX = 400  # Guess: 256 sources, and what is doubtful of the first
EXIT_FAILED = 3


def main() -> int:
    """Serve commands until told to stop; the exit status."""
    arguments = _parse_arguments()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent(arguments.parent)
    leads = not arguments.rank
    channel = Channel(socket.socket(fileno=arguments.channel)) if leads else group.FollowingChannel()
    try:
        _serve(channel, {name: getattr(arguments, name) for name in BUFFERS}, arguments.rank, arguments.store)
    except ChannelClosed:
        return 0
    except WorkerFailure as failure:
        sys.stderr.write(f"{failure}\n")
        channel.send_last(Failed(failure.reason, str(failure)[:TEXT_CHARS_MAX]))
        return EXIT_FAILED
    except Exception as error:
        traceback.print_exc()
        channel.send_last(Failed("crashed", f"{type(error).__name__}: {error}"[:TEXT_CHARS_MAX]))
        return 1
    return 0


class Channel:
    """Frames on a blocking socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def send(self, report: Report) -> None:
        """Raises ChannelClosed."""
        try:
            self._socket.sendall(pack(report))
        except OSError as error:
            raise ChannelClosed from error

    def send_last(self, report: Report) -> None:
        """As `send`, when it no longer matters whether anyone listens."""
        try:
            self.send(report)
        except ChannelClosed:
            return

    def receive(self, wait: bool) -> Command | None:
        """The next command; None if there is none and we shall not wait. Raises ChannelClosed."""
        if not wait and not select.select([self._socket], [], [], 0)[0]:
            return None
        return unpack_command(self._read(body_length(self._read(HEADER.size))))

    def _read(self, size: int) -> bytes:
        pieces = bytearray()
        while len(pieces) < size:
            try:
                piece = self._socket.recv(size - len(pieces))
            except OSError as error:
                raise ChannelClosed from error
            if not piece:
                raise ChannelClosed
            pieces += piece
        return bytes(pieces)


class Worker:
    """What is going on, and what each command does to it."""

    def __init__(
        self, settings: WorkerSettings, channel: group.Channel, together: group.Group | None = None
    ) -> None:
        from tapestry.compression.codecs import get_codec
        from tapestry.compression.payloads import PayloadLayout
        from tapestry.compression.refusals import Refused
        from tapestry.node.trainer import encoder, inner
        from tapestry.node.trainer.data.feed import Feed
        from tapestry.node.trainer.models import registry
        from tapestry.node.trainer.trial import Trial

        self._settings = settings
        self._channel = channel
        self._together = together
        self.device = _device(settings.device) if together is None else together.device
        self._inner_state = Path(settings.inner_state_path)
        if together is not None and together.rank:
            self._inner_state = self._inner_state.with_suffix(f".{together.rank}{self._inner_state.suffix}")
        training = settings.training
        corpus = open_training_corpus(settings, channel if together is None else None)
        cursor = Path(settings.cursor_path)
        if together is not None:
            cursor = together.own_copy(cursor)
        self._batch_size = training.train.batch_size  # by the latest Begin
        self._feed = Feed(corpus, self._batch_size, cursor)
        if together is not None:
            require_equal_data(together, self._feed.key)
        self._validation = corpus.validation(settings.validation_windows)
        self._trial = Trial(
            corpus.validation(settings.gate_windows) if settings.gate_windows else {},
            lambda params, batches: self._inner.losses(params, batches),
        )
        with model_refused():
            net = registry.build(training.model, Path(settings.base_dir), training.data.sequence_length)
        if self.device.type == "cpu":
            net.float()  # a frozen base may be stored in bf16, which most CPUs multiply many times slower
        self.layout = registry.layout_of(net)
        try:
            codec = get_codec(settings.codec)
            self.payloads = PayloadLayout.of(codec, self.layout.n, settings.shard_elements)
        except Refused as refused:
            raise WorkerFailure("settings", str(refused)) from refused
        self._encoder = encoder.Encoder(self.payloads, self.device, settings.residual, together)
        with _named_failures():
            self._inner = inner.InnerLoop(
                net,
                self.layout,
                training.train,
                self._feed.draw,
                self.device,
                settings.local,
                lambda text: channel.send(Notice(text[:TEXT_CHARS_MAX])),
                together,
            )
        self._inner.tell_of_parts(self._between_parts)
        self._told_s = self._asked_s = time.monotonic()  # last sign of life; last look for commands
        self._early: deque[Command] = deque()  # came in the middle of a step or an evaluation
        self._closing = False
        self._generation = self._slot = 0  # of the latest Begin
        self._began_s = self._reported_s = 0.0  # an epoch's first step; the last Progress
        self._waited_s = 0.0  # since the last contribution
        inner_epoch, note = load_inner_state(self._inner, self._inner_state, together)
        channel.send(
            Hello(
                names=self.layout.names,
                shapes=self.layout.shapes,
                train_tokens=corpus.train_tokens,
                validation_tokens=corpus.validation_tokens,
                device=_described(self.device),
                inner_epoch=inner_epoch,
                note=note[:TEXT_CHARS_MAX],
                sets=tuple(self._validation),
                summary=tuple(sendable(line)[:1000] for line in corpus.summary[:SUMMARY_LINES_MAX]),
            )
        )

    def run(
        self,
        base: torch.Tensor,  # f32 (n,), shared with the node, which writes it
        outs: Sequence[torch.Tensor],  # uint8 (payloads.size,), of each slot; the node reads them
        initial: Callable[[], torch.Tensor],  # f32 (n,), shared with the node for `Initialise`
        before_first: Callable[[], None] = lambda: None,  # before the first epoch begins
    ) -> None:
        """Until Stop. Raises ChannelClosed and WorkerFailure."""
        self._base, self._outs, self._initial, self._before_first = base, outs, initial, before_first
        while True:
            command = self._next_command()
            if isinstance(command, Stop):
                return
            with _named_failures():
                if command is not None:
                    self._handle(command)
                else:
                    self._advance()

    def _next_command(self) -> Command | None:
        """Waits for one while there is no step to take."""
        self._asked_s = time.monotonic()
        if self._early:
            return self._early.popleft()
        if not self._inner.idle:
            return self._channel.receive(wait=False)
        since_s = time.monotonic()
        command = self._channel.receive(wait=True)
        if self._generation:  # to wait for the first base is no loss
            self._waited_s += time.monotonic() - since_s
        return command

    def _handle(self, command: Command) -> None:
        if isinstance(command, Begin):
            self._begin(command)
        elif isinstance(command, Close):
            self._closing = self._closing or command.epoch == self._inner.epoch
        elif isinstance(command, GoOn):
            self._go_on(command.epoch)
        elif isinstance(command, Abort):
            self._inner.abandon()
        elif isinstance(command, Evaluate):
            self._evaluate(command.epoch)
        elif isinstance(command, Judge):
            self._judge(command)
        elif isinstance(command, Save):
            self._save(command.epoch)
        elif isinstance(command, Initialise):
            self._initialise()
        else:
            raise WorkerFailure("crashed", f"{type(command).__name__} makes no sense now")

    def _begin(self, command: Begin) -> None:
        self._encoder.settle(command.counted)
        if not self._generation:
            self._before_first()
        if command.afresh:
            self._inner.forget()
            self._inner_state.unlink(missing_ok=True)
        brought = self._brought()
        base = self._base if brought is None else brought.add_(self._base)
        changed = Changed(command.lr, command.batches, command.batch_size)
        self._batch_size = changed.of_spec(self._settings.training.train).batch_size
        kept = self._inner.begin(command.epoch, base, command.follows and brought is None, changed)
        self._closing, self._generation, self._slot = False, command.generation, command.slot
        if not kept:
            self._feed.take(self._batch_size)
            self._start_clock()
        elif self._inner.done:
            self._report_progress(command.epoch)  # it has waited: that made it slower

    def _brought(self) -> torch.Tensor | None:  # f32 (n,), CPU
        """What this member learnt alone, as long as no contribution with it has counted."""
        from tapestry.node.trainer.brought import BroughtError, read_brought

        path = self._settings.brought_path
        try:
            return read_brought(Path(path), self.layout.n) if path else None
        except BroughtError as error:
            raise WorkerFailure("settings", str(error)) from error

    def _start_clock(self) -> None:
        self._began_s, self._reported_s = time.monotonic(), 0.0

    def _advance(self) -> None:
        """One inner step; the last one, or the first after a Close, is followed by the contribution."""
        from tapestry.node.trainer.inner import Diverged

        inner = self._inner
        epoch = inner.epoch
        assert epoch is not None
        try:
            if not (inner.done or (self._closing and inner.batches)):
                inner.step()
                self._report_progress(epoch)
            if (inner.done or self._closing) and not inner.ahead:
                self._contribute(epoch)
        except Diverged as error:
            # The saved inner state is part of what led here: the next worker starts with a fresh one.
            self._inner_state.unlink(missing_ok=True)
            raise WorkerFailure("diverged", str(error)) from error

    def _contribute(self, epoch: int) -> None:
        encode, out, generation = self._encoder.encode, self._outs[self._slot], self._generation
        outcome = self._inner.finish(self._base, lambda write: encode(write, out, generation))
        try:
            self._feed.finish(epoch, outcome.batches)
        except OSError as error:
            text = f"{self._settings.cursor_path} cannot be written: {error.strerror}"
            raise WorkerFailure("disk", text) from error
        self._channel.send(
            Contribution(
                epoch=epoch,
                generation=self._generation,
                weight=outcome.weight,
                norm=outcome.norm,
                loss=outcome.loss,
                tokens=outcome.weight,
                steps=outcome.batches,
                waited_s=self._waited_s,
                passes=self._feed.passes,
            )
        )
        self._waited_s = 0.0

    def _go_on(self, epoch: int) -> None:
        """Unless that epoch is over: then its base is there, and we are on it."""
        if self._inner.finished == epoch:
            self._closing = False
            self._feed.take(self._batch_size)
            self._inner.go_on()
            self._start_clock()

    def _report_progress(self, epoch: int) -> None:
        now_s = time.monotonic()
        if now_s - self._reported_s < PROGRESS_INTERVAL_S and not self._inner.done:
            return
        self._reported_s = now_s
        self._channel.send(
            Progress(
                epoch=epoch,
                generation=self._generation,
                step=self._inner.batches,
                steps=self._inner.batches_wanted,
                loss=self._inner.loss,
                tokens=self._inner.tokens,
                tokens_per_second=self._inner.tokens / max(now_s - self._began_s, 1e-9),
            )
        )

    def _evaluate(self, epoch: int) -> None:
        found = self._inner.losses(self._base, self._validation.values())
        losses = dict(zip(self._validation, found, strict=True))
        mean = sum(losses.values()) / len(losses)
        if not mean < float("inf"):
            raise WorkerFailure("diverged", f"epoch {epoch}: the validation loss is {mean}")
        self._channel.send(Validation(epoch, mean, tuple(losses), tuple(losses.values())))

    def _judge(self, command: Judge) -> None:
        before, after = self._trial.judge(command.base, self._base, command.head, self._initial())
        self._channel.send(Judged(command.head, before, after))

    def _between_parts(self) -> None:
        """In the middle of a long step or evaluation: the node must not take us for stuck, and may want us
        gone. Raises ChannelClosed."""
        now_s = time.monotonic()
        if now_s - self._told_s >= ALIVE_S:
            self._told_s = now_s
            self._channel.send(Alive())
        if self._together is None and now_s - self._asked_s >= HEED_STOP_S:
            self._asked_s = now_s
            self._heed_stop()

    def _heed_stop(self) -> None:
        """What else has come waits for the end of the step."""
        while (command := self._channel.receive(wait=False)) is not None:
            if isinstance(command, Stop):
                for early in self._early:
                    if isinstance(early, Save):
                        self._save(early.epoch)
                raise ChannelClosed
            self._early.append(command)

    def _save(self, epoch: int) -> None:
        error_text = ""
        try:
            self._inner.save(self._inner_state, epoch)
        except OSError as error:
            error_text = str(error)[:TEXT_CHARS_MAX]
        if self._together is not None and self._together.sum(float(bool(error_text))) and not error_text:
            error_text = "another process of this trainer could not save its part"
        self._channel.send(Saved(epoch, error_text))

    def _initialise(self) -> None:
        from tapestry.node.trainer.models import registry

        settings = self._settings
        training = settings.training
        with model_refused():
            registry.initial_state(
                training.model, weights_folder(settings), training.data.sequence_length, self._initial()
            )
        self._channel.send(Initialised())


def require_equal_data(together: group.Group, key: str) -> None:
    """Each rank opens the data by itself, and a file can grow meanwhile. All raise WorkerFailure."""
    if len(set(together.each(float(int(key[:12], 16))))) > 1:
        raise WorkerFailure("data", "the data have changed while the trainer's processes opened them")


def load_inner_state(inner: InnerLoop, path: Path, together: group.Group | None) -> tuple[int, str]:
    """The epoch of the inner optimizer's saved state, -1 if it is afresh, and why it is if there was one.

    Of several ranks all have parts of one state, or all begin afresh: a part can be of weeks ago, when there
    were as many ranks as now, or be missing, where a kill fell between two ranks' writes.
    """
    from tapestry.node.trainer.optimizers.state import InnerStateError

    why, epoch = "", None
    try:
        epoch = inner.load(path)
    except InnerStateError as error:
        why = str(error)
    place = (-1 if epoch is None else epoch), inner.steps
    if together is not None:
        places = [*zip(together.each(place[0]), together.each(place[1]), strict=True)]
        if len(set(places)) > 1:
            inner.forget()
            others = ", ".join(f"rank {rank}: {at:.0f}" for rank, (at, _) in enumerate(places))
            return (
                -1,
                f"the inner optimizer starts afresh: {why or f'its parts are of other epochs ({others})'}",
            )
    return place[0], why and f"the inner optimizer starts afresh: {why}"


def _serve(channel: group.Channel, fds: dict[str, int], rank: int, store: str) -> None:
    """A process of the trainer, from its imports to `Stop`; `rank` and `store` as in group.py."""
    imports.spare_torch()
    with imports.lasting():
        import torch

        from tapestry.node.trainer.models import llama as model

        model.import_architectures()  # while the node finds out what is to be trained
    first = channel.receive(wait=True)
    if not isinstance(first, Configure):
        raise WorkerFailure("crashed", "the first command is not Configure")
    try:
        settings = read_table(WorkerSettings, first.settings)
        settings.training.check()
    except TableError as error:
        raise WorkerFailure("settings", str(error)) from error
    devices = group.devices_of(settings.device)
    torch.set_num_threads(max(1, settings.threads // len(devices)))
    if len(devices) > 1 and not rank:
        open_training_corpus(settings, channel)  # tokenized once, before the others come
    together = group.meet(first, devices, fds, rank, store or f"{settings.inner_state_path}.meet")
    if together is not None:
        channel = group.LeadingChannel(channel, together) if not rank else group.FollowingChannel(together)
    worker = Worker(settings, channel, together)
    attach = channel.receive(wait=True)
    if isinstance(attach, Stop):
        return
    if not isinstance(attach, Attach) or attach.n != worker.layout.n:
        raise WorkerFailure("crashed", f"expected Attach of {worker.layout.n} elements, got {attach}")
    base = map_vector(fds["params"], attach.n, writable=False)
    size = worker.payloads.size
    outs = [map_slot(fds["contribution"], size, slot, writable=True) for slot in range(SLOTS)]
    if worker.device.type == "cuda":
        lock_for_gpu(base, writable=False)
        for out in outs:
            lock_for_gpu(out, writable=True)
    initial = fds["initial"]
    # Not nice before there is something to train: a node that begins, or comes back, is waited for.
    worker.run(base, outs, lambda: map_vector(initial, attach.n, writable=True), _let_others_first)


@contextlib.contextmanager
def _named_failures() -> Iterator[None]:
    """What the inner loop cannot do, as a WorkerFailure with its reason."""
    from tapestry.node.trainer.gradients import DocumentsLeak
    from tapestry.node.trainer.memory import is_out_of_memory
    from tapestry.node.trainer.optimizers.unavailable import OptimizerUnavailable

    try:
        yield
    except OptimizerUnavailable as error:
        raise WorkerFailure("device", str(error)) from error
    except DocumentsLeak as error:
        raise WorkerFailure("settings", str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise WorkerFailure("memory", str(error).splitlines()[0]) from error


def _device(wanted: str) -> torch.device:
    import torch

    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise WorkerFailure(
            "device", f"device is {wanted}, but torch finds none here: use --device cpu or auto"
        )
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def _described(device: torch.device) -> str:
    """For people: "cpu", or "cuda, " and what the card calls itself."""
    import torch

    return f"cuda, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="started by the Tapestry node, not by hand")
    for name in ("channel", *BUFFERS, "parent"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--rank", type=int, default=0, help="of a trainer of several processes: group.py")
    parser.add_argument("--store", default="", help="where they meet")
    return parser.parse_args()


def _let_others_first() -> None:
    """Take what processor time the nodes and the starting trainers of this machine leave.

    Where the kernel groups processes by session (sched(7), autogroup), niceness counts within one only, and a
    trainer has its own: there the session is made nice as well. Only if it is ours.
    """
    os.nice(NICENESS)
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):  # the kernel does not group; or it has just done so for another
            AUTOGROUP.write_text(f"{NICENESS}")


def _die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent dies; if that has happened already, go at once."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit(0)


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # torch's own teardown takes a second of a node's time to stop, and saves nothing
