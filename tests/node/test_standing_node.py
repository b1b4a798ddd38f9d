"""A script that opens a node which runs by itself: the trainer's desk, and the talk over the socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tapestry.node.daemon.goal import Goal
from tapestry.node.daemon.trainer_desk import TrainerDesk
from tapestry.node.daemon.views import Reporter
from tapestry.node.library.member import Loop, Member
from tapestry.node.library.module import Trained
from tapestry.node.library.wanted import Wanted
from tapestry.node.protocol import events as ev
from tapestry.node.spec.data import NO_DATA
from tapestry.node.spec.node import ENDLESS
from tapestry.node.spec.run import training_spec
from tapestry.node.spec.training import WorkerSettings
from tapestry.node.surface.logs import LiveLine
from tapestry.node.surface.metrics import Metrics
from tapestry.node.trainer.guest import GREETING, Door, Guest, knock
from tapestry.node.trainer.messages import Begin, Command, Contribution
from tapestry.node.trainer.process import Event, Parted, TrainerProcess
from tapestry.node.trainer.shared import BUFFERS
from tapestry.node.trainer.worker import Channel


def settings_of(module: nn.Module, folder: Path) -> WorkerSettings:
    spec = Wanted.of(Trained(module).layout, None, None, {"train": {"inner_steps": 2}}).spec
    return WorkerSettings(
        training=training_spec(spec),
        data=NO_DATA,
        cache_dir="",
        inner_state_path=str(folder / "inner.safetensors"),
        cursor_path="",
        node_seed=0,
        codec=spec.compression.codec,
        shard_elements=256,
        residual=False,
        run_spec=spec.canonical().decode(),
    )


def visit(path: Path, settings: WorkerSettings, steps: int) -> None:
    """A script, in a thread, that takes so many steps."""
    module = nn.Linear(30, 20)
    loop = Loop(Trained(module), torch.optim.SGD(module.parameters(), lr=0.1), None)
    with knock(path) as connection:
        greeting, fds, _, _ = socket.recv_fds(connection, len(GREETING), len(BUFFERS))
        assert greeting == GREETING
        Channel(connection).receive(wait=True)  # Configure
        script = Member(connection, dict(zip(BUFFERS, fds, strict=True)), settings, loop)
        script.say_hello()
        script.wait_for_base(lambda waited_s: None)
        for _ in range(steps):
            script.step(1.0, 1, lambda waited_s: None)


async def next_of(events: asyncio.Queue[Event], kind: type) -> Any:
    while not isinstance(event := await events.get(), kind):
        pass
    return event


class Asks:
    """A desk's loop, and of the core that it asks again for epoch 7 when a trainer is there again."""

    def __init__(self) -> None:
        self.jobs: list[asyncio.Task[None]] = []
        self.desk: TrainerDesk
        self.was_up = True

    def feed(self, inp: ev.Input) -> None:
        assert isinstance(inp, ev.TrainerState)
        if inp.up and not self.was_up:
            self.spawn(self.desk.do_train(ev.Train(7, "a", "")))
        self.was_up = inp.up

    def spawn(self, job: Coroutine[Any, Any, None]) -> None:
        self.jobs.append(asyncio.create_task(job))

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def snapshot(self) -> Any:
        return SimpleNamespace(roll=SimpleNamespace(rolled={}, settings={}))


def test_a_script_that_opens_a_standing_node_is_told_once_what_to_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began what the one before had left, and then the same once more: its first step counted for
    nothing."""
    settings = settings_of(nn.Linear(30, 20), tmp_path)
    path, told, send = tmp_path / "trainer.sock", [], Guest.send

    def told_too(guest: Guest, command: Command) -> None:
        if isinstance(command, Begin):
            told.append((command.epoch, guest))
        send(guest, command)

    monkeypatch.setattr(Guest, "send", told_too)

    async def run() -> None:
        door, loop = Door(path), Asks()
        trainer = TrainerProcess.await_guests(door)
        reporter = Reporter(Metrics("0"), LiveLine(None, enabled=False))  # type: ignore[arg-type]
        fakes: Any = (loop, trainer, None, reporter, Goal(ENDLESS))
        desk = loop.desk = TrainerDesk(*fakes, "me", lambda name: None)
        events: asyncio.Queue[Event] = asyncio.Queue()

        def on_event(event: Event) -> None:
            if not isinstance(event, Contribution):
                desk.on_event(event)
            events.put_nowait(event)

        try:
            async with asyncio.timeout(30):
                first = asyncio.create_task(asyncio.to_thread(visit, path, settings, 1))
                await trainer.configure(settings, on_event)
                await desk.do_train(ev.Train(7, "a", ""))
                await first
                await next_of(events, Parted)
                second = asyncio.create_task(asyncio.to_thread(visit, path, settings, 2))
                assert (await next_of(events, Contribution)).steps == 2
                trainer.begin(8, "b")
                await second
        finally:
            await trainer.stop(2)
            door.close()

    asyncio.run(run())
    assert [epoch for epoch, _ in told] == [7, 7, 8] and told[0][1] is not told[1][1]
