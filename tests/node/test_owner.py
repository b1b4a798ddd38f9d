"""Root in another user's home: what would write there is refused, what reads leaves nothing of root's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from homes import make_home

from tapestry.node.cli.main import cli
from tapestry.node.daemon import doctor
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.spec.training import PRESETS
from tapestry.node.surface.findings import Verdict

NOBODY = 65534
WRITING = {
    "start": ["start", "--data", "stdlib", "--declare", "own"],
    "init": ["init", "HOME"],
    "id": ["id"],
    "log-level": ["log-level", "links", "debug"],
    "data declare": ["data", "declare", "own", "stdlib"],
    "data revoke": ["data", "revoke", "stdlib"],
    "derive": ["derive", "french", "--stage", "cpt", "--data", "stdlib"],
    "evaluate": ["evaluate", "base"],
    "rebase": ["rebase", "french"],
    "merge": ["merge", "french", "law", "--into", "both"],
    "rejoin": ["rejoin", "--bring"],
    "restore": ["restore", "/dev/null"],
}
READING = {
    "verify": ["verify", "HOME"],
    "export": ["export", "OUT/model"],
    "backup": ["backup", "OUT/backup.tar"],
    "exit": ["exit", "OUT/left"],
    "log": ["log"],
    "anchor": ["anchor"],
    "derivatives": ["derivatives"],
    "data list": ["data", "list"],
    "data check": ["data", "check", "stdlib"],
    "status": ["status"],
    "peers": ["peers"],
    "members": ["members"],
    "stop": ["stop"],
}
# Answered by the node, or as `doctor`, which takes away what it makes.
OTHERS = {"admit", "remove", "invite", "propose", "approve", "top", "doctor", "completion"}


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home that is not root's, for whoever runs as root."""
    home = Home(tmp_path / "home")
    home.path.mkdir()
    home.identity_key.touch()
    if os.getuid() == 0:
        for path in (home.path, home.identity_key):
            os.chown(path, NOBODY, NOBODY)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(Home, "_owner_of_new_files", lambda self: 0)
    return home


def _names(command: click.Command) -> Iterator[str]:
    context = click.Context(command)
    assert isinstance(command, click.Group)
    for name in command.list_commands(context):
        below = command.get_command(context, name)
        yield from (f"{name} {sub}" for sub in below.commands) if isinstance(below, click.Group) else (name,)


def test_every_command_is_known_to_write_in_a_home_or_not_to() -> None:
    assert sorted(_names(cli)) == sorted(WRITING.keys() | READING.keys() | OTHERS)


def _given(words: list[str], home: Home, out: Path) -> list[str]:
    said = [word.replace("HOME", str(home.path)).replace("OUT", str(out)) for word in words]
    return said if "HOME" in words else [*said, "--home", str(home.path)]


@pytest.mark.parametrize("words", WRITING.values(), ids=WRITING.keys())
def test_root_is_told_to_act_as_the_user_whose_home_it_is(theirs: Home, words: list[str]) -> None:
    result = CliRunner().invoke(cli, _given(words, theirs, theirs.path))
    assert (
        result.exit_code == ExitCode.REFUSED and "whose node could not read what root writes" in result.stderr
    )
    assert "hint: sudo -u " in result.stderr and list(theirs.path.iterdir()) == [theirs.identity_key]


@pytest.mark.parametrize("name", sorted(WRITING.keys() - {"restore"}))
def test_a_home_that_is_not_restored_to_its_end_gets_no_files_of_others(tmp_path: Path, name: str) -> None:
    """`id` made a key there, and the next `restore` said that the home is there already."""
    home = Home(tmp_path / "home")
    home.path.mkdir()
    home.restoring.touch()
    result = CliRunner().invoke(cli, _given(WRITING[name], home, tmp_path))
    assert result.exit_code == ExitCode.USAGE and "was not restored to its end" in result.stderr
    assert list(home.path.iterdir()) == [home.restoring]


def test_others_and_homes_that_are_not_there_yet_are_nobody_elses(
    theirs: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="belongs to"):
        theirs.require_owner()
    Home(theirs.path / "new").require_owner()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    theirs.require_owner()


@pytest.mark.skipif(os.getuid() != 0, reason="needs files of root's and of others")
def test_a_node_of_root_in_a_folder_of_another_user_goes_on(theirs: Home) -> None:
    """As in a container with a folder of the host's."""
    theirs.identity_key.unlink()
    theirs.require_owner()
    theirs.identity_key.touch()
    (theirs.path / "run.toml").touch()
    theirs.require_owner()
    os.chown(theirs.identity_key, 99_999, 0)
    with pytest.raises(UserError, match="belongs to #99999") as caught:
        theirs.require_owner()
    assert "sudo -u '#99999' tapestry" in (caught.value.hint or "")


def test_where_the_file_system_gives_roots_files_to_their_owner_root_may_write(
    theirs: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS may, and folders of the host in a virtual machine."""
    owner = theirs.identity_key.stat().st_uid
    monkeypatch.setattr(Home, "_owner_of_new_files", lambda self: owner)
    theirs.require_owner()


@pytest.mark.skipif(os.getuid() != 0, reason="needs files of others")
def test_what_reads_as_root_leaves_no_file_of_roots(tmp_path: Path) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    made.advance(2, checkpoint=True)
    made.home.chain_index.unlink(missing_ok=True)  # as after a restore
    for path in (made.home.path, *made.home.path.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    for name, words in READING.items():
        result = CliRunner().invoke(cli, _given(words, made.home, tmp_path))
        assert result.exit_code == 0, (name, result.output)
        of_root = [str(path) for path in made.home.path.rglob("*") if path.lstat().st_uid == 0]
        assert of_root == [], name


@pytest.mark.parametrize(
    ("closed", "why"),
    [
        ({}, ""),
        # What somebody else manages, and the node only reads
        ({"node.toml": 0o444, "run.toml": 0o444, "identity.key": 0o400, "http.key": 0o440}, ""),
        ({"texts": 0o555, "linked": 0o555, "base": 0o555, "lost+found": 0, "egress-000001.jsonl": 0o400}, ""),
        ({"data.toml": 0}, "read data.toml"),
        ({"identity.key": 0o200, "chain.jsonl": 0o444}, "write chain.jsonl, read identity.key"),
        ({"updates": 0o555, "state": 0o555}, "write state, write updates"),
        ({"lock": 0o444, ".data.toml.lock": 0o444}, "write .data.toml.lock, write lock"),
    ],
)
def test_doctor_names_what_another_user_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: dict[str, int], why: str
) -> None:
    home = Home(tmp_path / "home")
    home.path.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (home.path / "linked").symlink_to(tmp_path / "elsewhere")
    (home.path / "leads-nowhere").symlink_to(tmp_path / "none")
    for name in ("texts", "base", "lost+found", "updates", "state"):
        (home.path / name).mkdir()
    for name in closed:
        if not (home.path / name).exists():
            (home.path / name).touch()

    def access(path: Path, how: int) -> bool:  # root may do everything: the modes tell
        return closed.get(path.name, 0o600) >> 6 & how == how

    monkeypatch.setattr(os, "access", access)
    (finding,) = doctor.look_at_home(home, False)
    assert (finding.verdict is Verdict.WRONG) is bool(why)
    if why:
        assert finding.text == f"this user cannot {why} in {home.path}"
        assert finding.cure.startswith("sudo chown -R USER: ")
