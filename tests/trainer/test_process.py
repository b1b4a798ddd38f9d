"""The trainer process from the node's side: a fake worker to go wrong, the real one for the rest."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import gc
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import uvloop

from tapestry.compression.codecs import get_codec
from tapestry.compression.payloads import PayloadLayout
from tapestry.node.spec.tables import plain
from tapestry.node.spec.training import WorkerSettings
from tapestry.node.trainer import child, process
from tapestry.node.trainer.messages import (
    Contribution,
    Failed,
    Hello,
    Progress,
    Saved,
    Tokenizing,
    Validation,
)
from tapestry.node.trainer.models.llama import initial_state
from tapestry.node.trainer.orders import UNKNOWN_GENERATION
from tapestry.node.trainer.process import (
    Died,
    Event,
    ProcessLimits,
    TrainerError,
    TrainerProcess,
)
from tapestry.node.trainer.worker import NICENESS

DEADLINE_S = 60.0  # only ever waited for by a test that fails
QUICK = ProcessLimits(backoff_initial_s=0.01, backoff_max_s=0.04)

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    return asyncio.run if request.param == "asyncio" else uvloop.run


class Events:
    """What the trainer told, and waiting for more of it."""

    def __init__(self) -> None:
        self.all: list[Event] = []
        self._more = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.all.append(event)
        self._more.set()

    async def until(self, cls: type, count: int = 1) -> Any:
        """The count-th event of its kind."""
        async with asyncio.timeout(DEADLINE_S):
            while len(found := self.of(cls)) < count:
                self._more.clear()
                await self._more.wait()
        return found[count - 1]

    def of(self, cls: type) -> list[Any]:
        return [event for event in self.all if isinstance(event, cls)]


class Fake:
    """Starts the fake worker in one of its modes."""

    def __init__(self, settings: WorkerSettings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self.inner_state = Path(settings.inner_state_path)

    async def start(
        self, mode: str, limits: ProcessLimits = QUICK, folder: Path | None = None
    ) -> tuple[TrainerProcess, Events]:
        events = Events()
        script = Path(__file__).with_name("fake_worker.py")
        command = (sys.executable, "-P", str(script), mode, str(self._folder / "flag"))
        return await TrainerProcess.start(self._settings, events, limits, command, folder), events


@pytest.fixture
def fake(worker_settings: WorkerSettings, tmp_path: Path) -> Fake:
    return Fake(worker_settings, tmp_path)


def test_a_killed_worker_is_restarted_and_begins_again_with_the_same_memory(run: Run, fake: Fake) -> None:
    async def scenario() -> None:
        trainer, events = await fake.start("crashes once")
        try:
            trainer.params.fill_(3.0)
            trainer.begin(4)
            assert (await events.until(Contribution)).epoch == 4
            died = await events.until(Died)
            assert (died.exit_code, died.will_restart_in_s) == (-signal.SIGKILL, 0.01)
            assert trainer.restarts == 1 and len(events.of(Hello)) == 2
            assert torch.equal(trainer.params, torch.full((6,), 3.0))
        finally:
            await trainer.stop(DEADLINE_S)

    run(scenario())


def test_parameters_lie_in_a_file_that_a_restarted_worker_maps_again(
    worker_settings: WorkerSettings, tmp_path: Path
) -> None:
    async def scenario() -> None:
        fake = Fake(worker_settings, tmp_path)
        trainer, events = await fake.start("crashes once", folder=tmp_path / "state")
        try:
            trainer.params.fill_(3.0)
            trainer.begin(4)
            await events.until(Contribution)
            assert torch.equal(trainer.params, torch.full((6,), 3.0))
            home = f"{tmp_path / 'state'}/"
            assert os.readlink(f"/proc/self/fd/{trainer._buffers.fds['params']}").startswith(home)
            assert os.readlink(f"/proc/{trainer.pid}/fd/{trainer._buffers.fds['params']}").startswith(home)
        finally:
            await trainer.stop(DEADLINE_S)

    asyncio.run(scenario())


def test_a_home_without_room_for_the_parameters_is_told_in_a_line(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fstatvfs", lambda fd: SimpleNamespace(f_bavail=0, f_frsize=1))

    async def scenario() -> None:
        with pytest.raises(TrainerError, match="needs 24 bytes, 0 are free") as caught:
            await fake.start("obedient", folder=tmp_path / "state")
        assert caught.value.reason == "room"

    asyncio.run(scenario())


def test_a_contribution_that_is_held_is_not_written_over_by_the_next(fake: Fake) -> None:
    async def scenario() -> None:
        trainer, events = await fake.start("writes")
        try:
            trainer.begin(1)
            await events.until(Contribution)
            first = trainer.contribution
            trainer.begin(2)
            await events.until(Contribution, 2)
            assert trainer.must_copy
            second = trainer.contribution.clone()
            trainer.begin(3)
            await events.until(Contribution, 3)
            assert first.eq(1).all() and second.eq(2).all() and trainer.contribution.eq(3).all()
        finally:
            await trainer.stop(DEADLINE_S)

    asyncio.run(scenario())


def test_when_every_place_is_held_a_new_worker_writes_to_a_new_buffer(fake: Fake) -> None:
    async def scenario() -> None:
        trainer, events = await fake.start("writes")
        try:
            held = []
            for epoch in (1, 2, 3):
                trainer.begin(epoch)
                await events.until(Contribution, epoch)
                held.append(trainer.contribution)
            assert [int(each[0]) for each in held] == [1, 2, 3]
            assert all(each.eq(each[0]).all() for each in held)
            assert trainer.restarts == 1
        finally:
            await trainer.stop(DEADLINE_S)

    asyncio.run(scenario())


def test_progress_of_tokenizing_comes_before_the_hello(fake: Fake) -> None:
    async def scenario() -> None:
        trainer, events = await fake.start("tokenizes")
        await trainer.stop(DEADLINE_S)
        assert events.of(Tokenizing) == [Tokenizing(3, 6, 1.5), Tokenizing(6, 6, 1.5)]
        assert (trainer.restarts, trainer.protocol_errors) == (0, 0)

    asyncio.run(scenario())


def test_an_evaluation_is_asked_again_of_a_new_worker_until_it_is_answered(fake: Fake) -> None:
    async def scenario() -> None:
        trainer, events = await fake.start("crashes once")
        try:
            trainer.evaluate(4)
            assert await events.until(Validation) == Validation(4, 2.5)
            os.kill(trainer.pid or -1, signal.SIGKILL)
            await events.until(Hello, 3)
            trainer.begin(4)
            await events.until(Contribution)
            assert len(events.of(Validation)) == 1
        finally:
            await trainer.stop(DEADLINE_S)

    asyncio.run(scenario())


def test_a_step_aside_is_measured_by_who_can_and_a_worker_that_dies_of_it_has_no_answer(
    fake: Fake, worker_settings: WorkerSettings, tmp_path: Path
) -> None:
    async def scenario() -> None:
        trainer, _ = await fake.start("crashes once")
        try:
            assert (
                not trainer.can_judge and await trainer.judge("base", "head") is None
            )  # the run has no gate
        finally:
            await trainer.stop(DEADLINE_S)
        (tmp_path / "flag").unlink()
        gated = Fake(dataclasses.replace(worker_settings, gate_windows=2), tmp_path)
        trainer, events = await gated.start("crashes once", folder=tmp_path)
        try:
            assert trainer.can_judge and trainer.room_aside().shape == trainer.params.shape
            assert await trainer.judge("base", "head") is None
            await events.until(Hello, 2)
            assert await trainer.judge("base", "head") == (2.5, 2.75)
        finally:
            await trainer.stop(DEADLINE_S)

    asyncio.run(scenario())


def test_the_pause_before_a_restart_doubles_up_to_its_limit_and_the_last_words_are_told(fake: Fake) -> None:
    async def scenario() -> None:
        trainer, events = await fake.start("crashes always")
        try:
            trainer.begin(4)
            await events.until(Died, 4)
        finally:
            await trainer.stop(DEADLINE_S)
        died = events.of(Died)[:4]
        assert [event.will_restart_in_s for event in died] == [0.01, 0.02, 0.04, 0.04]
        assert {(event.exit_code, event.output) for event in died} == {(7, ("out of memory",))}
        assert not events.of(Contribution)

    asyncio.run(scenario())


def test_a_worker_that_cannot_be_started_again_at_once_is_tried_again(
    run: Run, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        trainer, events = await fake.start("crashes once")
        spawn, tries = child.Worker.spawn, []

        async def fails_twice(*args: Any) -> Any:
            tries.append(args)
            if len(tries) <= 2:
                raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
            return await spawn(*args)

        monkeypatch.setattr(child.Worker, "spawn", fails_twice)
        try:
            trainer.begin(4)
            assert (await events.until(Contribution)).epoch == 4
            died = events.of(Died)
            assert [one.exit_code for one in died] == [-signal.SIGKILL, os.EX_OSERR, os.EX_OSERR]
            assert "cannot be started" in died[1].output[0]
        finally:
            await trainer.stop(DEADLINE_S)

    run(scenario())


@pytest.mark.parametrize("mode", ["garbage", "huge frame"])
def test_a_malformed_message_kills_and_restarts_the_worker_and_is_counted(
    run: Run, fake: Fake, mode: str
) -> None:
    async def scenario() -> None:
        trainer, events = await fake.start(mode)
        try:
            trainer.begin(4)
            await events.until(Contribution)
            assert trainer.protocol_errors == 1
            assert events.of(Failed)[0].reason == "protocol"
            assert events.of(Died)[0].exit_code == -signal.SIGKILL
        finally:
            await trainer.stop(DEADLINE_S)

    run(scenario())


def test_a_worker_whose_contribution_is_none_is_replaced_and_that_is_told(fake: Fake) -> None:
    """It was only forgotten: the node trained no more until somebody started it again, without a word."""

    async def scenario() -> None:
        trainer, events = await fake.start("")
        try:
            trainer.begin(4)
            await events.until(Contribution)
            trainer.reject("scale: a scale lies below the smallest")
            assert "a scale lies below the smallest" in events.of(Failed)[0].text
            await events.until(Hello, 2)
            assert events.of(Died)[0].exit_code == -signal.SIGKILL and trainer.protocol_errors == 1
            trainer.begin(4)
            await events.until(Contribution, 2)
        finally:
            await trainer.stop(DEADLINE_S)

    asyncio.run(scenario())


def test_a_worker_that_is_silent_with_work_to_do_is_killed_and_an_idle_one_is_not(fake: Fake) -> None:
    async def scenario() -> None:
        limits = dataclasses.replace(QUICK, silence_timeout_s=1.0)
        trainer, events = await fake.start("silent", limits)
        try:
            trainer.begin(4)
            await events.until(Contribution)
            assert events.of(Failed)[0] == Failed(
                "timeout", "the trainer was silent for 1 s, which a micro-batch must not take"
            )
            assert trainer.restarts >= 1  # a machine that is slow enough makes it more
            assert trainer._worker is not None and trainer._silence.ends_s is None
        finally:
            await trainer.stop(DEADLINE_S)

    asyncio.run(scenario())


def test_a_worker_that_writes_its_inner_optimizer_is_given_longer(fake: Fake) -> None:
    """A checkpoint asks for it while the next epoch has begun: it was killed in the middle, each time."""

    async def scenario() -> None:
        trainer, events = await fake.start("saves slowly", dataclasses.replace(QUICK, silence_timeout_s=1.0))
        try:
            trainer.save(4)  # takes 2.5 s
            trainer.begin(4)
            await events.until(Contribution)
            assert not events.of(Failed) and trainer.restarts == 0
            assert trainer._silence.saves == 0
        finally:
            await trainer.stop(DEADLINE_S)

    asyncio.run(scenario())


def test_a_worker_that_has_an_inner_optimizer_to_read_is_given_longer(fake: Fake) -> None:
    """What took an hour to write cannot be read in the time that imports may take."""

    async def scenario() -> None:
        limits = dataclasses.replace(QUICK, hello_timeout_s=1.0, save_timeout_s=30.0)
        with pytest.raises(TrainerError) as caught:
            await fake.start("reads slowly", limits)
        assert caught.value.reason == "timeout"
        fake.inner_state.parent.mkdir(parents=True, exist_ok=True)
        fake.inner_state.touch()
        trainer, events = await fake.start("reads slowly", limits)
        await trainer.stop(DEADLINE_S)
        assert not events.of(Failed)

    asyncio.run(scenario())


def test_a_worker_that_takes_long_and_shows_life_is_let_be(fake: Fake) -> None:
    async def scenario() -> None:
        trainer, events = await fake.start("slow", dataclasses.replace(QUICK, silence_timeout_s=1.0))
        try:
            trainer.begin(4)
            await events.until(Contribution)
            assert not events.of(Failed) and trainer.restarts == 0
        finally:
            await trainer.stop(DEADLINE_S)

    asyncio.run(scenario())


def test_a_worker_is_not_silent_while_the_node_waits_to_be_admitted(
    worker_settings: WorkerSettings, tmp_path: Path
) -> None:
    """Its time for a hello ran from its start: a node that was admitted later than that ended."""

    async def scenario() -> None:
        script = Path(__file__).with_name("fake_worker.py")
        command = (sys.executable, "-P", str(script), "well", str(tmp_path / "flag"))
        trainer = await TrainerProcess.launch(1, dataclasses.replace(QUICK, hello_timeout_s=3.0), command)
        try:
            await asyncio.sleep(3.5)
            await trainer.configure(worker_settings, events := Events())
            assert len(events.of(Hello)) == 1 and trainer.restarts == 0
        finally:
            await trainer.stop(DEADLINE_S)

    asyncio.run(scenario())


def test_a_restarted_worker_with_another_model_is_refused(fake: Fake) -> None:
    async def scenario() -> None:
        trainer, events = await fake.start("another model")
        try:
            trainer.begin(4)
            failed = await events.until(Failed)
            assert "the model has changed" in failed.text
            assert not events.of(Contribution)
        finally:
            await trainer.stop(DEADLINE_S)

    asyncio.run(scenario())


def test_what_is_not_of_the_current_epoch_is_dropped_and_counted(fake: Fake) -> None:
    async def scenario() -> None:
        trainer, events = await fake.start("stale")
        try:
            trainer.begin(4)
            assert (await events.until(Contribution)).epoch == 4
            assert trainer.stale_reports == 1
        finally:
            await trainer.stop(DEADLINE_S)

    asyncio.run(scenario())


def test_a_contribution_on_its_way_does_not_pass_for_a_second_begin_of_the_same_epoch(fake: Fake) -> None:
    async def scenario() -> None:
        trainer, events = await fake.start("late")
        try:
            trainer.begin(4, "head of one fork")
            trainer.abort()
            trainer.begin(4, "head of the other")
            told = await events.until(Contribution)
            assert told.generation == trainer._orders.generation
            assert trainer.stale_reports >= 1
        finally:
            await trainer.stop(DEADLINE_S)

    asyncio.run(scenario())


def test_a_begin_tells_the_worker_what_it_is_to_keep_and_what_has_counted(fake: Fake) -> None:
    async def scenario() -> None:
        trainer, events = await fake.start("tells what it is told")
        try:
            trainer.begin(4, "four", "three")
            await events.until(Contribution)
            trainer.settle(1)
            trainer.begin(5, "five", "four")
            await events.until(Contribution, 2)
            trainer.forget()
            trainer.begin(6)
            await events.until(Contribution, 3)
            told = [one.weight - 10 for one in events.of(Contribution)]
            assert told == [0, 1000 + 1, 100 + UNKNOWN_GENERATION]
        finally:
            await trainer.stop(DEADLINE_S)

    asyncio.run(scenario())


def test_a_worker_that_dies_while_it_initialises_is_told_and_its_buffer_freed(fake: Fake) -> None:
    async def scenario() -> None:
        trainer, _ = await fake.start("dies at initialise")
        try:
            with pytest.raises(TrainerError, match="died while initialising"):
                await trainer.initialise()
            assert os.fstat(trainer._buffers.fds["initial"]).st_size == 0
        finally:
            await trainer.stop(DEADLINE_S)

    asyncio.run(scenario())


def test_a_stop_while_the_worker_initialises_is_told_and_touches_no_closed_descriptor(fake: Fake) -> None:
    async def scenario() -> None:
        trainer, _ = await fake.start("dies at initialise")
        initialising = asyncio.create_task(trainer.initialise())
        await asyncio.sleep(0)
        await trainer.stop(0)
        with pytest.raises(TrainerError, match="died while initialising"):
            await initialising

    asyncio.run(scenario())


def test_a_first_worker_that_fails_says_why_and_is_not_restarted(run: Run, fake: Fake) -> None:
    async def scenario() -> None:
        with pytest.raises(TrainerError, match="no such file: give --data") as caught:
            await fake.start("no data")
        assert caught.value.reason == "data"
        with pytest.raises(TrainerError, match="status 5 before it was ready: last words"):
            await fake.start("dies before hello")

    run(scenario())


def test_a_worker_deaf_to_stop_is_killed_after_the_timeout(run: Run, fake: Fake) -> None:
    async def scenario() -> None:
        trainer, _ = await fake.start("deaf to stop")
        worker = os.pidfd_open(trainer.pid or -1)
        await trainer.stop(0.05)
        assert _gone(worker, timeout_s=0)

    run(scenario())


def test_a_callback_that_raises_is_told_by_stop_and_leaves_no_worker(fake: Fake) -> None:
    async def scenario() -> None:
        trainer, events = await fake.start("obedient")
        worker = os.pidfd_open(trainer.pid or -1)
        trainer.on_event = _broken
        trainer.begin(4)
        with pytest.raises(ExceptionGroup) as caught:
            await trainer.closed()
        assert caught.group_contains(ZeroDivisionError)
        with pytest.raises(ExceptionGroup):
            await trainer.stop(DEADLINE_S)
        assert _gone(worker, DEADLINE_S)
        assert not events.of(Contribution)

    asyncio.run(scenario())


def test_stopping_leaves_no_descriptor_open(fake: Fake) -> None:
    async def scenario() -> None:
        gc.collect()  # what earlier tests left
        before = len(os.listdir("/proc/self/fd"))
        trainer, _ = await fake.start("obedient")
        await trainer.stop(DEADLINE_S)
        del trainer  # and with it the two mappings, each of which has a descriptor
        await asyncio.sleep(0)  # transports close in the next turn of the loop
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(scenario())


def test_the_real_worker_from_initial_state_to_stop(worker_settings: WorkerSettings) -> None:
    asyncio.run(_real_worker_scenario(_with_steps(worker_settings, 6)))
    assert Path(worker_settings.inner_state_path).exists()


async def _real_worker_scenario(settings: WorkerSettings) -> None:
    events = Events()
    trainer = await TrainerProcess.start(settings, events, QUICK)
    try:
        assert trainer.layout.n == 48_448
        await trainer.initialise()
        assert torch.equal(
            trainer.params, initial_state(settings.training.model, settings.training.data.sequence_length)
        )
        assert os.fstat(trainer._buffers.fds["initial"]).st_size == 0
        trainer.evaluate(0)
        trainer.begin(0)
        whole = await events.until(Contribution)
        assert (await events.until(Validation)).loss == pytest.approx(5.55, abs=0.2)
        assert _niceness(trainer.pid or -1) == {min(19, os.nice(0) + NICENESS)}
        first = trainer.contribution.clone()
        assert whole.weight == whole.tokens == 6 * 4 * 32
        decoded = _decoded(first, settings)
        assert whole.norm == pytest.approx(decoded.double().norm().item(), rel=1e-3)
        assert events.of(Progress)[-1].step == events.of(Progress)[-1].steps == 6

        trainer.begin(1)
        trainer.close_round(1)
        early = await events.until(Contribution, 2)
        assert early.epoch == 1 and 0 < early.weight < whole.weight and early.tokens == early.weight

        good = trainer.params.clone()
        trainer.params.fill_(float("nan"))
        trainer.begin(2)
        assert (await events.until(Failed)).reason == "diverged"
        trainer.params.copy_(good)
        # The new worker has fresh moments, as the first one had, so epoch 0 gives the same bits again.
        trainer.begin(0)
        assert (await events.until(Contribution, 3)).epoch == 0
        assert torch.equal(trainer.contribution, first)

        trainer.save(1)
    finally:
        await trainer.stop(DEADLINE_S)
    assert events.of(Saved) == [Saved(1, "")]
    assert len(events.of(Died)) == trainer.restarts == 1


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_worker_dies_when_its_node_is_killed(worker_settings: WorkerSettings) -> None:
    """A stopped worker cannot notice that its socket has closed; only the kernel can end it."""
    doubtful = dataclasses.replace(worker_settings.data, allow_doubtful=True)  # so few texts for so long
    settings = _with_steps(dataclasses.replace(worker_settings, data=doubtful), 100_000)
    node = subprocess.Popen(
        [sys.executable, "-P", "-c", NODE, json.dumps(plain(settings))], stdout=subprocess.PIPE, text=True
    )
    with node:
        assert node.stdout is not None
        pid = int(node.stdout.readline())
        worker = os.pidfd_open(pid)
        os.kill(pid, signal.SIGSTOP)
        node.kill()
    assert _gone(worker, DEADLINE_S)


NODE = """
import asyncio, json, sys
from tapestry.node.trainer.messages import Progress
from tapestry.node.trainer.process import TrainerProcess
from tapestry.node.spec.tables import read_table
from tapestry.node.spec.training import WorkerSettings

async def main():
    trainer = await TrainerProcess.start(read_table(WorkerSettings, json.loads(sys.argv[1])), on_event)
    trainer.pid_told = False
    started.append(trainer)
    trainer.params.fill_(0.01)
    trainer.begin(0)
    await trainer.closed()

def on_event(event):
    if isinstance(event, Progress) and not started[0].pid_told:
        started[0].pid_told = True
        print(started[0].pid, flush=True)

started = []
asyncio.run(main())
"""


def test_the_node_side_does_not_import_transformers() -> None:
    code = f"import sys, {process.__name__}; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def _decoded(buffer: torch.Tensor, settings: WorkerSettings) -> torch.Tensor:
    codec = get_codec(settings.codec)
    payloads = PayloadLayout.of(codec, 48_448, settings.shard_elements)
    parts = zip(payloads.shards, payloads.views(buffer), strict=True)
    return torch.cat([codec.decode(payload, shard.n) for shard, payload in parts])


def _with_steps(settings: WorkerSettings, steps: int) -> WorkerSettings:
    train = dataclasses.replace(settings.training.train, inner_steps=steps)
    return dataclasses.replace(settings, training=dataclasses.replace(settings.training, train=train))


def _broken(event: Event) -> None:
    raise ZeroDivisionError


def _niceness(pid: int) -> set[int]:
    """Of the process, and of its session where the kernel groups by sessions: "/autogroup-25 nice 0"."""
    of_session = Path(f"/proc/{pid}/autogroup")
    found = {os.getpriority(os.PRIO_PROCESS, pid)}
    if of_session.exists():
        found.add(int(of_session.read_text().split()[-1]))
    return found


def _gone(pidfd: int, timeout_s: float) -> bool:
    """Whether the process ends in time; a pidfd becomes readable when it does."""
    try:
        return bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)
