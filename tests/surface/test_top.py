"""`tapestry top`, `completion`, and what help shows."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
import time
from typing import Any

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from tapestry.node.cli.main import FAMILIES, cli
from tapestry.node.cli.top import bars, screen

STATUS: dict[str, Any] = {
    "run_name": "demo\x1b[31m",
    "version": "0.1.0",
    "peer_id": "12D3KooWxyzABC",
    "name": "lab-oslo",
    "uptime_s": 7300.0,
    "epoch": 12,
    "phase": "training",
    "reason": "2 of 3 ready, for 90 s; ends when one more is",
    "waiting": {"what": "2 of 3 ready", "for_s": 90.0, "ends": "ends when one more is " + "ready " * 40},
    "data_passes": 1.4,
    "agreement": {"cosine": 0.701, "norm_kept": 0.41},
    "applicants": [{"peer": "12D3KooWasks01", "name": "lab-new", "since": 1.0}],
    "loss": 2.34567,
    "val_loss": None,
    "tokens_per_second": 12345.6,
    "bytes": {"sent": 2_000_000, "received": 3_000_000, "sent_float32": 8_000_000, "received_float32": 1},
    "round": {"stage": "ready", "ballot": 0, "electorate": 3, "waiting_on": ["12D3KooWotherZ"]},
    "trainer_trouble": "",
    "roll": [
        {"peer_id": "12D3KooWotherZ", "name": "lab-hanoi", "phase": "training", "last_epoch": 12},
        {"peer_id": "12D3KooWgone00", "name": "lab-lima", "phase": "", "last_epoch": 9},
    ],
}
PEERS = [
    {
        "peer_id": "12D3KooWotherZ",
        "name": "lab-hanoi\x1b[31m of a long name",
        "phase": "training",
        "epoch": 12,
        "heard_s": 0.4,
        "relayed": True,
        "addresses": ["/ip4/198.51.100.7/tcp/4001/p2p/12D3KooWotherZ"],
    },
    {"peer_id": "12D3KooWevil00", "phase": "banned", "why": "streams", "left_s": 3.0},
]
HISTORY = {
    "points": [{"epoch": e, "loss": 5.0 - e / 4, "validation": {"a": 5.0 - e / 5}} for e in range(12)],
    "events": [{"at": 1.0, "text": "…otherZ left; round 11 went on"}],
    "records": [
        {
            "epoch": 12,
            "at": time.time() - 3 * 86_400 - 3600,
            "ballot": 2,
            "forced": False,
            "count": 3,
            "members": [["12D3KooWotherZ", 30], ["12D3KooWxyzABC", 70], ["12D3KooWgone00", 0]],
        }
    ],
}


@pytest.mark.parametrize("width", [72, 80, 200])
def test_a_node_at_a_glance_fits_its_terminal_and_obeys_no_peer(width: int) -> None:
    console = Console(width=width, record=True, file=open(os.devnull, "w"), legacy_windows=False)  # noqa: SIM115
    console.print(screen({"status": STATUS, "peers": PEERS, "history": HISTORY}, width, 40))
    console.file.close()
    text = console.export_text(styles=False)
    assert all(len(line) <= width for line in text.splitlines()) and "\x1b" not in text
    for words in (
        "demo?[31m",
        "up 2.0 h",
        "epoch 12  training",
        "2 of 3 ready, for 1.5 min",
        "ends when one more is",
        "1.40 passes",
        "cosine 0.70, norm kept 0.41",
        "12, 3.0 d ago, in ballot 2; 2 of 3: lab-hanoi",
        "70 %",
        "lab-new …asks01: tapestry admit",
        "2.3457",
        "waits for lab-hanoi",
        "lab-oslo",
        "…evil00",
        "lab-lima",
        "not heard",
        "relayed",
        "streams",
        "round 11 went on",
        "4.0 times less than float32",
    ):
        assert words in text, words
    assert "█▇" in text  # the loss fell


@pytest.mark.parametrize("peers", [0, 1, 40])
def test_all_of_it_fits_80_columns_and_24_lines(peers: int) -> None:
    console = Console(width=80, record=True, file=open(os.devnull, "w"), legacy_windows=False)  # noqa: SIM115
    others = [{**PEERS[0], "peer_id": f"12D3KooWother{n:02}"} for n in range(peers)]
    history = {**HISTORY, "events": HISTORY["events"] * 50}
    console.print(screen({"status": STATUS, "peers": others, "history": history}, 80, 24))
    console.file.close()
    lines = console.export_text(styles=False).splitlines()
    assert len(lines) <= 24 and all(len(line) <= 80 for line in lines), "\n".join(lines)
    assert "lab-oslo" in "\n".join(lines) and lines[-1].endswith("round 11 went on")
    more = re.search(r"and (\d+) more", "\n".join(lines))
    assert (more is not None) == (peers == 40) and (not more or int(more[1]) > 30)


def test_a_node_that_has_nothing_yet_is_shown_too() -> None:
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(screen({"status": {"phase": "starting"}, "peers": []}, 80, 24))
    console.file.close()
    assert "starting" in console.export_text()


def test_bars_show_the_last_values_and_gaps() -> None:
    assert bars([0.0, 7.0, None, math.nan, 3.5], 4) == "█  ▁"
    assert bars([1.0, 1.0], 9) == "▁▁"
    assert bars([None], 9) == bars([1.0], 0) == ""


def test_top_of_a_home_without_a_node_says_what_else_there_is(tmp_path: Any) -> None:
    result = CliRunner().invoke(cli, ["top", "--home", str(tmp_path)])
    assert result.exit_code == 1 and "no node is running" in result.stderr


def test_a_shell_completes_commands_and_flags() -> None:
    command = [sys.executable, "-P", "-m", "tapestry.node.cli"]

    def completed(words: str, index: int) -> list[str]:
        env = {
            **os.environ,
            "_TAPESTRY_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(index),
        }
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert completed("tapestry sta", 1) == ["start", "status"]
    assert "--peer" in completed("tapestry start --pe", 2)
    for shell in ("bash", "zsh", "fish"):
        result = CliRunner().invoke(cli, ["completion", shell])
        assert result.exit_code == 0 and "_TAPESTRY_COMPLETE" in result.stdout


def commands() -> list[list[str]]:
    """As they are typed; a group's parts each."""
    context = click.Context(cli)
    found = []
    for name in (name for names in FAMILIES for name in names):
        parts = getattr(cli.get_command(context, name), "commands", None)
        found += [[name]] if parts is None else [[name, part] for part in parts]
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help_with_examples_that_are_commands(words: list[str]) -> None:
    result = CliRunner().invoke(cli, [*words, "--help"])
    assert result.exit_code == 0
    examples = result.stdout.partition("Examples:")[2]
    assert f"tapestry {' '.join(words)}" in examples
    typed = [line.split("tapestry ", 1)[1] for line in examples.splitlines() if "tapestry " in line]
    for line in typed:
        given = shlex.split(re.split(r"[>|)]", line)[0], comments=True)
        context = click.Context(cli)
        command = cli.get_command(context, given[0])
        assert command is not None, line
        if isinstance(command, click.Group):
            command, given = command.get_command(context, given[1]), given[1:]
            assert command is not None, line
        command.make_parser(click.Context(command)).parse_args(given[1:])  # raises where a flag is not there


def test_names_are_no_markup() -> None:
    peers = [{"peer_id": "12D3KooWevil01", "name": "[/] [red]x[link=http://a]", "phase": "training"}]
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    roll = [{"peer_id": "12D3KooWevil01", "name": "x", "phase": "", "last_epoch": 3}]
    console.print(screen({"status": {**STATUS, "roll": roll}, "peers": peers}, 100, 24))
    console.file.close()
    text = console.export_text()
    assert "[/] [red]x" in text and text.count("evil01") == 1
