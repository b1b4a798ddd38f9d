"""`tapestry export`: the shared base as a model for others."""

from __future__ import annotations

import os
from pathlib import Path

import click

from tapestry.node.cli.options import home_option
from tapestry.node.home import Home


@click.command()
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@home_option
@click.option("--epoch", type=click.IntRange(min=0), metavar="E", help="Default: the latest on disk.")
def export(out: Path, home: str | None, epoch: int | None) -> None:
    """Write the shared base into OUT as a Hugging Face model."""
    from tapestry.node.lineage.export import export_home

    export_home(Home.locate(home, os.environ), out, epoch)
    click.echo(f"wrote {out}")
