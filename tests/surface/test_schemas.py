"""docs/schemas: what --json prints is what they say, no more and no less."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner
from homes import MadeHome, make_home
from schemas import SCHEMAS, faults, load

from tapestry.node.cli.main import FAMILIES, cli
from tapestry.node.disk.linked import LinkedFile
from tapestry.node.home import WAY_BACK
from tapestry.node.lineage.egress import Left, Started
from tapestry.node.lineage.island import begin
from tapestry.node.lineage.log import Line
from tapestry.node.protocol.members import Change, Seat
from tapestry.node.protocol.waits import KINDS, Wait
from tapestry.node.spec.training import PRESETS
from tapestry.node.surface.findings import wrong
from tapestry.node.surface.history import History, RecordSeen
from tapestry.node.surface.http import _finite
from tapestry.node.surface.status import NO_TRAFFIC, NodeView
from tapestry.node.surface.stopped import stopped_status

WAIT = Wait("round", "waiting for a", "ends when it speaks", 2.0)
CHANGES = (Change("admit", "b", "Bea", 9, "0" * 32, (("a", "ab"),)),)


def attached(island_since: int | None = None) -> NodeView:
    """A view of a node that is in a round, with a peer and one that is banned."""
    view = NodeView("0.1.0")
    peer = SimpleNamespace(peer_id="a", phase="training", epoch=3, head="ab", same_head=True, heard_s=0.5)
    round_ = SimpleNamespace(
        epoch=3,
        ballot=0,
        leader="a",
        stage=SimpleNamespace(name="READY"),
        forced=False,
        electorate=2,
        members=2,
    )
    round_.waiting_on = ("a",)
    agreement = SimpleNamespace(shares=lambda: {"cosine": 0.5})
    core = SimpleNamespace(
        peer_id="us", run_id="r", phase="training", reason="", wait=WAIT, state_epoch=3, state_head="ab"
    )
    core.roll = SimpleNamespace(members={"us": Seat("", 1, 0), "gone": Seat("lab-lima", 1, 7)})
    core.roll.settings = {"train.lr": 0.1, "round.exchange_max_s": "auto"}
    core.state_digest, core.params, core.peers, core.round, core.agreement = (
        "d",
        7,
        (peer,),
        round_,
        agreement,
    )
    shown = SimpleNamespace(
        core=core,
        loss=1.5,
        loss_epoch=3,
        val_loss=math.nan,
        val_loss_epoch=-1,
        trainer_trouble="",
        loss_trouble="",
        val_losses={"x": 2.0},
        data_passes=0.1,
        tokens_total=9,
        tokens_per_second=1.0,
        dropped_records=0,
        dropped_weight=0,
        accused=({"peer": "c", "name": "C", "epoch": 3, "shard": 1, "what": "signed a wrong mean"},),
        withheld=({"peer": "c", "name": "", "count": 2},),
        unlike=({"peer": "c", "name": "", "cosine": 0.1, "others": 0.9},),
        branches=("00000003-" + "ab" * 8,),
        applicants=({"peer": "d", "name": "D", "since": 1.5},),
        traffic=NO_TRAFFIC,
        addresses=("/ip4/1.2.3.4/tcp/1",),
        reachable=True,
        relays=(),
        routes={"a": "direct"},
        versions={"a": "0.2.0"},
        last_contributions={"gone": 2},
        name_of=lambda peer: {"a": "lab-hanoi"}.get(peer, ""),
    )
    ban = SimpleNamespace(peer="b", reason="streams", left_s=3.0)
    view.attach(
        lambda: shown,  # type: ignore[arg-type, return-value]
        lambda peer: ("/ip4/1.2.3.4/tcp/2",),
        lambda: (ban,),
        "run",
        lambda peer, name: "",
    )
    view.island_since = island_since
    return view


def test_status_and_peers_are_as_their_schemas_say() -> None:
    for view in (NodeView("0.1.0"), attached()):
        assert faults(load("status"), _finite(view.status())) == []
        assert faults(load("peers"), _finite(view.peers())) == []
    assert len(attached().peers()) == 2
    assert [attached().peers()[0][key] for key in ("version", "same_version")] == ["0.2.0", False]
    waiting = load("status")["properties"]["waiting"]["anyOf"][1]
    assert waiting["properties"]["kind"]["enum"] == list(KINDS)
    us, gone = attached().status()["roll"]
    assert (us["phase"], us["last_epoch"]) == ("training", None)
    assert (gone["phase"], gone["last_epoch"], gone["since"]) == ("", 2, 7)


def test_status_of_an_island_says_since_when_and_how_back(tmp_path: Path) -> None:
    for since in (None, 7):
        island = attached(since).status()["island"]
        assert island == (None if since is None else {"since_epoch": 7, "back": WAY_BACK})
    assert faults(load("status"), _finite(attached(7).status())) == []

    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    made.advance(1, checkpoint=True)
    said = stopped_status(made.home)
    assert said is not None and said["island"] is None
    begin(made.home)
    made.advance(2, alone=True)
    said = stopped_status(made.home)
    assert said is not None and said["epoch"] == 3
    assert said["island"] == {"since_epoch": 1, "back": WAY_BACK}
    assert faults(load("stopped-status"), said) == []


def test_a_clock_that_is_set_changes_no_uptime(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NTP does on a machine that has no battery for its clock."""
    monkeypatch.setattr(time, "time", lambda: 0.0)
    view = NodeView("0.1.0")
    monkeypatch.setattr(time, "time", lambda: 1.8e9)
    assert 0 <= view.status()["uptime_s"] < 60


def test_log_and_doctor_are_as_their_schemas_say() -> None:
    lines = [
        Line(1, "2026", (("a", 0.5),), 2, 2, False, 9, "ab", "r", 0.5, 2.5, CHANGES),
        Line(2, "", (), 1, 1, True, 0, "cd", "r", None),
    ]
    assert [faults(load("log"), line.table()) for line in lines] == [[], []]
    answer = {"ok": False, "findings": [wrong("disk", "full", "make room").table()]}
    assert faults(load("doctor"), answer) == []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeHome:
    made = make_home(tmp_path_factory.mktemp("schemas") / "home", PRESETS["nano"].model)
    made.advance(2, checkpoint=True)
    made.roll_back(1, "xyz lied")
    (made.home.path / "text.txt").write_text("words " * 99)
    file = LinkedFile(made.home.egress)
    left = Left("2026-11-30T10:00:00Z", "result", 4, {"a": 4}, "mean", ((1, "x"),), 0)
    file.append([Started("2026-11-30T09:00:00Z", "ab", 0).value(), left.value()])
    file.close()
    return made


def said(made: MadeHome, *words: str) -> str:
    run = CliRunner().invoke(cli, [*words, "--json"])
    assert run.exit_code == 0, run.output
    return run.stdout


def test_what_commands_print_of_a_home_is_as_their_schemas_say(made: MadeHome) -> None:
    home = ("--home", str(made.home.path))
    text = str(made.home.path / "text.txt")
    assert CliRunner().invoke(cli, ["data", "declare", "us, CC0-1.0", text, *home]).exit_code == 0
    for schema, words in (
        ("verify", ("verify", str(made.home.path))),
        ("members", ("members", *home)),
        ("stopped-status", ("status", *home)),
        ("peers", ("peers", *home)),
        ("log-branches", ("log", "--branches", *home)),
        ("derivatives", ("derivatives", *home)),
        ("data-list", ("data", "list", *home)),
        ("data-revoke", ("data", "revoke", text, *home)),
        ("data-list", ("data", "list", *home)),
    ):
        assert faults(load(schema), json.loads(said(made, *words))) == [], schema
    for schema, words in (("log", ("log",)), ("log-egress", ("log", "--egress"))):
        lines = said(made, *words, *home).splitlines()
        assert len(lines) >= 2 and [faults(load(schema), json.loads(line)) for line in lines] == [[]] * len(
            lines
        )
    broken = CliRunner().invoke(cli, ["verify", str(made.home.path / "updates"), "--json"])
    assert broken.exit_code != 0


@pytest.mark.parametrize("words", [["log"], ["log", "--branches"], ["log", "--egress"], ["members"]])
def test_what_is_read_of_a_stopped_home_says_so_beside_the_answer(made: MadeHome, words: list[str]) -> None:
    stopped = "no node runs in this home: this is what its disk holds\n"
    run = CliRunner().invoke(cli, [*words, "--home", str(made.home.path)])
    assert (run.exit_code, run.stderr) == (0, stopped) and stopped not in run.stdout
    with made.home.lock():
        assert CliRunner().invoke(cli, [*words, "--home", str(made.home.path)]).stderr == ""
    for_programs = CliRunner().invoke(cli, [*words, "--json", "--home", str(made.home.path)])
    assert for_programs.stderr == "" and "no node runs" not in for_programs.stdout


def test_an_export_of_a_stopped_home_says_so(made: MadeHome, tmp_path: Path) -> None:
    run = CliRunner().invoke(cli, ["export", str(tmp_path / "model"), "--home", str(made.home.path)])
    assert run.exit_code == 0, run.output
    assert "no node runs in this home" in run.stderr
    assert run.stdout.startswith(f"wrote {tmp_path / 'model'}: epoch ") and "no node" not in run.stdout


def test_what_top_shows_is_as_its_schema_says() -> None:
    history = History()
    for epoch in (1, 2):
        history.point(
            epoch, contributions=3, loss=2.5, tokens=100, validation={"fr": 2.0}, phases={"ready": 0.1}
        )
    history.record(RecordSeen(2, "cd", 1.0, 0, False, 2, (("a", 5), ("b", 0))))
    history.tell("…kT4mQz joined", "good")
    view = attached()
    seen = {"status": view.status(), "peers": view.peers(), "history": history.everything()}
    assert faults(load("top"), json.loads(json.dumps(_finite(seen)))) == []


def test_every_command_that_prints_json_has_a_schema_and_every_schema_is_whole() -> None:
    context = click.Context(cli)
    names = set()
    for name in (name for names in FAMILIES for name in names):
        command = cli.get_command(context, name)
        parts = getattr(command, "commands", {"": command})
        for part, one in parts.items():
            if any("--json" in option.opts for option in one.params):
                names.add("-".join(filter(None, [name, part])))
    titles = " ".join(json.loads(path.read_text())["title"] for path in SCHEMAS.glob("*.json"))
    assert [name for name in sorted(names) if f"tapestry {name.replace('-', ' ')}" not in titles] == []
    for path in SCHEMAS.glob("*.json"):
        for ref in re.findall(r'"\$ref": "([^"]+)"', path.read_text()):
            assert (SCHEMAS / ref).exists(), ref


@pytest.mark.parametrize(
    "change",
    [{"epoch": "3"}, {"epoch": True}, {"new": 1}, {"phase": "gone"}, {"round": {}}, {"addresses": [1]}],
)
def test_the_check_itself_can_fail(change: dict[str, Any]) -> None:
    assert faults(load("status"), attached().status() | change) != []
