"""`tapestry data list|check|declare|revoke`: what each source of data may be used for; and how a source is
declared on the command line.

docs/data.md says what is declared and why; spec/declared.py is the file.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from tapestry.node.cli.options import examples, home_option, home_to_write, json_option
from tapestry.node.cli.said import Said
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.spec.data import is_word, real_of, reals_of, rebased_data, split_field
from tapestry.node.spec.declared import (
    BASE,
    FORM,
    Declared,
    Revoked,
    append,
    covers,
    parse_declaration,
    paths_of,
    today_utc,
    undeclared,
)
from tapestry.node.spec.tables import plain
from tapestry.node.trainer.data.tally import numbered

declare_option = click.option(
    "--declare", "declaration", metavar="TEXT", help=f"Of data that are not declared yet: {FORM}."
)


def declare_missing(
    home: Home, paths: Iterable[str], purpose: str, text: str | None, silent: bool = False
) -> None:
    """Each source that nobody declared for the purpose: by `text`, or ask whoever sits there, once. Raises
    UserError where there is neither; a source that does not exist is left for its reader to name."""
    from tapestry.node.lineage.uses import note

    there = [path for path in dict.fromkeys(paths) if is_word(path) or os.path.lexists(path)]
    for path in undeclared(home, there, purpose):
        said = text if text is not None else _asked(path, purpose)
        made = parse_declaration(said, path, purpose)
        append(home, [made])
        note(home, "declared", path=path, declaration=plain(made))
        if not silent:
            click.echo(f"declared {path} for {purpose}: {made.owner}, {made.licence}, {made.mode}", err=True)


def _asked(path: str, purpose: str) -> str:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError(
            f"data {path} is not declared for {purpose}, so it is not read",
            hint=f'say once whose it is: --declare "{FORM.partition("[")[0]}", or --declare own for your own',
        )
    click.echo(f"{path} is not declared for {purpose} yet. Whose is it, and under what licence?", err=True)
    answer: str = click.prompt(f"{FORM}", err=True)
    return answer


@click.group("data", no_args_is_help=True)
def data() -> None:
    """What each source of data may be used for, what it was used for, and how to withdraw it."""


@data.command(
    "list",
    epilog=examples(
        "tapestry data list --home mine",
        "tapestry data list --home mine --json",
    ),
)
@home_option
@json_option
def listed(home: str | None, as_json: bool) -> None:
    """What is declared in HOME/data.toml, and what of it holds today."""
    place = Home.locate(home, os.environ)
    declared = Declared.load(place)
    if as_json:
        click.echo(json.dumps(plain(declared), indent=1))
        return
    if not declared.source:
        click.echo(f"nothing is declared in {place.data_toml}: tapestry data declare TEXT PATH")
    for one in declared.source:
        until = f", until {one.until}" if one.until else ""
        click.echo(f"{one.path}\n  {one.owner}, {one.licence}, {one.mode}{until}")
        for purpose in one.purposes:
            click.echo(f"  {purpose}: {declared.refusal(one.path, purpose, today_utc()) or 'may be used'}")
    for gone in declared.revoked:
        click.echo(f"{gone.path}\n  revoked at {gone.at}: {gone.reason or 'no reason given'}")


@data.command(
    epilog=examples(
        "tapestry data check --home mine",
        "tapestry data check texts/fr --purpose derive:french --home mine",
    )
)
@click.argument("sources", metavar="[SOURCE]...", nargs=-1)
@home_option
@click.option("--purpose", default=BASE, show_default=True, metavar="base|derive:NAME")
def check(sources: tuple[str, ...], home: str | None, purpose: str) -> int:
    """Whether SOURCEs (default: those of node.toml) may be read, and what was made from them."""
    place = Home.locate(home, os.environ)
    declared = Declared.load(place)
    with Said():
        from tapestry.node.sovereign.withdrawal import withdrawal  # torch: seconds

    refused = 0
    for path in _absolute(sources) or _configured(place):
        why = declared.refusal(path, purpose, today_utc())
        refused += bool(why)
        click.echo(f"{path}: {why or f'may be used for {purpose}'}")
        if not why and (domains := declared.domains_of(path)):
            click.echo(f"  dropped from it: {', '.join(one.name for one in domains)}")
        if place.data_events.exists():
            touched = withdrawal(place, lambda other, path=path: _touches(path, other))  # type: ignore[misc]
            lost = f", and {len(touched.branches)} branches that lost" if touched.branches else ""
            records = numbered(len(touched.records), "record")
            where = f"{records} and {numbered(len(touched.derivatives), 'derivative')}{lost}"
            click.echo(f"  used in {where}")
    return ExitCode.REFUSED if refused else ExitCode.DONE


@data.command(
    epilog=examples(
        'tapestry data declare "Our lab, CC-BY-4.0" texts/fr --home mine',
        'tapestry data declare "The archive, all rights, restricted, until 2027-12-31, consent A-17" letters',
    )
)
@click.argument("text", metavar="TEXT")
@click.argument("sources", metavar="[SOURCE]...", nargs=-1)
@home_option
@click.option("--purpose", default=BASE, show_default=True, metavar="base|derive:NAME")
def declare(text: str, sources: tuple[str, ...], home: str | None, purpose: str) -> None:
    """Say whose SOURCEs (default: those of node.toml) are, and under what licence, before a node starts.

    TEXT is OWNER, LICENCE[, MODE][, until YYYY-MM-DD][, consent REFERENCE], or "own".
    """
    place = home_to_write(home)
    paths = _absolute(sources) or _configured(place)
    for path in paths:
        if not is_word(path) and not os.path.lexists(path):
            raise UserError(f"there is no {path}", hint="a file or a folder that is there")
    missing = undeclared(place, paths, purpose)
    declare_missing(place, missing, purpose, text)
    for path in paths:
        if path not in missing:
            refusal = Declared.load(place).refusal(path, purpose, today_utc())
            click.echo(f"{path}: {refusal or f'may be used for {purpose} already'}", err=True)


@data.command(
    epilog=examples(
        'tapestry data revoke texts/fr --reason "withdrawn by its author" --home mine',
    )
)
@click.argument("source", metavar="SOURCE")
@home_option
@json_option
@click.option("--reason", default="", metavar="TEXT", help="Kept with the revocation.")
@click.option(
    "--force", is_flag=True, help="Also what was neither declared nor used here: before it ever is."
)
def revoke(source: str, home: str | None, as_json: bool, reason: str, force: bool) -> None:
    """Stop the use of SOURCE, and say which epochs, records and derivatives it touched."""
    from tapestry.node.lineage.uses import note

    place = home_to_write(home)
    (path,) = _absolute((source,))
    declared = Declared.load(place)
    # A link may lead elsewhere tomorrow: what it leads to today is revoked by its own name, and the link too.
    real = real_of(path)
    if not any(gone.path == real_of(gone.path) and covers(gone.path, path) for gone in declared.revoked):
        if not force:
            _require_known(place, declared, source, path)
        at = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        append(place, [Revoked(one, at, reason) for one in dict.fromkeys((real, path))])
        note(place, "revoked", path=path, real=list(reals_of((path,))), reason=reason)
    with Said():
        from tapestry.node.sovereign.withdrawal import withdrawal  # torch: seconds; the use has ended before

        removed = _forget_ids(place, path)
        found = withdrawal(place, lambda other: _touches(path, other))
    if as_json:
        said = {"source": path, "removed_bytes": removed} | dataclasses.asdict(found)
        click.echo(json.dumps(said, indent=1))
        return
    named = path if path == real else f"{path}, which is {real}"
    click.echo(f"revoked {named}: it is not read any more, and a running node stops training on it")
    click.echo(f"its text as ids, of the base and of derivatives: {removed} bytes removed")
    click.echo("\n".join(found.lines()))


def _require_known(home: Home, declared: Declared, said: str, path: str) -> None:
    """A mistyped name must not end in "revoked" while the source is trained on. Raises UserError."""
    known: dict[str, None] = {}
    for one in _known(home, declared):
        if _touches(path, one):
            return
        known[split_field(one)[0]] = None
    in_home = rebased_data({"paths": [split_field(said)[0]]}, home.path)["paths"]
    near = [one for one in known if any(_touches(other, one) for other in in_home)]
    near = near or difflib.get_close_matches(path, known, n=1)
    hint = f"is it {near[0]}? " if near else ""
    raise UserError(
        f"nothing was revoked: {path} was neither declared nor used here, and node.toml does not name it",
        hint=f"{hint}--force revokes it all the same, before it is ever used",
        details=[f"known here: {one}" for one in known],
    )


def _known(home: Home, declared: Declared) -> Iterator[str]:
    """What was declared, what was used, and what would be. Raises UserError."""
    from tapestry.node.lineage.uses import named
    from tapestry.node.spec.node import named_sources

    yield from (one.path for one in declared.source)
    yield from named(home)
    yield from named_sources(home, os.environ)


def _forget_ids(home: Home, path: str) -> int:
    """What trainers made of its text, of the base and of derivatives; the bytes."""
    from tapestry.node.sovereign.derivative import Shelf
    from tapestry.node.trainer.data.tokens import forget

    removed = 0
    for folder in (home.cache, Shelf(home).cache):
        try:
            removed += forget(folder, lambda other: _touches(path, other))
        except OSError as error:
            raise UserError(
                f"{path} is revoked; its text as ids could not be removed from {folder}: {error.strerror}",
                exit_code=ExitCode.FAILED,
                hint="remove that folder; what it holds of other sources is made again when it is needed",
            ) from error
    return removed


def _touches(path: str, other: str) -> bool:
    used = split_field(other)[0]
    return covers(path, used) or covers(used, path)


def _configured(home: Home) -> tuple[str, ...]:
    from tapestry.node.spec.node import NodeConfig

    return paths_of(NodeConfig.resolve(home, {}, os.environ).data)


def _absolute(sources: Iterable[str]) -> tuple[str, ...]:
    paths = [split_field(one)[0] for one in sources]
    return tuple(rebased_data({"paths": paths}, Path.cwd())["paths"])
