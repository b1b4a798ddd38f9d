"""`tapestry exit`: one directory that holds by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from homes import MadeHome, make_home

from tapestry.node.cli.main import cli
from tapestry.node.disk.base import ENDS
from tapestry.node.disk.held import open_run
from tapestry.node.disk.home_mark import claim
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.leave import leave
from tapestry.node.lineage.verify import verify
from tapestry.node.spec.training import PRESETS


def _quiet(_what: str, _done: int, _total: int) -> None:
    return None


@pytest.fixture
def made(tmp_path: Path) -> MadeHome:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    made.advance(3, checkpoint=True)
    (made.home.path / "trainer").mkdir()
    (made.home.path / "trainer" / "cursor.json").write_text("{}")
    made.home.peers.write_text("[]")
    return made


def test_a_member_leaves_with_a_home_that_holds_and_leads_to_nobody(made: MadeHome, tmp_path: Path) -> None:
    proof = leave(made.home, tmp_path / "out", _quiet)
    assert proof.holds and (proof.epoch, proof.replayed_to) == (3, 3)
    out = Home(tmp_path / "out")
    assert verify(out.path, told=_quiet).holds
    assert out.identity_key.stat().st_mode & 0o777 == 0o600 and out.path.stat().st_mode & 0o777 == 0o700
    assert (out.trainer / "cursor.json").exists() and not out.peers.exists()
    run = open_run(out, ReaderCrypto())
    assert run is not None
    state = run.state()
    restored = run.restore(state, 3)
    assert restored is not None and restored.state_digest == made.state.digest()


def test_an_exit_starts_alone_on_purpose_or_with_a_peer(made: MadeHome, tmp_path: Path) -> None:
    out = tmp_path / "out"
    leave(made.home, out, _quiet)
    run = CliRunner().invoke(cli, ["start", "--home", str(out), "--data", "stdlib", "--declare", "own"])
    assert run.exit_code == 2 and f"{out} is an exit from its run" in run.stderr
    assert "--island" in run.stderr and "--peer ADDRESS" in run.stderr
    Home(out).require_way(alone=True, to_others=False)
    Home(out).require_way(alone=False, to_others=True)
    made.home.require_way(alone=False, to_others=False)  # no exit
    claim(Home(out))
    Home(out).require_way(alone=False, to_others=False)  # a node has started there: a home as any other


def test_what_a_live_node_is_just_writing_is_left_behind(made: MadeHome, tmp_path: Path) -> None:
    with made.home.chain.open("ab") as file:
        file.write(b'{"digest":"half a line')
    (made.home.updates / f"00000004-{'ab' * 8}.upd").write_bytes(b"of a round under way")
    made.home.base.mkdir(exist_ok=True)
    for end in ENDS:
        (made.home.base / f"model.safetensors{end}").write_bytes(b"of a base that came")
    assert leave(made.home, tmp_path / "out", _quiet).epoch == 3
    assert len(list((tmp_path / "out" / "updates").iterdir())) == 3
    assert not list((tmp_path / "out" / "base").iterdir())


@pytest.mark.parametrize("bit", range(8))
def test_a_last_record_whose_newline_was_flipped_is_damage_and_not_left_out(
    made: MadeHome, tmp_path: Path, bit: int
) -> None:
    """The exit was one epoch short, and held."""
    data = made.home.chain.read_bytes()
    made.home.chain.write_bytes(data[:-1] + bytes([data[-1] ^ 1 << bit]))
    with pytest.raises(UserError, match="does not hold, and nothing was written") as raised:
        leave(made.home, tmp_path / "out", _quiet)
    assert raised.value.details[0] == "chain.jsonl, epoch 3: it ends with another byte than a newline"
    assert not (tmp_path / "out").exists()


def test_a_chain_that_does_not_hold_is_said_in_one_line(made: MadeHome, tmp_path: Path) -> None:
    """It was a traceback."""
    data = made.home.chain.read_bytes()
    made.home.chain.write_bytes(data[:40] + b"x" + data[41:])
    with pytest.raises(UserError, match="does not hold, and nothing was written") as raised:
        leave(made.home, tmp_path / "out", _quiet)
    assert raised.value.details[0].startswith("chain.jsonl, epoch 1: ")


def test_a_home_that_does_not_hold_is_said_and_nothing_is_written(made: MadeHome, tmp_path: Path) -> None:
    (path,) = made.home.updates.glob("00000002-*")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="does not hold, and nothing was written") as raised:
        leave(made.home, tmp_path / "out", _quiet)
    assert any(detail.startswith(f"updates/{path.name}, epoch 2") for detail in raised.value.details)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["home", "member-1.key"]
