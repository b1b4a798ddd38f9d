"""`tapestry doctor`: could a node train here, now?"""

from __future__ import annotations

import json
import os
from typing import Any

import click

from tapestry.node.cli.options import examples, home_option, json_option
from tapestry.node.cli.said import Said
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.spec.data import DATA_MISSING
from tapestry.node.spec.node import NodeConfig
from tapestry.node.surface.findings import Finding, unknown, wrong


@click.command(
    epilog=examples(
        "tapestry doctor --home mine",
        "tapestry doctor --home mine --peer LINE --data texts/fr",
    )
)
@home_option
@click.option(
    "--peer", "peers", metavar="MADDR", multiple=True, help="A member: is it reached, does it reach us?"
)
@click.option("--run", metavar="FILE", help="The run spec to judge by. Default: the home's.")
@click.option("--run-id", metavar="ID", help="The run that the peer must be of.")
@click.option("--data", metavar="PATH[:FIELD]", multiple=True, help="As for start.")
@click.option("--listen", metavar="MADDR", multiple=True, help="As for start.")
@click.option("--http", metavar="HOST:PORT", help="As for start.")
@click.option("--device", metavar="DEVICE", help="As for start.")
@click.option("--island", is_flag=True, default=None, help="As for start.")
@json_option
def doctor(home: str | None, as_json: bool, **flags: Any) -> int:
    """Check ports, reachability, clock, disk, memory, devices and versions; exit 0 if a node could train
    now."""
    place = Home.locate(home, os.environ)
    findings: list[Finding] = []

    def tell(finding: Finding) -> None:
        findings.append(finding)
        said.clear()
        if not as_json:
            _print(finding)

    with Said() as said:
        from tapestry.node.daemon import doctor as look  # seconds

        ok = True
        config: NodeConfig | None
        try:
            config = NodeConfig.resolve(place, flags, os.environ)
        except UserError as error:
            config = _without_data(place, flags)
            if error.line == DATA_MISSING and place.is_held():
                tell(unknown("settings", "the node that runs here was given its data by start"))
            else:
                ok = False
                tell(wrong("settings", error.line, error.hint or "see the comments in node.toml"))
        if config is not None:
            ok = look.run(config, tell, said.update) and ok
    if as_json:
        click.echo(json.dumps({"ok": ok, "findings": [one.table() for one in findings]}, indent=1))
    else:
        click.echo("a node could train here now" if ok else "a node could not train here now")
    return ExitCode.DONE if ok else ExitCode.FAILED


def _without_data(home: Home, flags: dict[str, Any]) -> NodeConfig | None:
    """What is wrong may be the data alone: then the rest is still looked at."""
    try:
        return NodeConfig.resolve(home, {**flags, "data": (), "external": True}, os.environ)
    except UserError:
        return None


def _print(finding: Finding) -> None:
    click.echo(f"{finding.verdict.value:<12}{finding.what:<10}{finding.text}")
    if finding.cure:
        click.echo(f"{'':<12}cure      {finding.cure}")
