"""An open base -> the spec of a run that continues it, and what `init` says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from bases import begin_with, make_base
from click.testing import CliRunner

from tapestry.node.cli.main import cli
from tapestry.node.home import Home
from tapestry.node.spec.run import RunSpec


@pytest.mark.parametrize("begins", [False, True])
def test_init_takes_from_the_base_whether_documents_begin_with_bos(tmp_path: Path, begins: bool) -> None:
    base = make_base(tmp_path / "base", "llama")
    if begins:
        begin_with(base)
    done = CliRunner().invoke(cli, ["init", str(tmp_path / "home"), "--base", str(base)])
    assert done.exit_code == 0, done.output
    assert RunSpec.load(Home(tmp_path / "home").run_toml).data.add_bos is begins
    said = "ids, BOS before documents" if begins else "ids, no BOS before documents"
    assert said in done.output


def test_a_preset_begins_no_document_with_bos(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["init", str(tmp_path / "home"), "--preset", "nano"])
    assert done.exit_code == 0, done.output
    assert RunSpec.load(Home(tmp_path / "home").run_toml).data.add_bos is False
