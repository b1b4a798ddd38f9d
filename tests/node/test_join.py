"""Which run a node is of, and what is said where a file at hand says otherwise."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from homes import make_home

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.net import join
from tapestry.node.net.join import agree_on_run
from tapestry.node.protocol.chain import Genesis
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
