"""Options that several commands take."""

from __future__ import annotations

import click

home_option = click.option(
    "--home",
    metavar="DIR",
    help="The node's directory. Default: $TAPESTRY_HOME, then the user data directory.",
)


def examples(*commands: str) -> str:
    """The end of a command's --help."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
