"""`tapestry backup` and `restore`: a home as one file, and back."""

from __future__ import annotations

import os
from pathlib import Path

import click

from tapestry.node.cli.options import examples, home_option
from tapestry.node.cli.said import Said
from tapestry.node.home import Home


@click.command(
    epilog=examples(
        "tapestry backup /backups/node-$(date +%F).tar --home mine",
    )
)
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@home_option
def backup(out: Path, home: str | None) -> None:
    """Write the home into the file OUT, checked; its node may run meanwhile. It holds the node's key."""
    os.umask(0o077)
    with Said() as said:
        from tapestry.node.lineage.backup import backup as write

        proof = write(Home.locate(home, os.environ), out, said.update)
    click.echo(f"wrote {out}: epoch {proof.epoch} of {proof.run_name}; it holds the key: keep it as such")


@click.command(
    epilog=examples(
        "tapestry restore /backups/node-2026-11-29.tar --home mine",
    )
)
@click.argument("archive", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@home_option
def restore(archive: Path, home: str | None) -> None:
    """Make a home of a backup. Its node looks for its run before it trains."""
    os.umask(0o077)
    place = Home.locate(home, os.environ)
    place.require_owner()
    with Said() as said:
        from tapestry.node.lineage.backup import restore as read

        proof = read(archive, place, said.update)
    click.echo(f"restored {place.path}: epoch {proof.epoch} of {proof.run_name}")
    click.echo(
        "the node it was made of must not run any more: two nodes with one key disturb each other. If its "
        "home lies on this machine, stop it and move it away first: mv HOME HOME.away"
    )
    click.echo(f"  tapestry start --home {place.path} --data PATH")
