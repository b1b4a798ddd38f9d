"""Derivatives of a small base, from data to a promoted version: derive, resume, rebase, merge, release."""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from flips import files_below, flipped
from homes import MadeHome, base_spec, make_home
from safetensors.torch import load_file, save_file
from schemas import faults, load
from transformers import AutoModelForCausalLM

from tapestry.node.cli.main import cli
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage.anchor import Anchor
from tapestry.node.lineage.leave import leave
from tapestry.node.lineage.listed import faults as listed_faults
from tapestry.node.lineage.manifest import write_manifest
from tapestry.node.lineage.verify import verify
from tapestry.node.sovereign import build
from tapestry.node.sovereign.bases import export_base, prune_bases
from tapestry.node.sovereign.bench import Bench, measured, tokenizers
from tapestry.node.sovereign.build import Built
from tapestry.node.sovereign.derivative import Derivative, Shelf, Transplant
from tapestry.node.sovereign.recipe import Recipe
from tapestry.node.sovereign.release import release
from tapestry.node.sovereign.rows import prepare
from tapestry.node.sovereign.suite import Suite, measured_command
from tapestry.node.sovereign.training import train
from tapestry.node.sovereign.withdrawal import withdrawal
from tapestry.node.spec.declared import Revoked, append, parse_declaration
from tapestry.node.trainer.models.stored import StoredWeights
from tapestry.node.trainer.models.weights import weights_digest


def _quiet(_what: str, _done: int, _total: int) -> None:
    return None


class _Killed(Exception):
    pass


def _killing(what: str, _done: int, _total: int) -> None:
    if what == "training":
        raise _Killed


def _measuring(what: str, _done: int, _total: int) -> None:
    if what == "measuring":
        raise _Killed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeHome:
    folder = tmp_path_factory.mktemp("sovereign")
    rows = [{"prompt": f"the square of {i} is ", "completion": str(i * i)} for i in range(120)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("".join(f"le carré de {i} est {i * i}\n" for i in range(600)))
    made = make_home(folder / "home", base_spec(folder / "home", "qwen3"))
    for name in ("pairs.jsonl", "text.txt"):
        append(made.home, [parse_declaration("us, CC0-1.0, open", str(folder / name), "derive:*")])
    made.advance(2, scale=0.005)
    return made


def _recipe(made: MadeHome, stage: str = "sft", **keys: object) -> Recipe:
    data = "text.txt" if stage == "cpt" else "pairs.jsonl"
    keys = {"lr": 3e-3, "steps": 12, "save_every_steps": 4, **keys}
    return Recipe(stage, "full", (str(made.home.path.parent / data),), **keys)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def squares(made: MadeHome) -> Built:
    """A derivative by sft, at epoch 2."""
    return build.derive(made.home, "squares", _recipe(made), None, told=_quiet)


@pytest.fixture(scope="module")
def french(made: MadeHome, squares: Built) -> Built:
    """One by cpt and adapters, from an epoch that is named; the base has moved on meanwhile."""
    made.advance(1, scale=0.002)
    return build.derive(made.home, "french", replace(_recipe(made, "cpt"), method="lora"), 2, told=_quiet)


def test_a_derivative_learns_its_data_and_says_what_it_was_made_from(made: MadeHome, squares: Built) -> None:
    version = squares.version
    (now,), (base,) = version.report, version.base_report
    assert now.name == "pairs/loss" and now.own and now.value < 0.9 * base.value
    assert version.promoted and squares.derivative.current == 1
    assert (version.parent.epoch, version.parent.head) == (2, made.chain.head_at(2))
    assert version.steps == 12 and version.recipe == _recipe(made)
    assert Shelf(made.home).require("squares") == squares.derivative
    assert not (squares.folder.parent / "work").exists()


def test_its_model_loads_with_its_tokenizer_and_has_the_digest_it_names(squares: Built) -> None:
    model = AutoModelForCausalLM.from_pretrained(squares.folder)
    assert weights_digest(squares.folder) == squares.version.digest
    assert model.config.model_type == "qwen3" and (squares.folder / "tokenizer.json").exists()


def test_a_training_that_was_killed_goes_on_and_ends_the_same(
    made: MadeHome, squares: Built, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def killing(what: str, done: int, _total: int) -> None:
        if (what, done) == ("training", 7):
            raise Killed

    with pytest.raises(Killed):
        build.derive(made.home, "again", _recipe(made), 2, told=killing)
    with pytest.raises(UserError, match="begun with another recipe") as raised:
        build.derive(made.home, "again", _recipe(made, seed=5), 2, told=_quiet)
    assert raised.value.details == ("seed: 0 before, 5 now",)
    with pytest.raises(UserError, match="again was begun from epoch 2 of"):
        build.derive(made.home, "again", _recipe(made), 1, told=_quiet)
    steps: list[int] = []
    built = build.derive(
        made.home,
        "again",
        _recipe(made),
        2,
        told=lambda what, done, _: steps.append(done) if what == "training" else None,
    )
    assert steps == [*range(5, 13)]
    assert built.version.digest == squares.version.digest


def test_a_training_does_not_go_on_with_other_data(made: MadeHome, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def killing(what: str, _done: int, _total: int) -> None:
        if what == "training":
            raise Killed

    file = tmp_path / "own.jsonl"
    file.write_text((made.home.path.parent / "pairs.jsonl").read_text())
    append(made.home, [parse_declaration("us, CC0-1.0, open", str(file), "derive:*")])
    recipe = replace(_recipe(made, steps=2), data=(str(file),))
    with pytest.raises(Killed):
        build.derive(made.home, "other", recipe, 2, told=killing)
    file.write_text(file.read_text().replace("the square of 7 is", "the square of seven is"))
    with pytest.raises(UserError, match="other was begun with other data"):
        build.derive(made.home, "other", recipe, 2, told=_quiet)
    with pytest.raises(Killed):
        build.derive(made.home, "other", recipe, 2, restart=True, told=killing)


def test_a_repair_is_a_share_of_the_first_training_however_often_it_was_rebased_or_merged(
    squares: Built, tmp_path: Path
) -> None:
    shelf = Shelf(Home(tmp_path))
    one = replace(squares.version, steps=200)
    two = replace(one, number=2, how="rebase", steps=10, made_of=("a:1",))
    three = replace(two, number=3, made_of=("a:2",))
    recipe, use = replace(one.recipe, steps=0), replace(one.data[0], examples=800)
    alone = replace(one, how="island", steps=0, recipe=recipe, data=(use,))
    joined = replace(one, how="merge", steps=0, made_of=("a:3", "b:1"))
    for name, versions in (("a", (one, two, three)), ("b", (alone,))):
        shelf.of(name).mkdir(parents=True)
        shelf.write(Derivative(name, 1, versions), 1)
    assert [build._steps_behind(shelf, one) for one in (three, alone, joined)] == [200, 100, 300]


def test_two_commands_export_bases_at_once_and_neither_removes_the_others(
    made: MadeHome, squares: Built
) -> None:
    shelf, beside = Shelf(made.home), []
    there = shelf.base(squares.version.parent).stat().st_ino

    def told(_what: str, _done: int, _total: int) -> None:
        if not beside:
            beside.append(export_base(shelf, made.home, 1, _quiet))
            prune_bases(shelf)

    assert export_base(shelf, made.home, 2, told) == squares.version.parent
    assert shelf.base(squares.version.parent).stat().st_ino == there  # somebody may be reading it
    assert shelf.base(beside[0]).is_dir()
    prune_bases(shelf)
    assert {path.name for path in (shelf.folder / ".bases").iterdir()} >= {
        "lock",
        squares.version.parent.folder,
    }
    assert not shelf.base(beside[0]).exists() and not list((shelf.folder / ".bases").glob("new*"))


@pytest.fixture
def broken(made: MadeHome, squares: Built, tmp_path: Path) -> Path:
    """A base whose every figure is no number."""
    shutil.copytree(Shelf(made.home).base(squares.version.parent), tmp_path / "broken")
    (file,) = (tmp_path / "broken").glob("*.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in load_file(file).items()}, file)
    return tmp_path / "broken"


@pytest.mark.parametrize(
    ("steps", "what"), [(12, "its loss is no number at step 10"), (4, "weights that are no numbers")]
)
def test_a_training_that_diverges_ends_with_one_line(
    made: MadeHome, broken: Path, tmp_path: Path, steps: int, what: str
) -> None:
    recipe = _recipe(made, steps=steps)
    prepared = prepare(recipe, 64, *tokenizers(made.home, broken), tmp_path / "cache", _quiet)
    with pytest.raises(UserError, match=f"the training diverged: .*{what}"):
        train(broken, prepared, recipe, 64, tmp_path / "work", tmp_path, _quiet)
    assert not (tmp_path / "model").exists()


def test_a_figure_that_is_no_number_is_refused_by_its_name(broken: Path) -> None:
    examples = [{"ids": [1, 2, 3], "labels": [1, 2, 3]}]
    with pytest.raises(UserError, match=r"pairs/loss of .*broken is no number"):
        measured(broken, Bench({"pairs": examples}, {}, Suite(), {}), _quiet)


def test_adapters_are_merged_and_kept_apart_as_well(made: MadeHome, squares: Built, french: Built) -> None:
    assert french.version.parent == squares.version.parent and french.version.promoted
    assert french.version.parent.state_digest == made.chain.state_digest_at(2)
    assert (french.folder.parent / "adapters" / "adapter_model.safetensors").exists()
    base = StoredWeights.find(Shelf(made.home).base(french.version.parent))
    own = StoredWeights.find(french.folder)
    moved = {name for name in base.tensors if not torch.equal(base.read(name), own.read(name))}
    assert moved and all("proj" in name for name in moved)


def test_a_rebase_stands_on_the_new_base_keeps_the_gain_and_both_versions(
    made: MadeHome, squares: Built, french: Built
) -> None:
    with pytest.raises(UserError, match=r"stands on epoch 2 of a run .* already"):
        build.rebase(made.home, "squares", 2, Transplant(), told=_quiet)
    built = build.rebase(made.home, "squares", None, Transplant(), told=_quiet)
    version = built.version
    assert (version.number, version.parent.epoch, version.steps) == (2, made.chain.epoch, 1)
    assert version.promoted and any("of the gain of the version before" in line for line in version.reasons)
    assert squares.folder.exists() and built.derivative.current == 2
    assert built.derivative.version(1) == squares.version


def test_a_repair_stays_at_the_highest_rate_of_the_first_training(made: MadeHome) -> None:
    """Of adapters as well. Of a cosine of a few steps the last ones would do nothing."""
    build.derive(made.home, "level", replace(_recipe(made, "cpt"), method="lora"), 1, told=_quiet)
    build.rebase(made.home, "level", 2, Transplant(), repair_share=1.0, told=_quiet)
    folder = Shelf(made.home).of("level")
    first, repair = (
        [
            line["learning_rate"]
            for line in json.loads((folder / v / "history.json").read_bytes())
            if "loss" in line
        ]
        for v in ("v1", "v2")
    )
    assert len(first) == len(repair) == 1  # of step 10 of 12
    assert first[0] < 1e-3 and repair == [3e-3]
    shutil.rmtree(folder)


def test_what_a_script_brought_is_rebased_without_a_repair(
    made: MadeHome, squares: Built, french: Built
) -> None:
    shelf, one = Shelf(made.home), squares.version
    shutil.copytree(shelf.of("squares") / "v1", shelf.of("scripts") / "v1")
    recipe = replace(one.recipe, stage="cpt", data=())
    shelf.write(Derivative("scripts", 1, (replace(one, how="island", recipe=recipe, data=(), steps=0),)), 1)
    version = build.rebase(made.home, "scripts", 3, Transplant(), told=_quiet).version
    assert (version.steps, version.data, version.parent.epoch) == (0, (), 3)


def test_a_rebase_that_was_begun_is_not_begun_otherwise_unless_a_person_says_so(made: MadeHome) -> None:
    build.derive(made.home, "steady", _recipe(made, steps=4), 1, told=_quiet)
    with pytest.raises(_Killed):
        build.rebase(made.home, "steady", 2, Transplant(), repair_share=0.5, told=_killing)
    for epoch, way, share, what in (
        (1, Transplant(), 0.5, "begun from epoch 2 of"),
        (2, Transplant("ties"), 0.5, "with another way"),
        (2, Transplant(), 0.0, "with another --repair"),
    ):
        before = "give --repair 0.5 to go on" if not share else ""
        with pytest.raises(UserError, match=f"steady was begun {what}|steady was {what}") as raised:
            build.rebase(made.home, "steady", epoch, way, repair_share=share, told=_quiet)
        assert raised.value.hint and "--restart to begin anew" in raised.value.hint
        assert before in raised.value.hint
    with pytest.raises(_Killed):
        build.rebase(made.home, "steady", 2, Transplant(), repair_share=0.0, restart=True, told=_measuring)
    shelf = Shelf(made.home)
    steady = shelf.require("steady")
    again = replace(steady, versions=(steady.versions[0], replace(steady.versions[0], number=2)))
    with shelf.locked("steady") as folder:
        (folder / "v2").rename(folder / "v3")
    shelf.write(replace(again, current=2), 1)
    with pytest.raises(UserError, match="with another current version") as raised:
        build.rebase(made.home, "steady", 2, Transplant(), repair_share=0.0, told=_quiet)
    assert raised.value.details == ("['steady:1'] before, ['steady:2'] now",)
    shelf.write(again, 1)
    built = build.rebase(made.home, "steady", None, Transplant(), repair_share=0.0, told=_quiet)
    assert (built.version.made_of, built.version.parent.epoch) == (("steady:1",), 2)
    shutil.rmtree(shelf.of("steady"))  # its second version was made up


def test_a_rebase_that_fails_its_gate_stays_beside_and_says_why(made: MadeHome, french: Built) -> None:
    (made.home.path / "gates.toml").write_text("gain_kept_min = 5.0\n")
    try:
        built = build.rebase(made.home, "french", None, Transplant("dare"), repair_share=0.0, told=_quiet)
        assert not built.version.promoted and built.derivative.current == 1
        assert built.version.reasons[0].startswith("text/loss: fails: keeps")
        assert (built.folder / "model.safetensors").exists() and built.version.steps == 0
        (made.home.path / "gates.toml").write_text("gain_kept_min = 0.9\n")  # a half was dropped
        _, verdict = build.evaluate(made.home, "french", 2, None, told=_quiet)
        assert verdict.holds and Shelf(made.home).require("french").current == 2
    finally:
        (made.home.path / "gates.toml").unlink()


def test_derivatives_of_one_base_are_merged_and_measured_on_both(
    made: MadeHome, squares: Built, french: Built
) -> None:
    with pytest.raises(UserError, match="squares stands on epoch 3") as raised:
        build.merge(made.home, "both", ["again", "squares"], (), Transplant(), told=_quiet)
    assert raised.value.hint == "tapestry rebase squares --onto 2 first"
    build.rebase(made.home, "again", 3, Transplant(), repair_share=0.0, told=_quiet)
    parts = ["again", "squares"]
    with pytest.raises(_Killed):
        build.derive(made.home, "both", _recipe(made, "cpt", own_tokens=4), 2, told=_killing)
    begun = {path.name for path in (made.home.path / "derivatives" / "both").iterdir()}
    assert begun == {"lock", "v1", "held-out.jsonl", "tokens.json"}
    with pytest.raises(UserError, match="both was begun by `derive` and is not finished") as raised:
        build.merge(made.home, "both", parts, (), Transplant(), told=_quiet)
    assert raised.value.hint and "--restart to begin anew" in raised.value.hint
    assert {path.name for path in (made.home.path / "derivatives" / "both").iterdir()} == begun
    way = Transplant("ties")
    built = build.merge(made.home, "both", parts, (0.5, 0.5), way, restart=True, told=_quiet)
    assert built.version.own_tokens == 0 and not (built.folder.parent.parent / "tokens.json").exists()
    assert [one.name for one in built.version.report] == ["again.pairs/loss", "squares.pairs/loss"]
    assert built.version.promoted and built.version.made_of == ("again:2", "squares:2")


def test_a_suite_adds_sets_and_commands_to_the_report(made: MadeHome, squares: Built, tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(
        "import json, pathlib, sys\n"
        "print(json.dumps({'files': len(list(pathlib.Path(sys.argv[1]).iterdir()))}))"
    )
    (tmp_path / "suite.toml").write_text(
        f'[[set]]\nname = "french"\npath = "{made.home.path.parent / "text.txt"}"\n'
        f'[[command]]\nname = "count"\nrun = ["{sys.executable}", "{tmp_path}/score.py", "{{model}}"]\n'
    )
    built, _ = build.evaluate(made.home, "squares", 1, tmp_path / "suite.toml", told=_quiet)
    names = {one.name: one for one in built.version.report}
    assert list(names) == ["pairs/loss", "french/loss", "count/files"] and not names["french/loss"].own
    _, report = build.evaluate_base(made.home, 2, tmp_path / "suite.toml", told=_quiet)
    assert report[0] == next(one for one in built.version.base_report if one.name == "french/loss")
    (tmp_path / "score.py").write_text("raise SystemExit('no such language')")
    with pytest.raises(UserError, match="the suite's command count: exit 1: no such language"):
        build.evaluate_base(made.home, 2, tmp_path / "suite.toml", told=_quiet)


def test_a_suites_command_runs_in_the_folder_of_its_file_wherever_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("home", 1), ("elsewhere", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "score.py").write_text(
            "import json, os, sys\n"
            f"print(json.dumps({{'value': {value}, 'model': int(os.path.isdir(sys.argv[1]))}}))"
        )
    run = f'["{sys.executable}", "score.py", "{{model}}"]'
    (tmp_path / "home" / "suite.toml").write_text(f'[[command]]\nname = "culture"\nrun = {run}\n')
    (tmp_path / "elsewhere" / "model").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (command,) = Suite.load(Path("../home/suite.toml")).command
    figures = {one.name: one.value for one in measured_command(command, Path("model"))}
    assert figures == {"culture/value": 1, "culture/model": 1}


def test_what_is_printed_of_derivatives_is_as_the_schemas_say(
    made: MadeHome, squares: Built, tmp_path: Path
) -> None:
    suite = tmp_path / "suite.toml"
    suite.write_text(f'[[set]]\nname = "french"\npath = "{made.home.path.parent / "text.txt"}"\n')
    for schema, words in (
        ("derivatives", ["derivatives"]),
        ("version", ["evaluate", "squares", "--version", "1", "--suite", str(suite)]),
        ("evaluate-base", ["evaluate", "base", "--epoch", "2", "--suite", str(suite)]),
    ):
        run = CliRunner().invoke(cli, [*words, "--home", str(made.home.path), "--json"])
        assert run.stdout and faults(load(schema), json.loads(run.stdout)) == [], run.output


def test_a_release_has_a_card_that_names_parent_recipe_and_figures_and_no_paths(
    made: MadeHome, squares: Built, tmp_path: Path
) -> None:
    release(made.home, "squares", 1, tmp_path / "out", "bf16", _quiet)
    card = (tmp_path / "out" / "README.md").read_text()
    for word in (
        squares.version.parent.head,
        squares.version.digest,
        "pairs/loss",
        "pairs.jsonl",
        "lora_rank",
    ):
        assert word in card
    assert str(made.home.path.parent) not in card + (tmp_path / "out" / "tapestry.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    table = json.loads((tmp_path / "out" / "tapestry.json").read_text())
    assert table["weights"] == weights_digest(tmp_path / "out")
    assert verify(tmp_path / "out", told=_quiet).holds
    said = [
        CliRunner().invoke(cli, ["verify", str(tmp_path / "out"), *how]) for how in ([], ["--allow-unproven"])
    ]
    assert [one.exit_code for one in said] == [1, 0]
    assert "NOT proven: what a derivative says" in said[0].stdout.splitlines()[-1]
    for run_id, words in ((squares.version.parent.run_id, "with it"), ("ab" * 32, "of the run abababababab")):
        (fault,) = verify(tmp_path / "out", anchor=Anchor(run_id, 1, "cd" * 32, 0, ()), told=_quiet).faults
        assert fault.file == "anchor" and fault.what.endswith(words), "it held, whatever was published"
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    write_manifest(tmp_path / "out")
    assert {fault.file for fault in verify(tmp_path / "out", told=_quiet).faults} == {"adapter_config.json"}


def test_a_revocation_ends_a_training_within_a_step_and_the_report_names_what_it_left(made: MadeHome) -> None:
    source = made.home.path.parent / "short.jsonl"
    shutil.copyfile(made.home.path.parent / "pairs.jsonl", source)
    append(made.home, [parse_declaration("us, CC0-1.0, open", str(source), "derive:*")])
    steps = []

    def told(what: str, done: int, _total: int) -> None:
        steps.append((what, done))
        if steps[-1] == ("training", 2):
            append(made.home, [Revoked(str(source), "today")])

    recipe = replace(_recipe(made), data=(str(source),))
    with pytest.raises(UserError, match=r"short.jsonl is not read: .* was revoked at today"):
        build.derive(made.home, "ended", recipe, 2, told=told)
    assert steps[-1] == ("training", 2)
    found = withdrawal(made.home, lambda path: path == str(source)).derivatives
    assert [name for name, _ in found] == ["ended"] and "not finished: delete" in found[0][1]
    with pytest.raises(UserError, match="was revoked at today"):
        build.derive(made.home, "ended", recipe, 2, told=told)
    assert steps[-1] == ("training", 2), "given again, it reads nothing"


@pytest.mark.parametrize("command", ["evaluate", "rebase", "merge"])
def test_what_was_held_out_of_a_revoked_source_is_not_measured_on(
    made: MadeHome, squares: Built, french: Built, command: str
) -> None:
    declared = made.home.data_toml.read_text()
    append(made.home, [Revoked(str(made.home.path.parent / "pairs.jsonl"), "today")])
    try:
        with pytest.raises(UserError, match=r"pairs.jsonl is not read: .* was revoked at today"):
            if command == "evaluate":
                build.evaluate(made.home, "squares", 1, None, told=_quiet)
            elif command == "rebase":
                build.rebase(made.home, "squares", None, Transplant(), repair_share=0, told=_quiet)
            else:
                build.merge(made.home, "mixed", ("squares", "french"), (), Transplant(), told=_quiet)
    finally:
        made.home.data_toml.write_text(declared)


def test_verify_checks_the_derivatives_of_a_home(made: MadeHome, squares: Built) -> None:
    def faults() -> list[str]:
        return [str(fault) for fault in verify(made.home.path, replay=False, told=_quiet).faults]

    assert faults() == []
    file = squares.folder / "model.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        of_file, of_tensors = faults()
        assert of_file.startswith("derivatives/squares/v1/model/model.safetensors: has the digest")
        assert of_tensors.startswith("derivatives/squares/v1/model: its tensors have the digest")
    finally:
        file.write_bytes(whole)
    for name in ("v1/model/config.json", "v1/history.json", "held-out.jsonl"):
        file = squares.folder.parent.parent / name
        whole = file.read_bytes()
        try:
            file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
            assert faults()[0].startswith(f"derivatives/squares/{name}: has the digest")
        finally:
            file.write_bytes(whole)
    told = squares.folder.parent.parent / "derivative.json"
    text = told.read_text()
    try:
        told.write_text(text.replace(squares.version.parent.head, "ab" * 32))
        assert faults() == ["derivatives/squares/derivative.json: it is not what was written"]
        told.write_text(text.replace('"steps": 12', '"steps": 13'))
        assert faults() == ["derivatives/squares/derivative.json: it is not what was written"]
        told.write_text(text.replace('\n "digest":', '\n "eigest":').replace(": true", ": false"))
        assert faults() == ["derivatives/squares/derivative.json: it is not what was written"]
        told.write_text("{}")
        assert any("derivatives/squares/derivative.json: cannot be read" in fault for fault in faults())
    finally:
        told.write_text(text)


def test_a_derivative_whose_parent_left_the_chain_still_holds_and_a_note_says_where_its_parent_is(
    tmp_path: Path,
) -> None:
    (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(400)))
    made = make_home(tmp_path / "home", base_spec(tmp_path / "home", "qwen3"))
    home = made.home
    append(home, [parse_declaration("us, CC0-1.0, open", str(tmp_path / "text.txt"), "derive:*")])

    def notes() -> list[str]:
        proof = verify(home.path, replay=False, told=_quiet)
        assert proof.faults == []
        return [note for note in proof.notes if note.startswith("lost")]

    made.advance(3, scale=0.005, checkpoint=True)
    recipe = Recipe("cpt", "full", (str(tmp_path / "text.txt"),), steps=1)
    built = build.derive(home, "lost", recipe, None, told=_quiet)
    assert notes() == []
    branch = made.leave_fork(1, 3)
    assert notes() == [f"lost 1: stands on epoch 3 of branches/{branch}, which lost at a fork"]
    assert leave(home, tmp_path / "out", _quiet).holds
    shutil.rmtree(home.branches / branch)
    head = built.version.parent.head[:12]
    assert notes() == [f"lost 1: stands on epoch 3 (head {head}), of which this home has no record"]


@pytest.mark.parametrize(
    "name", ["v1/model/adapter_config.json", "v1/model/.more/model.py", "v1/adapters/link"]
)
def test_a_file_that_no_version_has_is_found_beside_its_model(
    made: MadeHome, squares: Built, tmp_path: Path, name: str
) -> None:
    folder = made.home.path / "derivatives" / "squares"
    shutil.copytree(folder, tmp_path / "squares")
    added = folder / name
    added.parent.mkdir(exist_ok=True)
    added.symlink_to(tmp_path) if added.name == "link" else added.write_text("{}")
    try:
        (fault,) = verify(made.home.path, replay=False, told=_quiet).faults
        assert fault.file == f"derivatives/squares/{name}" and "no version has such a file" in fault.what
    finally:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "squares", folder)


def test_a_derivative_of_an_older_node_has_no_digests_and_a_changed_key_is_none_of_its_own(
    squares: Built, tmp_path: Path
) -> None:
    table = json.loads((squares.folder.parent.parent / "derivative.json").read_text())
    for gone, what in ((("digest", "files"), []), (("digest",), ["derivative.json"])):
        (tmp_path / "derivative.json").write_text(
            json.dumps({k: v for k, v in table.items() if k not in gone})
        )
        assert [file for file, _ in listed_faults(tmp_path)] == what


@pytest.mark.parametrize(("name", "dtype"), [("squares", "f32"), ("french", "bf16")])
def test_a_flipped_bit_is_found_in_every_file_of_a_released_derivative_whatever_its_manifest_says(
    made: MadeHome, squares: Built, french: Built, tmp_path: Path, name: str, dtype: str
) -> None:
    out, rng, missed = tmp_path / "out", random.Random(3), []
    release(made.home, name, 1, out, dtype, _quiet)
    for path in [path for path in files_below(out) for _ in range(3)]:
        for forge in (False, True):
            with flipped(path, rng) as flip:
                if forge:
                    write_manifest(out)
                named = {fault.file for fault in verify(out, told=_quiet).faults}
            write_manifest(out)
            if path.name not in named and (path.name, forge) != ("manifest.json", True):
                missed.append(f"{flip}: {named}")
    assert missed == [] and verify(out, told=_quiet).holds


def test_a_flipped_bit_is_found_in_every_file_of_a_derivative_of_a_home(
    made: MadeHome, french: Built
) -> None:
    shelf, rng, missed = made.home.path / "derivatives", random.Random(3), []
    folder = shelf / "french"
    for path in [folder / "derivative.json", folder / "held-out.jsonl", *files_below(folder / "v1")]:
        with flipped(path, rng) as flip:
            named = {fault.file for fault in verify(made.home.path, replay=False, told=_quiet).faults}
        if path.relative_to(made.home.path).as_posix() not in named:
            missed.append(f"{path.relative_to(shelf)}: {flip}: {named}")
    assert missed == []


def test_a_model_that_was_changed_is_not_released_or_measured(
    made: MadeHome, squares: Built, tmp_path: Path
) -> None:
    path = squares.folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(UserError, match="its tensors changed"):
            release(made.home, "squares", 1, tmp_path / "out", "f32", _quiet)
        with pytest.raises(UserError, match="is not what was made"):
            build.evaluate(made.home, "squares", 1, None, told=_quiet)
    finally:
        path.write_bytes(whole)
    assert not (tmp_path / "out").exists()
