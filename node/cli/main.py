"""The command line: `tapestry init|start|status|peers|stop|export`, and derive|evaluate|rebase|merge.

Every command ends in an exit code of errors.ExitCode. What is wrong is said in one line on stderr, as
`error: ...`, with `hint: ...` where there is something to do. `stop` with nothing to stop is done: 0.

A command is a function of one of the modules beside this one, and a name in FAMILIES.

A family is imported when one of its commands is asked for, and heavy modules (the daemon, and with it torch
and hivemind) by the commands that need them, so that `tapestry status` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from tapestry.node.cli import interrupt
from tapestry.node.errors import ExitCode, UserError


def main() -> None:
    """The entry point of the `tapestry` command."""
    cli()


def _starting() -> tuple[click.Command, ...]:
    from tapestry.node.cli.start import start, stop

    return start, stop


def _founding() -> tuple[click.Command, ...]:
    from tapestry.node.cli.init import init

    return (init,)


def _looking() -> tuple[click.Command, ...]:
    from tapestry.node.cli.look import peers, status

    return status, peers


def _admitting() -> tuple[click.Command, ...]:
    from tapestry.node.cli.members import admit, approve, invite, members, own_id, propose, remove

    return members, admit, remove, invite, propose, approve, own_id


def _logging() -> tuple[click.Command, ...]:
    from tapestry.node.cli.logs import log_level

    return (log_level,)


def _doctoring() -> tuple[click.Command, ...]:
    from tapestry.node.cli.doctor import doctor

    return (doctor,)


def _proving() -> tuple[click.Command, ...]:
    from tapestry.node.cli.lineage import anchor, export, leave, log, verify

    return export, verify, log, anchor, leave


def _deriving() -> tuple[click.Command, ...]:
    from tapestry.node.cli.sovereign import derivatives, derive, evaluate, merge, rebase, rejoin

    return derive, evaluate, rebase, merge, derivatives, rejoin


def _declaring() -> tuple[click.Command, ...]:
    from tapestry.node.cli.data import data

    return (data,)


def _keeping() -> tuple[click.Command, ...]:
    from tapestry.node.cli.backup import backup, restore

    return backup, restore


def _completing() -> tuple[click.Command, ...]:
    from tapestry.node.cli.completion import completion

    return (completion,)


def _watching() -> tuple[click.Command, ...]:
    from tapestry.node.cli.top import top

    return (top,)


FAMILIES = {
    ("start", "stop"): _starting,
    ("init",): _founding,
    ("status", "peers"): _looking,
    ("members", "admit", "remove", "invite", "propose", "approve", "id"): _admitting,
    ("log-level",): _logging,
    ("doctor",): _doctoring,
    ("export", "verify", "log", "anchor", "exit"): _proving,
    ("derive", "evaluate", "rebase", "merge", "derivatives", "rejoin"): _deriving,
    ("data",): _declaring,
    ("backup", "restore"): _keeping,
    ("top",): _watching,
    ("completion",): _completing,
}


class _Cli(click.Group):
    """A click group that ends as the contract says: our exit codes, one line per error, no traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(name for names in FAMILIES for name in names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for names, family in FAMILIES.items():
            if cmd_name in names:
                return next(command for command in family() if command.name == cmd_name)
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """click looks for names like the one that was meant among the commands that it holds itself."""
        if args and self.get_command(ctx, args[0]) is None:
            self.commands = dict.fromkeys(self.list_commands(ctx), click.Command(None))
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            code = super().main(*args, **{**extra, "prog_name": "tapestry", "standalone_mode": False})
            sys.stdout.flush()
        except (KeyboardInterrupt, click.Abort):
            code = _complain(_INTERRUPTED)
        except Exception as error:
            code = _interrupted() if interrupt.CTRL_C.pressed else _failed(error)
        sys.exit(int(code or ExitCode.DONE))


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False)
@click.version_option(package_name="tapestry-node", message="tapestry %(version)s")
def cli() -> None:
    """Train one shared base model together with others, without a coordinator."""


# ---- errors ------------------------------------------------------------------------------------------


_INTERRUPTED = UserError("interrupted", exit_code=ExitCode.FAILED)


def _interrupted() -> ExitCode:
    """What came of a Ctrl-C in a library is no fault of anything."""
    click.echo(err=True)  # as click does for a KeyboardInterrupt: the terminal has written ^C
    return _complain(_INTERRUPTED)


def _failed(error: Exception) -> ExitCode:
    """Raises what is our own fault."""
    if isinstance(error, UserError):
        return _complain(error)
    if isinstance(error, click.ClickException):
        return _complain(_usage_error(error))
    if isinstance(error, BrokenPipeError):
        _forget_stdout()
        return ExitCode.FAILED
    if isinstance(error, PermissionError):
        return _complain(_not_ours(error))
    raise error


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


def _not_ours(error: PermissionError) -> UserError:
    """A home, or a file in it, of another user: what no command could do otherwise either."""
    return UserError(
        f"no permission for {error.filename or 'a file'}",
        exit_code=ExitCode.FAILED,
        hint="run this as the user whose home it is: sudo -u USER tapestry ...",
    )


def _forget_stdout() -> None:
    """Whoever read our output is gone: let the interpreter flush into nothing when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
