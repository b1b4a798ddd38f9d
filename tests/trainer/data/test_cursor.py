"""Nothing skipped, nothing repeated, however epochs begin, end, begin again and die."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tapestry.node.trainer.data import cursor as cursor_module
from tapestry.node.trainer.data import tokens
from tapestry.node.trainer.data.cursor import Cursor
from tapestry.node.trainer.data.order import Course, Position, WindowOrder
from tapestry.node.trainer.data.seen import Seen, Text, go_on, read_known

WINDOWS = {"first": 50, "second": 7}
ORDER = WindowOrder((Course.of(b"first", 50), Course.of(b"second", 7)), (50, 7))
BATCH = 4


def _cursor(folder: Path, **windows: int) -> Cursor:
    """Of sources with so many windows each, as they go on."""
    path = folder / "trainer" / "cursor.json"
    texts = [_text(name, count) for name, count in (windows or WINDOWS).items()]
    gone_on = go_on(read_known(path), texts)
    return Cursor(path, _order(gone_on.sources), gone_on.sources, gone_on.absent)


def _text(name: str, windows: int) -> Text:
    return Text(name, f"{name} {windows}", windows, False, name.encode(), lambda count: f"{name} {count}")


def _order(sources: tuple[Seen, ...]) -> WindowOrder:
    return WindowOrder(tuple(one.course for one in sources), tuple(one.course.count for one in sources))


def test_epochs_follow_one_another_across_a_restart(tmp_path: Path) -> None:
    first = _cursor(tmp_path)
    assert first.begin(0) == ORDER.start()
    first.finish(0, 20)
    assert first.begin(1) == ORDER.advance(ORDER.start(), 20)
    again = _cursor(tmp_path)
    assert again.begin(1) == ORDER.advance(ORDER.start(), 20)
    again.finish(1, 4)
    assert again.passes == pytest.approx(24 / 57)


def test_an_epoch_that_begins_again_begins_where_it_did(tmp_path: Path) -> None:
    """After an aborted round, and after a fork many epochs later, with a restart between."""
    one = _cursor(tmp_path)
    starts = []
    for epoch in range(5):
        starts.append(one.begin(epoch))
        one.finish(epoch, 8)
    assert [one.begin(epoch) for epoch in (4, 2, 0)] == [starts[4], starts[2], starts[0]]
    again = _cursor(tmp_path)
    assert [again.begin(epoch) for epoch in (4, 2, 0)] == [starts[4], starts[2], starts[0]]
    again.finish(2, 4)  # closed earlier this time: what came after is another life
    assert again.begin(3) == ORDER.advance(starts[2], 4)


def test_an_epoch_that_was_never_finished_leaves_its_windows_to_the_next(tmp_path: Path) -> None:
    one = _cursor(tmp_path)
    one.begin(0)
    one.finish(0, 8)
    assert one.begin(1) == one.begin(7)


def test_an_epoch_that_begins_ahead_of_its_base_begins_where_it_will(tmp_path: Path) -> None:
    one = _cursor(tmp_path)
    one.begin(0)
    one.finish(0, 8)
    ahead = one.begin(1)  # with overlap, before the base of epoch 1 is there
    assert _cursor(tmp_path).begin(1) == ahead == one.begin(1)


def test_a_source_that_stays_goes_on_and_a_new_one_begins(tmp_path: Path) -> None:
    one = _cursor(tmp_path)
    one.begin(0)
    one.finish(0, 30)
    seen = ORDER.advance(ORDER.start(), 30).seen
    other = _cursor(tmp_path, second=7, third=90)
    assert other.begin(1) == Position((seen[1], 0), (0, 0))
    other.finish(1, 10)
    assert _cursor(tmp_path, second=7, third=90).begin(1) == Position((seen[1], 0), (0, 0))


def test_a_source_that_was_left_out_for_a_while_goes_on(tmp_path: Path) -> None:
    one = _cursor(tmp_path)
    one.begin(0)
    one.finish(0, 30)
    seen = ORDER.advance(ORDER.start(), 30).seen
    for epoch in (1, 2):
        without = _cursor(tmp_path, second=7)
        without.begin(epoch)
        without.finish(epoch, 3)
    assert _cursor(tmp_path).begin(3) == Position((seen[0], seen[1] + 6), (0, 0))


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[]",
        b"{",
        b'{"version": 1}',
        b'{"version": 1, "key": 5, "before": [0], "next": ["x"]}',
        b'{"version": 2, "sources": [{"sizes": []}]}',
    ],
)
def test_a_damaged_file_says_nothing(tmp_path: Path, damage: bytes) -> None:
    one = _cursor(tmp_path)
    one.begin(0)
    one.finish(0, 8)
    (tmp_path / "trainer" / "cursor.json").write_bytes(damage)
    assert _cursor(tmp_path).begin(1) == ORDER.start()


def test_the_file_is_private_small_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursor_module, "EPOCHS_KEPT", 4)
    one = _cursor(tmp_path)
    for epoch in range(20):
        one.begin(epoch)
        one.finish(epoch, 1)
    path = tmp_path / "trainer" / "cursor.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(json.loads(path.read_text())["epochs"]) == ["16", "17", "18", "19"]
    assert path.stat().st_size < 1000


class Life(RuleBasedStateMachine):
    """A trainer's life: epochs begin, are stepped, finished, aborted, and it may die at every point.

    What counts is the chain of finished epochs: each must begin where the one before it ended.
    """

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = Path(tempfile.mkdtemp())
        self.cursor = _cursor(self.folder)
        self.finished: dict[int, tuple[Position, Position]] = {}
        self.given: dict[int, Position] = {}  # beginnings that were told and not made void since
        self.going: int | None = None

    @rule(epoch=st.integers(0, 8))
    def begin(self, epoch: int) -> None:
        start = self.cursor.begin(epoch)
        if epoch in self.finished:
            assert start == self.finished[epoch][0], "an epoch that began before gave other windows"
        self.going = epoch

    @precondition(lambda self: self.going is not None)
    @rule(batches=st.integers(1, 5), dies=st.sampled_from(["", "before the write", "after the write"]))
    def finish(self, batches: int, dies: str) -> None:
        assert self.going is not None
        epoch, self.going = self.going, None
        start = self.cursor.begin(epoch)
        if dies == "before the write":
            self.restart()
            return
        self.cursor.finish(epoch, batches * BATCH)
        end = ORDER.advance(start, batches * BATCH)
        if self.finished.get(epoch) != (start, end):
            self.finished = {one: both for one, both in self.finished.items() if one < epoch}
        self.finished[epoch] = (start, end)
        if dies:
            self.restart()

    @rule()
    def abort(self) -> None:
        self.going = None

    @rule()
    def restart(self) -> None:
        self.cursor, self.going = _cursor(self.folder), None

    @invariant()
    def nothing_is_skipped_and_nothing_repeated(self) -> None:
        place = ORDER.start()
        for _, (start, end) in sorted(self.finished.items()):
            assert start == place, "windows between two epochs were skipped, or came twice"
            place = end

    def teardown(self) -> None:
        import shutil

        shutil.rmtree(self.folder)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync takes milliseconds, and the tests need thousands."""
    monkeypatch.setattr(tokens.os, "fsync", lambda fd: None)


def test_a_life_of_any_kind_skips_nothing_and_repeats_nothing() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Life, settings=settings(max_examples=60, stateful_step_count=20, deadline=None))
