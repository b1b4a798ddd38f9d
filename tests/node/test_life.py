"""The daemon's life with nothing real below it: what is told to whom, from start to exit code."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from tapestry.node.daemon import assembly, launch, life
from tapestry.node.daemon.life import Daemon
from tapestry.node.daemon.notify import Notifier
from tapestry.node.disk.home_mark import claim, read_mark, write_mark
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home, NodeInfo
from tapestry.node.protocol.waits import Wait
from tapestry.node.spec.data import DataSettings, Located
from tapestry.node.spec.declared import BASE, append, parse_declaration
from tapestry.node.spec.node import ISLAND_LISTEN, NodeConfig
from tapestry.node.spec.run import new_spec
from tapestry.node.spec.training import PRESETS
from tapestry.node.surface import logs
from tapestry.node.surface.logs import Log
from tapestry.node.trainer.data.sources import located_in
from tapestry.node.trainer.process import Parted

INFO = NodeInfo(1, "12D3KooW", "ab", (), "http://127.0.0.1:1", "0.1.0", "now")


class Heard(Notifier):
    """What a service manager would hear."""

    def __init__(self) -> None:
        super().__init__({})
        self.said: list[str] = []

    def send(self, text: str) -> None:
        self.said.append(text.partition("\n")[0])


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    monkeypatch.setattr(logs, "TICK_S", 0.01)
    log = Log("text", io.StringIO())
    config = NodeConfig.resolve(Home(tmp_path), {"external": True}, {})
    trainer = SimpleNamespace(closed=lambda: asyncio.sleep(3600))

    async def made() -> Daemon:
        return Daemon(config, log, trainer, Heard())  # type: ignore[arg-type]

    yield asyncio.run(made())
    log.close()


def run(daemon: Daemon, inside: Callable[[], Awaitable[None]]) -> int:
    daemon._run = inside  # type: ignore[method-assign, assignment]
    return asyncio.run(asyncio.wait_for(daemon.run(), 10))


def said(daemon: Daemon) -> list[str]:
    heard = daemon.notifier
    assert isinstance(heard, Heard)
    return heard.said


def test_a_stop_is_told_to_the_service_manager_and_is_exit_code_0(daemon: Daemon) -> None:
    async def inside() -> None:
        await asyncio.sleep(0.01)
        daemon.stop.set()
        await asyncio.sleep(3600)

    assert run(daemon, inside) == 0
    assert said(daemon) == ["STATUS=epoch 0, starting", "STOPPING=1"]


def test_a_file_that_another_container_leaves_stops_the_node(daemon: Daemon) -> None:
    async def inside() -> None:
        daemon.home.stop_request.touch()
        await asyncio.sleep(3600)

    assert run(daemon, inside) == 0
    assert not daemon.home.stop_request.exists()


def test_a_shared_memory_that_is_full_at_the_imports_is_one_line(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hivemind makes locks there while it is imported: it was a traceback of its own."""

    class Full:
        def find_spec(self, name: str, *_: object) -> None:
            if name == life.__name__:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stopped: list[float] = []

    async def stop(timeout_s: float) -> None:
        stopped.append(timeout_s)

    nothing = SimpleNamespace(
        submodules_only=lambda package: None, spare_torch=lambda: None, lasting=contextlib.nullcontext
    )
    monkeypatch.setattr(launch, "imports", nothing)
    monkeypatch.delitem(sys.modules, life.__name__)
    monkeypatch.delattr(sys.modules["tapestry.node.daemon"], "life")
    monkeypatch.setattr(sys, "meta_path", [Full(), *sys.meta_path])
    trainer: Any = SimpleNamespace(stop=stop)
    log: Any = None
    with pytest.raises(UserError, match=r"No space left on device, most likely of /dev/shm") as caught:
        asyncio.run(launch._run_with(trainer, daemon.config, log, Heard()))
    assert caught.value.exit_code == ExitCode.FAILED and "df /dev/shm" in str(caught.value.hint)
    assert stopped == [0]


@pytest.mark.parametrize(
    ("number", "is_up", "code"),
    [
        (signal.SIGINT, False, ExitCode.FAILED),
        (signal.SIGINT, True, ExitCode.DONE),
        (signal.SIGTERM, False, ExitCode.DONE),
    ],
)
def test_a_ctrl_c_gives_a_node_up_that_is_not_up_and_ends_one_that_is(
    daemon: Daemon, number: signal.Signals, is_up: bool, code: ExitCode
) -> None:
    async def inside() -> None:
        daemon._is_up = is_up
        os.kill(os.getpid(), number)
        await asyncio.sleep(3600)

    assert run(daemon, inside) == code


def test_a_node_that_was_given_up_ends_as_an_interrupted_command(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def given_up(*_: object) -> int:
        return ExitCode.FAILED

    daemon.home.run_toml.write_text(new_spec("run", PRESETS["nano"]).to_toml())
    monkeypatch.setattr(launch, "_run", given_up)
    monkeypatch.setattr(launch, "start_logging", lambda kind: Log(kind, io.StringIO()))
    with pytest.raises(KeyboardInterrupt):
        launch.run(replace(daemon.config, run=daemon.home.run_toml, http_port=0))


@pytest.mark.parametrize(("log_format", "times"), [("text", 1), ("json", 0)])
def test_a_start_says_its_run_on_the_screen_once(
    daemon: Daemon,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    log_format: Literal["text", "json"],
    times: int,
) -> None:
    caplog.set_level("INFO")
    daemon.config = replace(daemon.config, log_format=log_format, kept=("--listen here",))
    daemon._say_who(replace(INFO, run_id="c" * 64), "our-run", is_open=True)
    printed = [record for record in caplog.records if getattr(record, "printed", False)]
    assert len(printed) == 2 * times and "kept flags='--listen here'" in caplog.text
    out = capsys.readouterr().out
    assert out.count("kept     --listen here, of an earlier start") == out.count("run      our-run") == times


def test_a_stop_from_another_container_counts_from_when_the_node_took_the_home(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The imports take seconds, in which nobody looks."""
    request = daemon.home.stop_request
    request.touch()

    async def importing(*_: object) -> int:
        assert not request.exists(), "it was meant for a node before this one"
        request.touch()
        return await asyncio.wait_for(daemon.run(), 10)

    async def train() -> None:
        await asyncio.sleep(3600)

    daemon._run = train  # type: ignore[method-assign]
    monkeypatch.setattr(launch, "_run", importing)
    monkeypatch.setattr(launch, "start_logging", lambda kind: Log(kind, io.StringIO()))
    monkeypatch.setattr(logs, "TICK_S", 3600.0)
    daemon.home.run_toml.write_text(new_spec("run", PRESETS["nano"]).to_toml())
    assert launch.run(replace(daemon.config, run=daemon.home.run_toml, http_port=0)) == 0
    assert not request.exists()


def test_a_node_whose_script_is_gone_before_it_is_up_says_so_and_ends(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    daemon.config = replace(daemon.config, script_fd=99)
    caplog.set_level("INFO")

    async def inside() -> None:
        daemon.trainer.on_event(Parted())
        await asyncio.sleep(3600)

    assert run(daemon, inside) == 0
    assert "the script that started this node has left, before the node was up" in caplog.text


def test_what_is_wrong_at_the_start_comes_out_as_it_is(daemon: Daemon) -> None:
    async def inside() -> None:
        raise ExceptionGroup("tasks", [UserError("no such luck")])

    with pytest.raises(UserError, match="no such luck"):
        run(daemon, inside)


def node_of(daemon: Daemon) -> Any:
    """A node that has done what it was to do, and leaves when the metrics have its disk."""

    async def nothing(*_: object) -> None: ...

    told = asyncio.Event()
    set_disk = daemon.metrics.set_disk

    def noted(use: Any, free: int) -> None:
        set_disk(use, free)
        told.set()

    async def leave() -> None:
        await told.wait()

    daemon.metrics.set_disk = noted  # type: ignore[method-assign]
    up, done = asyncio.Event(), asyncio.Event()
    up.set()
    done.set()
    network = SimpleNamespace(up=up, withdraw=nothing)
    desk = SimpleNamespace(news=lambda: None)
    runtime = SimpleNamespace(done=done, ends=None, leave=leave, network=desk)
    keeper = SimpleNamespace(state=SimpleNamespace(epoch=3))

    def start(swarm: object, tasks: asyncio.TaskGroup) -> tuple[asyncio.Task[None], ...]:
        return (tasks.create_task(asyncio.sleep(3600)),)

    return SimpleNamespace(start=start, network=network, runtime=runtime, keeper=keeper)


def test_a_node_that_is_up_is_ready_writes_node_json_and_says_what_the_disk_holds(daemon: Daemon) -> None:
    async def inside() -> None:
        daemon.home.log.write_bytes(b"x" * 4096)
        egress: Any = SimpleNamespace(run=lambda: asyncio.sleep(3600))
        await daemon._serve(node_of(daemon), None, INFO, egress)  # type: ignore[arg-type]

    assert run(daemon, inside) == 0
    assert "READY=1" in said(daemon)
    assert b'tapestry_disk_bytes{kind="logs"} 4096.0' in daemon.metrics.render()
    assert json.loads(daemon.home.node_json.read_text())["peer_id"] == "12D3KooW"


def test_a_node_that_was_removed_leaves_in_good_order_and_ends_with_the_reason(daemon: Daemon) -> None:
    node, left = node_of(daemon), []
    node.runtime.ends = UserError("this node was removed", exit_code=ExitCode.REFUSED)
    leave = node.runtime.leave

    async def noted() -> None:
        await leave()
        left.append(True)

    node.runtime.leave = noted

    async def inside() -> None:
        egress: Any = SimpleNamespace(run=lambda: asyncio.sleep(3600))
        await daemon._serve(node, None, INFO, egress)  # type: ignore[arg-type]

    with pytest.raises(UserError, match="was removed") as caught:
        run(daemon, inside)
    assert caught.value.exit_code == ExitCode.REFUSED and left


def test_a_restored_home_looks_for_its_run_and_says_so_in_its_status(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    async def find_run(home: Home, mark: Any, genesis: object, chain: Any, wait_s: float, *rest: Any) -> None:
        assert chain is records
        rest[-1](Wait("run", "looks for its run", f"goes on alone in {wait_s:g} s"))
        seen.append(daemon.view.status())
        rest[-1](None)

    spec = SimpleNamespace(round=SimpleNamespace(quorum_loss_s=60.0))
    records = SimpleNamespace(roll=SimpleNamespace(settings={}))
    monkeypatch.setattr(life, "find_run", find_run)
    monkeypatch.setattr(life, "chain_of", lambda *_: records)
    monkeypatch.setattr(life, "read_genesis", lambda *_: (object(), spec))

    async def inside() -> None:
        await daemon._find_run_again(None, (), None)  # type: ignore[arg-type]

    mark = claim(daemon.home, "")
    daemon.home.genesis.write_text("{}")
    assert run(daemon, inside) == 0 and seen == []  # an ordinary home
    write_mark(daemon.home, replace(mark, restored_at="2026-11-29T10:00:00+00:00"))
    assert run(daemon, inside) == 0
    (said,) = seen
    assert said["phase"] == "joining"
    assert said["reason"] == "looks for its run, for 0 s; goes on alone in 60 s"
    assert daemon.view.ready() == (False, "starting")

    seen.clear()
    daemon.config = replace(daemon.config, island=True)  # where it must not wait for what the run decides
    assert run(daemon, inside) == 0 and seen == []
    mark_now = read_mark(daemon.home)
    assert mark_now is not None and mark_now.restored_at


def test_an_island_listens_where_nobody_knows_its_node_and_leaves_the_port_for_after_it(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member on the same machine dialled the port of before, and the island took the run's chain."""
    asked: list[tuple[str, ...]] = []

    async def addresses() -> tuple[str, ...]:
        return ("/ip4/127.0.0.1/tcp/4711/p2p/12D3KooWCaHaT7xh4yGquL286pZyfWAMnEyMke3Rwi5DGsRxQz4W",)

    async def start(config: Any, on_refused: object) -> Any:
        asked.append(config.listen)
        return SimpleNamespace(addresses=addresses)

    monkeypatch.setattr(life, "Swarm", SimpleNamespace(start=start))
    for island in (False, True, False):
        daemon.config = replace(daemon.config, listen=ISLAND_LISTEN, island=island)
        asyncio.run(daemon._start_swarm())
    port_4711 = ("/ip4/127.0.0.1/tcp/4711",)
    assert asked == [ISLAND_LISTEN, ISLAND_LISTEN, port_4711]

    daemon.config = replace(daemon.config, listen=("/ip4/0.0.0.0/tcp/0",))
    asyncio.run(daemon._start_swarm())
    before = daemon.home.listen.read_bytes()
    daemon.config = replace(daemon.config, listen=ISLAND_LISTEN, island=True)
    asyncio.run(daemon._start_swarm())
    assert daemon.home.listen.read_bytes() == before


def test_a_trainer_may_read_what_was_asked_about_also_if_a_link_is_moved_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "home")
    home.create()
    first, second, source = tmp_path / "v1", tmp_path / "v2", tmp_path / "current"
    for folder in (first, second):
        folder.mkdir()
        (folder / "a.txt").write_text("text")
    source.symlink_to(first)
    config = NodeConfig.resolve(home, {"data": (str(source),)}, {})
    spec = new_spec("run", PRESETS["nano"])

    def moved(settings: DataSettings) -> tuple[Located, ...]:
        found = located_in(settings)
        source.unlink()
        source.symlink_to(second)
        return found

    monkeypatch.setattr(assembly, "located", moved)
    append(home, [parse_declaration("us, CC0-1.0", str(second), BASE)])
    with pytest.raises(UserError, match=r"v1 is not read: not declared \(a link in .*current leads there"):
        assembly.worker_settings(config, spec, "peer")
    source.unlink()
    source.symlink_to(first)
    append(home, [parse_declaration("us, CC0-1.0", str(first), BASE)])
    assert assembly.worker_settings(config, spec, "peer").located == (Located(str(source), (str(first),)),)
