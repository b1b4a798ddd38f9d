"""An island and the way back: what is kept, what is put back, and that both hold."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from homes import MadeHome, make_home

from tapestry.node.cli.main import cli
from tapestry.node.disk.held import open_run
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage import island
from tapestry.node.lineage.branches import Branch, branches
from tapestry.node.lineage.bring import Brought, bring
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.export import export_home
from tapestry.node.lineage.leave import leave
from tapestry.node.lineage.uses import Started, events, note_use, sources_since
from tapestry.node.lineage.verify import verify
from tapestry.node.protocol.members import ROLLBACK_EPOCHS_MAX, Change, rollback_value
from tapestry.node.protocol.record import Record
from tapestry.node.sovereign import build
from tapestry.node.sovereign.derivative import Parent, Shelf
from tapestry.node.sovereign.plans import Plan, write_plan
from tapestry.node.sovereign.recipe import Recipe
from tapestry.node.sovereign.standing import behind
from tapestry.node.sovereign.withdrawal import withdrawal
from tapestry.node.spec.declared import BASE, READ, Revoked, append, parse_declaration
from tapestry.node.spec.training import PRESETS
from tapestry.node.trainer.brought import read_brought
from tapestry.node.trainer.models.weights import weights_digest


def _quiet(_what: str, _done: int, _total: int) -> None:
    return None


def holds(path: Path) -> bool:
    proof = verify(path, told=_quiet)
    assert proof.faults == []
    return proof.replayed_to == proof.epoch


@pytest.fixture
def made(tmp_path: Path) -> MadeHome:
    """Two epochs of three, whose run waits for a quorum; then three on an island, on declared text."""
    made = make_home(tmp_path / "home", PRESETS["nano"].model, members=3)
    home, text = made.home, tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of the text that is learnt alone\n" for n in range(400)))
    append(home, [parse_declaration("us, CC0-1.0, open", str(text), BASE)])
    made.advance(2)
    home.vote.write_text("the vote of before")
    (home.trainer / "inner").mkdir(parents=True)
    began = island.begin(home)
    assert (began.epoch, began.head) == (2, made.chain.head_at(2)) == (island.begin(home).epoch, began.head)
    note_use(home, BASE, [str(text)], began.run_id, 2)
    home.vote.write_text("the vote of the island")
    shutil.rmtree(home.trainer)
    made.advance(3, checkpoint=True, alone=True)
    return made


def rejoin(home: Home, *more: str) -> str:
    run = CliRunner().invoke(cli, ["rejoin", "--home", str(home.path), "--keep", "alone", *more])
    assert run.exit_code == 0, run.output
    return run.stdout


def test_the_log_tells_the_run_from_what_was_made_alone_before_and_after_the_way_back(made: MadeHome) -> None:
    heads = [made.chain.head_at(epoch) for epoch in (2, 5)]
    assert branches(made.home) == [
        Branch("run", "island", 0, 2, heads[0], False),
        Branch("island", ".", 2, 5, heads[1], True),
    ]
    rejoin(made.home, "--declare", "us, CC0-1.0, open")
    said = CliRunner().invoke(cli, ["log", "--branches", "--home", str(made.home.path)]).stdout.splitlines()
    assert said[1].split() == ["run", "0-2", heads[0][:16], "goes", "on"]
    assert said[2].split()[:3] == ["island", "3-5", heads[1][:16]]
    assert said[3].split() == ["in", f"islands/00000005-{heads[1][:16]}"]


def test_the_way_back_keeps_a_derivative_and_the_island_and_puts_the_home_back(
    made: MadeHome, tmp_path: Path
) -> None:
    home, heads = made.home, [made.chain.head_at(epoch) for epoch in (2, 5)]
    export_home(home, tmp_path / "alone", 5)
    said = rejoin(home, "--declare", "us, CC0-1.0, open")
    assert "is at epoch 2 again" in said
    version = Shelf(home).require("alone").versions[0]
    assert (version.how, version.parent.epoch, version.parent.head) == ("island", 2, heads[0])
    assert version.digest == weights_digest(tmp_path / "alone") != version.parent.weights
    assert [one.name for one in version.report] == ["text/loss"] and version.report[0].own
    assert island.tip(home).head == heads[0] and not home.island.exists()
    assert home.vote.read_text() == "the vote of before" and (home.trainer / "inner").exists()
    (kept,) = (home.path / "islands").iterdir()
    assert kept.name == f"00000005-{heads[1][:16]}" and (kept / "vote.json").read_text().endswith("island")
    for place in (home, Home(kept)):
        place.vote.unlink()  # no vote of a node's, and the fault is not ours to test
        assert holds(place.path)
    assert island.tip(Home(kept)).head == heads[1]


def test_a_derivative_of_an_island_stands_on_it_after_the_way_back_and_hinders_nothing(
    made: MadeHome, tmp_path: Path
) -> None:
    home = made.home
    append(home, [parse_declaration("us, CC0-1.0, open", str(tmp_path / "text.txt"), "derive:*")])
    recipe = Recipe("cpt", "full", (str(tmp_path / "text.txt"),), steps=1, sequence_length=32)
    build.derive(home, "here", recipe, 4, told=_quiet)
    rejoin(home)
    home.vote.unlink()  # no vote of a node's
    (kept,) = (home.path / "islands").iterdir()
    proof = leave(home, tmp_path / "out", _quiet)
    assert [note for note in proof.notes if note.startswith("here 1")] == [
        f"here 1: stands on epoch 4 of islands/{kept.name}, which was made alone"
    ]


@pytest.mark.parametrize("says_so", [True, False])
def test_data_are_held_out_as_node_toml_reads_them_and_what_cannot_be_read_hinders_no_way_back(
    made: MadeHome, tmp_path: Path, says_so: bool
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes("".join(f"l'été numéro {n} est passé\n" for n in range(400)).encode("latin-1"))
    if says_so:
        made.home.node_toml.write_text(f'[[data.source]]\npath = "{text}"\nencoding = "latin-1"\n')
    said = rejoin(made.home, "--declare", "us, CC0-1.0, open")
    version = Shelf(made.home).require("alone").version()
    assert [one.name for one in version.report] == (["text/loss"] if says_so else [])
    assert ("note  nothing is held out, for the data cannot be read: " in said) is not says_so
    assert not made.home.island.exists() and version.recipe.data == (str(text),)


def test_what_links_led_to_on_the_island_is_declared_for_what_is_kept_and_named_when_it_is_revoked(
    made: MadeHome, tmp_path: Path
) -> None:
    home, (text,) = made.home, sources_since(made.home, made.chain.genesis.run_id, 2)
    led_to = tmp_path / "elsewhere"
    led_to.mkdir()
    (tmp_path / "link").symlink_to(text)
    sources = [str(tmp_path / "link")]
    append(home, [parse_declaration("us, CC0-1.0, open", str(led_to), BASE)])
    note_use(home, BASE, sources, made.chain.genesis.run_id, 2, Started("own", True, (str(led_to),)))
    append(home, [parse_declaration("us, CC0-1.0, open", text, "derive:alone")])
    run = CliRunner().invoke(cli, ["rejoin", "--home", str(home.path), "--keep", "alone"])
    assert run.exit_code == 2 and f"{led_to} is not declared for derive:alone" in run.stderr, run.output
    rejoin(home, "--declare", "us, CC0-1.0, open")
    version = Shelf(home).require("alone").version()
    read = {"derive:alone": (*sources, str(led_to)), READ: (text,)}
    assert behind(Shelf(home), "alone", version) == read
    for source in (str(led_to), text):
        assert [name for name, _ in withdrawal(home, source.__eq__).derivatives] == ["alone:1"]


def test_a_way_back_that_was_killed_goes_on(made: MadeHome, monkeypatch: pytest.MonkeyPatch) -> None:
    home, real = made.home, island._exchange

    def killed(now: Path, before: Path, aside: Path) -> None:
        real(now, before, aside)
        if now.name == "updates":
            raise KeyboardInterrupt

    monkeypatch.setattr(island, "_exchange", killed)
    run = CliRunner().invoke(cli, ["rejoin", "--home", str(home.path), "--keep", "alone", "--declare", "own"])
    assert run.exit_code == 1 and home.island.exists()
    monkeypatch.setattr(island, "_exchange", real)
    assert "as it was before the island" in rejoin(home)
    home.vote.unlink()
    assert holds(home.path) and island.tip(home).epoch == 2
    assert len(list((home.path / "islands").iterdir())) == 1


def test_what_was_begun_under_the_name_is_kept_unless_a_person_says_so(made: MadeHome) -> None:
    home, shelf = made.home, Shelf(made.home)
    parent = Parent("ab" * 32, "a run", 2, "cd" * 32, "ef" * 32, "01" * 32)
    with shelf.locked("alone") as folder:
        write_plan(folder / "v1", Plan(Recipe("cpt", "full", (), own_tokens=9), parent))
        (folder / "held-out.jsonl").write_text('{"set": "of before", "ids": [1, 2], "labels": [1, 2]}\n')
        (folder / "tokens.json").write_text('["of before"]')
    words = ["rejoin", "--home", str(home.path), "--keep", "alone", "--declare", "us, CC0-1.0, open"]
    run = CliRunner().invoke(cli, words)
    assert run.exit_code == 2 and "alone was begun by `derive` and is not finished" in run.stderr, run.output
    assert home.island.exists() and (folder / "tokens.json").exists()
    rejoin(home, "--restart")
    version = shelf.require("alone").version()
    assert [one.name for one in version.report] == ["text/loss"] and version.own_tokens == 0


def test_a_home_on_an_island_starts_as_one_or_not_at_all(made: MadeHome) -> None:
    run = CliRunner().invoke(cli, ["start", "--home", str(made.home.path), "--data", "stdlib"])
    assert run.exit_code == 2 and "epochs that it made alone would be given up" in run.stderr
    assert "rejoin --keep" in run.stderr


def test_there_must_be_a_run_to_go_on_with_and_an_island_to_leave(tmp_path: Path) -> None:
    run = CliRunner().invoke(cli, ["start", "--home", str(tmp_path), "--data", "stdlib", "--island"])
    assert run.exit_code == 2 and "holds no run to go on with alone" in run.stderr
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    with pytest.raises(UserError, match="is on no island"):
        island.require(made.home)


def test_who_leaves_from_an_island_takes_the_way_back_along(made: MadeHome, tmp_path: Path) -> None:
    made.home.vote.unlink()
    leave(made.home, tmp_path / "out", _quiet)
    began, here = island.require(Home(tmp_path / "out"))
    assert (began.epoch, here.epoch) == (2, 5)


# --- bringing it ------------------------------------------------------------------------------------


def test_what_is_brought_is_the_difference_to_where_the_island_began(made: MadeHome) -> None:
    home = made.home
    home.vote.unlink()  # no vote of a node's
    run = open_run(home, ReaderCrypto())
    assert run is not None
    at = {}
    for epoch in (2, 5):
        state = run.state(torch.zeros(run.chain.genesis.params))
        restored = run.restore(state, epoch)
        assert restored is not None and restored.epoch == epoch
        at[epoch] = state.params
    said = CliRunner().invoke(cli, ["rejoin", "--home", str(home.path), "--bring"])
    assert said.exit_code == 0 and "next contribution that counts" in said.stdout, said.output
    brought = read_brought(home.brought, at[2].numel())
    assert brought is not None and torch.equal(brought, at[5] - at[2]) and brought.any()
    assert island.tip(home).epoch == 2 and not home.island.exists()
    assert [one["event"] for one in events(home)][-2:] == ["brought", "rejoined"]
    with pytest.raises(UserError, match="has still to bring"):
        island.begin(home)


def test_what_was_learnt_from_data_that_may_no_more_be_used_is_not_brought(made: MadeHome) -> None:
    (source,) = sources_since(made.home, made.chain.genesis.run_id, 2)
    revoke = CliRunner().invoke(cli, ["data", "revoke", source, "--home", str(made.home.path)])
    assert revoke.exit_code == 0, revoke.output
    run = CliRunner().invoke(cli, ["rejoin", "--home", str(made.home.path), "--bring"])
    assert run.exit_code == 2 and "is not read" in run.stderr and made.home.island.exists()
    assert not made.home.brought.exists()


def test_what_was_learnt_by_a_link_is_not_brought_when_what_it_led_to_then_was_revoked(
    made: MadeHome, tmp_path: Path
) -> None:
    home, (text,) = made.home, sources_since(made.home, made.chain.genesis.run_id, 2)
    (tmp_path / "link").symlink_to(text)
    append(home, [parse_declaration("us, CC0-1.0, open", str(tmp_path / "link"), BASE)])
    note_use(home, BASE, [str(tmp_path / "link")], made.chain.genesis.run_id, 2)
    (tmp_path / "link").unlink()
    append(home, [Revoked(text, "today")])
    run = CliRunner().invoke(cli, ["rejoin", "--home", str(home.path), "--bring"])
    assert run.exit_code == 2 and "was revoked" in run.stderr and made.home.island.exists()


def test_it_goes_aside_with_the_first_record_after_the_island_that_names_a_contribution_with_it(
    made: MadeHome,
) -> None:
    bring(made.home, _quiet)
    own, run_id = made.identities[0].peer_id, made.chain.genesis.run_id
    records = made.chain.records
    Brought(made.home, own, run_id).look(records[:2])
    Brought(made.home, "somebody else", run_id).look(records)
    Brought(made.home, own, run_id).look([_rolling_back(records[2], made, 1)])  # nothing is made of it
    signed = tuple(
        [replace(m, weight=0, contribution="") if m.peer == own else m for m in records[2].body.members]
    )
    Brought(made.home, own, run_id).look([replace(records[2], body=replace(records[2].body, members=signed))])
    assert made.home.brought.exists()
    pending = Brought(made.home, own, run_id)
    pending.offer(_contribution(records[2], own))
    pending.look(records[2:3])
    assert not made.home.brought.exists() and not pending.is_pending
    *_, brought, given = events(made.home)
    assert brought["sources"] == list(sources_since(made.home, run_id, 2)) and brought["epoch"] == 2
    assert (given["event"], given["epoch"]) == ("given", 3)
    pending.look(records)  # nothing is left to do
    assert not made.home.brought.exists()


def test_a_contribution_that_was_under_way_when_the_island_began_has_not_brought_it(made: MadeHome) -> None:
    """The others may have counted it; it was made before there was anything to bring."""
    bring(made.home, _quiet)
    own, records = made.identities[0].peer_id, made.chain.records
    pending = Brought(made.home, own, made.chain.genesis.run_id)
    pending.offer("ab" * 32)
    pending.look(records[2:3])
    assert pending.is_pending and made.home.brought.exists()
    pending.look(records[3:4])
    assert not pending.is_pending and not made.home.brought.exists()


def test_it_is_to_be_brought_again_when_its_record_is_left_with_a_fork_and_not_twice(made: MadeHome) -> None:
    bring(made.home, _quiet)
    own, run_id, records = made.identities[0].peer_id, made.chain.genesis.run_id, made.chain.records
    whole = made.home.brought.read_bytes()
    node = Brought(made.home, own, run_id)
    node.look(records[3:4])
    assert not node.is_pending
    node.look([_without(records[4], own)], 4)  # a fork after its record
    assert not node.is_pending and not made.home.brought.exists()
    node.look([_without(one, own) for one in records[3:5]], 3)
    assert node.is_pending and made.home.brought.read_bytes() == whole
    assert [one["event"] for one in events(made.home)][-3:] == ["brought", "given", "brought"]
    node.look(records[4:5], 4)  # the other side has one of ours
    assert not node.is_pending and not made.home.brought.exists()


def test_it_is_to_be_brought_again_when_its_record_is_undone_or_was_while_the_node_was_down(
    made: MadeHome,
) -> None:
    bring(made.home, _quiet)
    own, run_id, records = made.identities[0].peer_id, made.chain.genesis.run_id, made.chain.records
    node = Brought(made.home, own, run_id)
    node.look(records[3:4])
    node.look([_rolling_back(records[4], made, 4)])  # what has it stays
    assert not node.is_pending
    node.look([_rolling_back(records[4], made, 3)])
    assert node.is_pending and made.home.brought.exists()
    node.look(records[3:4])
    made.roll_back(3, "")
    again = Brought(made.home, own, run_id)
    again.meet(made.chain)
    assert again.is_pending and made.home.brought.exists() and not made.home.given.exists()


def test_it_is_deleted_when_no_rollback_reaches_its_record_any_more(made: MadeHome) -> None:
    bring(made.home, _quiet)
    own, records = made.identities[0].peer_id, made.chain.records
    node = Brought(made.home, own, made.chain.genesis.run_id)
    node.look(records[3:4])
    late = replace(records[4], body=replace(records[4].body, epoch=4 + ROLLBACK_EPOCHS_MAX))
    node.look([late])
    assert made.home.given.exists()
    node.look([replace(late, body=replace(late.body, epoch=late.body.epoch + 1))])
    assert not made.home.given.exists() and not Brought(made.home, own, "any run").is_pending


def _contribution(record: Record, peer: str) -> str:
    (found,) = [one.contribution for one in record.body.members if one.peer == peer]
    return found


def _without(record: Record, peer: str) -> Record:
    members = tuple(one for one in record.body.members if one.peer != peer)
    return replace(record, body=replace(record.body, members=members))


def _rolling_back(record: Record, made: MadeHome, to: int) -> Record:
    back = Change("rollback", "", rollback_value(to, made.chain.head_at(to), ""), 9, "0" * 32)
    return replace(record, body=replace(record.body, changes=(back,)))


def test_what_is_of_another_run_or_damaged_is_never_brought(made: MadeHome) -> None:
    bring(made.home, _quiet)
    with pytest.raises(UserError, match="of another run"):
        Brought(made.home, "own", "ab" * 32)
    made.home.brought.write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        Brought(made.home, "own", made.chain.genesis.run_id)


def test_who_rejoins_says_what_becomes_of_the_island(made: MadeHome) -> None:
    run = CliRunner().invoke(cli, ["rejoin", "--home", str(made.home.path)])
    assert run.exit_code == 2 and "--keep NAME, --bring, or both" in run.stderr


# --- an island without epochs of its own ----------------------------------------------------------------


@pytest.mark.parametrize("epochs", [0, 2])
def test_an_island_without_epochs_is_left_without_a_trace_whatever_is_asked(
    tmp_path: Path, epochs: int
) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    home = made.home
    made.advance(epochs)
    for asked in ([], ["--bring"], ["--keep", "alone"]):
        home.vote.write_text("the vote of before")
        island.begin(home)
        home.vote.write_text("the vote of the island")
        listed = CliRunner().invoke(cli, ["log", "--branches", "--home", str(home.path)]).stdout
        assert listed.splitlines()[-1].split()[:2] == ["island", "-"]
        run = CliRunner().invoke(cli, ["rejoin", "--home", str(home.path), *asked])
        assert run.exit_code == 0 and "on which no epoch was made" in run.stdout, run.output
        assert island.tip(home).epoch == epochs and home.vote.read_text() == "the vote of before"
        assert not home.island.exists() and not list((home.path / "islands").iterdir())
        assert not home.brought.exists() and not Shelf(home).read("alone")
    home.vote.unlink()
    assert holds(home.path)


def test_a_way_back_that_was_killed_when_all_was_in_place_does_not_end_the_next_island(
    made: MadeHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(island, "_put_away", killed)
        with pytest.raises(KeyboardInterrupt):
            island.end(made.home)
    assert not made.home.island.exists()
    island.begin(made.home)
    assert not island.is_ending(made.home)
    (kept,) = (made.home.path / "islands").iterdir()
    assert kept.name.startswith("00000005-") and island.tip(Home(kept)).epoch == 5
