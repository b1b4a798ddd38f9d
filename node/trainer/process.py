"""The node's side of the trainer: start the worker, talk to it, start it again when it dies.

A new worker is handed the same parameters (buffers.py) and the `begin` that was going on (orders.py); what a
worker says of another `begin` is dropped. A worker that breaks the message format, or is silent for too long
(silence.py), is killed and restarted like one that died, with back-off.

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
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol

from tapestry.compression.refusals import RefusedLayout
from tapestry.node.errors import UserError
from tapestry.node.protocol.settings import Settings
from tapestry.node.spec.tables import plain
from tapestry.node.spec.training import Changed, TrainingSpec, WorkerSettings
from tapestry.node.trainer.aside import Aside
from tapestry.node.trainer.buffers import Buffers
from tapestry.node.trainer.child import Children
from tapestry.node.trainer.messages import (
    Alive,
    Attach,
    Command,
    Configure,
    Contribution,
    Failed,
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
from tapestry.node.trainer.orders import Orders
from tapestry.node.trainer.silence import Silence

if TYPE_CHECKING:
    from torch import Tensor

    from tapestry.compression.shards import Layout

# -P: the folder we were started in must not be on sys.path; it may be this repository.
WORKER_COMMAND = (sys.executable, "-P", "-m", "tapestry.node.trainer.worker")
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
        self.restarts = 0
        self.protocol_errors = 0
        self.stale_reports = 0
        self._settings: WorkerSettings | None = None
        self.on_event: Callable[[Event], None] = lambda event: None  # a guest may go before `configure`
        self._hire = hire
        self._limits = limits
        self._buffers = Buffers(folder)
        self._orders = Orders()
        self._silence = Silence(limits.hello_timeout_s, limits.silence_timeout_s, limits.save_timeout_s)
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
            self._await_hello()
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
        changed = Changed.of(self.training.train, settings)
        here = self._buffers.choose_slot()
        command = self._orders.begin(epoch, base, before, changed, self._buffers.slot)
        if here:
            self._send(command)
        elif self._worker is not None:
            self._worker.kill()

    def settle(self, generation: int) -> None:
        """The contribution of this begin has been committed: its residual counts from the next begin on.

        UNKNOWN_GENERATION if another than the latest contribution was: then there is no residual.
        """
        self._orders.settle(generation)

    def forget(self) -> None:
        """What was learnt is undone: the next begin is without residual, and with a new inner optimizer."""
        self._orders.forget()

    def close_round(self, epoch: int) -> None:
        """Have the worker contribute what it has, after at least one inner step."""
        self._send(self._orders.close_round(epoch))

    def go_on(self, epoch: int) -> None:
        """The exchange of `epoch` has begun. With overlap, have a worker that has contributed to it go on."""
        if self.training.train.overlap:
            self._send(self._orders.go_on(epoch))

    def abort(self) -> None:
        """Drop the epoch that is going on, and what came after a contribution; nothing will come of it."""
        self._send(self._orders.abort())

    def evaluate(self, epoch: int) -> None:
        """Ask for the validation loss of `params`; comes as a Validation event named `epoch`."""
        self._send(self._orders.evaluate(epoch))

    @property
    def can_judge(self) -> bool:
        """Whether a worker is here that can measure a step."""
        return self._worker is not None and self._worker.attached and self._measures

    def room_aside(self) -> Tensor:  # f32 (n,)
        """Where to write the parameters of a step, for `judge`; hold `aside.lock`. Raises UserError."""
        return self._buffers.room_aside()

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
            self._silence.saves += 1
        self._send(Save(epoch))

    async def initialise(self) -> None:
        """For a founder, before it begins: the run's random initial state, into `params`.

        It comes through a buffer of its own, for the worker cannot write to `params`; that has room only
        meanwhile. Raises TrainerError.
        """
        self._initialising = asyncio.get_running_loop().create_future()
        try:
            with self._buffers.room_for_initial():
                self._send(Initialise())
                async with asyncio.timeout(self._limits.hello_timeout_s):
                    await self._initialising
                self._buffers.take_initial()
        except TimeoutError:
            raise TrainerError("timeout", "the trainer did not initialise the model in time") from None
        finally:
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
            self._buffers.close()
        await asyncio.wait({self._supervisor})
        error = self._supervisor.exception()
        if error is not None and not isinstance(error, TrainerError):  # `start` has raised that one
            raise error

    @property
    def params(self) -> Tensor:  # f32 (n,)
        """The parameters, shared: written here, read by the worker."""
        return self._buffers.params

    @property
    def contribution(self) -> Tensor:  # uint8 (size,), PayloadLayout
        """The latest one, shared with the worker that wrote it; to be read only. It stays while held."""
        return self._buffers.contribution

    @property
    def must_copy(self) -> bool:
        """Whether the latest contribution has to be copied and let go: the next has no other place."""
        return self._buffers.must_copy

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
            self._worker, self._silence.saves = None, 0
            self.aside.gone()

    async def _hired(self) -> Hired | None:
        """The next worker; None if we are told to stop before there is one. Raises OSError."""
        hiring = asyncio.ensure_future(self._hire(self._buffers.fds))
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
            async with self._silence.bounded():
                if self._settings is not None:  # else it has nothing to say, however long the node waits
                    self._await_hello()
                while True:
                    self._handle(worker, await worker.receive())
                    self._watch(worker)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except TimeoutError:
            self._failure = Failed("timeout", self._silence.why(worker.attached))
        except (MessageError, RefusedLayout) as error:
            self._end_broken(worker, str(error))
            return
        except UserError as error:  # no room for the parameters, once it is known how many they are
            self._failure = Failed("room", f"{error}; {error.hint}")
        worker.kill()
        self.on_event(self._failure)

    def _end_broken(self, worker: Hired, why: str) -> None:
        """It sent what it must not, and is trusted no more."""
        self.protocol_errors += 1
        self._failure = Failed("protocol", f"the trainer sent what it must not: {why}")
        worker.kill()
        self.on_event(self._failure)

    def _await_hello(self) -> None:
        assert self._settings is not None
        self._silence.await_hello(reads=Path(self._settings.inner_state_path).exists())

    def _handle(self, worker: Hired, report: Report) -> None:
        if isinstance(report, Hello):
            self._handle_hello(worker, report)
        elif isinstance(report, Tokenizing) and not worker.attached:
            self._await_hello()
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
        elif isinstance(report, Progress | Contribution) and self._orders.is_stale(report):
            self.stale_reports += 1
        else:
            self._settle(report)
            self.on_event(report)

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
        for command in self._orders.again(self._buffers.slot):
            worker.send(command)

    def _map_buffers(self, layout: Layout) -> None:
        from tapestry.compression.codecs import get_codec
        from tapestry.compression.payloads import PayloadLayout

        assert self._settings is not None  # the worker has said hello because of them
        codec = get_codec(self._settings.codec)
        payloads = PayloadLayout.of(codec, layout.n, self._settings.shard_elements)
        self._buffers.map(layout.n, payloads.size)
        self.layout = layout

    def _settle(self, report: Report) -> None:
        if isinstance(report, Contribution):
            self._orders.done(report)
            self._backoff_s = self._limits.backoff_initial_s
        elif isinstance(report, Validation):
            self._orders.done(report)
        elif isinstance(report, Saved):
            self._silence.saves = max(0, self._silence.saves - 1)
        elif isinstance(report, Failed):
            self._failure = report

    def _send(self, command: Command | None) -> None:
        """To the worker if one is up; else the next one is told what is open (`Orders.again`)."""
        worker = self._worker
        if command is not None and worker is not None and (worker.attached or isinstance(command, Stop)):
            worker.send(command)
            self._watch(worker)

    def _watch(self, worker: Hired) -> None:
        """Only a worker that has something to do owes us a sign of life."""
        if worker.attached:
            owes = self._orders.open or self._initialising is not None or self.aside.waiting
            self._silence.watch(owes)

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
