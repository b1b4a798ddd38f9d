"""The command line: `tapestry init|start|status|peers|stop|export`, and derive|evaluate|rebase|merge.

Every command ends in an exit code of errors.ExitCode. What is wrong is said in one line on stderr, as
`error: ...`, with `hint: ...` where there is something to do. `stop` with nothing to stop is done: 0.

A command is a function of one of the modules beside this one, and a word in the loop below.

Heavy modules (the daemon, and with it torch and hivemind) are imported by the commands that need them, so
that `tapestry status` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from tapestry.node.cli.data import data
from tapestry.node.cli.init import init
from tapestry.node.cli.lineage import anchor, export, leave, log, verify
from tapestry.node.cli.logs import log_level
from tapestry.node.cli.look import peers, status
from tapestry.node.cli.sovereign import derivatives, derive, evaluate, merge, rebase
from tapestry.node.cli.start import start, stop
from tapestry.node.errors import ExitCode, UserError


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


for _command in (
    init,
    start,
    status,
    peers,
    stop,
    export,
    verify,
    log,
    log_level,
    anchor,
    leave,
    derive,
    evaluate,
    rebase,
    merge,
    derivatives,
    data,
):
    cli.add_command(_command)


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
