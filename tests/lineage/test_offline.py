"""`tapestry verify` needs no network: on a machine without one, and where making a socket ends it."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
from homes import make_home

from tapestry.node.lineage.export import export_home
from tapestry.node.lineage.leave import leave
from tapestry.node.spec.training import PRESETS

VERIFY = """
import sys
from tapestry.node.cli.entry import main
sys.argv[0] = "tapestry"
main()
"""
# Not even this machine's own address answers in a namespace of its own.
UNREACHABLE = """
import errno, socket
try:
    socket.create_connection(("127.0.0.1", 9), 5)
except OSError as error:
    assert error.errno == errno.ENETUNREACH, error
else:
    raise AssertionError("there is a network")
"""
FORBIDDEN = """
import os, socket, sys
def forbid(event, arguments):
    if event.startswith("socket."):
        sys.stderr.write(f"{event} {arguments}")
        sys.stderr.flush()
        os._exit(70)
if not os.fork():
    sys.addaudithook(forbid)
    socket.socket()
    os._exit(0)
_, status = os.wait()
assert os.waitstatus_to_exitcode(status) == 70, "a socket could be made"
sys.addaudithook(forbid)
"""


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `exit` and what `export` write."""
    folder = tmp_path_factory.mktemp("offline")
    made = make_home(folder / "home", PRESETS["nano"].model)
    made.advance(3, checkpoint=True)
    leave(made.home, folder / "out", lambda *_: None)
    export_home(made.home, folder / "model", None)
    export_home(made.home, folder / "half", None, dtype="bf16")
    return {name: folder / name for name in ("out", "model", "half")}


def _run(script: str, *words: object, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-P", "-c", script, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@functools.cache
def _why_no_namespace() -> str:
    """Why `unshare -rn` makes none here; "" if it does."""
    try:
        done = subprocess.run(["unshare", "-rn", "true"], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"unshare: {error.strerror}"
    return "" if done.returncode == 0 else done.stderr.strip() or "unshare failed"


@pytest.mark.parametrize(
    ("where", "what"),
    [("no network", "out"), ("no network", "half"), ("no socket", "out"), ("no socket", "model")],
)
def test_what_was_taken_along_is_verified_without_a_network(
    left: dict[str, Path], where: str, what: str
) -> None:
    script, before = FORBIDDEN, ()
    if where == "no network":
        if why := _why_no_namespace():
            pytest.skip(f"no network namespace can be made here: {why}")
        script, before = UNREACHABLE, ("unshare", "-rn")  # type: ignore[assignment]
    against = ("--against", left["out"]) if what == "half" else ()
    done = _run(script + VERIFY, "verify", left[what], "--jobs", 2, *against, before=before)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("it holds")


def test_a_command_that_makes_a_socket_is_ended_there(left: dict[str, Path]) -> None:
    done = _run(FORBIDDEN + "socket.create_connection(('127.0.0.1', 9))\n" + VERIFY, "verify", left["out"])
    assert done.returncode == 70 and done.stderr.startswith("socket.")
