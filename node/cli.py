"""The command line: `tapestry init|start|status|peers|stop|export`.

Every command ends in an exit code of errors.ExitCode. What is wrong is said in one line on stderr, as
`error: ...`, with `hint: ...` where there is something to do. `stop` with nothing to stop is done: 0.

Heavy modules (the daemon, and with it torch and hivemind) are imported by the commands that need them, so
that `tapestry status` answers at once.
"""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import click

from tapestry.node.config import NodeConfig, NodeToml
from tapestry.node.errors import ExitCode, UserError, printable
from tapestry.node.home import Home, Liveness
from tapestry.node.runspec import RUN_NAME, preset_spec

HTTP_TIMEOUT_S = 5.0
HTTP_BYTES_MAX = 4 * 2**20  # Guess: /peers with 10,000 peers has 3 MB.
POLL_S = 0.05
DETACH_WAIT_S = 300.0  # Guess: to join may take the download of a state; after that it goes on unwatched.
LOG_TAIL_BYTES = 4096


def main() -> None:
    """The entry point of the `tapestry` command."""
    cli()


class _Cli(click.Group):
    """A click group that ends as the contract says: our exit codes, one line per error, no traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            code = super().main(*args, **{**extra, "prog_name": "tapestry", "standalone_mode": False})
            sys.stdout.flush()
        except UserError as error:
            code = _complain(error)
        except click.ClickException as error:
            code = _complain(_usage_error(error))
        except (KeyboardInterrupt, click.Abort):
            code = _complain(UserError("interrupted", exit_code=ExitCode.FAILED))
        except BrokenPipeError:
            _forget_stdout()
            code = ExitCode.FAILED
        sys.exit(int(code or ExitCode.DONE))


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False)
@click.version_option(package_name="tapestry-node", message="tapestry %(version)s")
def cli() -> None:
    """Train one shared base model together with others, without a coordinator."""


_home_option = click.option(
    "--home",
    metavar="DIR",
    help="The node's directory. Default: $TAPESTRY_HOME, then the user data directory.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@cli.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--preset",
    type=click.Choice(["nano", "tiny", "small"]),
    default="tiny",
    show_default=True,
    help="Size of the model: about 50k, 0.9M or 10M parameters.",
)
@click.option("--name", help="The name of the run. Default: the directory's.")
def init(directory: Path, preset: str, name: str | None) -> None:
    """Write a commented run.toml and node.toml into DIR."""
    home = Home(directory.expanduser().absolute())
    files = {
        home.run_toml: preset_spec(preset, name or _name_for(home.path)).to_toml(),
        home.node_toml: NodeToml().to_toml(),
    }
    for path in files:
        if os.path.lexists(path):
            raise UserError(f"{path} is there already", hint="choose another DIR, or remove the file")
    home.create()
    for path, text in files.items():
        _write_new(path, text)
        click.echo(f"wrote {path}")
    click.echo("\nFound the run with your own text, or with --data stdlib for a first trial:\n")
    click.echo(f"  tapestry start --home {shlex.quote(str(directory))} --data PATH")


@cli.command()
@_home_option
@click.option("--run", metavar="FILE", help="The run spec. Default: run.toml in the home, if it is there.")
@click.option("--run-id", metavar="ID", help="Refuse every run but this one.")
@click.option("--peer", "peers", metavar="MADDR", multiple=True, help="Join by this peer. May be repeated.")
@click.option("--data", metavar="PATH", multiple=True, help="Text to train on, or stdlib. May be repeated.")
@click.option("--listen", metavar="MADDR", multiple=True, help="Where other nodes reach this one.")
@click.option("--announce", metavar="MADDR", multiple=True, help="Address to tell the others instead.")
@click.option("--http", metavar="HOST:PORT", help="Metrics and status. Default: 127.0.0.1:9470")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to train. Default: auto")
@click.option("--max-upload", metavar="RATE", help="Cap of what is sent, e.g. 20mbit. Default: none")
@click.option("--max-download", metavar="RATE", help="Cap of what is received. Default: none")
@click.option("--epochs", type=int, metavar="N", help="Stop after N epochs.")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Default: text")
@click.option("--detach", is_flag=True, help="Go to the background once the node is ready.")
def start(home: str | None, detach: bool, **flags: Any) -> int:
    """Found a run, join one with --peer, or go on with the home's. Ends with SIGTERM or Ctrl-C."""
    place = Home.locate(home, os.environ)
    config = NodeConfig.resolve(place, flags, os.environ)
    _check_early(config)
    if detach:
        return start_detached(_foreground_command(place, flags), place)
    from tapestry.node import launch

    return launch.run(config)


@cli.command()
@_home_option
@_json_option
def status(home: str | None, as_json: bool) -> None:
    """What the node is doing."""
    answer = _ask_node(Home.locate(home, os.environ), "/status")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    if not isinstance(answer, dict):
        raise UserError("the node's /status is not a table", exit_code=ExitCode.FAILED)
    width = max((len(str(key)) for key in answer), default=0)
    for key, value in answer.items():
        for index, line in enumerate(_lines(value)):
            click.echo(f"{printable(str(key)) if index == 0 else '':<{width}}  {line}")


@cli.command()
@_home_option
@_json_option
def peers(home: str | None, as_json: bool) -> None:
    """The live peers, as this node sees them."""
    answer = _ask_node(Home.locate(home, os.environ), "/peers")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    if not isinstance(answer, list) or not all(isinstance(row, dict) for row in answer):
        raise UserError("the node's /peers is not a list of tables", exit_code=ExitCode.FAILED)
    for line in _table(answer) if answer else ["no peers"]:
        click.echo(line)


@cli.command()
@_home_option
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0), default=15.0, show_default=True, metavar="S"
)
def stop(home: str | None, timeout_s: float) -> None:
    """Ask the node to finish its round, save its state and end. Exit code 0 also if there is none."""
    place = Home.locate(home, os.environ)
    pid = place.holder()
    if pid is None:
        click.echo(f"no node is running in {place.path}")
        return
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it ended by itself just now
    except PermissionError as error:
        raise UserError(f"the node (pid {pid}) belongs to another user", exit_code=ExitCode.FAILED) from error
    deadline_s = time.monotonic() + timeout_s
    while place.holder() == pid:
        if time.monotonic() >= deadline_s:
            raise UserError(
                f"the node (pid {pid}) has not stopped within {timeout_s:g} s",
                exit_code=ExitCode.FAILED,
                hint="tapestry stop once more: a second signal ends it at once",
            )
        time.sleep(POLL_S)
    click.echo(f"stopped the node (pid {pid})")


@cli.command()
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@_home_option
@click.option("--epoch", type=click.IntRange(min=0), metavar="E", help="Default: the latest on disk.")
def export(out: Path, home: str | None, epoch: int | None) -> None:
    """Write the shared base into OUT as a Hugging Face model."""
    from tapestry.node import daemon

    daemon.export(Home.locate(home, os.environ), out, epoch)
    click.echo(f"wrote {out}")


# ---- init --------------------------------------------------------------------------------------------


def _name_for(directory: Path) -> str:
    """The directory's name where it can name a run."""
    return directory.name if RUN_NAME.admits(directory.name) else "tapestry"


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


# ---- start --detach ----------------------------------------------------------------------------------


def _check_early(config: NodeConfig) -> None:
    """What is wrong at first sight is said before the imports, which take seconds."""
    from tapestry.node.trainer.data import DataError, list_files

    config.home.require_free()
    try:
        list_files(config.data)
    except DataError as error:
        raise UserError(str(error)) from error


def start_detached(command: Sequence[str], home: Home, wait_s: float = DETACH_WAIT_S) -> int:
    """Run `command` in a session of its own until it is ready; print what it prints until then.

    Its output goes to HOME/node.log. Ctrl-C while waiting stops it. Returns its exit code if it ends
    before it is ready.
    """
    home.require_free()
    home.create()
    with _opened_log(home.log) as log:
        begin = log.tell()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        ready = _wait_until_ready(child, home, wait_s)
    except KeyboardInterrupt:
        child.terminate()
        raise
    printed = _log_since(home.log, begin)
    if child.returncode is not None:
        click.echo(printed[-LOG_TAIL_BYTES:], err=True, nl=False)
        return child.returncode if child.returncode >= 0 else ExitCode.FAILED
    click.echo(printed, nl=False)
    if not ready:
        click.echo(f"not ready after {wait_s:g} s, goes on in the background; see {home.log}")
    child.returncode = 0  # it is meant to outlive us: Popen need not warn that it does
    return ExitCode.DONE


def _opened_log(path: Path) -> BinaryIO:
    try:
        return path.open("ab")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", exit_code=ExitCode.FAILED) from error


def _wait_until_ready(child: subprocess.Popen[bytes], home: Home, wait_s: float) -> bool:
    """True once the child has written node.json; False if it ended or the time is over."""
    deadline_s = time.monotonic() + wait_s
    while child.poll() is None and time.monotonic() < deadline_s:
        state = home.read_node_json()
        if state.liveness is Liveness.RUNNING and state.pid == child.pid:
            return True
        time.sleep(POLL_S)
    return False


def _log_since(path: Path, begin: int) -> str:
    with path.open("rb") as log:
        log.seek(begin)
        return log.read(16 * LOG_TAIL_BYTES).decode("utf-8", errors="replace")


def _foreground_command(home: Home, flags: dict[str, Any]) -> list[str]:
    """The same start without --detach. -P keeps the current directory off the module path."""
    command = [sys.executable, "-P", "-m", "tapestry.node.cli", "start", f"--home={home.path}"]
    for name, value in flags.items():
        flag = "--peer" if name == "peers" else f"--{name.replace('_', '-')}"
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        for one in values:
            command += [f"{flag}={one}"]
    return command


# ---- status and peers --------------------------------------------------------------------------------


def _ask_node(home: Home, path: str) -> object:
    """What the node of this home answers; raises UserError with exit code 1 if it does not."""
    state = home.read_node_json()
    if state.info is None or state.liveness is not Liveness.RUNNING:
        raise UserError(_why_not_running(home, state.liveness, state.pid), exit_code=ExitCode.FAILED)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the node is local: no proxy
    try:
        with opener.open(state.info.http + path, timeout=HTTP_TIMEOUT_S) as response:
            data = response.read(HTTP_BYTES_MAX + 1)
        if len(data) > HTTP_BYTES_MAX:
            raise ValueError(f"the answer is longer than {HTTP_BYTES_MAX} bytes")
        return json.loads(data)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"the node (pid {state.pid}) does not answer at {state.info.http}: {error}",
            exit_code=ExitCode.FAILED,
        ) from error


def _why_not_running(home: Home, liveness: Liveness, pid: int | None) -> str:
    if liveness is Liveness.STARTING:
        return f"the node in {home.path} is starting (pid {pid}) and does not answer yet"
    died = "; the last one ended without saying so" if liveness is Liveness.STALE else ""
    return f"no node is running in {home.path}{died}"


def _lines(value: object) -> list[str]:
    """A value for people: lists and tables one item a line."""
    if isinstance(value, list):
        return [_word(item) for item in value] or ["-"]
    if isinstance(value, dict):
        return [f"{printable(str(key))}={_word(item)}" for key, item in value.items()] or ["-"]
    return [_word(value)]


def _word(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:.0f}"
    return printable(value if isinstance(value, str) else json.dumps(value))


def _table(rows: Sequence[dict[str, object]]) -> list[str]:
    """Aligned columns, one per key, in the order in which the keys first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[printable(str(column)) for column in columns]]
    cells += [[" ".join(_lines(row.get(column))) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


# ---- errors ------------------------------------------------------------------------------------------


def _complain(error: UserError) -> ExitCode:
    click.echo(f"error: {error.line}", err=True)
    for detail in error.details:
        click.echo(f"  {detail}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
    return error.exit_code


def _usage_error(error: click.ClickException) -> UserError:
    context = error.ctx if isinstance(error, click.UsageError) else None
    hint = f"{context.command_path} --help" if context else None
    return UserError(error.format_message(), exit_code=ExitCode.USAGE, hint=hint)


def _forget_stdout() -> None:
    """Whoever read our output is gone: let the interpreter flush into nothing when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
