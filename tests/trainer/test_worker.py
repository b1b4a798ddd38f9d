"""The worker's own loop, in this process: what it does between two commands, with a script for a socket."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tapestry.node.spec.data import DataSettings, resolved_data
from tapestry.node.spec.training import WorkerSettings
from tapestry.node.trainer.brought import write_brought
from tapestry.node.trainer.data.sources import located_in
from tapestry.node.trainer.messages import (
    Abort,
    Begin,
    Close,
    Command,
    Contribution,
    Evaluate,
    GoOn,
    Hello,
    Judge,
    Judged,
    Progress,
    Report,
    Save,
    Saved,
    Stop,
    Tokenizing,
    Validation,
)
from tapestry.node.trainer.opening import ChannelClosed, TellTokenizing, WorkerFailure
from tapestry.node.trainer.optimizers.state import InnerStateError
from tapestry.node.trainer.worker import Worker, load_inner_state

STEPS = 4
TOKENS = 4 * 32  # of a step


class Script:
    """Gives each command when its time has come: `when(script)` holds and the worker asks.

    The worker asks before every step; where it would wait and nothing is due, the script has gone wrong.
    """

    def __init__(self, *lines: tuple[Callable[[Script], bool], Command]) -> None:
        self.lines = list(lines)
        self.told: list[Report] = []
        self.waits = False
        self.steps = 0

    def receive(self, wait: bool) -> Command | None:
        self.waits = wait
        if self.lines and self.lines[0][0](self):
            return self.lines.pop(0)[1]
        assert not wait, f"waits for ever after {self.told[-1]}"
        self.steps += 1
        return None

    def send(self, report: Report) -> None:
        self.told.append(report)

    def of(self, kind: type) -> list:
        return [report for report in self.told if isinstance(report, kind)]


def at_once(script: Script) -> bool:
    return True


def waiting(script: Script) -> bool:
    """When the worker has nothing left to do."""
    return script.waits


def contributed(count: int, steps: int = 0) -> Callable[[Script], bool]:
    """After so many contributions, and so many steps since."""
    since: list[int] = []

    def holds(script: Script) -> bool:
        if len(script.of(Contribution)) < count:
            return False
        since.append(script.steps)
        return script.steps - since[0] >= steps

    return holds


def perform(settings: WorkerSettings, script: Script) -> tuple[Tensor, Tensor]:
    """The base and the contribution's buffer, as the worker left them."""
    torch.manual_seed(1)
    worker = Worker(settings, script)  # type: ignore[arg-type]
    base, out = buffers_of(worker)
    worker.run(base, [out, out], no_initial)
    assert not script.lines
    return base, out


def buffers_of(worker: Worker) -> tuple[Tensor, Tensor]:
    size = worker.payloads.size
    return torch.randn(worker.layout.n) * 0.02, torch.zeros(size, dtype=torch.uint8)


def no_initial() -> Tensor:
    raise AssertionError("nobody asked for an initial state")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the worker's own process; more would only get into each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def overlapping(worker_settings: WorkerSettings) -> WorkerSettings:
    training = worker_settings.training
    inner = dataclasses.replace(training.train, inner_steps=STEPS, overlap=True)
    return dataclasses.replace(worker_settings, training=dataclasses.replace(training, train=inner))


def test_the_next_epoch_is_ready_when_its_base_comes_and_not_before(overlapping: WorkerSettings) -> None:
    script = Script(
        (at_once, Begin(0, 1, follows=False, counted=0, slot=0)),
        (contributed(1), GoOn(0)),
        (waiting, Begin(1, 2, follows=True, counted=0, slot=0)),
        (contributed(2), Stop()),
    )
    perform(overlapping, script)
    first, second = script.of(Contribution)
    assert (first.epoch, first.generation, first.weight) == (0, 1, STEPS * TOKENS)
    assert (second.epoch, second.generation, second.weight) == (1, 2, STEPS * TOKENS)
    assert script.told.index(second) > script.told.index(first) + 1
    assert first.waited_s == 0.0 and second.waited_s > 0.0
    assert script.steps == 2 * STEPS + 1  # the last one only to contribute
    ahead = [report for report in script.of(Progress) if report.epoch == 1]
    assert (ahead[-1].step, ahead[-1].tokens) == (STEPS, STEPS * TOKENS)


def test_contributions_carry_what_is_brought_from_an_island_as_long_as_it_is_there(
    overlapping: WorkerSettings,
) -> None:
    def contributed_by(brought: bool, lines: list[tuple[Callable[[Script], bool], Command]]) -> Tensor:
        path = Path(overlapping.cache_dir).with_name("brought.safetensors")
        settings = dataclasses.replace(overlapping, brought_path=str(path) if brought else "")
        worker = Worker(settings, script := Script(*lines))  # type: ignore[arg-type]
        base, out = buffers_of(worker)
        base.fill_(0.01)
        if brought:
            write_brought(path, torch.full_like(base, 0.5), {})
        worker.run(base, [out, out], no_initial)
        assert len(script.of(Contribution)) == sum(isinstance(command, Begin) for _, command in lines)
        codec, views = worker.payloads.codec, worker.payloads.views(out)
        made = [
            codec.decode(view, shard.n) for view, shard in zip(views, worker.payloads.shards, strict=True)
        ]
        return torch.cat(made)

    once = [(at_once, Begin(0, 1, follows=False, counted=0, slot=0)), (contributed(1), Stop())]
    again = [
        once[0],
        (contributed(1), GoOn(0)),
        (waiting, Begin(1, 2, follows=True, counted=0, slot=0)),  # steps ahead are dropped: they lack it
        (contributed(2), Stop()),
    ]
    assert contributed_by(False, once).mean().abs() < 0.05
    for lines in (once, again):
        assert abs(contributed_by(True, lines).mean() + 0.5) < 0.05  # base minus local


@pytest.mark.parametrize("overlap", [False, True])
def test_records_change_how_many_steps_of_how_many_windows_an_epoch_takes(
    overlapping: WorkerSettings, overlap: bool
) -> None:
    """Steps taken ahead keep the size that they began with; the epoch's length is that of its Begin."""
    training = overlapping.training
    train = dataclasses.replace(training.train, overlap=overlap)
    settings = dataclasses.replace(overlapping, training=dataclasses.replace(training, train=train))
    ahead = [(contributed(1), GoOn(0))] if overlap else []
    script = Script(
        (at_once, Begin(0, 1, follows=False, counted=0, slot=0)),
        *ahead,
        (waiting, Begin(1, 2, follows=overlap, counted=0, slot=0, batches=STEPS + 2, batch_size=6)),
        (contributed(2), GoOn(1)),
        (waiting, Begin(2, 3, follows=overlap, counted=0, slot=0, batches=STEPS + 2, batch_size=6)),
        (contributed(3), Stop()),
    )
    perform(settings, script)
    first, second, third = script.of(Contribution)
    assert [first.steps, second.steps, third.steps] == [STEPS, STEPS + 2, STEPS + 2]
    window = TOKENS // training.train.batch_size
    sizes = [one.tokens // one.steps // window for one in (first, second, third)]
    assert sizes == [training.train.batch_size, training.train.batch_size if overlap else 6, 6]
    last = [report.steps for report in script.of(Progress) if report.epoch == 2]
    assert last[-1] == STEPS + 2


def test_without_overlap_nothing_is_done_between_contribution_and_begin(
    worker_settings: WorkerSettings,
) -> None:
    script = Script(
        (at_once, Begin(0, 1, follows=False, counted=0, slot=0)),
        (contributed(1), Begin(1, 2, follows=True, counted=0, slot=0)),
        (contributed(2), Stop()),
    )
    perform(worker_settings, script)
    assert script.steps == 2 * worker_settings.training.train.inner_steps
    assert [report.waited_s > 0 for report in script.of(Contribution)] == [False, True]


def test_with_overlap_nothing_is_done_before_the_exchange(overlapping: WorkerSettings) -> None:
    """Who is ready first waits for the others: ahead of them it would be as far ahead of its base."""
    script = Script(
        (at_once, Begin(0, 1, follows=False, counted=0, slot=0)),
        (waiting, Begin(1, 2, follows=True, counted=0, slot=0)),
        (at_once, GoOn(0)),  # too late
        (contributed(2), Stop()),
    )
    perform(overlapping, script)
    assert script.steps == 2 * STEPS
    assert [report.waited_s > 0 for report in script.of(Contribution)] == [False, True]


def test_an_abort_or_a_begin_that_does_not_follow_starts_from_nothing(overlapping: WorkerSettings) -> None:
    begin = Begin(1, 2, follows=False, counted=0, slot=0)
    aborted = [(contributed(1, 2), Abort()), (at_once, dataclasses.replace(begin, follows=True))]
    for lines in ([(contributed(1, 2), begin)], aborted):
        script = Script(
            (at_once, Begin(0, 1, follows=False, counted=0, slot=0)),
            (contributed(1), GoOn(0)),
            *lines,
            (contributed(2), Stop()),
        )
        perform(overlapping, script)
        assert script.steps == STEPS + 2 + STEPS
        assert script.of(Contribution)[1].weight == STEPS * TOKENS


def test_a_close_after_a_begin_that_follows_counts_the_steps_before_it(overlapping: WorkerSettings) -> None:
    script = Script(
        (at_once, Begin(0, 1, follows=False, counted=0, slot=0)),
        (contributed(1), GoOn(0)),
        (contributed(1, 2), Begin(1, 2, follows=True, counted=0, slot=0)),
        (at_once, Close(1)),
        (contributed(2), Stop()),
    )
    perform(overlapping, script)
    assert script.of(Contribution)[1].weight == 2 * TOKENS


def test_a_close_that_comes_too_late_closes_nothing(overlapping: WorkerSettings) -> None:
    script = Script(
        (at_once, Begin(0, 1, follows=False, counted=0, slot=0)),
        (contributed(1), GoOn(0)),
        (contributed(1, 1), Close(0)),
        (contributed(1, 2), Begin(1, 2, follows=True, counted=0, slot=0)),
        (contributed(2), Stop()),
    )
    perform(overlapping, script)
    assert script.of(Contribution)[1].weight == STEPS * TOKENS


def test_the_contribution_is_not_touched_before_the_next_begin(overlapping: WorkerSettings) -> None:
    """The node still copies it."""
    kept: list[Tensor] = []
    buffers: list[Tensor] = []

    class Watching(Script):
        def send(self, report: Report) -> None:
            super().send(report)
            if isinstance(report, Contribution):
                kept.append(buffers[0].clone())

    script = Watching(
        (at_once, Begin(0, 1, follows=False, counted=0, slot=0)), (contributed(1), GoOn(0)), (waiting, Stop())
    )
    worker = Worker(overlapping, script)  # type: ignore[arg-type]
    base, out = buffers_of(worker)
    buffers.append(out)
    worker.run(base, [out, out], no_initial)
    assert len(script.of(Hello)) == 1 and torch.equal(out, kept[0])


def test_both_inner_states_can_be_saved_while_ahead(overlapping: WorkerSettings) -> None:
    script = Script(
        (at_once, Begin(0, 1, follows=False, counted=0, slot=0)),
        (contributed(1), GoOn(0)),
        (contributed(1, 2), Save(0)),
        (at_once, Save(1)),
        (at_once, Stop()),
    )
    perform(overlapping, script)
    assert script.of(Saved) == [Saved(0, ""), Saved(1, "")]


def test_a_stop_in_the_middle_of_a_step_is_heard_after_the_saves_before_it(
    worker_settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tapestry.node.trainer.worker.HEED_STOP_S", 0.0)
    script = Script(
        (at_once, Begin(0, 1, follows=False, counted=0, slot=0)),
        (lambda script: script.steps == 1, Save(0)),  # the first step has begun
        (at_once, Close(0)),
        (at_once, Stop()),
    )
    with pytest.raises(ChannelClosed):
        perform(worker_settings, script)
    assert script.of(Saved) == [Saved(0, "")] and not script.of(Progress) and not script.lines


@pytest.mark.parametrize("counted", [0, 1])
def test_the_residual_is_kept_from_the_begin_that_says_it_counted(
    overlapping: WorkerSettings, counted: int
) -> None:
    script = Script(
        (at_once, Begin(0, 1, follows=False, counted=0, slot=0)),
        (contributed(1), GoOn(0)),
        (contributed(1, 2), Begin(1, 2, follows=True, counted=counted, slot=0)),
        (contributed(2), Stop()),
    )
    worker = Worker(dataclasses.replace(overlapping, residual=True), script)  # type: ignore[arg-type]
    base, out = buffers_of(worker)
    worker.run(base, [out, out], no_initial)
    kept = worker._encoder._residual
    assert (kept is not None) == bool(counted)
    if kept is not None:
        assert 0 < kept.abs().max() < 0.01


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_taken_aside_is_measured_beside_its_base_and_disturbs_nothing(
    overlapping: WorkerSettings, overlap: bool
) -> None:
    """One judged after the contribution, one in the middle of what goes on ahead; the rest is as without."""
    training = overlapping.training
    inner = dataclasses.replace(training.train, overlap=overlap)
    settings = dataclasses.replace(
        overlapping, training=dataclasses.replace(training, train=inner), gate_windows=2
    )
    goes_on: list[tuple[Callable[[Script], bool], Command]] = [(contributed(1), GoOn(0))] if overlap else []

    def lines(*judged: tuple[Callable[[Script], bool], Command]) -> Script:
        return Script(
            (at_once, Begin(0, 1, follows=False, counted=0, slot=0)),
            *judged[:1],
            *goes_on,
            *judged[1:],
            (contributed(1), Begin(1, 2, follows=overlap, counted=1, slot=1)),
            (contributed(2), Stop()),
        )

    def aside(worker: Worker) -> Tensor:
        return torch.ones(worker.layout.n) * 0.02

    plain, script = lines(), lines((contributed(1), Judge("base", "next")), (at_once, Judge("next", "third")))
    outs = []
    for one in (plain, script):
        torch.manual_seed(1)
        worker = Worker(settings, one)  # type: ignore[arg-type]
        base, out = buffers_of(worker)
        second = torch.zeros_like(out)
        worker.run(base, [out, second], lambda worker=worker: aside(worker))  # type: ignore[misc]
        outs.append(torch.cat([out, second]))
    assert torch.equal(*outs)
    first, again = script.of(Judged)
    assert (first.head, again.head) == ("next", "third")
    assert again.before == again.after == first.after != first.before  # the same numbers, measured once


def test_every_set_has_its_loss_and_the_data_their_passes(
    worker_settings: WorkerSettings, text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{i * 7919 % 1009} " for i in range(3000)))
    sets = resolved_data(DataSettings(paths=(str(text_file), str(other))), "")
    settings = dataclasses.replace(worker_settings, data=sets, located=located_in(sets))
    script = Script(
        (at_once, Evaluate(0)),
        (at_once, Begin(0, 1, follows=False, counted=0, slot=0)),
        (contributed(1), Stop()),
    )
    perform(settings, script)
    (hello,), (validation,), (contribution,) = map(script.of, (Hello, Validation, Contribution))
    assert hello.sets == validation.sets == ("corpus", "other")
    assert [line.split(":")[0] for line in hello.summary] == ["data corpus", "data other"]
    assert validation.losses[0] != validation.losses[1]
    assert validation.loss == pytest.approx(sum(validation.losses) / 2)
    assert contribution.passes == pytest.approx(contribution.weight / hello.train_tokens)


def test_a_trainer_that_died_goes_on_with_the_windows_after_those_it_contributed(
    worker_settings: WorkerSettings,
) -> None:
    """In this process: what dies is the worker's memory."""
    first = Script((at_once, Begin(0, 1, follows=False, counted=0, slot=0)), (contributed(1), Stop()))
    perform(worker_settings, first)
    whole = Script(
        (at_once, Begin(1, 1, follows=False, counted=0, slot=0)),
        (contributed(1), Begin(2, 2, follows=True, counted=0, slot=0)),
        (contributed(2), Stop()),
    )
    perform(worker_settings, whole)
    passes = [report.passes for report in (*first.of(Contribution), *whole.of(Contribution))]
    assert passes == pytest.approx([passes[0], 2 * passes[0], 3 * passes[0]])


def test_a_stop_while_the_data_are_tokenized_ends_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((0.0, 1.5, 1.6, 3.0))
    monkeypatch.setattr("tapestry.node.trainer.worker.time.monotonic", lambda: next(times))
    script = Script((lambda script: len(script.told) == 1, Stop()))
    tell = TellTokenizing(script)  # type: ignore[arg-type]
    tell(10, 100)
    tell(20, 100)
    with pytest.raises(ChannelClosed):
        tell(30, 100)
    assert script.told == [Tokenizing(10, 100, 0.0)]


def test_a_codec_or_shards_that_there_are_not_are_a_fault_of_the_settings(
    worker_settings: WorkerSettings,
) -> None:
    for changes in ({"codec": "int7"}, {"shard_elements": 255}):
        with pytest.raises(WorkerFailure) as caught:
            Worker(dataclasses.replace(worker_settings, **changes), Script())  # type: ignore[arg-type]
        assert caught.value.reason == "settings"


def test_a_worker_reads_no_source_that_was_not_asked_about(worker_settings: WorkerSettings) -> None:
    with pytest.raises(WorkerFailure, match="it leads to") as caught:
        Worker(dataclasses.replace(worker_settings, located=()), Script())  # type: ignore[arg-type]
    assert caught.value.reason == "data"


class Rank:
    """An inner optimizer with a saved part: epoch and steps, none, or one that cannot be used."""

    def __init__(self, saved: tuple[int, int] | str | None) -> None:
        self.saved, self.steps, self.forgot = saved, 0, False

    def load(self, path: Path) -> int | None:
        if isinstance(self.saved, str):
            raise InnerStateError(self.saved)
        if self.saved is None:
            return None
        epoch, self.steps = self.saved
        return epoch

    def forget(self) -> None:
        self.steps, self.forgot = 0, True


class Ranks:
    """A group whose other ranks' parts are of these epochs and steps."""

    def __init__(self, *others: tuple[int, int]) -> None:
        self.columns = [list(column) for column in zip(*others, strict=True)]

    def each(self, value: float) -> list[float]:
        return [value, *self.columns.pop(0)]


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        ((9, 50), [(9, 50)], (9, "")),
        (None, [(-1, 0)], (-1, "")),
        ("another shape", [(-1, 0)], (-1, "starts afresh: another shape")),
        ("another shape", [(3, 20)], (-1, "starts afresh: another shape")),
        (None, [(3, 20)], (-1, "parts are of other epochs (rank 0: -1, rank 1: 3)")),
        ((9, 50), [(9, 50), (8, 45)], (-1, "parts are of other epochs (rank 0: 9, rank 1: 9, rank 2: 8)")),
        ((9, 50), [(9, 30)], (-1, "parts are of other epochs")),
    ],
)
def test_ranks_take_up_one_inner_state_or_all_begin_afresh(
    own: tuple[int, int] | str | None, others: list[tuple[int, int]], expected: tuple[int, str]
) -> None:
    """With 8 GPUs, then 4, then 8 again, half of each parameter went on with moments of weeks ago."""
    rank = Rank(own)
    epoch, note = load_inner_state(rank, Path("x"), Ranks(*others))  # type: ignore[arg-type]
    assert epoch == expected[0] and expected[1] in note and bool(note) is bool(expected[1])
    assert rank.forgot is (epoch < 0 <= others[0][0]) and (rank.steps > 0) is (epoch >= 0)


def test_one_process_alone_takes_up_what_it_saved() -> None:
    assert load_inner_state(Rank((9, 50)), Path("x"), None) == (9, "")  # type: ignore[arg-type]
    assert load_inner_state(Rank("damaged"), Path("x"), None) == (  # type: ignore[arg-type]
        -1,
        "the inner optimizer starts afresh: damaged",
    )
