"""What needs no tensors is said before torch is imported, which takes seconds."""

from __future__ import annotations

import json
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from bases import edit_json
from homes import base_spec, make_home

from tapestry.node.errors import UserError
from tapestry.node.sovereign.asked import require_length
from tapestry.node.spec.recipe import preset_recipe
from tapestry.node.spec.run import new_spec
from tapestry.node.spec.training import PRESETS, DataSpec, TrainingSpec, TrainSpec

HEAVY = ("torch", "hivemind", "transformers")
DATA = ("--data", "stdlib:1/30", "--http", "127.0.0.1:0", "--listen", "/ip4/127.0.0.1/tcp/0")

# Command lines and what is said. `H` is a home at epoch 2, `E` an empty folder, `F` a file, `N` nothing, and
# `B` the home of a run to be, with a base whose tokenizer has no BOS.
REFUSED = {
    "restore F --home H": "H is there already",
    "restore F --home N": "F is no backup of a home",
    "backup N --home E": "E holds no run to back up",
    "backup F --home H": "F is there already",
    "exit N --home E": "E holds no run to leave with",
    "exit F --home H": "F is there already",
    "export N --home E": "E holds no run to export",
    "export N --home H --epoch 9": "there is no epoch 9 yet: the run is at 2 in H",
    "export F --home H": "F is there already",
    "export N --home H --branch b": "H has no branch b",
    "export N --home H --derivative d": "there is no derivative d",
    "verify N": "N is neither a home with a run nor an export",
    "verify H --against H": "--against is for exports",
    "verify H --anchor N": "cannot read the anchor in N",
    "log --home E": "E holds no run",
    "anchor --home E": "E holds no run",
    "members E": "E holds no run",
    "derive d --home E --stage cpt --method full --data F --declare own": "E holds no run",
    "derive d --home H --from 9 --stage cpt --method full --data F": "there is no epoch 9 yet",
    "derive d --home H --stage cpt --method full --data F --sequence-length 999": "the base has 32 positions",
    "derive base --home H --stage cpt --method full --data F": "base is the name of the shared base",
    "evaluate d --home H": "there is no derivative d",
    "evaluate base --home H": "there is no H/suite.toml",
    "evaluate base --home H --epoch 9 --suite F": "there is no epoch 9 yet",
    "rebase d --home H": "there is no derivative d",
    "merge d --into e --home H": "a merge takes two derivatives or more",
    "merge d e --into f --home H": "there is no derivative d",
    "rejoin --bring --home H": "H is on no island",
    "data revoke N --home H": "nothing was revoked",
    "init N/a --base N": "there is no folder N",
    "init N/a --base E": "E holds no model.safetensors",
    "start --home E": "there is no run: E holds none",
    "start --home B": "B/base: data.add_bos is true, but the tokenizer has no BOS",
    "start --home H --run-id " + "a" * 64: "but H is of run",
    "start --home H --run R": "R differs from the run in H",
    "start --home H --peer /ip4/127.0.0.1/tcp/9/p2p/ME": "has the key of this home itself",
    "start --home H --peer /ip4/127.0.0.1/tcp/9": "`tapestry invite` prints there, which has everything",
    "start --home H --http 127.0.0.1:PORT": "port PORT on 127.0.0.1 is in use",
    "start --home H --listen /ip4/127.0.0.1/tcp/PORT": "cannot listen on /ip4/127.0.0.1/tcp/PORT",
}
# What only reads, and answers.
ANSWERED = (
    "log --home H",
    "log --branches --home H",
    "anchor --home H",
    "members H",
    "status --home H",
    "peers --home H",
    "derivatives --home H",
    "data check stdlib --home H",
    "data list --home H",
)

PROGRAM = """
import json, sys
from click.testing import CliRunner
from tapestry.node.cli.main import cli
for line in json.load(sys.stdin):
    done = CliRunner().invoke(cli, line)
    print(json.dumps([done.exit_code, done.stderr, [one for one in sys.argv[1:] if one in sys.modules]]))
"""


@dataclass(frozen=True, slots=True)
class Said:
    exit_code: int
    stderr: str
    imported: list[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the letters stand for."""
    folder = tmp_path_factory.mktemp("early")
    made = make_home(folder / "home", PRESETS["nano"].model)
    made.advance(2)
    (folder / "empty").mkdir()
    (folder / "file").write_text("text")
    (folder / "run.toml").write_text(preset_recipe("nano", "another", 0).to_toml())
    _without_bos(folder / "no-bos")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield {
            "B": str(folder / "no-bos"),
            "H": str(folder / "home"),
            "E": str(folder / "empty"),
            "F": str(folder / "file"),
            "N": str(folder / "nothing"),
            "R": str(folder / "run.toml"),
            "ME": made.identities[0].peer_id,
            "PORT": str(taken.getsockname()[1]),
        }


def _without_bos(home: Path) -> None:
    spec = new_spec(
        "no bos", TrainingSpec(base_spec(home, "llama"), DataSpec("base", add_bos=True), TrainSpec())
    )
    edit_json(home / "base" / "tokenizer_config.json", lambda table: table.pop("bos_token"))
    (home / "run.toml").write_text(spec.to_toml())


@pytest.fixture(scope="module")
def said(world: dict[str, str]) -> dict[str, Said]:
    """By the command line, all in one process."""
    lines = [*REFUSED, *ANSWERED]
    given = [_meant(line, world).split() + list(DATA[: _wants_data(line)]) for line in lines]
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, *HEAVY],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {line: Said(*one) for line, one in zip(lines, found, strict=True)}


def _wants_data(line: str) -> int:
    """How many of DATA: what the line gives by itself is left out."""
    if not line.startswith("start"):
        return 0
    return 2 if "PORT" in line else len(DATA)


def _meant(text: str, world: dict[str, str]) -> str:
    """With what the letters stand for in their place: whole words, or the beginning of a path."""
    return re.sub(r"(?<![\w./-])[BHEFNR](?=[ /:]|$)|\bPORT\b|\bME\b", lambda found: world[found[0]], text)


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_is_refused_before_torch_is_imported(
    line: str, said: dict[str, Said], world: dict[str, str]
) -> None:
    one = said[line]
    assert one.exit_code and one.imported == []
    assert _meant(REFUSED[line], world) in one.stderr


@pytest.mark.parametrize("line", ANSWERED)
def test_what_only_reads_the_records_needs_no_torch(line: str, said: dict[str, Said]) -> None:
    assert (said[line].exit_code, said[line].imported) == (0, [])


def test_the_positions_of_a_base_from_elsewhere_are_those_of_its_config(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", base_spec(tmp_path / "home", "llama")).home
    require_length(home, 128)
    with pytest.raises(UserError, match="the base has 128 positions"):
        require_length(home, 129)


@pytest.mark.parametrize("line", ["restore F --home H", "start --home E"])
def test_a_refusal_takes_less_than_a_second_of_processor_time(line: str, world: dict[str, str]) -> None:
    args = _meant(line, world).split() + list(DATA[: _wants_data(line)])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-P", "-m", "tapestry.node.cli", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and done.stderr.count("error:") == 1
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 1.0
