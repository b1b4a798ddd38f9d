"""`tapestry init`: the commented files that a new run and its first node begin with."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.spec.node import NodeToml
from tapestry.node.spec.run import RUN_NAME, preset_spec


@click.command()
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


def _name_for(directory: Path) -> str:
    """The directory's name where it can name a run."""
    return directory.name if RUN_NAME.admits(directory.name) else "tapestry"


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
