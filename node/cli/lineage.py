"""`tapestry export`, `verify`, `log`, `anchor`, `exit`: the base for others, and where it comes from."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import deque
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from tapestry.node.cli.look import say_if_stopped
from tapestry.node.cli.options import examples, home_option, json_option
from tapestry.node.cli.said import Said
from tapestry.node.errors import ExitCode, UserError, as_user_error
from tapestry.node.home import Home
from tapestry.node.lineage.asked import (
    ExportError,
    require_branch,
    require_epoch,
    require_free,
    require_provable,
)

if TYPE_CHECKING:
    from tapestry.node.lineage.export import Written


class EpochType(click.ParamType):  # type: ignore[type-arg]
    """A number, or the word `head`."""

    name = "epoch"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Literal["head"]:
        return "head" if value == "head" else click.IntRange(min=0).convert(value, param, ctx)


@click.command(
    epilog=examples(
        "tapestry export model --home mine --dtype bf16",
    )
)
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@home_option
@click.option(
    "--epoch",
    type=EpochType(),
    metavar="E|head",
    help="Default: the newest whose state was signed, which is the one before the head.",
)
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
@click.option("--branch", metavar="NAME", help="What lost at a fork, of `tapestry log --branches`.")
def export(
    out: Path,
    home: str | None,
    epoch: int | Literal["head"] | None,
    dtype: str,
    adapters: bool,
    derivative: str | None,
    number: int | None,
    branch: str | None,
) -> None:
    """Write the shared base, or a derivative of it, into OUT as a Hugging Face model."""
    where = Home.locate(home, os.environ)
    say_if_stopped(where)
    if derivative is not None:
        if adapters or epoch is not None or branch is not None:
            raise click.UsageError("--epoch, --adapters, --branch: of the base; a derivative has --version")
        _release(where, derivative, number, out, dtype)
        return
    with as_user_error(ExportError):
        require_free(out)
    if branch is not None:
        require_branch(where, branch, epoch)
    else:
        require_epoch(where, epoch)
    with Said() as said:
        if branch is not None:
            from tapestry.node.lineage.export_branch import export_branch

            written = export_branch(
                where, branch, out, epoch, dtype=dtype, adapters=adapters, progress=said.update
            )
        else:
            from tapestry.node.lineage.export import export_home

            written = export_home(where, out, epoch, dtype=dtype, adapters=adapters, progress=said.update)
    click.echo(f"wrote {out}: {_epoch_of(written, chosen=epoch is None and branch is None)}")
    if written.unprovable:
        click.echo(f"tapestry verify will say that its tensors are NOT proven: {written.unprovable}")
    else:
        click.echo("tapestry verify proves its tensors by what members signed")


def _epoch_of(written: Written, chosen: bool) -> str:
    """Which epoch, and why that one where the user did not say."""
    epoch, newest = written.epoch, written.newest
    if not chosen:
        return f"epoch {epoch}"
    if written.signed and epoch == newest:
        return f"epoch {epoch}, the head"
    if epoch == newest:
        why = (
            "below it is only what the run began from"
            if epoch == 1
            else "this home does not lead to the one below"
        )
        return f"epoch {epoch}, the head, for {why}"
    if epoch < newest - 1:
        return f"epoch {epoch}, the newest state that this home leads to; its records are at {newest}"
    return f"epoch {epoch}, the newest whose state was signed; the head, {newest}, is --epoch head"


@click.command(
    epilog=examples(
        "tapestry verify mine",
        "tapestry verify model --anchor anchor.txt",
        "tapestry verify small --against mine",
    )
)
@click.argument("path", metavar="HOME|OUT", type=click.Path(path_type=Path))
@json_option
@click.option("--anchor", metavar="LINE|FILE", help="What was published of this chain.")
@click.option(
    "--against",
    metavar="HOME|OUT",
    type=click.Path(path_type=Path),
    help="Of an export in bf16, or of the head: a home or an f32 export to compare its tensors with.",
)
@click.option(
    "--allow-unproven",
    is_flag=True,
    help="Exit code 0 also where no file is damaged, but nobody's signature vouches for the tensors.",
)
@click.option("--no-replay", is_flag=True, help="Signatures and digests only: no state is computed again.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes that check signatures of a long chain; all cores if not given.",
)
def verify(
    path: Path,
    as_json: bool,
    anchor: str | None,
    against: Path | None,
    allow_unproven: bool,
    no_replay: bool,
    jobs: int | None,
) -> int:
    """Check a home or an export, offline: records, updates, checkpoints, files, and the states themselves.

    The last line says what came out. Exit code 0: it holds, and of an export, the tensors are proven.
    """
    from tapestry.node.lineage.anchor import Anchor

    require_provable(path, against)
    given = None if anchor is None else Anchor.parse(_text_of(anchor))
    with Said() as said:
        from tapestry.node.lineage.signatures import jobs_here
        from tapestry.node.lineage.verify import lines
        from tapestry.node.lineage.verify import verify as proven

        how_many = jobs or jobs_here()
        proof = proven(
            path, anchor=given, against=against, replay=not no_replay, jobs=how_many, told=said.update
        )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(proof) | {"holds": proof.holds}, indent=1))
    else:
        click.echo("\n".join(lines(proof)))
    enough = proof.holds and (proof.proven is not False or allow_unproven)
    return ExitCode.DONE if enough else ExitCode.FAILED


@click.command(
    epilog=examples(
        "tapestry log --home mine --last 20",
        "tapestry log --home mine --json",
    )
)
@home_option
@json_option
@click.option("-n", "--last", type=click.IntRange(min=1), metavar="N", help="Only the newest N.")
@click.option("--egress", "as_egress", is_flag=True, help="What left this node, in place of the chain.")
@click.option("--branches", "as_branches", is_flag=True, help="The run, islands, and what lost at forks.")
def log(home: str | None, as_json: bool, last: int | None, as_egress: bool, as_branches: bool) -> None:
    """The epochs of a home's chain: when, who with which share, how many bytes, which head."""
    from tapestry.node.lineage.log import lines, read_log

    where = Home.locate(home, os.environ)
    if not as_json:
        say_if_stopped(where)
    if as_branches:
        _log_branches(where, as_json)
        return
    if as_egress:
        _log_egress(where, as_json, last)
        return
    entries = read_log(where, last, _losses(where))
    texts = (json.dumps(entry.table()) for entry in entries) if as_json else lines(entries)
    with Said("reading the chain"):
        first = list(islice(texts, 1))  # with -n, the others follow at once
    for text in chain(first, texts):
        click.echo(text)


@click.command(
    epilog=examples(
        "tapestry anchor --home mine > anchor.txt",
        "tapestry verify mine --anchor anchor.txt",
    )
)
@home_option
def anchor(home: str | None) -> None:
    """The head and its signatures as one line, to publish anywhere; `verify --anchor` checks against it."""
    from tapestry.node.lineage.log import newest

    with Said("reading the chain"):
        line = str(newest(Home.locate(home, os.environ)))
    click.echo(line)


@click.command(
    "exit",
    epilog=examples(
        "tapestry exit mine-alone --home mine",
        "tapestry start --home mine-alone --island --data texts",
    ),
)
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@home_option
def leave(out: Path, home: str | None) -> None:
    """Take everything along: one verified directory, from which `start --home OUT --island` goes on."""
    with Said() as said:
        from tapestry.node.lineage.leave import leave as taken

        proof = taken(Home.locate(home, os.environ), out, said.update)
    click.echo(f"wrote {out}: epoch {proof.epoch}, head {proof.head[:16]}, verified and replayed")


def _losses(home: Home) -> dict[int, float]:
    """This node's own, by epoch, as far as its history goes back."""
    from tapestry.node.surface.history import Point, look_at_history

    points = (entry for entry in look_at_history(home.history) if isinstance(entry, Point))
    return {point.epoch: point.loss for point in points if point.loss is not None}


def _log_branches(home: Home, as_json: bool) -> None:
    with Said():
        from tapestry.node.lineage.branches import branches, lines

        found = branches(home)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
    else:
        click.echo("\n".join(lines(found)))


def _log_egress(home: Home, as_json: bool, last: int | None) -> None:
    from tapestry.node.lineage.egress import lines, read_egress

    entries = read_egress(home)
    if last is not None:
        entries = iter(deque(entries, maxlen=last))
    if as_json:
        for entry in entries:
            click.echo(json.dumps(entry.value()))
        return
    for text in lines(entries):
        click.echo(text)


def _text_of(given: str) -> str:
    """An anchor as it is, or the file that holds it."""
    if " " in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the anchor in {given}: {error}") from error


def _release(home: Home, name: str, number: int | None, out: Path, dtype: str) -> None:
    from tapestry.node.sovereign.derivative import Shelf

    Shelf(home).require(name).released(number)
    with as_user_error(ExportError):
        require_free(out)
    with Said() as said:
        from tapestry.node.sovereign.release import release

        version = release(home, name, number, out, dtype, said.update)
    click.echo(f"wrote {name} {version.number} to {out}")
