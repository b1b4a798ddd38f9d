"""`tapestry init`: the commented files that a new run and its first node begin with."""

from __future__ import annotations

import os
import shlex
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Literal

import click

from tapestry.node.cli.options import examples, home_to_write
from tapestry.node.cli.said import Said
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.spec.declared import template
from tapestry.node.spec.node import NodeToml
from tapestry.node.spec.recipe import preset_recipe, recipe
from tapestry.node.spec.run import RUN_NAME, RunSpec


@click.command(
    epilog=examples(
        "tapestry init ours --base models/SmolLM2-135M --name our-run",
        "tapestry init trial --preset tiny",
    )
)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--preset",
    type=click.Choice(["nano", "tiny", "small"]),
    help="A Llama of about 50k, 0.9M or 10M random parameters. Default: tiny",
)
@click.option(
    "--base", metavar="HFDIR", help="Continue this open base: a Hugging Face directory, or a hub id."
)
@click.option("--config", metavar="HFDIR", help="Train the same architecture from random parameters.")
@click.option(
    "--lora",
    "lora_rank",
    type=click.IntRange(1, 1024),
    metavar="R",
    help="With --base: freeze it, and train adapters of rank R.",
)
@click.option(
    "--epochs",
    type=click.IntRange(1, 10**6),
    metavar="N",
    help="How long the run is to be, about: the learning rate falls along a cosine over N epochs. "
    "Without it, the rate stays.",
)
@click.option("--name", help="The name of the run. Default: the directory's.")
@click.option(
    "--admission",
    type=click.Choice(["members", "open"]),
    default="members",
    help="members: who comes waits to be admitted (default). open: who comes contributes.",
)
def init(
    directory: Path,
    preset: str | None,
    base: str | None,
    config: str | None,
    lora_rank: int | None,
    epochs: int | None,
    name: str | None,
    admission: Literal["members", "open"],
) -> None:
    """Write a commented run.toml, node.toml and data.toml into DIR."""
    if sum(choice is not None for choice in (preset, base, config)) > 1:
        raise UserError("--preset, --base and --config exclude each other", hint="name one of them")
    if lora_rank is not None and base is None:
        raise UserError("--lora trains adapters on a base", hint="name it with --base HFDIR")
    home = home_to_write(str(directory))
    for path in (home.run_toml, home.node_toml):
        if os.path.lexists(path):
            raise UserError(f"{path} is there already", hint="choose another DIR, or remove the file")
    run_name = name or _name_for(home.path)
    if base is None and config is None:
        spec, node = preset_recipe(preset or "tiny", run_name, epochs or 0), NodeToml()
        home.create()
    else:
        spec, node = _adopt(base or config or "", home, run_name, base is not None, lora_rank or 0)
        spec = recipe(spec, epochs or 0)
    spec = replace(spec, members=replace(spec.members, admission=admission))
    texts = {home.run_toml: spec.to_toml(), home.node_toml: node.to_toml(), home.data_toml: template()}
    if os.path.lexists(home.data_toml):  # declared before: `tapestry data declare`
        del texts[home.data_toml]
    for path, text in texts.items():
        _write_new(path, text)
        click.echo(f"wrote {path}")
    trial = "" if base or config else ", or with --data stdlib for a first trial"
    click.echo(f"\nFound the run with your own text{trial}:\n")
    click.echo(f"  tapestry start --home {shlex.quote(str(directory))} --data PATH")


def _adopt(source: str, home: Home, name: str, weights: bool, lora_rank: int) -> tuple[RunSpec, NodeToml]:
    """A base's files into HOME/base; says what it found."""
    from tapestry.node.trainer.models.folder import look_at
    from tapestry.node.trainer.models.refusal import ModelError

    try:
        look_at(source, weights)
    except ModelError as error:
        raise UserError(str(error), hint=error.hint or None) from error
    home.create()
    with Said() as said:
        from tapestry.node.lineage.adopt import adopt  # torch and transformers: seconds

        adopted = adopt(source, home.base, name, weights=weights, lora_rank=lora_rank, told=said.update)
    facts = adopted.facts
    click.echo(
        f"base {source}: {facts.architecture}, {facts.parameters:,} parameters, "
        f"a tokenizer of {facts.tokenizer_ids:,} ids, "
        f"{'' if adopted.spec.data.add_bos else 'no '}BOS before documents"
    )
    if facts.unused:
        click.echo(f"not used of its weights: {', '.join(facts.unused[:4])}")
    return adopted.spec, NodeToml(base=str(facts.folder.absolute()) if weights else "")


def _name_for(directory: Path) -> str:
    """The directory's name where it can name a run."""
    name = unicodedata.normalize("NFC", directory.name)
    return name if RUN_NAME.admits(name) else "tapestry"


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
