"""Which run a node is of, what is said where a file at hand says otherwise, and what a person is asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from homes import MadeHome, make_home

from tapestry.dht.addresses import parse_peer
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.net import join
from tapestry.node.net.join import Agreed, agree_on_run
from tapestry.node.protocol.record import Genesis
from tapestry.node.spec.node import NodeConfig
from tapestry.node.spec.run import RunSpec
from tapestry.node.spec.training import PRESETS

PEER = "/ip4/203.0.113.7/tcp/4001/p2p/12D3KooWSahP5pFRCEfaziPEba7urXGeif6T1y8jmodzdFUvzBHj"


def test_what_is_changed_in_ones_own_run_toml_is_said_of_the_run_and_what_a_record_can_change_is_named(
    tmp_path: Path,
) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    table = made.spec.to_dict()
    table["train"] |= {"lr": 0.002, "inner_steps": 7, "betas": [0.5, 0.9]}
    made.home.run_toml.write_text(RunSpec.from_dict(table).to_toml())
    config = NodeConfig.resolve(made.home, {"data": ("stdlib",)}, {})
    with pytest.raises(UserError, match="which goes on as it was founded") as caught:
        asyncio.run(agree_on_run(config, made.chain.genesis, None, (), None))  # type: ignore[arg-type]
    error = caught.value
    assert error.exit_code == ExitCode.REFUSED and len(error.details) == 3
    assert "train.betas: [0.5, 0.9] here, [0.9, 0.99] in the run" in error.details
    commands = "tapestry propose set train.inner_steps 7 and tapestry propose set train.lr 0.002"
    assert error.hint is not None and sorted(commands.split()) == sorted(
        error.hint.partition(": ")[2].partition("; ")[0].split()
    )
    assert error.hint.endswith("to take the run as it is") and "betas" not in error.hint


@pytest.mark.parametrize("show_spec", [False, True])
def test_a_joiner_reads_a_few_lines_and_has_all_that_was_agreed_on_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, show_spec: bool
) -> None:
    made = make_home(tmp_path / "donor", PRESETS["nano"].model)
    genesis, home = made.chain.genesis, Home(tmp_path / "joiner")
    home.create()
    flags = {"data": ("stdlib",), "peers": (PEER,), "show_spec": show_spec or None}
    config = NodeConfig.resolve(home, flags, {})

    async def asked(*_: object) -> Genesis:
        return genesis

    monkeypatch.setattr(join, "_ask_peers", asked)
    peers: Any = config.peers
    agreed = asyncio.run(agree_on_run(config, None, None, peers, None))  # type: ignore[arg-type]
    assert agreed.from_peer and RunSpec.load(home.agreed_toml) == agreed.spec == made.spec
    lines = capsys.readouterr().out.splitlines()
    assert genesis.run_id in lines[0] and lines[-1].endswith(f"is in {home.agreed_toml}")
    shown = [line for line in lines if line.strip().startswith("inner_steps = ")]
    assert (len(shown), len(lines) > 50, len(lines) < 8) == (
        (1, True, False) if show_spec else (0, False, True)
    )


# --- consent ----------------------------------------------------------------------------------------

THERE = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWLuBRa9XUvfuQ8VeDVTnBdUXX9LHnNDAkx2gAtXBobPmd"
QUESTION = "join this run? [y/N] "
WAIT_S = 20.0


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Descriptor of a person's side of a terminal, whose other side is this process's input and output."""
    ours, theirs = pty.openpty()
    with open(os.dup(theirs)) as read, open(theirs, "w") as written, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", read)
        patch.setattr(sys, "stdout", written)
        yield ours
    os.close(ours)


def seen(person: int, last: str) -> str:
    """What the terminal shows, up to these words."""
    text = ""
    while last not in text:
        assert select.select([person], [], [], WAIT_S)[0], text
        text += os.read(person, 4096).decode()
    return text


def joined(
    made: MadeHome, home: Path, monkeypatch: pytest.MonkeyPatch, typed: str = "", **flags: object
) -> tuple[Agreed, str]:
    """Join the run of `made`, whose genesis a peer has given, from a terminal: what was agreed, and shown."""

    async def genesis(*_: object) -> object:
        return made.chain.genesis

    async def main(person: int) -> tuple[Agreed, str]:
        config = NodeConfig.resolve(Home(home), {"data": ("stdlib",), "peers": (THERE,), **flags}, {})
        joins = asyncio.create_task(agree_on_run(config, None, None, (parse_peer(THERE),), None))  # type: ignore[arg-type]
        shown = await asyncio.to_thread(seen, person, QUESTION if typed else "agreed.toml")
        assert not (typed and joins.done()), "while a person thinks the node does other things"
        os.write(person, typed.encode())
        async with asyncio.timeout(WAIT_S):
            return await joins, shown

    home.mkdir()
    monkeypatch.setattr(join, "_ask_peers", genesis)
    with terminal(monkeypatch) as person:
        return uvloop.run(main(person))


@pytest.mark.parametrize("typed", ["y\n", " YES \n"])
def test_who_is_at_a_terminal_is_shown_what_a_run_takes_and_joins_it_by_saying_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    agreed, shown = joined(made, tmp_path / "b", monkeypatch, typed)
    assert agreed == Agreed(made.chain.genesis, made.spec, from_peer=True)
    assert f"joining run {made.spec.name}, {made.chain.genesis.run_id}" in shown
    assert "parameters" in shown and "memory" in shown and "each round sends" in shown
    assert shown.endswith(QUESTION), "the sizes come before the question"


@pytest.mark.parametrize("typed", ["\n", "n\n", "yess\n", "\x04"], ids=["enter", "n", "mistyped", "ctrl-d"])
def test_without_a_yes_nothing_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    with pytest.raises(UserError, match="not joined") as caught:
        joined(made, tmp_path / "b", monkeypatch, typed)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert caught.value.hint is not None and "--run-id" in caught.value.hint


@pytest.mark.parametrize("named", ["run_id", "max_params"])
def test_who_named_the_run_or_its_size_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    flags = {"run_id": made.chain.genesis.run_id} if named == "run_id" else {"max_params": 10**6}
    _, shown = joined(made, tmp_path / "b", monkeypatch, **flags)
    assert QUESTION not in shown
