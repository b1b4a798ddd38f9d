"""`tapestry start` and `stop`: run a node here or in the background, and end it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import click

from tapestry.node.cli import interrupt
from tapestry.node.cli.data import declare_missing, declare_option
from tapestry.node.cli.look import ask_node
from tapestry.node.cli.options import examples, home_option, home_to_write
from tapestry.node.cli.said import Said, waited_for
from tapestry.node.errors import ExitCode, UserError, printable
from tapestry.node.home import Home, Liveness
from tapestry.node.spec.data import is_word
from tapestry.node.spec.declared import BASE, paths_of, require, today_utc
from tapestry.node.spec.node import NodeConfig
from tapestry.node.spec.training import DEVICE

POLL_S = 0.05
STOPPED_S = 10.0  # a node ends within: the contract
STOPS = "finish its round and save its state"


DETACH_WAIT_S = 300.0  # Guess: to join may take the download of a state; after that it goes on unwatched.


LOG_TAIL_BYTES = 4096


def _checked_device(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and not DEVICE.admits(value):
        raise click.BadParameter(f"'{value}' is not {DEVICE.words.removeprefix('the form ')}")
    return value


@click.command(
    epilog=examples(
        "tapestry start --home first --data texts/fr --listen /ip4/0.0.0.0/tcp/4001",
        "tapestry start --home mine --peer LINE --data texts.parquet:text",
        "tapestry start --home mine --detach",
    )
)
@home_option
@click.option("--run", metavar="FILE", help="The run spec. Default: run.toml in the home, if it is there.")
@click.option("--run-id", metavar="ID", help="Refuse every run but this one.")
@click.option(
    "--peer",
    "peers",
    metavar="LINE|MADDR",
    multiple=True,
    help="Join by an invitation, or by a member's address. May be repeated.",
)
@click.option("--base", metavar="HFDIR", help="The base that the run continues, if you have it.")
@click.option(
    "--data", metavar="PATH[:FIELD]", multiple=True, help="Text to train on, or stdlib. May be repeated."
)
@click.option(
    "--validation", metavar="[NAME=]PATH[:FIELD]", multiple=True, help="Text to measure on. May be repeated."
)
@declare_option
@click.option(
    "--allow-doubtful-data", is_flag=True, default=None, help="Warn of doubtful data, do not refuse."
)
@click.option("--listen", metavar="MADDR", multiple=True, help="Where other nodes reach this one.")
@click.option("--announce", metavar="MADDR", multiple=True, help="Address to tell the others instead.")
@click.option("--http", metavar="HOST:PORT", help="Metrics and status. Default: 127.0.0.1:9470")
@click.option(
    "--device", metavar="DEVICE", callback=_checked_device, help="auto, cpu, cuda, cuda:0,1. Default: auto"
)
@click.option("--max-upload", metavar="RATE", help="Cap of what is sent, e.g. 20mbit. Default: none")
@click.option("--max-download", metavar="RATE", help="Cap of what is received. Default: none")
@click.option("--max-params", type=int, metavar="N", help="Join no run of more parameters.")
@click.option("--show-spec", is_flag=True, default=None, help="Joining, print all that the run agreed on.")
@click.option("--epochs", type=int, metavar="N", help="Stop after N epochs more.")
@click.option("--until-epoch", type=int, metavar="E", help="Stop once the run has E epochs.")
@click.option(
    "--external",
    is_flag=True,
    default=None,
    help="A script trains: it opens this home with Swarm. No --data.",
)
@click.option(
    "--island", is_flag=True, default=None, help="Go on alone: a branch of one's own. See tapestry rejoin."
)
@click.option("--script-fd", type=int, hidden=True, help="The socket of the script that starts this node.")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Default: text")
@click.option("--no-wait", is_flag=True, default=None, help="Where this node must be admitted first: end, 4.")
@click.option("--detach", is_flag=True, help="Go to the background once the node is ready.")
def start(home: str | None, detach: bool, declaration: str | None, **flags: Any) -> int:
    """Found a run, join one with --peer, or go on with the home's. Ends with SIGTERM or Ctrl-C."""
    os.umask(0o077)  # what a node writes is its owner's: texts in caches, checkpoints, the chain, the log
    signal.signal(signal.SIGTERM, _end_early)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt.end)
    place = home_to_write(home)
    config = NodeConfig.resolve(place, flags, os.environ)
    _check_early(config, declaration)
    if detach:
        return start_detached(_foreground_command(place, flags), place)
    from tapestry.node.daemon import launch

    return launch.run(config)


@click.command(
    epilog=examples(
        "tapestry stop --home mine",
        "tapestry stop --home mine --timeout 60",
    )
)
@home_option
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0), default=15.0, show_default=True, metavar="S"
)
def stop(home: str | None, timeout_s: float) -> None:
    """Ask the node to finish its round, save its state and end. Exit code 0 also if there is none."""
    place = Home.locate(home, os.environ)
    if not place.is_held():
        click.echo(f"no node is running in {place.path}")
        return
    pid = place.holder()
    if pid is None:
        _stop_elsewhere(place, timeout_s)
        return
    try:
        with waited_for(f"waiting for the node (pid {pid}) to {STOPS}"):
            is_gone = _terminate(pid, timeout_s)
    except ProcessLookupError:
        is_gone = True  # it ended by itself just now
    except PermissionError as error:
        raise UserError(
            f"the node (pid {pid}) belongs to another user",
            exit_code=ExitCode.FAILED,
            hint="run this as that user, or as root",
        ) from error
    if not is_gone:
        raise UserError(
            f"the node (pid {pid}) has not stopped within {timeout_s:g} s",
            exit_code=ExitCode.FAILED,
            hint="tapestry stop once more: a second signal ends it at once",
        )
    click.echo(f"stopped the node (pid {pid})")


def _terminate(pid: int, timeout_s: float) -> bool:
    """Signal the process and wait until it is gone, not only its lock. Raises ProcessLookupError and others.

    By a pidfd: what takes its pid after it is neither signalled nor waited for. pidfd_open(2), Linux 5.3.
    """
    fd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(fd, signal.SIGTERM)
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))
    finally:
        os.close(fd)


def _stop_elsewhere(home: Home, timeout_s: float) -> None:
    """A node in another container, or on another machine that shares this folder: it looks for a file."""
    where = f"on {home.holder_host() or 'another machine'}, where its pid is not ours"
    try:
        home.stop_request.touch(mode=0o600)
    except OSError as error:
        raise UserError(
            f"the node runs {where}, and {home.path} cannot be written: {error.strerror}",
            exit_code=ExitCode.FAILED,
            hint="stop it where it runs",
        ) from error
    deadline_s = time.monotonic() + timeout_s
    with waited_for(f"waiting for the node {where}, to {STOPS}"):
        while home.is_held():
            if time.monotonic() >= deadline_s:
                raise UserError(
                    f"the node {where}, has not stopped within {timeout_s:g} s",
                    exit_code=ExitCode.FAILED,
                    hint="stop it where it runs",
                )
            time.sleep(POLL_S)
    click.echo(f"stopped the node {where}")


def _end_early(number: int, frame: FrameType | None) -> None:
    """Told to stop before the daemon has handlers of its own: as process 1 of a container nothing else would
    end it. At once: nothing is begun that the kernel does not end with us (lock, trainer)."""
    os._exit(int(ExitCode.DONE))


def _check_early(config: NodeConfig, declaration: str | None) -> None:
    """What is wrong at first sight is said before the imports, which take seconds; nothing undeclared is
    opened."""
    from tapestry.node.trainer.data.errors import DataError
    from tapestry.node.trainer.data.sources import list_data, located_in

    config.home.require_free()
    config.home.require_way(alone=config.island, to_others=bool(config.peers))
    if config.external:
        return
    paths = paths_of(config.data)
    declare_missing(config.home, paths, BASE, declaration, silent=config.log_format == "json")
    there = [one for one in paths if is_word(one) or os.path.lexists(one)]
    try:
        located = located_in(config.data)
        led_to = [real for one in located for real in one.real]
        declare_missing(config.home, led_to, BASE, declaration, silent=config.log_format == "json")
        require(config.home, there, BASE, today_utc(), located)
        list_data(config.data, located)
    except DataError as error:
        raise UserError(str(error)) from error


def start_detached(command: Sequence[str], home: Home, wait_s: float = DETACH_WAIT_S) -> int:
    """Run `command` in a session of its own until it is ready; print what it prints until then.

    Its output goes to HOME/node.out, its log to HOME/node.log. Ctrl-C while waiting stops it. Returns its
    exit code if it ends before it is ready.
    """
    home.require_free()
    home.create()
    pressed: list[int] = []  # while the child begins, Ctrl-C waits: it must not be left without us
    with _opened_output(home) as log, _ctrl_c(lambda number, _: pressed.append(number)):
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        with _ctrl_c(interrupt.CTRL_C):
            if pressed:
                raise KeyboardInterrupt
            outcome = _wait_until_ready(child, home, wait_s)
    except KeyboardInterrupt:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOPPED_S)
        raise
    printed = _printed(home.output)
    if child.returncode is not None:
        click.echo(printed[-LOG_TAIL_BYTES:], err=True, nl=False)
        return child.returncode if child.returncode >= 0 else ExitCode.FAILED
    click.echo(printed, nl=False)
    if outcome is None:
        outcome = f"not ready after {wait_s:g} s, goes on in the background; see {home.log}"
    if outcome:
        click.echo(outcome)
    child.returncode = 0  # it is meant to outlive us: Popen need not warn that it does
    return ExitCode.DONE


@contextlib.contextmanager
def _ctrl_c(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """What Ctrl-C does within, unless somebody wants it ignored."""
    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _opened_output(home: Home) -> BinaryIO:
    try:
        return home.open_output()
    except OSError as error:
        raise UserError(f"cannot write {home.output}: {error.strerror}", exit_code=ExitCode.FAILED) from error


def _wait_until_ready(child: subprocess.Popen[bytes], home: Home, wait_s: float) -> str | None:
    """Until the child has written node.json, or waits for people: a line that says so, to be the last one.
    None if it ended or the time is over."""
    deadline_s = time.monotonic() + wait_s
    with Said() as said:
        while child.poll() is None and time.monotonic() < deadline_s:
            state = home.read_node_json()
            if state.liveness is Liveness.RUNNING and state.pid == child.pid:
                return ""
            waits = _waits_for(home, child.pid)
            if waits.startswith("waiting to be admitted"):
                return f"{waits}; it goes on in the background"
            if home.trainer_socket.exists() and home.holder() == child.pid:
                return f"waiting for a script that opens {home.path} with tapestry.node.Swarm"
            said.update(waits or "starting", 0, 0 if waits else 1)
            time.sleep(POLL_S)
    return None


def _waits_for(home: Home, pid: int) -> str:
    """What its endpoint says of it, while it is not ready."""
    if home.starting_url(pid) is None:
        return ""
    try:
        status = ask_node(home, "/status")
    except UserError:
        return ""
    return printable(str(status.get("reason") or "")) if isinstance(status, dict) else ""


def _printed(path: Path) -> str:
    with path.open("rb") as output:
        return output.read(16 * LOG_TAIL_BYTES).decode("utf-8", errors="replace")


def _foreground_command(home: Home, flags: dict[str, Any]) -> list[str]:
    """The same start without --detach. -P keeps the current directory off the module path."""
    command = [sys.executable, "-P", "-m", "tapestry.node.cli", "start", f"--home={home.path}"]
    for name, value in flags.items():
        flag = "--peer" if name == "peers" else f"--{name.replace('_', '-')}"
        if value is True:
            command.append(flag)
            continue
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        for one in values:
            command += [f"{flag}={one}"]
    return command
