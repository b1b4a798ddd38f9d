"""`tapestry export`: the shared base as a model for others."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click

from tapestry.node.cli.options import home_option
from tapestry.node.home import Home

QUIET_S = 2.0  # what takes longer says how far it is
INTERVAL_S = 0.5


@click.command()
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@home_option
@click.option("--epoch", type=click.IntRange(min=0), metavar="E", help="Default: the latest on disk.")
@click.option(
    "--dtype",
    type=click.Choice(["f32", "bf16"]),
    default="f32",
    show_default=True,
    help="Of the weights; bf16 takes half the space and rounds.",
)
@click.option("--adapters", is_flag=True, help="Of a LoRA run: the adapters alone, for PEFT, not merged.")
@click.option("--derivative", metavar="NAME", help="One's own model in place of the base.")
@click.option("--version", "number", type=click.IntRange(min=1), metavar="N", help="Of the derivative.")
def export(
    out: Path,
    home: str | None,
    epoch: int | None,
    dtype: str,
    adapters: bool,
    derivative: str | None,
    number: int | None,
) -> None:
    """Write the shared base, or a derivative of it, into OUT as a Hugging Face model."""
    if derivative is not None:
        if adapters or epoch is not None:
            raise click.UsageError("--epoch and --adapters are of the base; a derivative has --version")
        _release(Home.locate(home, os.environ), derivative, number, out, dtype)
        return
    from tapestry.node.lineage.export import export_home

    line = ProgressLine()
    try:
        where = Home.locate(home, os.environ)
        export_home(where, out, epoch, dtype=dtype, adapters=adapters, progress=line.update)
    finally:
        line.end()
    click.echo(f"wrote {out}")


def _release(home: Home, name: str, number: int | None, out: Path, dtype: str) -> None:
    from tapestry.node.sovereign.release import release

    line = ProgressLine()
    try:
        version = release(home, name, number, out, dtype, line.update)
    finally:
        line.end()
    click.echo(f"wrote {name} {version.number} to {out}")


class ProgressLine:
    """How far a long command is: one line on a terminal's stderr, after QUIET_S. Nothing if it is no
    terminal."""

    def __init__(self) -> None:
        self._began_s = self._shown_s = time.monotonic()
        self._shown = False

    def update(self, what: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s - self._began_s < QUIET_S or now_s - self._shown_s < INTERVAL_S or not sys.stderr.isatty():
            return
        self._shown_s, self._shown = now_s, True
        click.echo(f"\r{what} {100 * done // max(total, 1):3} %", nl=False, err=True)

    def end(self) -> None:
        """Leave the terminal at the beginning of a clean line."""
        if self._shown:
            click.echo("\r" + " " * 20 + "\r", nl=False, err=True)
