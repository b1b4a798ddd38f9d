"""`tapestry log-level`: how much each part of a node says."""

from __future__ import annotations

import difflib
import os

import click

from tapestry.node.cli.options import examples, home_option, home_to_write
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.surface.log_levels import LEVELS, SUBSYSTEMS, USUAL, read_levels, write_level


class _Subsystem(click.Choice):  # type: ignore[type-arg]  # generic in some versions of click only
    """Of a slip of the pen the one that was meant is named, not all."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        close = difflib.get_close_matches(value, SUBSYSTEMS, n=1)
        if value not in SUBSYSTEMS and close:
            self.fail(f"{value!r}: did you mean {close[0]}?", param, ctx)
        return str(super().convert(value, param, ctx))


@click.command("log-level", epilog=examples("tapestry log-level", "tapestry log-level links debug"))
@click.argument("subsystem", metavar="[SUBSYSTEM]", required=False, type=_Subsystem(list(SUBSYSTEMS)))
@click.argument("level", metavar="[LEVEL]", required=False, type=click.Choice(LEVELS))
@home_option
def log_level(subsystem: str | None, level: str | None, home: str | None) -> None:
    """Set how much SUBSYSTEM says, at once and for later starts; without LEVEL, show what is set."""
    sets = subsystem is not None and level is not None
    place = home_to_write(home) if sets else Home.locate(home, os.environ)
    place.require_there()
    try:
        if subsystem is None or level is None:
            _show(read_levels(place.log_levels), subsystem)
            return
        write_level(place.log_levels, subsystem, level)
    except ValueError as error:
        raise UserError(f"{place.log_levels}: {error}", hint="remove that file") from error
    except PermissionError:
        raise  # of another user
    except OSError as error:
        raise UserError(f"cannot use {place.log_levels}: {error.strerror}") from error
    when = "within a second" if place.is_held() else "from the next start on"
    click.echo(f"{subsystem} says {level} and above, {when}; the log is {place.log}")


def _show(levels: dict[str, str], only: str | None) -> None:
    for name, what in SUBSYSTEMS.items():
        if only in (None, name):
            click.echo(f"{name:<10} {levels.get(name, levels.get('all', USUAL)):<8} {what}")
