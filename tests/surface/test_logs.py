"""The log: fields, repeats, rotation, levels at run time, and that nobody waits for a slow reader."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tapestry.node.cli.main import cli
from tapestry.node.home import Home
from tapestry.node.surface import logs
from tapestry.node.surface.log_levels import SUBSYSTEMS, WatchedLevels, read_levels, write_level
from tapestry.node.surface.log_lines import Json, Text
from tapestry.node.surface.logs import LiveLine, Log, LogLimits, Repeats, RotatedFile, start_logging

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """What start_logging changes for the process, as it was."""
    ours, everybody = logging.getLogger("tapestry"), logging.getLogger()
    before = ours.handlers, ours.level, ours.propagate, everybody.handlers
    yield
    logging.captureWarnings(False)
    ours.handlers, ours.level, ours.propagate, everybody.handlers = before
    for name in SUBSYSTEMS:
        logging.getLogger(f"tapestry.{name}").setLevel(logging.NOTSET)


def record(text: str, *args: object, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("tapestry.links", level, "", 0, text, args, None)


def test_json_has_fields_of_their_own_types_and_none_that_a_peer_made_up() -> None:
    said = "x level=info epoch=99\n{}"
    line = Json().format(
        record("link=failed epoch=%d share=%.3f peer=%s reason=%r %s", 3, 0.5, "ab", said, said)
    )
    entry = json.loads(line)
    assert "\n" not in line
    assert (entry["event"], entry["link"], entry["epoch"]) == ("link=failed", "failed", 3)
    assert (entry["share"], entry["peer"], entry["reason"], entry["level"]) == (0.5, "ab", said, "info")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])
    entry = json.loads(Json().format(record("committed loss=%.4f path=%s.corrupt", math.nan, "f")))
    del entry["time"]
    assert entry == {
        "level": "info",
        "subsystem": "links",
        "event": "committed",
        "message": "committed loss=nan path=f.corrupt",
        "loss": None,
        "path": "f.corrupt",
    }


def test_text_has_date_level_and_subsystem_on_one_line_whatever_a_peer_said() -> None:
    said = "a\n2026-01-01 00:00:00.000 error \x1b[2J"
    line = Text().format(record("refused %s", said, level=logging.WARNING))
    head = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} warning links "
    assert re.fullmatch(head + r"refused a\\n2026.*\\x1b\[2J", line)


def test_a_trace_that_quotes_a_peer_makes_no_line_of_its_own() -> None:
    said = "a\n2026-01-01 00:00:00.000 error \x1b[2J"
    broken = record("stream handler failed", level=logging.ERROR)
    broken.exc_info = (ValueError, ValueError(said), None)
    first, *rest = Text().format(broken).split("\n")
    assert first.endswith("stream handler failed") and rest == [
        "  ValueError: a",
        r"  2026-01-01 00:00:00.000 error \x1b[2J",
    ]


def test_the_live_line_is_one_line_whatever_a_peer_said() -> None:
    stream = io.StringIO()
    LiveLine(stream, enabled=True).show("degraded: removed: \x1b[2J\nready")
    assert stream.getvalue() == "\r\x1b[K" + r"degraded: removed: \x1b[2J\nready"


def test_every_logger_is_a_subsystem_that_log_level_knows() -> None:
    sources = [p.read_text() for package in ("node", "dht") for p in (ROOT / package).rglob("*.py")]
    names = {name for text in sources for name in re.findall(r'getLogger\("tapestry\.([a-z0-9_.]+)"', text)}
    assert names == SUBSYSTEMS.keys() - {"all"}
    assert not [text for text in sources if "getLogger(__name__)" in text]


def test_the_same_warning_is_told_once_a_minute_with_how_often_it_came() -> None:
    repeats = Repeats(60.0, alike_max=2)
    kind = ("tapestry.links", "link=failed peer=%s")
    told = [repeats.may_tell(kind, text, now) for now, text in enumerate(["a", "a", "b", "c", "b"])]
    assert told == [True, False, True, False, False]
    assert repeats.take(59.0) == []
    assert repeats.take(60.0) == [(kind, "b", 3)]
    assert repeats.may_tell(kind, "a", 61.0) and repeats.take(200.0) == []


def test_the_file_is_rotated_by_size_and_its_forerunners_are_counted(tmp_path: Path) -> None:
    file = RotatedFile(tmp_path / "log", LogLimits(file_bytes_max=50, files_max=3))
    for index in range(40):
        file.write(f"line {index:02}")
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1", "log.2"]
    lines = "".join((tmp_path / name).read_text() for name in ("log.2", "log.1", "log")).splitlines()
    assert lines == [f"line {index:02}" for index in range(40 - len(lines), 40)] and len(lines) > 12
    assert all(path.stat().st_size <= 50 for path in tmp_path.iterdir())
    (tmp_path / "log").rename(tmp_path / "taken")
    file.reopen()
    file.write("after")
    file.close()
    assert (tmp_path / "log").read_text() == "after\n"


def test_a_held_terminal_keeps_nobody_waiting_and_the_lost_lines_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logs, "LINES_WAITING_MAX", 5)
    monkeypatch.setattr(logs, "TICK_S", 0.01)
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "w") as terminal:
        log = start_logging("text", terminal)
        began_s = time.monotonic()
        for index in range(200):
            logging.getLogger("tapestry.node").info("line=%d %s", index, "x" * 1000)
        assert time.monotonic() - began_s < 2.0
        text = b""
        while b"lines=lost" not in text:
            text += os.read(read_end, 65536)
        log.close()
    os.close(read_end)
    assert b"line=0 " in text and b"line=199 " not in text


def test_a_log_is_json_from_its_first_line_also_for_what_libraries_say(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = start_logging("json", stream)
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    logging.getLogger("tapestry.node").info("first epoch=%d", 1)
    log.flush()
    log.keep_in(tmp_path / "node.log", tmp_path / "levels", tmp_path / "out", LogLimits())
    logging.getLogger("tapestry.node").info("second")
    log.close()
    entries = [json.loads(line)["event"] for line in stream.getvalue().splitlines()]
    assert entries == ["Task exception was never retrieved", "first", "second"]
    kept = (tmp_path / "node.log").read_text().splitlines()
    assert [json.loads(line)["event"] for line in kept] == ["second"]


def test_a_node_in_the_background_logs_to_its_file_only(tmp_path: Path) -> None:
    with (tmp_path / "out").open("a") as stream:
        log = Log("text", stream)
        log.keep_in(tmp_path / "node.log", tmp_path / "levels", tmp_path / "out", LogLimits())
        log.line("a line")
        log.close()
    assert (tmp_path / "out").read_text() == "" and (tmp_path / "node.log").read_text() == "a line\n"
    assert not log.is_on_screen


def test_what_was_printed_in_other_words_is_for_the_file_alone(tmp_path: Path) -> None:
    screen, home = io.StringIO(), Home(tmp_path)
    log = start_logging("text", screen)
    log.keep_in(home.log, home.log_levels, home.output, LogLimits())
    logging.getLogger("tapestry.node").info("started run_id=%s", "ab", extra={"printed": True})
    logging.getLogger("tapestry.node").info("committed")
    log.close()
    assert "started" not in screen.getvalue() and "committed" in screen.getvalue()
    assert "started run_id=ab" in home.log.read_text()


def test_levels_follow_their_file_and_go_back_with_it(tmp_path: Path) -> None:
    path = tmp_path / "levels.json"
    watched = WatchedLevels(path)
    links = logging.getLogger("tapestry.links")
    watched.look()
    write_level(path, "links", "debug")
    watched.look()
    assert links.getEffectiveLevel() == logging.DEBUG
    path.write_text("{")
    watched.look()  # refused, and told
    assert links.getEffectiveLevel() == logging.DEBUG
    path.unlink()
    write_level(path, "links", "info")
    watched.look()
    assert links.level == logging.NOTSET and read_levels(path) == {}


def test_log_level_writes_shows_and_refuses(tmp_path: Path) -> None:
    def run(*args: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["log-level", *args, "--home", str(tmp_path)])
        return result.exit_code, result.output

    code, said = run("links", "debug")
    assert code == 0 and said.startswith("links says debug and above, from the next start on; the log is ")
    home = Home(tmp_path)
    with home.lock():
        home.lock_file.write_text("1 1 another-boot another-namespace elsewhere\n")  # in another container
        assert run("links", "debug")[1].startswith("links says debug and above, within a second; ")
    assert re.search(r"^links +debug ", run()[1], re.MULTILINE)
    code, said = run("lings", "debug")
    assert code == 2 and "'lings': did you mean links?" in said and "'p2pd'" not in said
    assert run("links", "loud")[0] == 2 and "'p2pd'" in run("xyzzy", "debug")[1]
    path = tmp_path / "log-levels.json"
    path.write_text("[]")
    assert run("links", "info") == (2, f"error: {path}: not a table\nhint: remove that file\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("end", [Log.leave_screen, Log.close])
def test_the_live_line_is_gone_where_others_write_next(end: Callable[[Log], None]) -> None:
    """An error, or the shell."""
    terminal = Terminal()
    log = Log("text", terminal)
    log.show("starting trainer")
    log.line("12:00 info node started")
    end(log)
    text = terminal.getvalue()
    assert "12:00 info node started\n" in text and text.rpartition("\r\x1b[K")[2] == ""
    log.close()
