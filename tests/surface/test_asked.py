"""The one line that `start --data` asks for at a terminal, of data that nobody declared: on a real pty."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tapestry.node.errors import ExitCode
from tapestry.node.home import Home
from tapestry.node.spec.declared import FORM, Declared

QUESTION = "Whose is it, and under what licence?"
DEADLINE_S = 120.0
# The command as it is, but for the node that it would start.
COMMAND = """
import fcntl, sys, termios, types
if sys.stdin.isatty():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that a Ctrl-C typed there reaches it
launch = types.ModuleType("tapestry.node.daemon.launch")
launch.run = lambda config: print("a node reads") or 0
import tapestry.node.daemon
sys.modules[launch.__name__] = tapestry.node.daemon.launch = launch
from tapestry.node.cli.entry import main
main()
"""


class Terminal:
    """`tapestry start --data TEXT`, with somebody at the keyboard."""

    def __init__(self, home: Home, text: Path) -> None:
        self.seen = ""
        self._screen, terminal = pty.openpty()
        words = ["start", "--home", str(home.path), "--data", str(text)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *words],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)

    def wait_for(self, words: str) -> None:
        while words not in self.seen:
            assert self._read(), f"it ended: {self.seen}"

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def end(self) -> int:
        """All that it says to its end, and its exit code."""
        while self._read():
            pass
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._screen], [], [], DEADLINE_S)
        assert ready, f"it said nothing more for {DEADLINE_S} s: {self.seen}"
        try:
            found = os.read(self._screen, 4096)
        except OSError:  # how Linux says that nobody has the other side open any more
            found = b""
        self.seen += found.decode()
        return bool(found)


@pytest.fixture
def sit(home: Home, text: Path) -> Iterator[Callable[[], Terminal]]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(closing(Terminal(home, text)))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "letters.txt"
    path.write_text("Dear all,\n")
    return path


def test_whoever_sits_at_the_terminal_is_asked_once_and_the_answer_is_the_declaration(
    home: Home, text: Path, sit: Callable[[], Terminal]
) -> None:
    first = sit()
    first.wait_for(QUESTION)
    assert "a node reads" not in first.seen and f"{text} is not declared for base yet" in first.seen
    first.type("INA, CC-BY-4.0, open\n")
    assert first.end() == 0
    assert f"declared {text} for base: INA, CC-BY-4.0, open" in first.seen
    assert "a node reads" in first.seen
    (one,) = Declared.load(home).source
    assert (one.path, one.owner, one.licence, one.mode) == (str(text), "INA", "CC-BY-4.0", "open")
    assert '"declared"' in home.data_events.read_text()
    second = sit()
    assert second.end() == 0
    assert QUESTION not in second.seen and "a node reads" in second.seen


@pytest.mark.parametrize(
    ("answer", "code"),
    [("INA\n", ExitCode.USAGE), ("\x03", ExitCode.FAILED), ("\x04", ExitCode.FAILED)],
    ids=["no licence", "Ctrl-C", "Ctrl-D"],
)
def test_without_an_answer_that_declares_them_nothing_is_read(
    home: Home, sit: Callable[[], Terminal], answer: str, code: ExitCode
) -> None:
    """Ctrl-C is 1, as at every moment before a node is up."""
    terminal = sit()
    terminal.wait_for(FORM)
    terminal.type(answer)
    assert terminal.end() == code, terminal.seen
    assert "a node reads" not in terminal.seen and Declared.load(home).source == ()
    if answer == "INA\n":
        assert "error: " in terminal.seen


def test_a_script_is_asked_nothing_and_told_how_to_say_it(home: Home, text: Path) -> None:
    words = ["start", "--home", str(home.path), "--data", str(text)]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words],
        input="INA, CC-BY-4.0, open\n",
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == ExitCode.USAGE and "--declare" in done.stderr
    assert QUESTION not in done.stderr and "a node reads" not in done.stdout
    assert not home.data_toml.exists()
