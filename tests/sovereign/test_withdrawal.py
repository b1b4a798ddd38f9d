"""A source that is withdrawn: what it touched, by the events, chain and derivatives of a real home."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from homes import MadeHome, make_home

from tapestry.dht.identity import Identity
from tapestry.node.cli.main import cli
from tapestry.node.daemon.permit import DataPermit
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage.uses import (
    Span,
    Started,
    note,
    note_brought,
    note_left,
    note_use,
    require_brought,
    spans,
)
from tapestry.node.lineage.verify import verify
from tapestry.node.sovereign.derivative import (
    PLAIN,
    DataUse,
    Derivative,
    Parent,
    Shelf,
    SourcesFor,
    Version,
)
from tapestry.node.sovereign.plans import Plan, write_plan
from tapestry.node.sovereign.recipe import Recipe
from tapestry.node.sovereign.standing import behind
from tapestry.node.sovereign.withdrawal import withdrawal
from tapestry.node.spec.declared import BASE, Declared, Revoked, append, parse_declaration, require
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


def test_a_source_touched_the_epochs_between_its_start_and_the_next_one_and_the_round_it_ended_in(
    made: MadeHome,
) -> None:
    """A node that ends after it gave its contribution may be in a record that its own disk has not."""
    found = withdrawal(made.home, lambda path: path == "/b")
    assert [epoch for epoch, _ in found.records] == [3, 4, 5, 6]
    assert found.before == (2, made.chain.head_at(2)) and found.head_epoch == 6
    assert found.records[0][1] == made.chain.head_at(3)


def told(tmp_path: Path, *said: tuple[str, dict[str, object]]) -> list[Span]:
    """When /x was used, by these events; the node's id is its start's, and the run's epochs are few."""
    home = Home(tmp_path)
    for event, more in said:
        note(home, event, **{"run_id": "run", "purpose": BASE, **more})
    return spans(home, lambda path: path == "/x")


def test_a_fork_that_was_left_takes_the_use_back_to_where_it_was_left(tmp_path: Path) -> None:
    """The epochs after it are made anew, from the same source."""
    used: dict[str, object] = {"epoch": 40, "sources": ["/x"]}
    assert told(tmp_path, ("used", used), ("left", {"epoch": 35})) == [Span("run", 35, None)]
    assert told(tmp_path, ("left", {"epoch": 38}), ("used", {"epoch": 37, "sources": []})) == [
        Span("run", 35, 38)
    ]


ISLAND: tuple[tuple[str, dict[str, object]], ...] = (
    ("used", {"epoch": 10, "sources": ["/x"], "island": True}),
    ("used", {"epoch": 15, "sources": ["/y"], "island": True}),
)


@pytest.mark.parametrize("how", ["restored", "records set aside"])
def test_what_was_used_before_a_home_lost_its_newest_records_may_be_in_any_since(
    tmp_path: Path, how: str
) -> None:
    home = Home(tmp_path)
    began = "2026-11-01T00:00:00Z"
    note(home, "used", purpose=BASE, run_id="run", epoch=5, sources=["/a"], at=began)
    note(home, "declared", path="/b")
    if how == "restored":
        note(home, "restored")
    else:
        home.chain.with_name("chain.jsonl.corrupt").write_text("what could not be read")
    note_use(home, BASE, ["/b"], "run", 6, Started("peer"))
    note_use(home, BASE, ["/b"], "run", 9, Started("peer"))
    assert spans(home, lambda path: path == "/a") == [Span("run", 5, None)]
    assert spans(home, lambda path: path == "/b") == [Span("run", 6, 10), Span("run", 9, None)]


def test_what_was_to_be_brought_may_have_been_given_before_a_home_was_restored(tmp_path: Path) -> None:
    brought = ("brought", {"epoch": 10, "sources": ["/x"]})
    moved_away = ("used", {"epoch": 10, "sources": ["/y"], "brings": False})
    assert Span("run", 10, None) in told(tmp_path, brought, ("restored", {}), moved_away)


def test_what_an_island_brings_is_in_the_record_that_took_it_and_in_no_other(tmp_path: Path) -> None:
    brought = ("brought", {"epoch": 10, "sources": ["/x", "/y"]})
    assert told(tmp_path, *ISLAND) == [Span("run", 10, 16)], "of the chain that was made alone"
    assert told(tmp_path, brought, ("rejoined", {"epoch": 10})) == [Span("run", 10, None)]
    started = ("used", {"epoch": 11, "sources": ["/y"], "brings": True})
    assert told(tmp_path, started, ("given", {"epoch": 13})) == [Span("run", 10, 13)]


def test_what_is_not_brought_any_more_touches_nothing_later(tmp_path: Path) -> None:
    brought = ("brought", {"epoch": 10, "sources": ["/x"]})
    moved_away = ("used", {"epoch": 12, "sources": ["/y"], "brings": False})
    assert told(tmp_path, *ISLAND, brought, ("rejoined", {"epoch": 10}), moved_away) == [Span("run", 10, 13)]


def test_contributions_under_a_key_that_was_replaced_are_named(made: MadeHome, tmp_path: Path) -> None:
    home, old = Home(tmp_path / "rekeyed"), made.identities[0].peer_id
    home.create()
    for name in ("genesis.json", "chain.jsonl"):
        (home.path / name).write_bytes((made.home.path / name).read_bytes())
    new = Identity.load_or_create(home.identity_key).peer_id
    run_id = made.chain.genesis.run_id
    note_use(home, BASE, ["/x"], run_id, 1, Started(old))
    assert [epoch for epoch, _ in withdrawal(home, lambda path: path == "/x").records] == [2, 3, 4, 5, 6]
    note_use(home, BASE, [], run_id, 3, Started(new))
    assert [epoch for epoch, _ in withdrawal(home, lambda path: path == "/x").records] == [2, 3, 4]


def test_what_is_still_to_be_brought_is_asked_for_too(made: MadeHome, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    append(home, [parse_declaration("us, CC0-1.0", path, BASE) for path in ("/x", "/y")])
    permit = DataPermit(home, ("/y",), lambda: datetime.date(2026, 12, 1))
    note_use(home, BASE, ["/x:text"], "run", 10, Started("peer", island=True))
    note_brought(home, "run", 10)
    home.brought.touch()
    assert permit.refusal() == ""
    append(home, [Revoked("/x", "today")])
    assert "was learnt from what may not be used: data /x is not read" in permit.refusal()
    home.brought.unlink()
    assert permit.refusal() == ""


def test_derivatives_are_touched_by_their_data_their_base_and_their_parts(made: MadeHome) -> None:
    found = dict(withdrawal(made.home, lambda path: path.startswith("/b")).derivatives)
    assert set(found) == {"late:1", "own:1", "joined:1"}
    assert "stands on epoch 4" in found["late:1"] and found["own:1"] == "trained on it"
    assert found["joined:1"] == "made of own:1"
    shelf = Shelf(made.home)
    derivative = shelf.require("own")
    (one,) = derivative.versions[0].data
    moved = replace(derivative.versions[0], data=(replace(one, source="/link", real=("/b",)),))
    shelf.write(replace(derivative, versions=(moved,)), 1)
    found = dict(withdrawal(made.home, lambda path: path == "/b").derivatives)
    shelf.write(derivative, 1)
    assert found["own:1"] == "trained on it"


def test_a_merge_is_named_and_asked_for_when_its_part_was_deleted(made: MadeHome, tmp_path: Path) -> None:
    """What it was made from stands in itself; of an older node's, in the trainings of the part's name."""
    home = Home(tmp_path)
    shelf, parent = Shelf(home), Parent(HEX, "a run", 1, HEX, HEX, HEX)
    uses = (SourcesFor("derive:law", ("/law",)), SourcesFor("derive:own", ("/own",)))
    merged = replace(version(parent, "/own", ("own:1", "law:1")), steps=0)
    note_use(home, "derive:law", ["/law"], "run", 1)
    for name, one in (
        ("own", version(parent, "/own", ())),
        ("both", replace(merged, uses=uses)),
        ("older", merged),
        ("after", replace(merged, how="rebase", made_of=("both:1",))),
    ):
        (shelf.folder / name).mkdir(parents=True)
        shelf.write(Derivative(name, 1, (one,)), 1)
    for name in ("both", "older", "after"):
        assert behind(shelf, name, shelf.require(name).version()) == {
            "derive:own": ("/own",),
            "derive:law": ("/law",),
        }
    found = dict(withdrawal(home, lambda path: path == "/law").derivatives)
    assert found == dict.fromkeys(("both:1", "older:1", "after:1"), "made from it, or measured on it")


@pytest.fixture
def begun(made: MadeHome, tmp_path: Path) -> Home:
    """Nothing but what was begun: a merge, a rebase, a derivative of a touched base, and one of another."""
    home = Home(tmp_path / "home")
    home.create()
    for name in ("genesis.json", "chain.jsonl", "identity.key"):
        (home.path / name).write_bytes((made.home.path / name).read_bytes())
    home.identity_key.chmod(0o600)
    shelf, run_id = Shelf(home), made.chain.genesis.run_id
    note_use(home, BASE, ["/base"], run_id, 3)
    early, late = (Parent(run_id, "a run", epoch, HEX, HEX, HEX) for epoch in (2, 5))
    (shelf.folder / "own").mkdir(parents=True)
    shelf.write(Derivative("own", 1, (version(early, "/own", ()),)), 1)
    recipe = Recipe("cpt", "full", ("/own:text",))
    for place, plan in (
        ("own/v2", Plan(recipe, early, ("own:1",), steps=1)),
        ("mixed/v1", Plan(recipe, early, ("own:1", "gone:1"), uses=(SourcesFor("derive:gone", ("/gone",)),))),
        ("new/v1", Plan(replace(recipe, data=("/new",)), late)),
        ("else/v1", Plan(replace(recipe, data=("/else",)), early)),
    ):
        (shelf.folder / place).mkdir(parents=True)
        write_plan(shelf.folder / place, plan)
    return home


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("/own", {"own:1": "trained on it", "own:2": "delete {}/own/v2", "mixed": "delete {}/mixed"}),
        ("/gone", {"mixed": "delete {}/mixed"}),
        ("/new", {"new": "delete {}/new"}),
        (
            "/base",
            {"new": "stands on epoch 5 of the base, which holds something of it; not finished"},
        ),
        ("/never", {}),
    ],
)
def test_what_was_begun_and_not_finished_is_named_by_its_plan(
    begun: Home, source: str, expected: dict[str, str]
) -> None:
    found = dict(withdrawal(begun, lambda path: path == source).derivatives)
    assert found.keys() == expected.keys()
    assert all(said.format(begun.path / "derivatives") in found[name] for name, said in expected.items())


def test_what_cannot_be_read_is_perhaps_touched_and_ends_no_revocation(begun: Home) -> None:
    shelf = Shelf(begun)
    (shelf.folder / "own" / "derivative.json").write_text("damaged")
    (shelf.folder / "else" / "v1" / "plan.json").write_text("damaged")
    run = revoked(begun, "/base", "--json")
    assert run.exit_code == 0, run.output
    found = dict(json.loads(run.stdout)["derivatives"])
    assert found.keys() == {"own", "own:2", "else", "new"}
    assert "perhaps touched, for it cannot be read" in found["own"] and "perhaps" in found["own:2"]
    assert "perhaps touched" in found["else"] and found["new"].startswith("stands on epoch 5")


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
    assert [epoch for epoch, _ in everyone.records] == [3, 4, 5, 6], "the second member contributed too"
    (other / "identity.key").unlink()
    Identity.load_or_create(other / "identity.key")
    assert withdrawal(replace(made.home, path=other), lambda path: path == "/b").records == ()


def test_revoke_stops_the_use_says_what_it_touched_and_leaves_a_home_that_holds(
    made: MadeHome,
) -> None:
    permit = DataPermit(made.home, ("/a", "/b"), lambda: datetime.date(2026, 12, 1))
    assert permit.refusal() == ""
    made.home.cache.mkdir()
    for name, path in (("one", "/b"), ("other", "/a")):
        (made.home.cache / f"tokens-{name}.bin").write_bytes(bytes(6))
        (made.home.cache / f"tokens-{name}.manifest").write_text(json.dumps({"path": path}))
    derived = Shelf(made.home).cache
    derived.mkdir(parents=True)
    (derived / "tokens-cpt.bin").write_bytes(bytes(4))
    (derived / "tokens-cpt.manifest").write_text(json.dumps({"path": "/b"}))
    run = CliRunner().invoke(cli, ["data", "revoke", "/b", "--home", str(made.home.path), "--json"])
    told = json.loads(run.stdout)
    assert [epoch for epoch, _ in told["records"]] == [3, 4, 5, 6] and told["before"][0] == 2
    assert (
        told["removed_bytes"] == 10
        and not any(derived.iterdir())
        and {p.stem for p in made.home.cache.iterdir()} == {"tokens-other"}
    )
    assert "data /b is not read: /b was revoked at" in permit.refusal()
    assert DataPermit(made.home, ("/a",)).refusal() == ""
    listed = CliRunner().invoke(cli, ["data", "list", "--home", str(made.home.path)])
    assert "base: may be used" in listed.stdout and "revoked at" in listed.stdout
    checked = CliRunner().invoke(cli, ["data", "check", "/b", "/a", "--home", str(made.home.path)])
    assert checked.exit_code == 4 and "used in 4 records and 3 derivatives" in checked.stdout
    assert "data-events.jsonl" not in faulty(made)
    events = made.home.data_events.read_text().replace('"/b"', '"/x"')
    made.home.data_events.write_text(events)
    assert "data-events.jsonl" in faulty(made)


def revoked(home: Home, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["data", "revoke", *arguments, "--home", str(home.path)])


def test_a_source_that_nobody_knows_is_not_called_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """data.toml says texts/fr, of the home; who types that in another folder was told that it was revoked."""
    home = Home(tmp_path / "home")
    texts = home.path / "texts" / "fr"
    append(home, [replace(parse_declaration("us, CC0-1.0", "x", BASE), path="texts/fr")])
    note_use(home, BASE, ["/used:text"], "run", 0)
    before = home.data_toml.read_bytes(), home.data_events.read_bytes()
    monkeypatch.chdir(tmp_path)
    run = revoked(home, "texts/fr")
    assert run.exit_code == 2 and f"{tmp_path}/texts/fr was neither declared nor used" in run.stderr
    assert f"is it {texts}?" in run.stderr and "known here: /used\n" in run.stderr
    assert f"is it {texts}?" in revoked(home, str(texts.with_name("rf"))).stderr
    assert before == (home.data_toml.read_bytes(), home.data_events.read_bytes())
    assert DataPermit(home, (str(texts),)).refusal() == ""
    for known in (str(texts), str(texts / "one.txt"), "/used"):  # declared, within what is, used
        assert revoked(home, known).exit_code == 0
    assert "was revoked" in DataPermit(home, (str(texts),)).refusal()


def test_a_source_can_be_revoked_before_it_is_ever_used(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert revoked(home, "/new").exit_code == 2 and not home.data_toml.exists()
    assert revoked(home, "/new", "--force").exit_code == 0
    assert revoked(home, "/new/within").exit_code == 0, "it is revoked already"
    with pytest.raises(UserError, match="/new was revoked"):
        require(home, ["/new"], BASE, datetime.date(2026, 12, 1))


@pytest.fixture
def current(tmp_path: Path) -> Path:
    """A link, which leads to v1."""
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "v1")
    return tmp_path / "current"


def lead(link: Path, target: str) -> None:
    link.unlink()
    link.symlink_to(link.with_name(target))


def test_what_was_revoked_by_a_link_stays_so_wherever_the_link_leads_later(
    tmp_path: Path, current: Path
) -> None:
    home, today = Home(tmp_path / "home"), datetime.date(2026, 12, 1)
    append(home, [parse_declaration("us, CC0-1.0", str(tmp_path), BASE)])
    run = revoked(home, str(current))
    assert f"revoked {current}, which is {tmp_path}/v1: " in run.stdout, run.output
    current.unlink()
    assert "/v1 was revoked" in Declared.load(home).refusal(f"{tmp_path}/v1", BASE, today)
    current.symlink_to(tmp_path / "v2")
    assert "/current was revoked" in Declared.load(home).refusal(str(current), BASE, today)
    assert revoked(home, str(current)).exit_code == 0
    current.unlink()
    assert "/v2 was revoked" in Declared.load(home).refusal(f"{tmp_path}/v2", BASE, today)
    assert revoked(home, f"{tmp_path}/v1").exit_code == 0 and len(Declared.load(home).revoked) == 4


def test_what_was_used_by_a_link_is_named_when_what_it_led_to_is_revoked(
    made: MadeHome, tmp_path: Path, current: Path
) -> None:
    home, run_id = Home(tmp_path / "home"), made.chain.genesis.run_id
    home.create()
    for name in ("genesis.json", "chain.jsonl", "identity.key"):
        (home.path / name).write_bytes((made.home.path / name).read_bytes())
    home.identity_key.chmod(0o600)
    note_use(home, BASE, [f"{current}:text"], run_id, 4)
    note_use(home, "derive:begun", [str(current)], run_id, 0)
    (Shelf(home).folder / "begun").mkdir(parents=True)
    lead(current, "v2")
    run = revoked(home, str(current.with_name("v1")), "--json")
    assert run.exit_code == 0, run.output
    told = json.loads(run.stdout)
    assert [epoch for epoch, _ in told["records"]] == [5, 6]
    assert [name for name, _ in told["derivatives"]] == ["begun"]


def test_what_an_island_learnt_by_a_link_is_not_brought_when_what_it_led_to_is_revoked(
    tmp_path: Path, current: Path
) -> None:
    home, today = Home(tmp_path / "home"), datetime.date(2026, 12, 1)
    append(home, [parse_declaration("us, CC0-1.0", str(current), BASE)])
    note_use(home, BASE, [str(current)], "run", 3)
    note_brought(home, "run", 3)
    home.brought.touch()
    lead(current, "v2")
    require_brought(home, today)
    v1 = str(current.with_name("v1"))
    append(home, [Revoked(v1, "today")])
    with pytest.raises(UserError, match="/v1 was revoked"):
        require_brought(home, today)
    assert Span("run", 3, None) in spans(home, lambda path: path == v1)


def test_a_running_node_stops_when_what_its_link_led_to_is_revoked_and_not_when_the_link_moves(
    tmp_path: Path, current: Path
) -> None:
    home = Home(tmp_path / "home")
    append(home, [parse_declaration("us, CC0-1.0", str(current), BASE)])
    permit = DataPermit(home, (str(current),))
    lead(current, "v2")
    home.data_toml.write_text(home.data_toml.read_text() + "# changed\n")
    assert permit.refusal() == ""
    append(home, [Revoked(str(current.with_name("v1")), "today")])
    assert "/v1 was revoked" in permit.refusal()


def test_what_node_toml_names_is_known(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create()
    for text, name in (
        ('[[data.source]]\npath = "letters"\n', "letters"),
        ('data = ["more:text"]\n', "more"),
    ):
        home.node_toml.write_text(text)
        assert revoked(home, f"{home.path}/{name}").exit_code == 0


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
    kept = made.home.data_toml.read_bytes()
    made.home.data_toml.write_text("nonsense")
    assert "not valid TOML" in permit.refusal() and "when that is mended" in permit.refusal()
    day = datetime.date(2026, 12, 1)
    made.home.data_toml.write_bytes(kept)
    assert permit.refusal() == ""


def test_a_branch_that_lost_is_named_if_it_holds_something_of_the_source(tmp_path: Path) -> None:
    """It lies there as a model, though the run's chain has nothing of it any more."""
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    run_id = made.chain.genesis.run_id
    note_use(made.home, BASE, ["/a"], run_id, 0)
    made.advance(2)
    early = made.leave_fork(1, 2)
    note_left(made.home, run_id, 1)
    note_use(made.home, BASE, ["/a", "/b"], run_id, made.chain.epoch)
    made.advance(2)
    late = made.leave_fork(4, 2)
    note_left(made.home, run_id, 4)
    found = withdrawal(made.home, lambda path: path == "/b")
    assert [epoch for epoch, _ in found.records] == [4, 5, 6] and found.branches == (late,)
    assert any(line.startswith(f"branch {late}: what lost") for line in found.lines())
    assert withdrawal(made.home, lambda path: path == "/a").branches == (early, late)
    assert withdrawal(made.home, lambda path: path == "/c").branches == ()
