"""A script's side and the node's of the trainer's protocol, over a socketpair: no daemon, no swarm."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from tapestry.compression.codecs import get_codec
from tapestry.compression.payloads import PayloadLayout
from tapestry.node.api import Swarm
from tapestry.node.library.errors import SwarmError
from tapestry.node.library.member import Loop, Member
from tapestry.node.library.module import Trained
from tapestry.node.library.optimizer import StateNotKept, load_state, save_state
from tapestry.node.library.wanted import Wanted
from tapestry.node.spec.data import NO_DATA
from tapestry.node.spec.run import RunSpec, preset_spec, training_spec
from tapestry.node.spec.training import ExternalSpec, WorkerSettings
from tapestry.node.trainer.guest import GREETING, Door, Line, knock
from tapestry.node.trainer.messages import (
    HEADER,
    Contribution,
    Hello,
    Notice,
    Progress,
    Saved,
    Validation,
    unpack_report,
)
from tapestry.node.trainer.process import Event, Parted, TrainerProcess
from tapestry.node.trainer.shared import BUFFERS
from tapestry.node.trainer.worker import Channel

SHARD = 256


def make_module() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Linear(20, 5))


def wanted(module: nn.Module, **run: Any) -> Wanted:
    return Wanted.of(Trained(module).layout, None, None, run)


def settings_of(spec: RunSpec, folder: Path) -> WorkerSettings:
    return WorkerSettings(
        training=training_spec(spec),
        data=NO_DATA,
        cache_dir="",
        inner_state_path=str(folder / "inner.safetensors"),
        cursor_path="",
        node_seed=0,
        codec=spec.compression.codec,
        shard_elements=SHARD,
        residual=False,
        run_spec=spec.canonical().decode(),
    )


def decoded(payloads: torch.Tensor, n: int) -> torch.Tensor:
    layout = PayloadLayout.of(get_codec("int8-block"), n, SHARD)
    pairs = zip(layout.shards, layout.views(payloads), strict=True)
    return torch.cat([layout.codec.decode(payload, shard.n) for shard, payload in pairs])


def between(node: Callable[..., Any], script: Callable[[socket.socket], Any]) -> Any:
    """Run `node(trainer, events)` in a loop and `script(connection)` in a thread; the script's result."""
    ours, theirs = socket.socketpair()
    result: list[Any] = []

    def in_thread() -> None:
        try:
            result.append(script(ours))
        except Exception as error:
            result.append(error)
        finally:
            ours.close()

    async def run() -> None:
        line = Line(theirs.detach())
        trainer = TrainerProcess.await_guests(line)
        events: asyncio.Queue[Event] = asyncio.Queue()
        thread = threading.Thread(target=in_thread)
        thread.start()
        try:
            async with asyncio.timeout(240):
                await node(trainer, events)
        finally:
            await trainer.stop(2)
            line.close()
            await asyncio.to_thread(thread.join, 10)

    asyncio.run(run())
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def member(connection: socket.socket, settings: WorkerSettings, loop: Loop) -> Member:
    greeting, fds, _, _ = socket.recv_fds(connection, len(GREETING), len(BUFFERS))
    assert greeting == GREETING
    Channel(connection).receive(wait=True)  # Configure
    made = Member(connection, dict(zip(BUFFERS, fds, strict=True)), settings, loop)
    made.say_hello()
    return made


async def next_of(events: asyncio.Queue[Event], kind: type | tuple[type, ...]) -> Any:
    while not isinstance(event := await events.get(), kind):
        pass
    return event


def silent(waited_s: float) -> None:
    return


def test_a_round_hands_in_base_minus_local_and_loads_the_next_base(tmp_path: Path) -> None:
    module, spec = make_module(), wanted(make_module(), train={"inner_steps": 2}).spec
    settings = settings_of(spec, tmp_path)
    n = Trained(module).layout.n
    got: dict[str, Any] = {}

    async def node(trainer: TrainerProcess, events: asyncio.Queue[Event]) -> None:
        await trainer.configure(settings, events.put_nowait)
        assert (await next_of(events, Hello)).names == Trained(module).layout.names
        await trainer.initialise()
        got["initial"] = trainer.params.clone()
        trainer.params.mul_(2)
        trainer.begin(4, "b")
        event = await next_of(events, Contribution)
        got["event"], got["mean"] = event, decoded(trainer.contribution.clone(), n)
        trainer.params.fill_(0.25)
        trainer.begin(5, "c")
        await next_of(events, Progress)  # of the third step; before it, Saved may be there first or not
        trainer.save(5)
        assert (await next_of(events, Saved)).error == ""

    def script(connection: socket.socket) -> None:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        one = member(connection, settings, Loop(Trained(module), optimizer, None))
        one.wait_for_base(silent)
        got["begun"] = (one.epoch, torch.cat([p.detach().reshape(-1) for p in module.parameters()]))
        for step in range(2):
            for p in module.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            assert one.step(1.5, 7, silent) is (step == 1)
        got["second"] = (one.epoch, [p.detach().clone() for p in module.parameters()])
        got["momenta"] = one.step(1.5, 7, silent)
        one.serve_until_gone(5)

    between(node, script)
    initial = torch.cat([p.detach().reshape(-1) for p in make_module().parameters()])
    assert torch.equal(got["initial"], initial), "state 0 is the founder's module"
    assert got["begun"][0] == 4 and torch.equal(got["begun"][1], 2 * initial)
    event = got["event"]
    assert (event.epoch, event.weight, event.steps, event.loss) == (4, 14, 2, 1.5)
    assert (got["mean"] - 1.0).abs().max() < 0.01, "two steps of 0.5 down"
    assert got["second"][0] == 5 and all(bool((p == 0.25).all()) for p in got["second"][1])


def test_with_gradients_the_mean_of_the_batches_is_handed_in(tmp_path: Path) -> None:
    module = make_module()
    spec = wanted(module, train={"inner_steps": 0, "accumulation": 2}).spec
    assert spec.outer.optimizer == "adamw"
    settings = settings_of(spec, tmp_path)
    got: dict[str, Any] = {}

    async def node(trainer: TrainerProcess, events: asyncio.Queue[Event]) -> None:
        await trainer.configure(settings, events.put_nowait)
        trainer.begin(0, "b")
        await next_of(events, Contribution)
        got["mean"] = decoded(trainer.contribution.clone(), trainer.layout.n)
        trainer.begin(1, "c")

    def script(connection: socket.socket) -> None:
        one = member(connection, settings, Loop(Trained(module), None, None))
        one.wait_for_base(silent)
        for gradient in (1.0, 3.0):
            for p in module.parameters():
                p.grad = torch.full_like(p, gradient)
            one.step(None, 1, silent)
        assert all(p.grad is None for p in module.parameters())

    between(node, script)
    assert (got["mean"] - 2.0).abs().max() < 0.02


@pytest.mark.parametrize("inner_steps", [0, 1])
@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float64), ("meta", torch.float32)])
def test_a_scripts_default_device_and_float_type_are_its_own_affair(
    tmp_path: Path, device: str, dtype: torch.dtype, inner_steps: int
) -> None:
    """As `torch.set_default_device("cuda")` and `torch.set_default_dtype(torch.float64)` at its top."""
    module = make_module()
    spec = wanted(module, train={"inner_steps": inner_steps}).spec
    settings = replace(settings_of(spec, tmp_path), residual=True)
    got: dict[str, Any] = {}

    async def node(trainer: TrainerProcess, events: asyncio.Queue[Event]) -> None:
        await trainer.configure(settings, events.put_nowait)
        await trainer.initialise()
        trainer.begin(0, "b")
        if isinstance(await next_of(events, (Contribution, Parted)), Parted):
            return  # the script says why
        got["mean"] = decoded(trainer.contribution.clone(), trainer.layout.n)
        trainer.begin(1, "c")

    def script(connection: socket.socket) -> None:
        parameters = list(module.parameters())
        gradients = [torch.ones_like(p) for p in parameters]
        optimizer = torch.optim.Adagrad(parameters, lr=1.0) if inner_steps else None
        with torch.device(device):
            one = member(connection, settings, Loop(Trained(module), optimizer, None))
            one.wait_for_base(silent)
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            if optimizer is not None:
                optimizer.step()
            one.step(None, 1, silent)
            assert one.save(1) == ""

    try:
        torch.set_default_dtype(dtype)
        between(node, script)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (got["mean"] - 1.0).abs().max() < 0.01


def test_an_evaluation_leaves_each_part_of_the_module_in_the_mode_it_was_in(tmp_path: Path) -> None:
    """A validation that begins with module.eval() had the rest of the pass trained without dropout."""
    module, spec = make_module(), wanted(make_module(), train={"inner_steps": 1}).spec
    settings = settings_of(spec, tmp_path)
    modes: list[list[bool]] = []

    def evaluate() -> float:
        module.eval()
        return 1.0

    async def node(trainer: TrainerProcess, events: asyncio.Queue[Event]) -> None:
        await trainer.configure(settings, events.put_nowait)
        trainer.evaluate(0)
        trainer.begin(0, "a")
        await next_of(events, Validation)

    def script(connection: socket.socket) -> None:
        module[1].eval()  # a batch norm that is to stay as it is
        optimizer = torch.optim.SGD(module.parameters())
        member(connection, settings, Loop(Trained(module), optimizer, evaluate)).wait_for_base(silent)
        modes.append([part.training for part in module.modules()])

    between(node, script)
    assert modes == [[True, True, False, True]]


def test_samples_may_be_whole_numbers_of_any_kind_and_nothing_else(tmp_path: Path) -> None:
    """Of unmasked tokens, counted by numpy or torch; a float ended the conversation with the node."""
    swarm = Swarm(make_module(), torch.optim.SGD([torch.zeros(1)]), home=tmp_path)
    told: list[int] = []
    swarm._daemon = Any  # type: ignore[assignment]
    swarm._member = SimpleNamespace(  # type: ignore[assignment]
        step=lambda loss, samples, on_wait: told.append(samples)
    )
    for samples in (3, np.int64(3), np.ones(3, bool).sum(), torch.tensor(3), torch.ones(3, 1).bool().sum()):
        swarm.step(1.0, samples)
    assert told == [3] * 5 and {type(one) for one in told} == {int}
    for wrong in (0.5, 3.0, torch.tensor(3.0), torch.ones(3, dtype=torch.int64), "3", 0, np.int64(-1)):
        with pytest.raises(ValueError, match="samples is"):
            swarm.step(1.0, wrong)  # type: ignore[arg-type]
    swarm._daemon = None


def test_a_piece_of_the_difference_costs_the_same_however_many_parameters_there_are() -> None:
    """A mixture with thousands of experts went over all of them for every piece, minutes in all."""

    def calls(parameters: int) -> int:
        module = nn.ParameterList(
            [nn.Parameter(torch.full((8,), float(index))) for index in range(parameters)]
        )
        write = Trained(module).difference(torch.zeros(8 * parameters))
        start, out, count = 8 * parameters // 2 + 4, torch.empty(12), [0]
        sys.setprofile(lambda frame, event, argument: count.__setitem__(0, count[0] + 1))
        try:
            write(start, start + 12, out)
        finally:
            sys.setprofile(None)
        assert out.tolist() == [-float(index // 8) for index in range(start, start + 12)]
        return count[0]

    assert calls(400) == calls(40)


def test_the_difference_of_any_span_is_that_of_the_whole_whatever_the_parameters() -> None:
    """Empty ones, single ones, and one that does not lie in a row."""
    shapes = [(0, 3), (2, 3), (), (0,), (4, 5), (1,), (0,)]
    module = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
    module[4] = nn.Parameter(torch.randn(5, 4).t())
    trained = Trained(module)
    n = trained.layout.n
    base, local = torch.randn(n), torch.empty(n)
    trained.read(local)
    write = trained.difference(base)
    for start in range(n):
        for stop in range(start + 1, n + 1):
            out = torch.empty(stop - start)
            write(start, stop, out)
            assert torch.equal(out, (base - local)[start:stop])


def test_a_closing_round_takes_what_there_is_and_a_superseded_step_is_dropped(tmp_path: Path) -> None:
    module, spec = make_module(), wanted(make_module(), train={"inner_steps": 50}).spec
    settings = settings_of(spec, tmp_path)
    may_step = threading.Semaphore(0)
    got: dict[str, Any] = {}

    async def node(trainer: TrainerProcess, events: asyncio.Queue[Event]) -> None:
        await trainer.configure(settings, events.put_nowait)
        trainer.begin(0, "a")
        trainer.begin(0, "another fork")
        trainer.close_round(0)
        may_step.release()  # not before: fifty steps are soon taken
        event = await next_of(events, Contribution)
        got["steps"] = event.steps
        trainer.begin(1, "c")

    def script(connection: socket.socket) -> None:
        one = member(connection, settings, Loop(Trained(module), torch.optim.SGD(module.parameters()), None))
        one.wait_for_base(silent)
        may_step.acquire()
        while not (one.step(1.0, 1, silent) and one.epoch == 1):
            pass

    between(node, script)
    assert got["steps"] < 50


def test_what_is_not_finite_is_told_to_the_script_and_not_to_the_node(tmp_path: Path) -> None:
    module, spec = make_module(), wanted(make_module(), train={"inner_steps": 1}).spec
    settings = settings_of(spec, tmp_path)
    seen: list[Event] = []

    async def node(trainer: TrainerProcess, events: asyncio.Queue[Event]) -> None:
        await trainer.configure(settings, events.put_nowait)
        trainer.begin(0, "a")
        while not isinstance(event := await events.get(), Parted):
            seen.append(event)

    def script(connection: socket.socket) -> None:
        one = member(connection, settings, Loop(Trained(module), torch.optim.SGD(module.parameters()), None))
        one.wait_for_base(silent)
        with torch.no_grad():
            next(module.parameters()).fill_(float("nan"))
        one.step(None, 1, silent)

    with pytest.raises(SwarmError, match="not finite: nothing of it is contributed"):
        between(node, script)
    assert not any(isinstance(event, Contribution) for event in seen)


def test_a_module_that_has_changed_since_is_refused_in_place_of_a_contribution_of_nothing() -> None:
    """What was trained was not what was read: with full weight such a member pulled the mean to zero."""
    module = make_module()
    module[1].bias.requires_grad = False
    trained = Trained(module)
    trained.require_unchanged()
    module[0].requires_grad_(False)
    trained.require_unchanged()
    module[0].requires_grad_(True)
    module[1].bias.requires_grad = True
    with pytest.raises(SwarmError, match=r"1\.bias is trained, and was not there or was frozen"):
        trained.require_unchanged()
    module[1].bias.requires_grad = False
    module[2] = nn.Linear(20, 7)
    with pytest.raises(SwarmError, match=r"2\.weight is trained"):
        trained.require_unchanged()
    del module[2]
    with pytest.raises(SwarmError, match=r"2\.weight is no longer in it"):
        trained.require_unchanged()


def test_gradients_that_are_gone_before_they_are_handed_in_are_missed() -> None:
    module = make_module()
    trained = Trained(module)
    with pytest.raises(SwarmError, match=r"no parameter has a gradient\nhint: .* before zero_grad"):
        trained.add_gradients()
    module[0].bias.grad = torch.ones(20)
    trained.add_gradients()


def test_a_script_whose_module_changed_contributes_nothing_and_one_that_learnt_nothing_is_named(
    tmp_path: Path,
) -> None:
    module, spec = make_module(), wanted(make_module(), train={"inner_steps": 1}).spec
    settings = settings_of(spec, tmp_path)
    seen: list[Event] = []

    async def node(trainer: TrainerProcess, events: asyncio.Queue[Event]) -> None:
        await trainer.configure(settings, events.put_nowait)
        trainer.begin(0, "a")
        while not isinstance(event := await events.get(), Contribution | Parted):
            seen.append(event)
        trainer.begin(1, "b")
        while not isinstance(event := await events.get(), Parted):
            seen.append(event)

    def script(connection: socket.socket) -> None:
        one = member(connection, settings, Loop(Trained(module), torch.optim.SGD(module.parameters()), None))
        one.wait_for_base(silent)
        one.step(None, 1, silent)
        module[2] = nn.Linear(20, 5)
        one.step(None, 1, silent)

    with pytest.raises(SwarmError, match="the module is not what it was"):
        between(node, script)
    assert [one.text for one in seen if isinstance(one, Notice)] == [
        "what the script made of epoch 0 is 0, and counts as a contribution; look at its learning rate and "
        "at what requires a gradient"
    ]
    assert not any(isinstance(event, Contribution) for event in seen)


def test_a_script_of_the_second_visit_takes_up_where_the_first_left(tmp_path: Path) -> None:
    """At a node that runs by itself: the first script leaves in the middle of an epoch."""
    spec = wanted(make_module(), train={"inner_steps": 2}).spec
    settings = settings_of(spec, tmp_path)
    path = tmp_path / ("x" * 120) / "trainer.sock"  # longer than a socket's address may be
    path.parent.mkdir()

    def visit(steps: int) -> int:
        module = make_module()
        with knock(path) as connection:
            loop = Loop(Trained(module), torch.optim.SGD(module.parameters(), lr=0.1), None)
            one = member(connection, settings, loop)
            one.wait_for_base(silent)
            for _ in range(steps):
                one.step(1.0, 1, silent)
            return one.epoch

    async def run() -> list[int]:
        door = Door(path)
        assert path.stat().st_mode & 0o777 == 0o600
        trainer = TrainerProcess.await_guests(door)
        events: asyncio.Queue[Event] = asyncio.Queue()
        try:
            async with asyncio.timeout(240):
                first = asyncio.create_task(asyncio.to_thread(visit, 1))
                await trainer.configure(settings, events.put_nowait)
                trainer.begin(7, "a")
                epochs = [await first]
                await next_of(events, Parted)
                second = asyncio.create_task(asyncio.to_thread(visit, 2))
                assert (await next_of(events, Contribution)).epoch == 7
                trainer.begin(8, "b")
                return [*epochs, await second]
        finally:
            await trainer.stop(2)
            door.close()

    assert asyncio.run(run()) == [7, 8]
    assert not path.exists()


def test_a_node_that_stops_before_a_script_comes_does_not_hang(tmp_path: Path) -> None:
    async def run() -> None:
        door = Door(tmp_path / "trainer.sock")
        trainer = TrainerProcess.await_guests(door)
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await trainer.stop(3)
        door.close()

    asyncio.run(run())


@pytest.mark.parametrize("greeted", [False, True])
def test_a_script_that_is_gone_before_its_node_is_configured_has_parted(greeted: bool) -> None:
    """Not greeted, it was a BrokenPipeError that ended the node; greeted, nobody heard of it until then."""

    async def run() -> list[Event]:
        ours, theirs = socket.socketpair()
        if not greeted:
            ours.close()
        trainer = TrainerProcess.await_guests(line := Line(theirs.detach()))
        heard: list[Event] = []
        trainer.on_event = heard.append
        if greeted:
            await asyncio.to_thread(ours.recv, len(GREETING))
            ours.close()
        await asyncio.sleep(0.05)
        await trainer.stop(3)
        line.close()
        return heard

    assert asyncio.run(run()) == [Parted()]


def test_a_member_with_another_module_or_other_arguments_is_refused_in_a_line() -> None:
    spec = wanted(make_module(), train={"inner_steps": 20}).spec
    wanted(make_module()).require(spec)
    wanted(make_module(), train={"inner_steps": 20}).require(spec)
    with pytest.raises(SwarmError, match=r"train\.inner_steps: 30 here, 20 in the run"):
        wanted(make_module(), train={"inner_steps": 30}).require(spec)
    with pytest.raises(SwarmError, match=r"0\.weight 4x3 here, 0\.weight 20x30 in the run"):
        wanted(nn.Sequential(nn.Linear(3, 4))).require(spec)
    with pytest.raises(SwarmError, match="4 tensors here, 6 in the run"):
        first, second, _ = make_module()
        wanted(nn.Sequential(first, second)).require(spec)
    with pytest.raises(SwarmError, match="trains a model that the node builds"):
        wanted(make_module()).require(preset_spec("nano", "n"))
    with pytest.raises(SwarmError, match=r"train.inner_step: unknown key; did you mean train.inner_steps\?"):
        wanted(make_module(), train={"inner_step": 1})


def test_a_spec_of_very_many_tensors_still_fits_its_genesis() -> None:
    model = ExternalSpec.of(
        "0" * 64, [f"a.rather.long.name.of.layer.{i}" for i in range(3000)], [(2, 2)] * 3000
    )
    assert model.tensors == () and model.parameters == 12000


@pytest.mark.parametrize("library", ["schedulefree.adamw_schedulefree", "deepspeed.runtime.bf16_optimizer"])
def test_an_optimizer_that_steps_from_a_copy_of_the_parameters_is_refused(
    tmp_path: Path, library: str
) -> None:
    """Without any gradient schedule-free takes the module from the base back to where it was."""
    module = make_module()
    theirs = type("Theirs", (torch.optim.SGD,), {"__module__": library})(module.parameters(), lr=0.1)
    wrapped = SimpleNamespace(optimizer=theirs)  # as accelerate does
    for optimizer in (theirs, wrapped):
        with pytest.raises(SwarmError, match=f"the optimizer is {library.partition('.')[0]}'s"):
            Swarm(module, cast(Any, optimizer), home=tmp_path / "home")
    Swarm(module, torch.optim.SGD(module.parameters(), lr=0.1), home=tmp_path / "home")


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.ASGD])
def test_an_optimizers_state_comes_back_and_its_learning_rate_is_the_scripts(
    tmp_path: Path, kind: type[torch.optim.Optimizer]
) -> None:
    def stepped(lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        module = make_module()
        more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        optimizer = kind(module.parameters(), lr=lr, **more)  # type: ignore[call-arg]
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return module, optimizer

    path = tmp_path / "state.safetensors"
    _, first = stepped(0.1)
    save_state(path, first, 5, "s")
    second = kind(make_module().parameters(), lr=0.2)  # type: ignore[call-arg]
    assert load_state(path, second, "s") == 5
    assert second.param_groups[0]["lr"] == 0.2
    before, after = first.state_dict()["state"], second.state_dict()["state"]
    assert before.keys() == after.keys() and before
    for index, values in before.items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(after[index][k])) for k, v in values.items()
        )
    with pytest.raises(StateNotKept, match="of another optimizer, module"):
        load_state(path, second, "another")


def test_a_state_is_put_on_the_parameters_that_it_was_saved_of_or_on_none(tmp_path: Path) -> None:
    """torch compares groups with themselves here: moments went by number, onto others where shapes agree."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    settings = settings_of(wanted(module, train={"inner_steps": 2}).spec, tmp_path)
    decay, rest = (
        [p for p in module.parameters() if p.ndim > 1],
        [p for p in module.parameters() if p.ndim < 2],
    )

    def note(*groups: list[nn.Parameter]) -> str:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            optimizer = torch.optim.AdamW([{"params": group, "lr": 0.1} for group in groups])
            one = Member(ours, {}, settings, Loop(Trained(module), optimizer, None))
            one.say_hello()
            for p in module.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            assert one.save(3) == ""
            hello = unpack_report(theirs.recv(1 << 16)[HEADER.size :])
            assert isinstance(hello, Hello)
            return hello.note or f"of epoch {hello.inner_epoch}"

    assert note([*module.parameters()]) == "of epoch -1"
    assert note([*module.parameters()]) == "of epoch 3"
    assert note([*module[0].parameters()], [*module[1].parameters()]) == "of epoch 3", "in the same order"
    assert "starts afresh" in note(decay, rest)
    assert "starts afresh" in note(decay)


def test_a_state_that_only_pickle_could_write_is_not_written(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(make_module().parameters())
    optimizer.state[optimizer.param_groups[0]["params"][0]] = {"closure": object()}
    with pytest.raises(StateNotKept, match="holds a object"):
        save_state(tmp_path / "x", optimizer, 0, "s")


def test_a_parameter_that_was_not_trained_contributes_zero_in_bf16_too() -> None:
    module = nn.Linear(16, 16).to(torch.bfloat16)
    trained = Trained(module)
    base = torch.randn(trained.layout.n)
    trained.load(base)
    out = torch.full((trained.layout.n,), 9.0)
    trained.difference(base)(0, trained.layout.n, out)
    assert bool((out == 0).all())
