"""Options that several commands take."""

from __future__ import annotations

import os

import click

from tapestry.node.home import Home

home_option = click.option(
    "--home",
    metavar="DIR",
    help="The node's directory. Default: $TAPESTRY_HOME, then the user data directory.",
)


def home_to_write(flag: str | None) -> Home:
    """For a command that writes in the home itself. Raises UserError for root in another user's home, and for
    one that is not restored to its end."""
    home = Home.locate(flag, os.environ)
    home.require_owner()
    home.require_restored()
    return home


def examples(*commands: str) -> str:
    """The end of a command's --help."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
