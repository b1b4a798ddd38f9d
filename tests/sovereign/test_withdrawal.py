"""A source that is withdrawn: what it touched, by the events, chain and derivatives of a real home."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from homes import MadeHome, make_home

from tapestry.node.cli.main import cli
from tapestry.node.daemon.permit import DataPermit
from tapestry.node.lineage.uses import note_use
from tapestry.node.lineage.verify import verify
from tapestry.node.sovereign.derivative import PLAIN, DataUse, Derivative, Parent, Shelf, Version
from tapestry.node.sovereign.recipe import Recipe
from tapestry.node.sovereign.withdrawal import withdrawal
from tapestry.node.spec.declared import BASE, append, parse_declaration
from tapestry.node.spec.training import PRESETS

HEX = "ab" * 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeHome:
    """Epochs 1 to 2 on /a, 3 to 5 on /a and /b, 6 on /a alone."""
    made = make_home(tmp_path_factory.mktemp("withdrawal") / "home", PRESETS["nano"].model)
    run_id = made.chain.genesis.run_id
    for sources, epochs in ((["/a"], 2), (["/a", "/b"], 3), (["/a"], 1)):
        note_use(made.home, BASE, sources, run_id, made.chain.epoch)
        made.advance(epochs)
    for path in ("/a", "/b"):
        append(made.home, [parse_declaration("us, CC0-1.0", path, BASE)])
    shelf = Shelf(made.home)
    for name, epoch, source, made_of in (
        ("early", 2, "/c", ()),
        ("late", 4, "/c", ()),
        ("own", 0, "/b:text", ()),
        ("joined", 2, "/c", ("early:1", "own:1")),
    ):
        (shelf.folder / name).mkdir(parents=True)
        parent = Parent(run_id, "a run", epoch, HEX, HEX, HEX)
        shelf.write(Derivative(name, 1, (version(parent, source, made_of),)), 1)
    return made


def version(parent: Parent, source: str, made_of: tuple[str, ...]) -> Version:
    return Version(
        number=1,
        how="merge" if made_of else "derive",
        parent=parent,
        recipe=Recipe("cpt", "full", (source,)),
        made_of=made_of,
        transplant=PLAIN,
        weights=(),
        data=() if made_of else (DataUse(source.partition(":")[0], HEX, 1, 1),),
        steps=1,
        tokens=1,
        seconds=1.0,
        made_at="2026-11-29T00:00:00Z",
        digest=HEX,
        report=(),
        base_report=(),
        promoted=True,
        reasons=(),
    )


def test_a_source_touched_the_epochs_between_its_start_and_the_next_one(made: MadeHome) -> None:
    found = withdrawal(made.home, lambda path: path == "/b")
    assert [epoch for epoch, _ in found.records] == [3, 4, 5]
    assert found.before == (2, made.chain.head_at(2)) and found.head_epoch == 6
    assert found.records[0][1] == made.chain.head_at(3)


def test_derivatives_are_touched_by_their_data_their_base_and_their_parts(made: MadeHome) -> None:
    found = dict(withdrawal(made.home, lambda path: path.startswith("/b")).derivatives)
    assert set(found) == {"late:1", "own:1", "joined:1"}
    assert "stands on epoch 4" in found["late:1"] and found["own:1"] == "trained on it"
    assert found["joined:1"] == "made of own:1"


def test_a_source_from_the_beginning_leaves_the_genesis_and_one_never_used_nothing(made: MadeHome) -> None:
    assert withdrawal(made.home, lambda path: path == "/a").before == (0, made.chain.genesis.run_id)
    nothing = withdrawal(made.home, lambda path: path == "/c/d")
    assert (nothing.records, nothing.before) == ((), None)


def test_epochs_without_a_contribution_of_ours_are_not_named(made: MadeHome, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("genesis.json", "chain.jsonl", "data-events.jsonl"):
        (other / name).write_bytes((made.home.path / name).read_bytes())
    (other / "identity.key").write_bytes((made.home.path.parent / "member-1.key").read_bytes())
    (other / "identity.key").chmod(0o600)
    everyone = withdrawal(replace(made.home, path=other), lambda path: path == "/b")
    assert [epoch for epoch, _ in everyone.records] == [3, 4, 5], "the second member contributed too"
    from tapestry.dht.identity import Identity

    (other / "identity.key").unlink()
    Identity.load_or_create(other / "identity.key")
    assert withdrawal(replace(made.home, path=other), lambda path: path == "/b").records == ()


def test_revoke_stops_the_use_says_what_it_touched_and_leaves_a_home_that_holds(
    made: MadeHome,
) -> None:
    permit = DataPermit(made.home, ("/a", "/b"), lambda: datetime.date(2026, 12, 1))
    assert permit.refusal() == ""
    run = CliRunner().invoke(cli, ["data", "revoke", "/b", "--home", str(made.home.path), "--json"])
    told = json.loads(run.stdout)
    assert [epoch for epoch, _ in told["records"]] == [3, 4, 5] and told["before"][0] == 2
    assert "data /b is not read: /b was revoked at" in permit.refusal()
    assert DataPermit(made.home, ("/a",)).refusal() == ""
    listed = CliRunner().invoke(cli, ["data", "list", "--home", str(made.home.path)])
    assert "base: may be used" in listed.stdout and "revoked at" in listed.stdout
    checked = CliRunner().invoke(cli, ["data", "check", "/b", "/a", "--home", str(made.home.path)])
    assert checked.exit_code == 4 and "used in 3 records and 3 derivatives" in checked.stdout
    assert "data-events.jsonl" not in faulty(made)
    events = made.home.data_events.read_text().replace('"/b"', '"/x"')
    made.home.data_events.write_text(events)
    assert "data-events.jsonl" in faulty(made)


def faulty(made: MadeHome) -> set[str]:
    """Files that do not hold."""
    return {fault.file for fault in verify(made.home.path, replay=False, told=lambda *_: None).faults}


def test_a_consent_that_ends_at_midnight_ends_on_a_running_node(tmp_path: Path) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    append(made.home, [parse_declaration("us, CC0-1.0, until 2026-12-01", "/a", BASE)])
    day = datetime.date(2026, 12, 1)
    permit = DataPermit(made.home, ("/a",), lambda: day)
    assert permit.refusal() == ""
    day = datetime.date(2026, 12, 2)
    assert "which is over" in permit.refusal()
    made.home.data_toml.write_text("nonsense")
    assert "not valid TOML" in permit.refusal()
