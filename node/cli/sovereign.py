"""`tapestry derive`, `evaluate`, `rebase`, `merge`, `derivatives`: what a member makes of the base for
itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tapestry.node.cli.data import declare_missing, declare_option
from tapestry.node.cli.options import examples, home_option, home_to_write, json_option
from tapestry.node.cli.said import Said
from tapestry.node.errors import ExitCode
from tapestry.node.home import Home
from tapestry.node.lineage.asked import require_epoch
from tapestry.node.sovereign.asked import (
    require_extra,
    require_length,
    require_new,
    require_suite,
    shares_of,
    to_merge,
)
from tapestry.node.sovereign.derivative import Shelf, Transplant, Version
from tapestry.node.sovereign.recipe import REPAIR_SHARE, load_recipe, recipe_paths
from tapestry.node.spec.declared import BASE, READ, require, today_utc
from tapestry.node.spec.tables import plain

if TYPE_CHECKING:
    from tapestry.node.sovereign.build import Built

GO_ON = "`tapestry start` with --peer, or the addresses it knows, goes on with the others"

_epoch = click.IntRange(min=0)
_way = click.option(
    "--way",
    type=click.Choice(["task", "ties", "dare"]),
    default="task",
    show_default=True,
    help="How differences are joined.",
)
_scale = click.option("--scale", type=float, default=1.0, show_default=True, help="Of the difference.")
_density = click.option(
    "--density", type=float, default=0.5, show_default=True, help="ties, dare: the share that is kept."
)


@click.command(
    epilog=examples(
        "tapestry derive french --stage sft --method lora --data pairs.jsonl --home mine",
        "tapestry derive french --recipe recipe.toml --from 40 --home mine",
    )
)
@click.argument("name", metavar="NAME")
@home_option
@click.option("--from", "epoch", type=_epoch, metavar="EPOCH", help="Default: the newest on disk.")
@click.option(
    "--recipe", "recipe_file", type=click.Path(path_type=Path), metavar="FILE", help="A recipe, TOML."
)
@click.option("--stage", type=click.Choice(["cpt", "sft", "dpo"]), help="What kind of training.")
@click.option("--method", type=click.Choice(["full", "lora"]), help="What is trained.")
@click.option("--data", metavar="SOURCE", multiple=True, help="Text, or rows. May be repeated.")
@declare_option
@click.option("--passes", type=float, metavar="N", help="How often the data are gone over. Default: 1")
@click.option("--steps", type=int, metavar="N", help="In place of --passes.")
@click.option("--batch-size", type=int, metavar="N", help="Default: 8")
@click.option("--sequence-length", type=int, metavar="N", help="Default: as many as the base takes, to 1024.")
@click.option("--lr", type=float, metavar="RATE", help="Default: by stage and method.")
@click.option("--own-tokens", type=int, metavar="N", help="Tokens to learn from the data. Default: 0")
@click.option("--tokens-file", metavar="FILE", help="Tokens to add, one in each line.")
@click.option("--lora-rank", type=int, metavar="R", help="Default: 16")
@click.option("--seed", type=int, metavar="N", help="Default: 0")
@click.option("--restart", is_flag=True, help="Begin anew, and forget a training that was not finished.")
def derive(
    name: str,
    home: str | None,
    epoch: int | None,
    recipe_file: Path | None,
    restart: bool,
    declaration: str | None,
    **flags: Any,
) -> None:
    """Make a model of one's own from the base. The same command goes on where it was ended."""
    where = home_to_write(home)
    Shelf(where).of(name)
    recipe = load_recipe(recipe_file, flags)
    require_extra()
    require_new(Shelf(where), name)
    require_epoch(where, epoch)
    require_length(where, recipe.sequence_length)
    declare_missing(where, recipe_paths(recipe), f"derive:{name}", declaration)
    with Said() as told:
        from tapestry.node.sovereign import build

        built = build.derive(where, name, recipe, epoch, restart=restart, told=told.update)
    _say_built(built)


@click.command(
    epilog=examples(
        "tapestry evaluate french --home mine",
        "tapestry evaluate base --epoch 40 --suite suite.toml --json --home mine",
    )
)
@click.argument("name", metavar="NAME|base")
@home_option
@json_option
@click.option(
    "--suite", "suite_file", type=click.Path(path_type=Path), metavar="FILE", help="Default: HOME/suite.toml"
)
@click.option(
    "--version", "number", type=click.IntRange(min=1), metavar="N", help="Default: the current one."
)
@click.option("--epoch", type=_epoch, metavar="E", help="Of the base.")
def evaluate(
    name: str, home: str | None, as_json: bool, suite_file: Path | None, number: int | None, epoch: int | None
) -> int:
    """Measure a derivative, or the base; the gate decides anew which version is current."""
    from tapestry.node.sovereign.suite import Suite, table

    where = home_to_write(home)
    if name == "base":
        require_epoch(where, epoch)
        Suite.load(require_suite(where, suite_file))
    else:
        Shelf(where).require(name).version(number)
    if name == "base":
        with Said() as told:
            from tapestry.node.sovereign import build

            parent, report = build.evaluate_base(where, epoch, suite_file, told=told.update)
        if as_json:
            click.echo(json.dumps({"base": plain(parent), "report": plain(report)}, indent=1))
        else:
            click.echo(f"the base at {parent}")
            click.echo("\n".join(table(report, ())))
        return ExitCode.DONE
    with Said() as told:
        from tapestry.node.sovereign import build

        built, _ = build.evaluate(where, name, number, suite_file, told=told.update)
    if as_json:
        click.echo(json.dumps(plain(built.version), indent=1))
    else:
        _say_built(built)
    return ExitCode.DONE if built.version.promoted else ExitCode.FAILED


@click.command(
    epilog=examples(
        "tapestry rebase french --home mine",
        "tapestry rebase french --way ties --density 0.3 --watch 50 --home mine",
    )
)
@click.argument("name", metavar="NAME")
@home_option
@click.option("--onto", "epoch", type=_epoch, metavar="EPOCH", help="Default: the newest on disk.")
@_way
@_scale
@_density
@click.option(
    "--repair",
    type=click.FloatRange(0.0, 1.0),
    default=REPAIR_SHARE,
    show_default=True,
    metavar="SHARE",
    help="Steps of training afterwards, as a share of those it took. 0: none.",
)
@click.option(
    "--watch",
    "every_epochs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stay, and do it whenever the base has moved N epochs. Ctrl-C ends it.",
)
@click.option("--restart", is_flag=True, help="Begin anew, and forget a rebase that was not finished.")
def rebase(
    name: str,
    home: str | None,
    epoch: int | None,
    way: Any,
    scale: float,
    density: float,
    repair: float,
    every_epochs: int | None,
    restart: bool,
) -> int:
    """Bring a derivative to a newer base. Both versions stay; the new one counts if its gate holds."""
    if every_epochs is not None and epoch is not None:
        raise click.UsageError("--watch follows the newest base: leave out --onto")
    where = home_to_write(home)
    Shelf(where).require(name).version()
    require_epoch(where, epoch)

    def rebased() -> int:
        with Said() as told:
            from tapestry.node.sovereign import build

            built = build.rebase(
                where,
                name,
                epoch,
                Transplant(way, scale, density),
                repair_share=repair,
                restart=restart,
                told=told.update,
            )
        _say_built(built)
        return ExitCode.DONE if built.version.promoted else ExitCode.FAILED

    if every_epochs is None:
        return rebased()
    from tapestry.node.sovereign.watch import watch

    click.echo(f"watching {where.path}: {name} follows the base every {every_epochs} epochs", err=True)
    for base_epoch in watch(where, name, every_epochs):
        click.echo(f"the base is at epoch {base_epoch}", err=True)
        rebased()
    raise AssertionError("a watch ends by a signal or an error")


@click.command(
    epilog=examples(
        "tapestry rejoin --bring --home mine",
        "tapestry rejoin --keep alone --home mine",
    )
)
@home_option
@click.option("--keep", "name", metavar="NAME", help="What was learnt alone, as a derivative.")
@click.option("--bring", "brings", is_flag=True, help="What was learnt alone, in the next contribution.")
@click.option("--restart", is_flag=True, help="Forget a derivative of that name that was not finished.")
@declare_option
def rejoin(home: str | None, name: str | None, brings: bool, restart: bool, declaration: str | None) -> None:
    """Leave the island: what was learnt alone is kept or brought, the home is as it was before."""
    from tapestry.node.lineage import island
    from tapestry.node.lineage.uses import read_since

    where = home_to_write(home)
    island.require(where)
    with where.lock():
        began, here = island.require(where)
        if island.is_ending(where) or began == here:
            aside = island.end(where)
            lies = "on which no epoch was made" if aside is None else f"which lies in {aside}"
            click.echo(f"{where.path} is as it was before the island, {lies}")
            click.echo(GO_ON)
            return
        if name is None and not brings:
            raise click.UsageError("say what becomes of it: --keep NAME, --bring, or both")
        paths, reals = read_since(where, began.run_id, began.epoch)
        if brings:
            require(where, paths, BASE, today_utc())
            require(where, reals, READ, today_utc())
        if name is not None:
            declare_missing(where, paths, f"derive:{name}", declaration)
        with Said() as told:
            from tapestry.node.lineage.bring import bring
            from tapestry.node.sovereign import build

            built = None
            if name is not None:
                built = build.keep_island(where, name, restart=restart, told=told.update)
            if brings:
                bring(where, told.update)
            else:
                where.brought.unlink(missing_ok=True)  # of a command like this one that was killed
        aside = island.end(where)
    if built is not None:
        _say_built(built)
    click.echo(
        f"{where.path} is at epoch {began.epoch} again, as it was; epochs to {here.epoch} lie in {aside}"
    )
    if brings:
        click.echo("what was learnt alone goes into this member's next contribution that counts")
    click.echo(GO_ON)


@click.command(
    epilog=examples(
        "tapestry merge french law --into both --home mine",
        "tapestry merge french law --into both --weights 0.7,0.3 --way dare --home mine",
    )
)
@click.argument("names", metavar="NAME NAME...", nargs=-1, required=True)
@click.option("--into", required=True, metavar="NAME", help="What the merged one is called.")
@click.option("--weights", metavar="W,W,...", help="One for each. Default: equal, and 1 in all.")
@home_option
@_way
@_scale
@_density
@click.option("--restart", is_flag=True, help="Forget a derivative of that name that was not finished.")
def merge(
    names: tuple[str, ...],
    into: str,
    weights: str | None,
    home: str | None,
    way: Any,
    scale: float,
    density: float,
    restart: bool,
) -> int:
    """Join derivatives of one base into one."""
    where, shares = home_to_write(home), shares_of(names, _weights(weights))
    require_new(Shelf(where), into)
    to_merge(Shelf(where), names)
    with Said() as told:
        from tapestry.node.sovereign import build

        built = build.merge(
            where,
            into,
            names,
            shares,
            Transplant(way, scale, density),
            restart=restart,
            told=told.update,
        )
    _say_built(built)
    return ExitCode.DONE if built.version.promoted else ExitCode.FAILED


@click.command(
    epilog=examples(
        "tapestry derivatives --home mine",
        "tapestry derivatives --home mine --json | jq -r '.[].name'",
    )
)
@home_option
@json_option
def derivatives(home: str | None, as_json: bool) -> None:
    """The derivatives in a home, with their versions."""
    shelf = Shelf(Home.locate(home, os.environ))
    found = [shelf.require(name) for name in shelf.names()]
    if as_json:
        click.echo(json.dumps([plain(one) for one in found], indent=1))
        return
    if not found:
        click.echo("no derivatives yet: tapestry derive makes one")
    for one in found:
        for version in one.versions:
            mark = "*" if version.number == one.current else " "
            click.echo(f"{mark} {one.name} {version.number}  {_made(version)}")


def _weights(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise click.BadParameter(f"'{text}' is not numbers with commas between them") from None


def _made(version: Version) -> str:
    made = f"{version.how} {version.recipe.stage} {version.recipe.method}"
    of = f" of {', '.join(version.made_of)}" if version.made_of else ""
    own = ""
    if version.own_tokens:
        own = f", {version.own_tokens} own tokens ({100 * version.ids_saved:.0f} % fewer ids)"
    return f"{made}{of}, on {version.parent}, {version.steps} steps{own}, {version.made_at}"


def _say_built(built: Built) -> None:
    from tapestry.node.sovereign.suite import table

    version = built.version
    click.echo(f"{built.derivative.name} {version.number}: {_made(version)}")
    click.echo("\n".join(table(version.report, version.base_report)))
    for note in built.notes:
        click.echo(f"note  {note}")
    for reason in version.reasons:
        click.echo(f"gate  {reason}")
    if version.promoted:
        click.echo(f"promoted: {built.derivative.name} is now version {version.number}, in {built.folder}")
    else:
        kept = f"version {built.derivative.current} stays" if built.derivative.current else "none is current"
        click.echo(f"not promoted, {kept}; this one is in {built.folder}")
