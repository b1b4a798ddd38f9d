"""`tapestry top`: a node at a glance, in the terminal, from what its endpoint serves; nothing of it is
kept."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from tapestry.node.cli.look import ask_node, stopped
from tapestry.node.cli.options import examples, home_option, json_option
from tapestry.node.errors import ExitCode, UserError, printable
from tapestry.node.home import Home
from tapestry.node.lineage.columns import cut, short, who

if TYPE_CHECKING:
    from rich.console import Group

EVERY_S = 1.0
HISTORY_EVERY_S = 5.0
MEMBERS_SHOWN_MAX = 12
EVENTS_SHOWN = 6
NAME_SHOWN = 12  # columns of a member's name
BARS = "▁▂▃▄▅▆▇█"


@click.command(epilog=examples("tapestry top", "tapestry top --home /srv/tapestry", "tapestry top --json"))
@home_option
@json_option
def top(home: str | None, as_json: bool) -> None:
    """Watch a node in the terminal: losses, speed, round, members, what happened. Ctrl-C ends it."""
    place = Home.locate(home, os.environ)
    if stopped(place, "status"):
        raise UserError(
            f"no node is running in {place.path}",
            exit_code=ExitCode.FAILED,
            hint="tapestry status says what its home holds; tapestry start starts it",
        )
    if as_json:
        click.echo(json.dumps(_look(place, history=True), indent=1))
        return
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not sys.stdout.isatty():
        console.print(screen(_look(place, history=True), console.width))
        return
    with contextlib.suppress(KeyboardInterrupt):  # that is how one leaves
        _watch(place, Live(console=console, screen=True, auto_refresh=False))


def _watch(home: Home, live: Any) -> None:
    """Until interrupted; a node that does not answer is shown as such, and asked again."""
    from rich.text import Text

    seen, history_at = _look(home, history=True), time.monotonic()
    with live:
        while True:
            live.update(screen(seen, live.console.width), refresh=True)
            time.sleep(EVERY_S)
            again = time.monotonic() - history_at >= HISTORY_EVERY_S
            try:
                seen = {**seen, **_look(home, history=again)}
                history_at = time.monotonic() if again else history_at
            except UserError as error:
                live.update(Text(f"{error.line}; asked again", style="bold red"), refresh=True)
                time.sleep(EVERY_S)


def _look(home: Home, history: bool) -> dict[str, Any]:
    seen = {"status": ask_node(home, "/status"), "peers": ask_node(home, "/peers")}
    return seen | ({"history": ask_node(home, "/history")} if history else {})


# --- what is shown ----------------------------------------------------------------------------------


def screen(seen: Mapping[str, Any], width: int) -> Group:
    """The whole picture, `width` columns wide."""
    from rich.console import Group
    from rich.text import Text

    status = seen["status"]
    points = seen.get("history", {}).get("points", [])
    events = seen.get("history", {}).get("events", [])
    narrow = width - 24
    speeds = [p.get("tokens_per_second") for p in points]
    lines = [
        *_head(status, width),
        "",
        *_rows(
            ("loss", f"{_number(status.get('loss'))}  {bars([p.get('loss') for p in points], narrow)}"),
            ("validation", f"{_number(status.get('val_loss'))}  {bars(_validations(points), narrow)}"),
            ("tokens/s", f"{_count(status.get('tokens_per_second'))}  {bars(speeds, narrow)}"),
            ("round", _round_of(status.get("round"), seen["peers"])),
            ("bytes", _bytes_of(status.get("bytes") or {})),
            ("trouble", status.get("trainer_trouble") or status.get("loss_trouble") or ""),
        ),
    ]
    return Group(
        *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines),
        Text(""),
        _members(seen["peers"], status),
        Text(""),
        *(Text(_event(one), no_wrap=True, overflow="ellipsis") for one in events[-EVENTS_SHOWN:]),
    )


def bars(values: Iterable[float | None], width: int) -> str:
    """The last `width` values as a line of bars; a gap where one is not known."""
    last = list(values)[-max(0, width) :] if width > 0 else []
    known = [v for v in last if v is not None and math.isfinite(v)]
    if not known:
        return ""
    low, high = min(known), max(known)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(" " if v is None or not math.isfinite(v) else BARS[round((v - low) / step)] for v in last)


def _head(status: Mapping[str, Any], width: int) -> list[str]:
    name = printable(str(status.get("run_name") or "-"))
    phase, reason = str(status.get("phase", "-")), printable(str(status.get("reason") or ""))
    told = f"{phase}: {reason}" if reason and reason != phase else phase
    up = _span(float(status.get("uptime_s") or 0.0))
    return [
        f"tapestry {status.get('version', '')}  {name}  {short(status.get('peer_id') or '-')}  up {up}"[
            :width
        ],
        f"epoch {status.get('epoch', '-')}  {told}",
    ]


def _rows(*rows: tuple[str, str]) -> list[str]:
    return [f"{name:<11} {text}" for name, text in rows if text.strip()]


def _validations(points: Sequence[Mapping[str, Any]]) -> list[float | None]:
    sets = [list((p.get("validation") or {}).values()) for p in points]
    return [sum(values) / len(values) if values else None for values in sets]


def _members(peers: Sequence[Mapping[str, Any]], status: Mapping[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    linked = {peer.get("peer_id") for peer in peers}
    every = [*peers, *(one for one in _away(status) if one.get("peer_id") not in linked)]
    rows = [member_row(row) for row in every[:MEMBERS_SHOWN_MAX]]
    for name, width in (
        ("member", max([7, *(len(row[0]) for row in rows)])),
        ("phase", 9),
        ("epoch", 7),
        ("heard", 7),
        ("way", 7),
        ("address", None),
    ):
        table.add_column(name, no_wrap=True, overflow="ellipsis", min_width=width)
    us = (_called(status), str(status.get("phase")), str(status.get("epoch")), "", "", "this node")
    for row in (us, *rows):
        table.add_row(*map(Text, row))  # names are words of others: no markup is read in them
    if len(every) > len(rows):
        table.add_row(f"and {len(every) - len(rows)} more")
    return table


def _away(status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The members that this node does not hear."""
    away = [one for one in status.get("roll") or [] if not one.get("phase")]
    return [one | {"phase": "not heard", "why": _last(one.get("last_epoch"))} for one in away]


def _last(epoch: int | None) -> str:
    return "nothing of late" if epoch is None else f"last in epoch {epoch}"


def _called(peer: Mapping[str, Any]) -> str:
    return who(str(peer.get("peer_id", "-")), cut(str(peer.get("name") or ""), NAME_SHOWN))


def member_row(peer: Mapping[str, Any]) -> tuple[str, ...]:
    """Of a table of members: who, phase, epoch, heard, way, address."""
    heard, relayed = peer.get("heard_s"), peer.get("relayed")
    addresses = peer.get("addresses") or [""]
    return (
        _called(peer),
        printable(str(peer.get("phase") or "-")),
        "-" if peer.get("epoch") is None else str(peer["epoch"]),
        "" if heard is None else f"{heard:.1f} s",
        "" if relayed is None else "relayed" if relayed else "direct",
        printable(str(peer.get("why") or addresses[0])).partition("/p2p/")[0],
    )


def _round_of(told: Mapping[str, Any] | None, peers: Sequence[Mapping[str, Any]]) -> str:
    if not told:
        return "-"
    known = {peer.get("peer_id"): _called(peer) for peer in peers}
    waiting = ", ".join(known.get(one) or who(str(one), "") for one in told.get("waiting_on", [])[:4])
    text = f"{told.get('stage')}, ballot {told.get('ballot')}, electorate {told.get('electorate')}"
    return text + (f", waits for {waiting}" if waiting else "")


def _bytes_of(traffic: Mapping[str, Any]) -> str:
    sent, received = int(traffic.get("sent") or 0), int(traffic.get("received") or 0)
    plain = int(traffic.get("sent_float32") or 0)
    saved = f", {plain / sent:.1f} times less than float32" if sent and plain > sent else ""
    return f"{_size(sent)} sent, {_size(received)} received{saved}"


def _event(told: Mapping[str, Any]) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(float(told.get("at") or 0.0)))
    return f"{clock}  {printable(str(told.get('text', '')))}"


def _number(value: Any) -> str:
    return f"{value:8.4f}" if isinstance(value, float) else f"{'-':>8}"


def _count(value: Any) -> str:
    return f"{value:8,.0f}" if isinstance(value, int | float) else f"{'-':>8}"


def _size(count: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1000:.0f} kB"


def _span(seconds: float) -> str:
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"
