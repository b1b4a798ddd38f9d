"""What is remembered for the page: bounded, mended when a fork is left, and the same after a restart."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tapestry.node.surface import history as history_module
from tapestry.node.surface.history import (
    CONTRIBUTORS_MAX,
    EVENTS_MAX,
    POINTS_MAX,
    RECORDS_MAX,
    History,
    HistoryFile,
    RecordSeen,
    plain,
    read_history,
)

RUN = "ab" * 32


def _record(epoch: int, head: str = "cd") -> RecordSeen:
    return RecordSeen(epoch, head * 32, 1.0, 0, False, 2, (("a", 5), ("b", 0)))


def _epochs(history: History) -> list[int]:
    return [point["epoch"] for point in history.everything()["points"]]


def _grown(count: int) -> History:
    history = History()
    for epoch in range(1, count + 1):
        history.point(epoch, contributions=2, sent=10, tokens=epoch * 100)
    return history


def test_what_is_known_of_an_epoch_comes_together_in_one_point() -> None:
    history = History()
    history.point(4, contributions=3, loss=2.5, tokens=100)
    history.point(4, round_s=0.4, phases={"ready": 0.1})
    history.point(4, validation={"fr": 2.0, "de": math.nan})
    history.point(4, loss=None, tokens_per_second=math.nan)
    (point,) = history.everything()["points"]
    assert point.pop("at") > 0
    assert {k: v for k, v in point.items() if v} == {
        "epoch": 4,
        "contributions": 3,
        "loss": 2.5,
        "tokens": 100,
        "round_s": 0.4,
        "phases": {"ready": 0.1},
        "validation": {"fr": 2.0},
    }


def test_points_are_bounded_reach_back_to_the_first_and_lose_no_bytes() -> None:
    history = _grown(5 * POINTS_MAX)
    points = history.everything()["points"]
    assert POINTS_MAX / 2 < len(points) <= POINTS_MAX
    assert points[0]["epoch"] == 1 and points[-1]["epoch"] == 5 * POINTS_MAX
    assert sum(point["sent"] for point in points) == 10 * 5 * POINTS_MAX
    assert _epochs(history)[-100:] == [*range(5 * POINTS_MAX - 99, 5 * POINTS_MAX + 1)], (
        "the last ones are whole"
    )


def test_a_loss_of_an_epoch_that_was_thinned_out_makes_no_point_out_of_order() -> None:
    history = _grown(2 * POINTS_MAX)
    before = _epochs(history)
    history.point(2, validation={"fr": 2.0})
    assert _epochs(history) == before == sorted(before)


def test_leaving_a_fork_takes_back_what_came_after_it() -> None:
    history = _grown(9)
    history.record(_record(8))
    history.record(_record(9))
    history.point(7, contributions=1)
    history.record(_record(7, "ef"))
    assert _epochs(history) == [1, 2, 3, 4, 5, 6, 7]
    assert [(r["epoch"], r["head"][:2]) for r in history.everything()["records"]] == [(7, "ef")]


def test_news_are_told_once_and_in_order_and_none_is_skipped_in_silence() -> None:
    history = History()
    told = history.count
    history.tell("one")
    history.record(_record(1))
    assert [plain(entry).get("text") for entry in history.since(told) or ()] == ["one", None]
    assert history.since(history.count) == []
    for number in range(2 * EVENTS_MAX):
        history.tell(f"event {number}")
    assert history.since(told) is None
    assert len(history.everything()["events"]) == EVENTS_MAX


def test_records_are_bounded() -> None:
    history = History()
    for epoch in range(1, 3 * RECORDS_MAX):
        history.record(_record(epoch))
    assert [r["epoch"] for r in history.everything()["records"]] == [*range(2 * RECORDS_MAX, 3 * RECORDS_MAX)]


# ---- its file ----------------------------------------------------------------------------------------


def _kept(path: Path) -> History:
    """A history that goes on where `path` ended."""
    history = History()
    history.keep_in(HistoryFile(path, RUN), read_history(path, RUN))
    return history


def _close(history: History) -> None:
    assert history._file is not None
    history._file.close()


def test_a_restart_forgets_nothing_and_puts_what_was_said_meanwhile_after_it(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    first = _kept(path)
    first.tell("before", "warning")
    first.record(_record(1))
    first.point(1, contributions=2, validation={"fr": 2.5}, phases={"ready": 0.5})
    _close(first)
    second = History()
    second.tell("after")
    second.keep_in(HistoryFile(path, RUN), read_history(path, RUN))
    _close(second)
    assert [event["text"] for event in second.everything()["events"]] == ["before", "after"]
    assert second.everything()["points"] == first.everything()["points"]
    assert second.everything()["records"] == first.everything()["records"]
    assert path.stat().st_mode & 0o077 == 0


def test_whoever_watched_before_the_file_was_read_takes_everything_again(tmp_path: Path) -> None:
    history = History()
    history.tell("starts")
    told = history.count
    history.keep_in(HistoryFile(tmp_path / "history.jsonl", RUN), ())
    _close(history)
    assert history.since(told) is None


@pytest.mark.parametrize(
    "line",
    [
        b'{"point":{"epoch":3,"at":1.0,"lo',
        b'{"point":{"epoch":"3","at":1.0}}',
        b'{"point":{"epoch":3,"at":1.0,"loss":NaN}}',
        b'{"point":{"epoch":3,"at":1.0,"of_a_later_version":1}}',
        b'{"record":{"epoch":3}}',
        b'{"event":{"at":"x","level":"info","text":"y"}}',
        b"[1]",
        b"\xff\xfe",
    ],
)
def test_a_line_that_cannot_be_read_is_left_out_and_the_others_stay(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "history.jsonl"
    good = b'{"point":{"epoch":2,"at":1.0}}'
    path.write_bytes(b"\n".join([json.dumps({"run_id": RUN}).encode(), good, line]))
    assert [plain(entry)["epoch"] for entry in read_history(path, RUN)] == [2]


def test_an_event_is_one_line_whatever_a_peer_said() -> None:
    history = History()
    history.tell("this node is joining: removed: \x1b[2J\nready")
    assert history.everything()["events"][0]["text"] == "this node is joining: removed: ?[2J ready"


def test_the_history_of_another_run_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "history.jsonl"
    _close(_kept(path))
    assert read_history(path, "ef" * 32) == [] and not path.exists()
    assert (tmp_path / "history.jsonl.corrupt").exists()
    assert "nothing is to be done" in caplog.text and "damaged" not in caplog.text


def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "LINES_ADDED_MAX", 50)
    history = _kept(tmp_path / "history.jsonl")
    for number in range(1000):
        history.tell(f"event {number}")
    _close(history)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert len(lines) <= 1 + EVENTS_MAX + 50 and "event 999" in lines[-1]


def test_a_disk_that_cannot_be_written_ends_the_writing_and_nothing_else(tmp_path: Path) -> None:
    history = _kept(tmp_path / "no such folder" / "history.jsonl")
    for number in range(10_000):
        history.tell(f"event {number}")
    _close(history)
    assert history.everything()["events"][-1]["text"] == "event 9999"


def test_the_last_epoch_that_counts_a_member_is_remembered_and_forgotten_with_its_fork() -> None:
    history = History()
    history.record(RecordSeen(1, "a", 0.0, 0, False, 2, (("hanoi", 5), ("lima", 5))))
    history.record(RecordSeen(2, "b", 0.0, 0, False, 2, (("hanoi", 5), ("lima", 0))))
    assert history.last_contributions == {"hanoi": 2, "lima": 1}
    history.record(RecordSeen(2, "c", 0.0, 0, False, 1, (("lima", 5),)))
    assert history.last_contributions == {"lima": 2}
    history.contributed(3, [f"peer{i}" for i in range(CONTRIBUTORS_MAX)])
    assert len(history.last_contributions) == CONTRIBUTORS_MAX and "lima" not in history.last_contributions
