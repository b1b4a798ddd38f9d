"""`tapestry status` and `peers`: what a running node says of itself."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click
from rich.cells import cell_len

from tapestry.node.cli.options import examples, home_option, json_option
from tapestry.node.errors import ExitCode, UserError, printable
from tapestry.node.home import Home, Liveness
from tapestry.node.lineage.columns import WIDTH, column, cut, ids_cut, who, wrapped
from tapestry.node.progress import size
from tapestry.node.protocol.settings import shown
from tapestry.node.protocol.waits import span
from tapestry.node.surface.ask import ask

NAME_WIDTH = WIDTH - 2 - 64  # a digest fits beside it
SHORT_NAMES = {  # of keys of /status that are longer
    "tokens_per_second": "tokens_per_s",
    "trainer_trouble": "trouble",
    "dropped_records": "dropped",
}


@click.command(epilog=examples("tapestry status", "tapestry status --json | jq .epoch"))
@home_option
@json_option
def status(home: str | None, as_json: bool) -> None:
    """What the node is doing; of a node that does not run, what its home holds."""
    place = Home.locate(home, os.environ)
    answer = stopped(place, "status") or ask_node(place, "/status")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    if not isinstance(answer, dict):
        raise UserError("the node's /status is not a table", exit_code=ExitCode.FAILED)
    for line in _for_people(answer):
        click.echo(line)


@click.command(epilog=examples("tapestry peers", "tapestry peers --json | jq -r '.[].peer_id'"))
@home_option
@json_option
def peers(home: str | None, as_json: bool) -> None:
    """The live peers, as this node sees them; of a stopped node, where they were."""
    place = Home.locate(home, os.environ)
    held = stopped(place, "peers")
    answer = ask_node(place, "/peers") if held is None else held
    if held is not None:
        click.echo("no node runs in this home: here is where the others were found last", err=True)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    if not isinstance(answer, list) or not all(isinstance(row, dict) for row in answer):
        raise UserError("the node's /peers is not a list of tables", exit_code=ExitCode.FAILED)
    versions = any(row.get("same_version") is False for row in answer)
    for line in _table([_in_short(row, versions) for row in answer]) if answer else ["no peers"]:
        click.echo(line)


def _for_people(answer: dict[str, Any]) -> Iterator[str]:
    """Names in a column, values beside it: digests whole, peer ids short but for the node's own, times in
    words."""
    answer.pop("roll", None)  # `tapestry members` shows it
    if isinstance(answer.get("settings"), dict):
        answer["settings"] = {key: shown(value) for key, value in answer["settings"].items()}
    if isinstance(answer.get("waiting"), dict):
        answer["waiting"]["since"] = _clock(answer["waiting"].get("since"))
    if isinstance(answer.get("bytes"), dict):
        answer["bytes"] = {key: size(value) for key, value in answer["bytes"].items()}
    if isinstance(answer.get("addresses"), list):
        own = f"/p2p/{answer.get('peer_id')}"
        answer["addresses"] = [str(one).removesuffix(own) for one in answer["addresses"]]
    rows = [(SHORT_NAMES.get(key, key), value) for key, value in map(_in_words, answer, answer.values())]
    width = min(NAME_WIDTH, max((cell_len(name) for name, _ in rows), default=0))
    for name, value in rows:
        for index, line in enumerate(_lines(value)):
            whole = name == "peer_id"
            yield from _beside(printable(name) if index == 0 else "", line if whole else ids_cut(line), width)


def _in_words(key: str, value: Any) -> tuple[str, Any]:
    """A duration as one, under its name without the unit."""
    if isinstance(value, dict):
        return key, dict(map(_in_words, value, value.values()))
    if key.endswith("_s") and isinstance(value, int | float) and not isinstance(value, bool):
        return key.removesuffix("_s"), span(value)
    return key, value


def _clock(at: object) -> str:
    """Unix time as it is here."""
    known = isinstance(at, int | float)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(str(at)))) if known else "-"


def _beside(name: str, value: str, width: int) -> Iterator[str]:
    """The value in the column beside its name, on as many lines as it takes."""
    begin = f"{name:<{width}}  "
    if cell_len(begin + value) <= WIDTH:
        yield begin + value
    else:
        yield from wrapped(value, begin, " " * (width + 2))


def _in_short(peer: dict[str, object], versions: bool) -> dict[str, object]:
    """What of a peer fits on a line of 80 columns; --json has the rest. `versions`: not all are ours."""
    row = {key: peer.get(key) for key in ("phase", "epoch")}
    addresses = peer.get("addresses")
    first = addresses[0] if isinstance(addresses, list) and addresses else None
    relayed, heard, same = peer.get("relayed"), peer.get("heard_s"), peer.get("same_head")
    return {
        "peer": who(str(peer.get("peer_id", "-")), str(peer.get("name") or "")),
        **row,
        **({"version": peer.get("version")} if versions else {}),
        "head": None if same is None else "same" if same else "other",
        "heard": f"{heard:.1f} s" if isinstance(heard, float) else None,
        "way": None if relayed is None else "relayed" if relayed else "direct",
        "address": peer.get("why") or (str(first).partition("/p2p/")[0] if first else None),
    }


def say_if_stopped(home: Home) -> None:
    """On stderr, beside an answer that is read from the disk."""
    with contextlib.suppress(PermissionError):  # of another user's home nobody can say
        if home.genesis.exists() and not home.is_held():
            click.echo("no node runs in this home: this is what its disk holds", err=True)


def stopped(home: Home, what: str) -> Any:
    """What a home without a node says; None if one runs, or if it holds no run."""
    if home.is_held() or not home.genesis.exists():
        return None
    from tapestry.node.surface.stopped import stopped_peers, stopped_status  # only here: it costs 0.1 s

    return stopped_peers(home) if what == "peers" else stopped_status(home)


def ask_node(home: Home, path: str) -> object:
    """What the node of this home answers; raises UserError: 1 if it does not, 2 if there is no such home."""
    home.require_there()
    state = home.read_node_json()
    url = state.info.http if state.info is not None else home.starting_url(state.pid)
    if url is None or state.liveness not in (Liveness.RUNNING, Liveness.STARTING):
        starts = state.liveness is Liveness.STARTING
        raise UserError(
            _why_not_running(home, state.liveness, state.pid),
            exit_code=ExitCode.FAILED,
            hint="ask again in a moment" if starts else "tapestry start starts it; --home DIR names another",
        )
    try:
        return ask(home, url, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"the node (pid {state.pid}) does not answer at {url}: {error}",
            exit_code=ExitCode.FAILED,
        ) from error


def _why_not_running(home: Home, liveness: Liveness, pid: int | None) -> str:
    if liveness is Liveness.STARTING:
        return f"the node in {home.path} is starting (pid {pid}) and does not answer yet"
    died = "; the last one ended without saying so" if liveness is Liveness.STALE else ""
    return f"no node is running in {home.path}{died}"


def _lines(value: object) -> list[str]:
    """A value for people: lists and tables one item a line."""
    if isinstance(value, list):
        return [_word(item) for item in value] or ["-"]
    if isinstance(value, dict):
        return [f"{printable(str(key))}={_word(item)}" for key, item in value.items()] or ["-"]
    return [_word(value)]


def _word(value: object) -> str:
    if value is None or value == "" or value == []:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list):
        return ", ".join(_word(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(_lines(value))
    return printable(value if isinstance(value, str) else json.dumps(value))


def _table(rows: Sequence[dict[str, object]]) -> list[str]:
    """Aligned columns, one per key, in the order in which the keys first appear; the last takes the room that
    is left."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[printable(str(key)) for key in columns]]
    cells += [[" ".join(_lines(row.get(key))) for key in columns] for row in rows]
    widths = [max(cell_len(line[index]) for line in cells) for index in range(len(columns))]
    return [
        cut("  ".join(column(cell, width) for cell, width in zip(line, widths, strict=True)).rstrip(), WIDTH)
        for line in cells
    ]
