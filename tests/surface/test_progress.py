"""How far something long is: one form, on a terminal and off it."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable

import pytest

from tapestry.node.cli import said as said_module
from tapestry.node.cli.said import Said, waited_for
from tapestry.node.progress import Progress, counted, form


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_rate_and_time_left_are_those_since_it_began_here() -> None:
    clock = Clock()
    progress = Progress(clock)
    assert progress.text == ""
    progress.update("state bytes", 100_000_000, 271_000_000)  # a download that goes on
    assert progress.text == "state 36 %, 100 of 271 MB"
    clock.now_s += 10
    progress.update("state bytes", 171_000_000, 271_000_000)
    assert progress.text == "state 63 %, 171 of 271 MB, 7.1 MB/s, 14 s left"
    progress.update("replaying", 0, 29)
    assert progress.text == "replaying 0 %, 0 of 29"
    clock.now_s += 15
    progress.update("replaying", 12, 29)
    assert progress.text == "replaying 41 %, 12 of 29, 0.8/s, 21 s left"
    progress.update("restoring", 0, 1)
    clock.now_s += 90
    assert progress.text == "restoring, 1.5 min"
    progress.update("waiting for a peer", 0, 0)
    assert progress.text == "waiting for a peer"
    progress.end()
    assert progress.text == ""


def test_the_form_of_what_is_slow_large_or_done() -> None:
    assert form("x", 1, 10, 0.01) == "x 10 %, 1 of 10, 1.7 min each, 15.0 min left"
    assert form("x bytes", 1_500_000_000, 3_000_000_000, 0) == "x 50 %, 1.5 of 3.0 GB"
    assert form("x bytes", 10, 10, 5.0) == "x 100 %, 10 of 10 B, 5 B/s"
    assert form("x bytes", 0, 0, 0) == "x 0 %, 0 of 0 B"


def test_what_says_how_much_more_it_did_is_added_up_to_the_whole_at_most() -> None:
    steps: list[tuple[str, int, int]] = []
    more = counted(lambda *step: steps.append(step), "copying bytes", 10)
    more(4)
    more(9)
    assert steps == [("copying bytes", 4, 10), ("copying bytes", 10, 10)]


class Screen(io.StringIO):
    """stderr; `shown` once something was written that has the words."""

    def __init__(self, terminal: bool, words: str) -> None:
        super().__init__()
        self.terminal, self.words, self.shown = terminal, words, threading.Event()

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        count = super().write(text)
        if self.words in text:
            self.shown.set()
        return count


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Screen]:
    def made(terminal: bool, words: str, quiet_s: float = 0.0, said_every_s: float = 0.0) -> Screen:
        screen = Screen(terminal, words)
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(said_module, "QUIET_S", quiet_s)
        monkeypatch.setattr(said_module, "SAID_EVERY_S", said_every_s)
        monkeypatch.setattr(said_module, "DRAWN_EVERY_S", 0.001)
        return screen

    return made


def test_on_a_terminal_it_is_one_line_that_is_gone_at_the_end(screen: Callable[..., Screen]) -> None:
    terminal = screen(True, "restoring, 0 s")
    with Said() as said:
        said.update("restoring " + "x" * 200, 0, 1)
        said.update("restoring", 0, 1)
        assert terminal.shown.wait(10)
    text = terminal.getvalue()
    assert "\n" not in text and max(map(len, text.split("\r"))) < 80
    assert text.endswith("\r") and not text.split("\r")[-2].strip(), "a clean line"


def test_elsewhere_it_is_a_line_now_and_then(screen: Callable[..., Screen]) -> None:
    log = screen(False, "restoring, 0 s")
    with Said("restoring"):
        assert log.shown.wait(10)
    assert set(log.getvalue().splitlines()) == {"restoring, 0 s"}


def test_what_has_said_nothing_yet_is_starting(screen: Callable[..., Screen]) -> None:
    """Commands import torch in it, which takes seconds."""
    terminal = screen(True, "starting, 0 s")
    with Said():
        assert terminal.shown.wait(10)


def test_what_is_short_says_nothing(screen: Callable[..., Screen]) -> None:
    terminal = screen(True, "", quiet_s=60.0)
    with Said() as said:
        said.update("restoring", 0, 1)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_waited_for_is_said_soon_everywhere_and_on_stderr_alone(
    screen: Callable[..., Screen], terminal: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = screen(terminal, "waiting for the node, 0 s", said_every_s=60.0)
    with waited_for("waiting for the node"):
        assert shown.shown.wait(10)
    assert terminal or shown.getvalue() == "waiting for the node, 0 s\n", "one line, not one each moment"
    assert capsys.readouterr().out == ""
