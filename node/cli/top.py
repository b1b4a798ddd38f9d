"""`tapestry top`: a node at a glance, in the terminal, from what its endpoint serves; nothing of it is
kept."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from tapestry.node.cli.look import ask_node, stopped
from tapestry.node.cli.options import examples, home_option, json_option
from tapestry.node.errors import ExitCode, UserError, printable
from tapestry.node.home import Home
from tapestry.node.lineage.columns import cut, ids_cut, short, who
from tapestry.node.protocol.waits import span

if TYPE_CHECKING:
    from rich.console import Group

EVERY_S = 1.0
HISTORY_EVERY_S = 5.0
MEMBERS_SHOWN_MAX = 12
MEMBERS_LEAST = 3  # also where the terminal is too low
EVENTS_SHOWN = 6
EVENTS_LEAST = 2
LINES_MAX = 60  # where there is no terminal
FRAME = 5  # lines: two empty ones, the table's head, this node, and one that the terminal keeps
RECORD_NAMES_MAX = 3
ENDS_LINES_MAX = 2  # for what would end a wait
ROW_NAME = 13  # columns of what a row is of
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
        console.print(screen(_look(place, history=True), console.width, LINES_MAX))
        return
    with contextlib.suppress(KeyboardInterrupt):  # that is how one leaves
        _watch(place, Live(console=console, screen=True, auto_refresh=False))


def _watch(home: Home, live: Any) -> None:
    """Until interrupted; a node that does not answer is shown as such, and asked again."""
    from rich.text import Text

    seen, history_at = _look(home, history=True), time.monotonic()
    with live:
        while True:
            live.update(screen(seen, live.console.width, live.console.height), refresh=True)
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


def screen(seen: Mapping[str, Any], width: int, height: int) -> Group:
    """The whole picture, so many columns wide, and lines high where that is enough for the least of it."""
    from rich.console import Group
    from rich.text import Text

    status = seen["status"]
    history = seen.get("history", {})
    points, records, events = (history.get(part, []) for part in ("points", "records", "events"))
    names = _names(status, seen["peers"])
    narrow = width - 24
    speeds = [p.get("tokens_per_second") for p in points]
    lines = [
        *_head(status, width),
        "",
        *_rows(
            ("loss", f"{_number(status.get('loss'))}  {bars([p.get('loss') for p in points], narrow)}"),
            ("validation", f"{_number(status.get('val_loss'))}  {bars(_validations(points), narrow)}"),
            ("tokens/s", f"{_count(status.get('tokens_per_second'))}  {bars(speeds, narrow)}"),
            ("data", _passes_of(status.get("data_passes"))),
            ("agreement", _agreement_of(status.get("agreement"))),
            ("round", _round_of(status.get("round"), names)),
            ("record", _record_of(records, names)),
            ("bytes", _bytes_of(status.get("bytes") or {})),
            ("waits", *_waiting_of(status.get("waiting"), width)),
            ("trouble", _trouble_of(status)),
            ("asks to join", _applicants_of(status.get("applicants") or [])),
        ),
    ]
    room = height - len(lines) - FRAME
    told = events[-max(EVENTS_LEAST, min(EVENTS_SHOWN, room - MEMBERS_LEAST)) :]
    return Group(
        *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines),
        Text(""),
        _members(seen["peers"], status, records[-1] if records else {}, room - len(told)),
        Text(""),
        *(Text(_event(one), no_wrap=True, overflow="ellipsis") for one in told),
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
    told = f"{phase}: {reason}" if reason and reason != phase and not status.get("waiting") else phase
    up = span(float(status.get("uptime_s") or 0.0))
    return [
        f"tapestry {status.get('version', '')}  {name}  {short(status.get('peer_id') or '-')}  up {up}"[
            :width
        ],
        f"epoch {status.get('epoch', '-')}  {told}",
    ]


def _rows(*rows: tuple[str, ...]) -> list[str]:
    """Of each its name and lines of text."""
    return [
        f"{name if text is texts[0] else '':<12} {text}"
        for name, *texts in rows
        for text in texts
        if text.strip()
    ]


def _validations(points: Sequence[Mapping[str, Any]]) -> list[float | None]:
    sets = [list((p.get("validation") or {}).values()) for p in points]
    return [sum(values) / len(values) if values else None for values in sets]


def _members(
    peers: Sequence[Mapping[str, Any]], status: Mapping[str, Any], record: Mapping[str, Any], room: int
) -> Any:
    """`room`: lines for other members; `record`: the newest, which says what each one's voice is."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    linked = {peer.get("peer_id") for peer in peers}
    every = [*peers, *(one for one in _away(status) if one.get("peer_id") not in linked)]
    shown = max(MEMBERS_LEAST, min(MEMBERS_SHOWN_MAX, room))
    shown -= shown < len(every)  # for the line that says how many more there are
    last = {one.get("peer_id"): one.get("last_epoch") for one in status.get("roll") or []}
    weights = dict(record.get("members") or [])
    rows = [member_row(row, weights, last) for row in every[:shown]]
    for name, width in (
        ("member", max([7, *(len(row[0]) for row in rows)])),
        ("phase", 9),
        ("epoch", 5),
        ("voice", 5),
        ("last", 5),
        ("heard", 6),
        ("address", None),
    ):
        table.add_column(name, no_wrap=True, overflow="ellipsis", min_width=width)
    us = member_row({**status, "addresses": ["this node"]}, weights, last)
    for row in (us, *rows):
        table.add_row(*map(Text, row))  # names are words of others: no markup is read in them
    if len(every) > len(rows):
        table.add_row(f"and {len(every) - len(rows)} more")
    return table


def _away(status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The members that this node does not hear."""
    away = [one for one in status.get("roll") or [] if not one.get("phase")]
    return [one | {"phase": "not heard"} for one in away]


def _called(peer: Mapping[str, Any]) -> str:
    return who(str(peer.get("peer_id", "-")), cut(str(peer.get("name") or ""), NAME_SHOWN))


def member_row(
    peer: Mapping[str, Any], weights: Mapping[str, int], last: Mapping[str, int | None]
) -> tuple[str, ...]:
    """Of a table of members: who, phase, epoch, voice in the newest record, last epoch that counts it, heard,
    and where: "relayed", or an address."""
    who_, heard = str(peer.get("peer_id")), peer.get("heard_s")
    address = "relayed" if peer.get("relayed") else _host_port(str((peer.get("addresses") or [""])[0]))
    total, epoch = sum(weights.values()), last.get(who_)
    return (
        _called(peer),
        printable(str(peer.get("phase") or "-")),
        "-" if peer.get("epoch") is None else str(peer["epoch"]),
        f"{100 * weights[who_] / total:.0f} %" if total and who_ in weights else "-",
        "-" if epoch is None else str(epoch),
        "" if heard is None else f"{heard:.1f} s",
        printable(str(peer.get("why") or address)),
    )


def _host_port(address: str) -> str:
    """Of a multiaddress, as a line of a table has room for it; else what it is."""
    parts = address.split("/")
    return f"{parts[2]}:{parts[4]}" if len(parts) > 4 else address


def _names(status: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Peer id -> what it is called."""
    every = [*(status.get("roll") or []), *peers, status]
    return {str(one.get("peer_id")): _called(one) for one in every if one.get("name")}


def _passes_of(passes: Any) -> str:
    return f"{passes:.2f} passes over this node's data" if isinstance(passes, int | float) else ""


def _agreement_of(figures: Mapping[str, float] | None) -> str:
    """Of the contributions of the newest record."""
    return ", ".join(f"{name.replace('_', ' ')} {share:.2f}" for name, share in (figures or {}).items())


def _record_of(records: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """The newest: when, and who contributed."""
    if not records:
        return ""
    record = records[-1]
    there = [str(peer) for peer, weight in record.get("members") or [] if weight]
    called = ", ".join(names.get(peer) or who(peer, "") for peer in there[:RECORD_NAMES_MAX])
    more = f" and {len(there) - RECORD_NAMES_MAX} more" if len(there) > RECORD_NAMES_MAX else ""
    forced = ", without a majority" if record.get("forced") else ""
    ballot = f", in ballot {record['ballot']}" if record.get("ballot") else ""
    age = span(max(0.0, time.time() - float(record.get("at") or 0.0)))
    count = f"{len(there)} of {record.get('count')}"
    return f"{record.get('epoch')}, {age} ago{forced}{ballot}; {count}: {called}{more}"


def _waiting_of(waiting: Mapping[str, Any] | None, width: int) -> tuple[str, ...]:
    """For what and since when; what would end it."""
    if not waiting:
        return ("",)
    what, ends = (printable(ids_cut(str(waiting.get(key) or ""))) for key in ("what", "ends"))
    for_s = f", for {span(float(waiting.get('for_s') or 0.0))}"
    lines = textwrap.wrap(ends, max(8, width - ROW_NAME), max_lines=ENDS_LINES_MAX, placeholder=" …")
    return cut(what, width - ROW_NAME - len(for_s)) + for_s, *lines


def _trouble_of(status: Mapping[str, Any]) -> str:
    """What the wait does not say."""
    said = (status.get("waiting") or {}).get("kind") == "trainer"
    return ("" if said else status.get("trainer_trouble")) or status.get("loss_trouble") or ""


def _applicants_of(applicants: Sequence[Mapping[str, Any]]) -> str:
    called = ", ".join(who(str(one.get("peer")), str(one.get("name") or "")) for one in applicants[:3])
    more = f" and {len(applicants) - 3} more" if len(applicants) > 3 else ""
    return f"{called}{more}: tapestry admit" if applicants else ""


def _round_of(told: Mapping[str, Any] | None, names: Mapping[str, str]) -> str:
    if not told:
        return "-"
    waiting = ", ".join(names.get(one) or who(str(one), "") for one in told.get("waiting_on", [])[:4])
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
