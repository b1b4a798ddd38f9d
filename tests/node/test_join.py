"""Which run a node is of, and what is said where a file at hand says otherwise."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from homes import make_home

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.net.join import agree_on_run
from tapestry.node.spec.node import NodeConfig
from tapestry.node.spec.run import RunSpec
from tapestry.node.spec.training import PRESETS


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
