"""The node's side of the trainer: start the worker, talk to it, start it again when it dies.

The node owns the shared buffers, so they outlive a worker; a new one is handed the same parameters and
the `begin` that was going on. Every `begin` has a number of its own, its generation, and what a worker says
of another is dropped: an epoch may begin twice, on two sides of a fork. A worker that breaks the message
format, or is silent for too long while it has something to do, is killed and restarted like one that died,
with back-off.

What the caller must hold to: write `params` only between a `begin` that is over and the next, or when the
contribution of the current `begin` is no longer wanted; take `contribution` before the next `begin`, and copy
it if `must_copy`, or `reject` it. What was taken stays as it is, for each `begin` has the worker write where
nobody reads (shared.py). With overlap as well: a worker that goes on after its contribution touches no buffer
before the next `begin`.

The worker may also be a guest, which the node did not start and never kills: guest.py. Then nothing is
started again; if another can come it is waited for.

A worker takes seconds to import what it needs. `launch` starts one before it is known what it shall train,
and `configure` says it: so a node does its own imports at the same time. That is why this module must not
import torch, nor transformers; nothing here blocks the loop.

Works under asyncio and uvloop.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol

from tapestry.compression.refusals import RefusedLayout
from tapestry.node.disk.scratch import create_scratch, reserve
from tapestry.node.errors import UserError
from tapestry.node.protocol.settings import Settings
from tapestry.node.spec.tables import plain
from tapestry.node.spec.training import UNCHANGED, Changed, TrainingSpec, WorkerSettings
from tapestry.node.trainer.aside import Aside
from tapestry.node.trainer.child import Children
from tapestry.node.trainer.messages import (
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
    MessageError,
    Notice,
    Progress,
    Report,
    Save,
    Saved,
    Stop,
    Tokenizing,
    Validation,
)
from tapestry.node.trainer.shared import (
    BUFFERS,
    SLOTS,
    Slots,
    create_buffer,
    map_vector,
    size_buffer,
    slot_stride,
    vector_size,
)

if TYPE_CHECKING:
    from torch import Tensor

    from tapestry.compression.shards import Layout

# -P: the folder we were started in must not be on sys.path; it may be this repository.
WORKER_COMMAND = (sys.executable, "-P", "-m", "tapestry.node.trainer.worker")
UNKNOWN_GENERATION = -1  # of a contribution that is not the latest
SCRATCH = ("params", "initial")  # the buffers that lie in files, if there is a folder for them
FORBIDDEN_LOOK_S = 1.0  # between two looks whether the data may be read again
GUEST_LEFT = -1000  # in place of an exit status, which a guest does not leave


NO_SETTINGS: Final[Settings] = MappingProxyType({})


class TrainerError(RuntimeError):
    """The trainer could not be started; `reason` as in messages.Failed, or died or timeout."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ProcessLimits:
    """How long to wait, and how patiently to start again."""

    hello_timeout_s: float = 900.0  # from `configure`: imports, and from one sign of tokenizing to the next
    silence_timeout_s: float | None = 300.0  # longer than any single micro-batch; None: it may be silent
    save_timeout_s: float = (
        3600.0  # in place of either, until an inner optimizer is written or read. Guess: 56 GB at 16 MB/s
    )
    backoff_initial_s: float = 1.0
    backoff_max_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Died:
    """The worker is gone and will be started again."""

    exit_code: int  # negative: minus the signal's number
    will_restart_in_s: float
    output: tuple[str, ...]  # its last lines


@dataclass(frozen=True, slots=True)
class Parted:
    """A guest has gone; another is waited for, if one can come."""


Event = Hello | Tokenizing | Progress | Contribution | Validation | Saved | Notice | Failed | Died | Parted


class Hired(Protocol):
    """A worker, and the socket to it: child.Worker, or guest.Guest."""

    guest: bool  # whether its process is somebody else's
    attached: bool  # it has said hello
    deadline: asyncio.Timeout | None

    @property
    def pid(self) -> int: ...

    async def receive(self) -> Report:
        """Raises MessageError; IncompleteReadError or ConnectionError when the worker has hung up."""
        ...

    def send(self, command: Command) -> None: ...

    async def collect_output(self) -> tuple[str, ...]:
        """Its last lines of output, at its end."""
        ...

    async def end(self) -> int:
        """The exit status, once it has hung up."""
        ...

    def kill(self) -> None:
        """End the conversation, and the process if it is ours."""
        ...

    async def close(self) -> None: ...


class Hire(Protocol):
    """Where workers come from: children of ours, or guest.Line and guest.Door."""

    again: bool  # after one has gone, and before any has said hello, there can be another

    def __call__(self, fds: dict[str, int]) -> Awaitable[Hired]:
        """A worker that has the shared buffers. Raises OSError."""
        ...


class TrainerProcess:
    """A running trainer. Make one with `start`, or `launch` and `configure`; `stop` it in a finally."""

    @classmethod
    async def start(
        cls,
        settings: WorkerSettings,
        on_event: Callable[[Event], None],
        limits: ProcessLimits | None = None,
        command: Sequence[str] = WORKER_COMMAND,
        folder: Path | None = None,
    ) -> TrainerProcess:
        """Returns when the first worker has said hello. Raises TrainerError if it never does."""
        trainer = await cls.launch(settings.threads, limits, command, folder)
        try:
            await trainer.configure(settings, on_event)
            return trainer
        except BaseException:
            await trainer.stop(timeout_s=0)
            raise

    @classmethod
    async def launch(
        cls,
        threads: int,
        limits: ProcessLimits | None = None,
        command: Sequence[str] = WORKER_COMMAND,
        folder: Path | None = None,
    ) -> TrainerProcess:
        """Returns when a first worker runs; it waits for `configure`. Its fate is told there.

        The parameters lie in a file without a name in `folder`; without one, in memory. Raises UserError.
        """
        trainer = cls(Children(command, threads), limits or ProcessLimits(), folder)
        spawned = asyncio.create_task(trainer._spawned.wait())
        await asyncio.wait({trainer._supervisor, spawned}, return_when=asyncio.FIRST_COMPLETED)
        spawned.cancel()
        return trainer

    @classmethod
    def await_guests(cls, hire: Hire, folder: Path | None = None) -> TrainerProcess:
        """The same for guests. Returns at once; `configure` waits until one has come and said hello."""
        return cls(hire, ProcessLimits(silence_timeout_s=None), folder)

    def __init__(self, hire: Hire, limits: ProcessLimits, folder: Path | None) -> None:
        """Only for `launch` and `await_guests`."""
        self.layout: Layout
        self.params: Tensor  # f32 (n,), shared: written here, read by the worker
        self.restarts = 0
        self.protocol_errors = 0
        self.stale_reports = 0
        self._settings: WorkerSettings | None = None
        self.on_event: Callable[[Event], None] = lambda event: None  # a guest may go before `configure`
        self._hire = hire
        self._limits = limits
        self._folder = folder
        self._fds: dict[str, int] = {}
        for name in BUFFERS:
            if folder is not None and name in SCRATCH:
                self._fds[name] = create_scratch(folder)
            else:
                self._fds[name] = create_buffer(f"tapestry-{name}")
        self._slots: Slots
        self._begun: int | None = None
        self._generation = 0
        self._changed = UNCHANGED  # of the latest begin
        self._base = ""  # head of the state that was begun from
        self._contributed: tuple[int, str] | None = None  # epoch and base; the worker may be ahead of it
        self._counted = 0  # generation; to be told with the next begin
        self._afresh = False  # to be told with each begin until something has come of one
        self._closing = False
        self._evaluating: int | None = None
        self._saves = 0  # that the worker was told, and has not done
        self.aside = Aside()
        self._measures = False  # the worker has data held out, and takes a step aside
        self._initialising: asyncio.Future[None] | None = None
        self._worker: Hired | None = None
        self._spawned = asyncio.Event()  # a first worker runs
        self._failure: Failed | None = None
        self.forbidden: Callable[[], str] = lambda: ""  # why no worker may read the data now; "": one may
        self._backoff_s = limits.backoff_initial_s
        self._stopping = asyncio.Event()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name="trainer supervisor")

    async def configure(self, settings: WorkerSettings, on_event: Callable[[Event], None]) -> None:
        """Once, after `launch`. Returns when a worker has said hello, and layout and buffers are there.

        Raises TrainerError if it never does.
        """
        self._settings, self.on_event = settings, on_event
        if self._worker is not None:
            self._worker.send(Configure(plain(settings)))
            self._wait_on(self._worker)
        await asyncio.wait({self._supervisor, self._ready}, return_when=asyncio.FIRST_COMPLETED)
        if self._supervisor.done():
            await self._supervisor  # raises what ended it

    @property
    def training(self) -> TrainingSpec:
        """The run's; after `configure`."""
        assert self._settings is not None
        return self._settings.training

    def begin(self, epoch: int, base: str = "", before: str = "", settings: Settings = NO_SETTINGS) -> None:
        """Train `epoch` from `params`; ends with a Contribution event. Supersedes an earlier begin.

        `base` is the head of the state that lies in `params`, `before` that of the one before it. With
        overlap the steps since the last contribution are kept if that was made from `before`. `settings` are
        what records have changed of the spec.
        """
        follows = before != "" and self._contributed == (epoch - 1, before)
        self._begun, self._base, self._contributed, self._closing = epoch, base, None, False
        self._generation += 1
        self._changed = Changed.of(self.training.train, settings)
        counted, self._counted = self._counted, 0
        slot = self._next_slot()
        if slot is not None:
            self._send(self._begin_command(epoch, follows, counted, slot))

    def _begin_command(self, epoch: int, follows: bool, counted: int, slot: int) -> Begin:
        changed = self._changed
        return Begin(
            epoch,
            self._generation,
            follows,
            counted,
            slot,
            changed.lr,
            changed.batches,
            changed.batch_size,
            self._afresh,
        )

    def settle(self, generation: int) -> None:
        """The contribution of this begin has been committed: its residual counts from the next begin on.

        UNKNOWN_GENERATION if another than the latest contribution was: then there is no residual.
        """
        self._counted = generation

    def forget(self) -> None:
        """What was learnt is undone: the next begin is without residual, and with a new inner optimizer."""
        self._counted, self._afresh = UNKNOWN_GENERATION, True

    def close_round(self, epoch: int) -> None:
        """Have the worker contribute what it has, after at least one inner step."""
        if epoch == self._begun:
            self._closing = True
            self._send(Close(epoch))

    def go_on(self, epoch: int) -> None:
        """The exchange of `epoch` has begun. With overlap, have a worker that has contributed to it go on."""
        assert self._settings is not None
        if self._settings.training.train.overlap and self._contributed == (epoch, self._base):
            self._send(GoOn(epoch))

    def abort(self) -> None:
        """Drop the epoch that is going on, and what came after a contribution; nothing will come of it."""
        self._begun = self._contributed = None
        self._generation += 1
        self._send(Abort())

    def evaluate(self, epoch: int) -> None:
        """Ask for the validation loss of `params`; comes as a Validation event named `epoch`."""
        self._evaluating = epoch
        self._send(Evaluate(epoch))

    @property
    def can_judge(self) -> bool:
        """Whether a worker is here that can measure a step."""
        return self._worker is not None and self._worker.attached and self._measures

    def room_aside(self) -> Tensor:  # f32 (n,)
        """Where to write the parameters of a step, for `judge`; hold `aside.lock`. Raises UserError."""
        if self.aside.room is None:
            self._size(self._fds["initial"], vector_size(self.layout.n))
            self.aside.room = map_vector(self._fds["initial"], self.layout.n, writable=True)
        return self.aside.room

    async def judge(self, base: str, head: str) -> tuple[float, float] | None:
        """The held-out losses of `params`, state `base`, and of what lies aside, state `head`; None if the
        worker goes without an answer. Hold `aside.lock`."""
        if not self.can_judge:
            return None
        answer = asyncio.ensure_future(self.aside.answer(head))
        await asyncio.sleep(0)  # it waits now
        self._send(Judge(base, head))
        return await answer

    def reject(self, why: str) -> None:
        """The latest contribution is of no use: its worker has gone wrong, and another takes its place."""
        if self._worker is not None:
            self._end_broken(self._worker, f"a contribution that is none: {why}")

    def save(self, epoch: int) -> None:
        """Write the inner optimizer as of the beginning of `epoch`; comes as a Saved event."""
        if self._worker is not None and self._worker.attached:
            self._saves += 1
        self._send(Save(epoch))

    async def initialise(self) -> None:
        """For a founder, before it begins: the run's random initial state, into `params`.

        It comes through a buffer of its own, for the worker cannot write to `params`; that has room only
        meanwhile. Raises TrainerError.
        """
        self._initialising = asyncio.get_running_loop().create_future()
        n = self.layout.n
        try:
            self._size(self._fds["initial"], vector_size(n))
            self._send(Initialise())
            async with asyncio.timeout(self._limits.hello_timeout_s):
                await self._initialising
            self.params.copy_(map_vector(self._fds["initial"], n, writable=False))
        except TimeoutError:
            raise TrainerError("timeout", "the trainer did not initialise the model in time") from None
        finally:
            if "initial" in self._fds:  # else `stop` has closed it, and its number may be another file's
                size_buffer(self._fds["initial"], 0)
            self._initialising = None

    async def closed(self) -> None:
        """Wait for the end of supervision: returns after `stop`, raises if it broke."""
        await asyncio.shield(self._supervisor)

    def end(self) -> None:
        """Have the worker end when it has done what was sent before; `stop` waits for that."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._send(Stop())

    async def stop(self, timeout_s: float) -> None:
        """End the worker: kindly, and after `timeout_s` with SIGKILL. Commands sent before are done first.

        Raises what broke the supervision, if anything did: an `on_event` that raises is our bug.
        """
        self.end()
        try:
            await asyncio.wait({self._supervisor}, timeout=timeout_s)
        finally:
            if self._worker is not None:
                self._worker.kill()
            while self._fds:
                os.close(self._fds.popitem()[1])
        await asyncio.wait({self._supervisor})
        error = self._supervisor.exception()
        if error is not None and not isinstance(error, TrainerError):  # `start` has raised that one
            raise error

    @property
    def contribution(self) -> Tensor:  # uint8 (size,), PayloadLayout
        """The latest one, shared with the worker that wrote it; to be read only. It stays while held."""
        return self._slots.view()

    @property
    def must_copy(self) -> bool:
        """Whether the latest contribution has to be copied and let go: the next has no other place."""
        return self._slots.last

    @property
    def pid(self) -> int | None:
        """The worker's process id; None while there is none."""
        return self._worker.pid if self._worker is not None else None

    async def _supervise(self) -> None:
        while True:
            exit_code, output = await self._run_worker()
            self._fail_initialising(exit_code)
            if self._stopping.is_set():
                return
            if exit_code == GUEST_LEFT and (self._ready.done() or self._hire.again or self._failure is None):
                self.on_event(Parted())
                continue
            if not self._ready.done():
                raise _start_error(self._failure, exit_code, output)
            pause_s = self._backoff_s
            self._backoff_s = min(2 * pause_s, self._limits.backoff_max_s)
            self.restarts += 1
            self.on_event(Died(exit_code, pause_s, output))
            await _wait_for(self._stopping, pause_s)
            while self.forbidden() and not self._stopping.is_set():
                await _wait_for(self._stopping, FORBIDDEN_LOOK_S)
            if self._stopping.is_set():
                return

    async def _run_worker(self) -> tuple[int, tuple[str, ...]]:
        """One worker from its start to its end: exit status, last lines of output."""
        self._failure = None
        try:
            worker = await self._hired()
        except ConnectionError:  # of a guest: it has gone before it was greeted
            return GUEST_LEFT, ()
        except OSError as error:  # out of memory, or the interpreter is being upgraded: it may pass
            if not self._ready.done() and not self._hire.again:
                raise
            return os.EX_OSERR, (f"the trainer cannot be started: {error}",)
        if worker is None:
            return 0, ()
        self._worker = worker
        self._spawned.set()
        try:
            async with asyncio.TaskGroup() as tasks:
                collector = tasks.create_task(worker.collect_output())
                if self._settings is not None:
                    worker.send(Configure(plain(self._settings)))
                if self._stopping.is_set():
                    worker.kill()
                await self._converse(worker)
                exit_code = await worker.end()
                output = await collector
            return (GUEST_LEFT if worker.guest else exit_code), output
        finally:
            await worker.close()
            self._worker, self._saves = None, 0
            self.aside.gone()

    async def _hired(self) -> Hired | None:
        """The next worker; None if we are told to stop before there is one. Raises OSError."""
        hiring = asyncio.ensure_future(self._hire(self._fds))
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({hiring, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return hiring.result() if hiring.done() else None
        finally:
            stopping.cancel()
            if not hiring.done():
                hiring.cancel()
                await asyncio.wait({hiring})

    async def _converse(self, worker: Hired) -> None:
        """Until the worker hangs up, breaks the format, or is silent for too long."""
        try:
            async with asyncio.timeout(None) as deadline:
                worker.deadline = deadline
                if self._settings is not None:  # else it has nothing to say, however long the node waits
                    self._wait_on(worker)
                while True:
                    self._handle(worker, await worker.receive())
                    self._watch_silence(worker)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except TimeoutError:
            self._failure = Failed("timeout", self._silent(worker))
        except (MessageError, RefusedLayout) as error:
            self._end_broken(worker, str(error))
            return
        except UserError as error:  # no room for the parameters, once it is known how many they are
            self._failure = Failed("room", f"{error}; {error.hint}")
        finally:
            worker.deadline = None
        worker.kill()
        self.on_event(self._failure)

    def _silent(self, worker: Hired) -> str:
        if not worker.attached or self._saves:
            return "the trainer was silent for too long"
        limit_s = self._limits.silence_timeout_s
        return f"the trainer was silent for {limit_s:g} s, which a micro-batch must not take"

    def _end_broken(self, worker: Hired, why: str) -> None:
        """It sent what it must not, and is trusted no more."""
        self.protocol_errors += 1
        self._failure = Failed("protocol", f"the trainer sent what it must not: {why}")
        worker.kill()
        self.on_event(self._failure)

    def _handle(self, worker: Hired, report: Report) -> None:
        if isinstance(report, Hello):
            self._handle_hello(worker, report)
        elif isinstance(report, Tokenizing) and not worker.attached:
            self._wait_on(worker)
            self.on_event(report)
        elif not worker.attached and not isinstance(report, Failed):
            raise MessageError(f"{type(report).__name__} before Hello")
        elif isinstance(report, Initialised):
            if self._initialising is not None and not self._initialising.done():
                self._initialising.set_result(None)
        elif isinstance(report, Judged):
            self.aside.answered(report)
        elif isinstance(report, Alive):
            return  # that it came is all it says
        elif isinstance(report, Progress | Contribution) and self._is_stale(report):
            self.stale_reports += 1
        else:
            self._settle(report)
            self.on_event(report)

    def _wait_on(self, worker: Hired) -> None:
        """For its hello, from now on: one that gets on with the data may take as long as they need."""
        if worker.deadline is not None:
            limit_s = self._limits.hello_timeout_s
            if self._settings is not None and Path(self._settings.inner_state_path).exists():
                limit_s = max(limit_s, self._limits.save_timeout_s)  # it is read again before the hello
            worker.deadline.reschedule(asyncio.get_running_loop().time() + limit_s)

    def _is_stale(self, report: Progress | Contribution) -> bool:
        """Of another begin; a Progress may be of the epoch after the one that was contributed to."""
        if report.generation != self._generation:
            return True
        return isinstance(report, Contribution) and report.epoch != self._begun

    def _handle_hello(self, worker: Hired, hello: Hello) -> None:
        """Size the buffers at the first hello; a later one must name the same model."""
        from tapestry.compression.shards import Layout

        if worker.attached or len(hello.names) != len(hello.shapes):
            raise MessageError("a second Hello, or one with names and shapes of different length")
        layout = Layout.from_named(zip(hello.names, hello.shapes, strict=True))
        if not self._ready.done():
            self._map_buffers(layout)
            self._ready.set_result(None)
        elif layout != self.layout:
            raise MessageError("the model has changed since the first Hello")
        worker.attached = True
        assert self._settings is not None  # the worker has said hello because of them
        self._measures = self._settings.gate_windows > 0 and hello.validation_tokens > 0 and not worker.guest
        worker.send(Attach(layout.n))
        self.on_event(hello)
        self._resume(worker)

    def _map_buffers(self, layout: Layout) -> None:
        from tapestry.compression.codecs import get_codec
        from tapestry.compression.payloads import PayloadLayout

        assert self._settings is not None  # the worker has said hello because of them
        codec = get_codec(self._settings.codec)
        payloads = PayloadLayout.of(codec, layout.n, self._settings.shard_elements)
        self._size(self._fds["params"], vector_size(layout.n))
        self.layout = layout
        self.params = map_vector(self._fds["params"], layout.n, writable=True)
        self._map_slots(payloads.size)

    def _map_slots(self, size: int) -> None:
        size_buffer(self._fds["contribution"], SLOTS * slot_stride(size))
        self._slots, self._payload_bytes = Slots(self._fds["contribution"], size), size

    def _size(self, fd: int, size: int) -> None:
        """Raises UserError."""
        if self._folder is not None:
            reserve(fd, size, self._folder)
        else:
            size_buffer(fd, size)

    def _next_slot(self) -> int | None:
        """Where the worker shall write. None: nowhere; then it is killed, and the next gets a new buffer.

        That happens only if whoever was told `must_copy` still holds the original. What a peer is being sent
        must not change.
        """
        slot = self._slots.next()
        if slot is None:
            gc.collect()
            slot = self._slots.next()
        if slot is None:
            os.close(self._fds["contribution"])
            self._fds["contribution"] = create_buffer("tapestry-contribution")
            self._map_slots(self._payload_bytes)
            if self._worker is not None:
                self._worker.kill()
        return slot

    def _resume(self, worker: Hired) -> None:
        """Tell a worker that has just come up what is still wanted."""
        if self._evaluating is not None:
            worker.send(Evaluate(self._evaluating))
        if self._begun is not None:
            # It has no residual that could be counted.
            worker.send(self._begin_command(self._begun, False, 0, self._slots.current))
            if self._closing:
                worker.send(Close(self._begun))

    def _settle(self, report: Report) -> None:
        if isinstance(report, Contribution):
            self._begun, self._contributed = None, (report.epoch, self._base)
            self._afresh = False
            self._backoff_s = self._limits.backoff_initial_s
        elif isinstance(report, Validation) and report.epoch == self._evaluating:
            self._evaluating = None
        elif isinstance(report, Saved):
            self._saves = max(0, self._saves - 1)
        elif isinstance(report, Failed):
            self._failure = report

    def _send(self, command: Command) -> None:
        """To the worker if one is up; else `_resume` will tell it, or it no longer matters."""
        worker = self._worker
        if worker is not None and (worker.attached or isinstance(command, Stop)):
            worker.send(command)
            self._watch_silence(worker)

    def _watch_silence(self, worker: Hired) -> None:
        """Only a worker that has something to do owes us a sign of life."""
        if worker.deadline is None or not worker.attached:
            return
        busy = (
            self._begun is not None
            or self._evaluating is not None
            or self._initialising is not None
            or self.aside.waiting
        )
        silence_s = self._limits.silence_timeout_s
        if silence_s is not None and self._saves:
            silence_s = max(silence_s, self._limits.save_timeout_s)
        now_s = asyncio.get_running_loop().time()
        worker.deadline.reschedule(now_s + silence_s if busy and silence_s is not None else None)

    def _fail_initialising(self, exit_code: int) -> None:
        if self._initialising is not None and not self._initialising.done():
            failure = self._failure or Failed(
                "died", f"the trainer died while initialising, exit status {exit_code}"
            )
            self._initialising.set_exception(TrainerError(failure.reason, failure.text))


def _start_error(failure: Failed | None, exit_code: int, output: tuple[str, ...]) -> TrainerError:
    if failure is not None:
        return TrainerError(failure.reason, failure.text)
    last = f": {output[-1]}" if output else ""
    return TrainerError("died", f"the trainer ended with status {exit_code} before it was ready{last}")


async def _wait_for(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
