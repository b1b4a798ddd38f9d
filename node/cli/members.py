"""`tapestry members`, `admit`, `remove`, `invite`, `propose`, `approve` and `id`: who belongs to the run.

They ask the running node over HOME/control.sock (daemon/control.py): a change needs its key and its swarm.
`members` answers without a node too, from the records in the home, and `id` from the key there.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import click
from rich.cells import cell_len

from tapestry.dht.identity import Identity, IdentityError
from tapestry.node.cli.look import say_if_stopped
from tapestry.node.cli.options import examples, home_option, home_to_write, json_option
from tapestry.node.cli.said import waited_for
from tapestry.node.errors import ExitCode, UserError, as_user_error, printable
from tapestry.node.home import Home, Liveness
from tapestry.node.lineage.columns import NAME_COLUMNS, column, ids_cut, short, wrapped
from tapestry.node.protocol.members import (
    KINDS,
    NAME_CHARS_MAX,
    OF_NOBODY,
    USES_MAX,
    WHY_CHARS_MAX,
    has_expired,
)
from tapestry.node.protocol.settings import SETTINGS, shown
from tapestry.node.surface import control
from tapestry.node.trainer.data.tally import numbered

WAIT_S = 60.0  # Guess: for the next record, which makes a change good; after that it goes on unwatched
POLL_S = 0.2
ID_CHARS_MIN = 4  # of an id's end, or of a proposal's beginning
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

wait_option = click.option("--no-wait", is_flag=True, help="Do not wait for the record that takes it up.")


@click.command(
    epilog=examples(
        "tapestry members mine",
        "tapestry members --home mine --json | jq -r '.members[].peer'",
    )
)
@click.argument("directory", metavar="[HOME]", required=False)
@home_option
@json_option
def members(directory: str | None, home: str | None, as_json: bool) -> None:
    """Who belongs to the run, who waits to, and what waits for signatures."""
    place = Home.locate(directory or home, os.environ)
    table = _table(place)
    if as_json:
        click.echo(json.dumps({key: value for key, value in table.items() if key != "done"}, indent=2))
        return
    say_if_stopped(place)
    for line in _lines(table):
        click.echo(line)


@click.command(
    name="id",
    epilog=examples(
        "tapestry id mine                     # for founders = [...] in another's run.toml",
    ),
)
@click.argument("directory", metavar="[HOME]", required=False)
@home_option
def own_id(directory: str | None, home: str | None) -> None:
    """The peer id of a home, which is made if there is none: what a founder writes into `founders`."""
    place = home_to_write(directory or home)
    place.create()
    with as_user_error(IdentityError):
        click.echo(Identity.load_or_create(place.identity_key).peer_id)


@click.command(
    epilog=examples(
        "tapestry admit 4FoeTV --name lab-hanoi --home mine",
    )
)
@click.argument("peer")
@click.option("--name", default="", help="What people call it.")
@home_option
@wait_option
def admit(peer: str, name: str, home: str | None, no_wait: bool) -> None:
    """Let PEER in: an applicant, or whoever will come with that id. The end of an id is enough."""
    place = Home.locate(home, os.environ)
    table = control.ask(place, {"do": "members"})
    _change(place, "admit", _whole(peer, _outside(table)), _named(name), f"admitted {peer}", no_wait)


@click.command(
    epilog=examples(
        'tapestry remove 4FoeTV --why "its data have no licence" --home mine',
    )
)
@click.argument("peer")
@click.option("--why", default="", help="What it is told.")
@home_option
@wait_option
def remove(peer: str, why: str, home: str | None, no_wait: bool) -> None:
    """End PEER's membership, from the next record on. An invitation is taken back by its key."""
    place = Home.locate(home, os.environ)
    table = control.ask(place, {"do": "members"})
    known = [one["peer"] for one in table["members"]] + [one["key"] for one in table["invites"]]
    if len(why) > WHY_CHARS_MAX:
        raise UserError(f"--why has more than {WHY_CHARS_MAX} characters")
    _change(place, "remove", _whole(peer, known), why, f"removed {peer}", no_wait)


@click.command(
    epilog=examples(
        "tapestry invite --name lab-hanoi --home mine",
        "tapestry invite --uses 20 --expires 12h --home mine",
        "tapestry start --home theirs --peer LINE --data texts        # what the guest runs",
    )
)
@click.option("--name", default="", help="What people will call the guest.")
@click.option("--uses", type=click.IntRange(1, USES_MAX), default=1, show_default=True)
@click.option("--expires", default="7d", show_default=True, metavar="TIME", help="30m, 12h, 7d; 0: never.")
@home_option
@wait_option
def invite(name: str, uses: int, expires: str, home: str | None, no_wait: bool) -> None:
    """Print one line with which somebody joins at once: `tapestry start --peer LINE`.

    It waits for the record that makes the line good, for a minute at most: then the line is printed all the
    same, and stderr says what it waits for.
    """
    place = Home.locate(home, os.environ)
    invitation, answer = control.invite(place, _named(name), uses, _seconds(expires))
    try:
        is_good, waits_for = _taken_up(place, answer, no_wait)
    except KeyboardInterrupt:
        click.echo(invitation.line)  # the change is on its way all the same
        raise
    click.echo(invitation.line)
    if not is_good:
        click.echo(f"not good yet: {waits_for}", err=True)


@click.command(
    epilog=examples(
        "tapestry propose set train.lr 1e-4 --home mine",
        "tapestry propose set round.exchange_max_s auto --home mine",
        "tapestry propose charter admit_by majority --home mine",
        'tapestry propose rollback 40 --why "the loss rose" --home mine',
    )
)
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("words", nargs=-1)
@click.option("--why", default="", help="Of a removal or a rollback: what everybody is told.")
@home_option
@wait_option
def propose(kind: str, words: tuple[str, ...], why: str, home: str | None, no_wait: bool) -> None:
    """Ask for a change of who belongs to the run, or of its rules.

    admit PEER [NAME], remove PEER [WHY], rekey OLD NEW, voice PEER N, charter KEY VALUE, and of the run's
    settings set KEY VALUE, as run.toml has it: train.lr, train.inner_steps, train.accumulation,
    train.batch_size, outer.lr, gate.margin, audit.share, audit.on_lie, round.straggler_wait_s,
    round.closing_grace_s, round.commit_grace_s, round.stall_s, round.exchange_max_s, round.quorum_loss_s,
    round.wait_max_s, round.min_members, round.max_influence. They are in force from the state that the next
    record makes. rollback EPOCH: the state that the next record makes is that of EPOCH again.
    """
    place = Home.locate(home, os.environ)
    if not words:
        raise UserError(f"propose {kind}: of whom, or of what?", hint="tapestry propose --help")
    peer, value = ("", " ".join(words)) if kind in OF_NOBODY else (words[0], " ".join(words[1:]))
    if why and kind not in ("remove", "rollback"):
        raise UserError(f"propose {kind} takes no --why")
    value = " ".join(filter(None, [value, why]))
    if kind in ("admit", "remove", "rekey", "voice"):
        table = control.ask(place, {"do": "members"})
        known = _outside(table) if kind == "admit" else [one["peer"] for one in table["members"]]
        peer = _whole(peer, known + [one["key"] for one in table["invites"]])
    if kind == "set":
        setting = SETTINGS.get(words[0])
        is_word = setting is not None and len(words) == 2 and words[1] in setting.words
        value = " ".join(words) if is_word else f"{words[0]} {_plain_number(words[1:])}"
    _change(place, kind, peer, value, f"{kind} {' '.join(words)}", no_wait)


@click.command(
    epilog=examples(
        "tapestry members --home mine          # what waits, with its id",
        "tapestry approve 3f2a9c01 --home mine",
    )
)
@click.argument("name", metavar="ID")
@home_option
@wait_option
def approve(name: str, home: str | None, no_wait: bool) -> None:
    """Sign what another member has proposed; `tapestry members` lists the ids."""
    place = Home.locate(home, os.environ)
    waiting = [one["id"] for one in control.ask(place, {"do": "members"})["pending"]]
    answer = control.ask(place, {"do": "approve", "id": _whole(name, waiting, at_begin=True)})
    _wait(place, answer, f"approved {name}", no_wait)


# --- asking -----------------------------------------------------------------------------------------


def _change(home: Home, kind: str, peer: str, value: str, done: str, no_wait: bool) -> None:
    answer = control.ask(home, {"do": "ask", "kind": kind, "peer": peer, "value": value})
    _wait(home, answer, done, no_wait)


def _wait(home: Home, answer: Mapping[str, Any], done: str, no_wait: bool) -> None:
    is_done, text = _taken_up(home, answer, no_wait)
    click.echo(f"{done}, {text}" if is_done else text)


def _taken_up(home: Home, answer: Mapping[str, Any], no_wait: bool) -> tuple[bool, str]:
    """Whether a record has it, and from when on, or what it waits for. Returns when it is
    clear which, or after WAIT_S. Raises UserError."""
    with waited_for("waiting for the next record, which makes it good"):
        return _until_taken_up(home, answer, no_wait)


def _until_taken_up(home: Home, answer: Mapping[str, Any], no_wait: bool) -> tuple[bool, str]:
    name, until = answer["id"], time.monotonic() + WAIT_S
    while True:
        table = control.ask(home, {"do": "members"})
        if name in table["done"]:
            return True, f"from epoch {table['epoch']} on"
        pending = [one for one in table["pending"] if one["id"] == name]
        if not pending:
            raise UserError(
                "not done: the node has dropped it, for what others asked for or the newest record changed",
                exit_code=ExitCode.REFUSED,
            )
        if not _has_enough(pending[0]):
            signed, needs = pending[0]["signed"], pending[0]["needs"]
            return False, f"{signed} of {needs} have signed; the others run: tapestry approve {name[:8]}"
        if no_wait or time.monotonic() >= until:
            return False, f"asked for; the next record takes it up ({name[:8]} in `tapestry members`)"
        time.sleep(POLL_S)


def _has_enough(pending: Mapping[str, Any]) -> bool:
    """Signatures. A node that was started before an upgrade does not say so."""
    return bool(pending.get("enough", pending["signed"] >= pending["needs"]))


def _whole(text: str, known: list[str], at_begin: bool = False) -> str:
    """The id that `text` is, or of those known the one that it begins or ends, with or without the `…` that
    `members` shows there. Raises UserError."""
    text = text.strip("…")
    if len(text) < ID_CHARS_MIN:
        raise UserError(
            f"an id of {len(text)} characters may be anybody's",
            hint=f"write at least {ID_CHARS_MIN} of it; `tapestry members` shows the ids",
        )
    fits: Callable[[str], bool] = lambda one: one.startswith(text) if at_begin else one.endswith(text)  # noqa: E731
    found = [one for one in known if one == text] or [one for one in known if fits(one)]
    if len(found) > 1:
        raise UserError(f"{text} may be {' or '.join(found)}", hint="write more of it")
    if not found and not re.fullmatch("[1-9A-HJ-NP-Za-km-z]{52}", text):
        raise UserError(f"nobody is called {text} here", hint="`tapestry members` shows the ids")
    return found[0] if found else text


def _outside(table: Mapping[str, Any]) -> list[str]:
    """Who can be admitted, of those whom `tapestry members` shows: who asks, and who was removed."""
    return list(dict.fromkeys([*(one["peer"] for one in table["applicants"]), *table["removed"]]))


def _named(name: str) -> str:
    if len(name) > NAME_CHARS_MAX or printable(name) != name:
        raise UserError(f"a name has at most {NAME_CHARS_MAX} printable characters")
    return name


def _plain_number(words: Sequence[str]) -> str:
    """3e-4 as 0.0003: a record has one text for one number. Raises UserError."""
    try:
        number = Decimal(words[0]) if len(words) == 1 else Decimal("nan")
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite():
        raise UserError(
            "propose set KEY VALUE: the second word is the value",
            hint="3e-4 or 0.0003; auto, where run.toml has it",
        )
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _seconds(text: str) -> int:
    found = re.fullmatch(r"(\d{1,6})([smhd])|0", text)
    if found is None:
        raise UserError(f"--expires: {text} is no time", hint="30m, 12h or 7d; 0: never")
    return int(found[1]) * UNITS_S[found[2]] if found[1] else 0


# --- showing ----------------------------------------------------------------------------------------


def _table(home: Home) -> dict[str, Any]:
    """The node's, or what the records in the home say."""
    if home.read_node_json().liveness is Liveness.RUNNING:
        return control.ask(home, {"do": "members"})
    from tapestry.node.lineage.log import place_of

    at = place_of(home)
    return {
        **control.roll_table(at.roll, {}),
        "me": "",
        "epoch": at.epoch,
        "applicants": [],
        "pending": [],
        "done": [],
    }


def _lines(table: Mapping[str, Any]) -> list[str]:
    """Names first, ids by their ends, which `admit`, `remove` and `approve` take."""
    lines = [f"epoch {table['epoch']}, {numbered(len(table['members']), 'member')}"]
    for one in table["members"]:
        since = f"since epoch {one['since']}" if one["since"] else "from the start"
        came = "founder" if one["founder"] else since
        marks = ["this node" * (one["peer"] == table["me"]), one["phase"], came]
        lines += _row("member", one["name"], short(one["peer"]), ", ".join(filter(None, marks)))
    for one in table["applicants"]:
        waits_s = max(0, int(time.time() - one["since"]))
        lines += _row("applicant", one["name"], short(one["peer"]), f"waits for {waits_s} s")
    for one in table["invites"]:
        left = "expired" if has_expired(one["expires_at"], time.time()) else f"{one['uses']} left"
        lines += _row("invite", one["name"], short(one["key"]), left)
    for one in table["pending"]:
        value = _invite(one["value"]) if one["kind"] == "invite" else one["value"]
        of = short(one["peer"]) if one["peer"] else ""
        what = " ".join(filter(None, [one["kind"], of, ids_cut(value)]))
        signed = f"{one['signed']} of {one['needs']} signed"
        lines += _row("pending", what, one["id"][:8], "for the next record" if _has_enough(one) else signed)
    for key, value in table["settings"].items():
        lines += _row("setting", key, "", f"{shown(value)}, in place of the run spec's")
    for peer, why in table["removed"].items():
        lines += _row("removed", "", short(peer), ids_cut(why))
    return lines


def _invite(value: str) -> str:
    """What members are asked to sign: whom it is for, how often it admits, and until when."""
    uses, expires_at, name = value.split(" ", 2)
    until = time.strftime("until %Y-%m-%d %H:%M UTC", time.gmtime(int(expires_at))) if int(expires_at) else ""
    return ", ".join(filter(None, [name and f"for {name}", numbered(int(uses), "use"), until]))


def _row(kind: str, name: str, end: str, text: str) -> Iterator[str]:
    """A long name or text goes on below its column."""
    begin = f"{kind:<9}  {column(printable(name) or '-', NAME_COLUMNS)}  {end:<8}"
    if cell_len(printable(name)) > NAME_COLUMNS:
        yield from wrapped(printable(name), f"{kind:<9}  ", " " * 11)
        begin = " " * 33 + f"{end:<8}"
    yield from wrapped(printable(text), f"{begin}  ", " " * 43)
