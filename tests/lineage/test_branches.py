"""What lost at forks, for who reads a home: listed, proven, exported, and taken along."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from homes import MadeHome, make_home

from tapestry.node.cli.main import cli
from tapestry.node.disk.branches import Branches, BranchLimits, read_about
from tapestry.node.disk.files import atomic_write
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage.backup import backup, restore
from tapestry.node.lineage.branches import branches
from tapestry.node.lineage.export import export_home
from tapestry.node.lineage.export_branch import export_branch
from tapestry.node.lineage.leave import leave
from tapestry.node.lineage.proof import Proof
from tapestry.node.lineage.verify import lines, verify
from tapestry.node.spec.training import PRESETS

FLIPS = 80


def _quiet(_what: str, _done: int, _total: int) -> None:
    return None


def _verify(path: Path, **how: object) -> Proof:
    return verify(path, told=_quiet, **how)  # type: ignore[arg-type]


def _faults(path: Path, **how: object) -> list[str]:
    return [str(fault) for fault in _verify(path, **how).faults]


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> tuple[MadeHome, str, str, Path]:
    """Epochs 3 to 5 were left at 2, and 2 to 6 of the other side at 1: the first branch follows the second.
    And an export of the first one's head, from before it was left."""
    folder = tmp_path_factory.mktemp("forks")
    made = make_home(folder / "home", PRESETS["nano"].model)
    made.advance(4, checkpoint=True)
    made.advance(1)
    export_home(made.home, folder / "before", 5)
    first = made.leave_fork(2, 4)
    second = made.leave_fork(1, 6)
    made.advance(1, checkpoint=True)
    return made, first, second, folder / "before"


@pytest.fixture
def copy(forked: tuple[MadeHome, str, str, Path], tmp_path: Path) -> Home:
    shutil.copytree(forked[0].home.path, tmp_path / "copy")
    return Home(tmp_path / "copy")


def test_a_home_with_branches_is_proven_whole(forked: tuple[MadeHome, str, str, Path]) -> None:
    made, *_ = forked
    for jobs in (1, 2):
        proof = _verify(made.home.path, jobs=jobs)
        assert proof.faults == [] and proof.branches == 2 and proof.notes == []
        assert (proof.epoch, proof.records, proof.replayed_to) == (8, 8, 8)
    assert any(line.startswith("branches 2: what lost") for line in lines(proof))


def test_the_log_lists_what_lost_with_its_members_and_why(forked: tuple[MadeHome, str, str, Path]) -> None:
    made, first, second, _ = forked
    members = tuple(sorted(one.peer_id for one in made.identities))
    run, one, two = branches(made.home)
    assert (run.kind, run.epoch) == ("run", 8)
    assert (one.kind, one.folder, one.since, one.epoch) == ("lost", f"branches/{first}", 2, 5)
    assert (two.kind, two.folder, two.since, two.epoch) == ("lost", f"branches/{second}", 1, 6)
    assert one.members == two.members == members and one.lacks == two.lacks == ""
    assert one.why == "5 records by most of the last full electorate, against 6"
    said = CliRunner().invoke(cli, ["log", "--branches", "--home", str(made.home.path)]).stdout
    assert f"it lost: {two.why}" in said and f"export --branch {second}" in said
    asked = CliRunner().invoke(cli, ["log", "--branches", "--json", "--home", str(made.home.path)]).stdout
    assert [row["folder"] for row in json.loads(asked)] == [".", one.folder, two.folder]


def test_a_branch_is_exported_as_it_was(forked: tuple[MadeHome, str, str, Path], tmp_path: Path) -> None:
    made, first, second, before = forked
    home = ["--home", str(made.home.path)]
    done = CliRunner().invoke(cli, ["export", str(tmp_path / "out"), "--branch", first, *home])
    assert done.exit_code == 0, done.output
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (before / weights).read_bytes()
    assert _faults(tmp_path / "out") == []
    export_branch(made.home, second, tmp_path / "earlier", 3)
    assert json.loads((tmp_path / "earlier" / "tapestry.json").read_text())["epoch"] == 3
    assert _faults(tmp_path / "earlier") == []
    with pytest.raises(UserError, match="has no branch 00000009-x"):
        export_branch(made.home, "00000009-x", tmp_path / "none", None)


def test_a_bit_that_is_flipped_in_a_branch_is_found_and_its_file_named(copy: Home) -> None:
    rng = random.Random(5)
    files = sorted(path for path in copy.branches.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".json", ".jsonl", ".upd", ".safetensors"}
    for _ in range(FLIPS):
        path = rng.choice(files)
        data = path.read_bytes()
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        named = {fault.file for fault in _verify(copy.path).faults}
        assert path.relative_to(copy.path).as_posix() in named, f"byte {at} of {path.name}: {named}"
        path.write_bytes(data)
    assert _faults(copy.path) == []


def test_whole_files_that_say_something_else_are_found(
    forked: tuple[MadeHome, str, str, Path], copy: Home
) -> None:
    _, first, second, _ = forked
    folder = copy.branches / second
    about = read_about(folder)
    for lie, what in (
        (replace(about, lost=replace(about.lost, full=9)), "stood behind its head"),
        (replace(about, lost=replace(about.lost, epoch=5)), "does not end with the head"),
        (replace(about, since=3), "no chain of this home has its epoch 3"),
        (replace(about, run_id="ab" * 32), "of the run abab"),
    ):
        atomic_write(folder / "branch.json", lie.line())
        faults = _faults(copy.path)
        assert any(what in fault for fault in faults), faults
    atomic_write(folder / "branch.json", about.line())
    next((folder / "updates").glob("00000004-*")).unlink()
    assert f"branches/{second}/branch.json: lacks nothing, it says, and leads to 3 only" in _faults(copy.path)
    shutil.rmtree(folder)
    (fault,) = _faults(copy.path)
    assert (
        fault
        == f"branches/{first}/chain.jsonl, epoch 3: no chain of this home has its epoch 2, which it follows"
    )
    (_, lost) = branches(copy)
    assert "the records before branch" in lost.lacks
    with pytest.raises(UserError, match="the records before branch"):
        export_branch(copy, first, copy.path / "out", None)


def test_what_a_killed_node_did_not_leave_is_no_branch(tmp_path: Path) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    made.advance(3)
    kept = Branches(made.home, BranchLimits())
    kept.keep(made.chain, 1, (), made.store, made.checkpoints)
    assert [one.kind for one in branches(made.home)] == ["run"]
    proof = _verify(made.home.path)
    assert proof.holds and proof.branches == 0 and "a killed node did not leave them" in proof.notes[0]


def test_a_branch_that_lacks_something_holds_and_says_so(tmp_path: Path) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    made.advance(2, checkpoint=True)
    made.advance(2)
    made.store.drop_updates([made.chain.head_at(4)])
    name = made.leave_fork(2, 3)
    proof = _verify(made.home.path)
    assert proof.faults == [] and any("it lacks the update of epoch 4" in note for note in proof.notes)
    assert branches(made.home)[1].lacks == "it lacks the update of epoch 4"
    with pytest.raises(UserError, match="it lacks the update of epoch 4"):
        export_branch(made.home, name, tmp_path / "out", None)
    export_branch(made.home, name, tmp_path / "out", 3)


def test_a_branch_in_which_the_run_was_rolled_back_is_proven_by_its_path(tmp_path: Path) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    made.advance(3)
    made.roll_back(1, "a lie")
    made.advance(1)
    export_home(made.home, tmp_path / "before", 5)
    name = made.leave_fork(2, 4)
    proof = _verify(made.home.path)
    assert proof.faults == [] and proof.branches == 1
    assert f"branches/{name}: epoch 4: the state is that of epoch 1 again" in proof.notes
    export_branch(made.home, name, tmp_path / "out", None)
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "before" / weights).read_bytes()


def test_exit_and_backup_take_branches_along(forked: tuple[MadeHome, str, str, Path], tmp_path: Path) -> None:
    made, first, second, _ = forked
    assert leave(made.home, tmp_path / "out", _quiet).branches == 2
    backup(made.home, tmp_path / "backup.tar", _quiet)
    assert restore(tmp_path / "backup.tar", Home(tmp_path / "again"), _quiet).branches == 2
    for folder in ("out", "again"):
        assert sorted(path.name for path in (tmp_path / folder / "branches").iterdir()) == [first, second]
        assert _faults(tmp_path / folder) == []
