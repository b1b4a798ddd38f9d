"""derive, evaluate, rebase, merge: the order of the steps; the work itself is done by the modules beside
this.

Every step leaves its result on disk before the next begins, so a command that was killed is given again and
goes on: the base is exported once, a training resumes from its last save, a version whose model is finished
is only measured. `plan.json` in a version's folder says what was begun; another recipe under the same name is
refused.

Only reads the home's run (lineage/export.py): the node may train meanwhile. Imports torch and transformers.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tapestry.node.disk.files import atomic_write
from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage import island
from tapestry.node.lineage.export import export_home
from tapestry.node.lineage.manifest import LINEAGE
from tapestry.node.lineage.manifest import NAME as MANIFEST
from tapestry.node.lineage.uses import note_use, sources_since
from tapestry.node.sovereign import suite as suites
from tapestry.node.sovereign import transplant as graft
from tapestry.node.sovereign.derivative import (
    PLAIN,
    DataUse,
    Derivative,
    Measure,
    Parent,
    Shelf,
    Transplant,
    Version,
)
from tapestry.node.sovereign.gates import Gates, Verdict, judge
from tapestry.node.sovereign.losses import measure_set
from tapestry.node.sovereign.recipe import Recipe, differences, recipe_paths
from tapestry.node.sovereign.rows import Example, Prepared, prepare
from tapestry.node.sovereign.suite import Suite
from tapestry.node.sovereign.training import Trained, device_of, require_extra, steps_of, train
from tapestry.node.spec.declared import require, today_utc
from tapestry.node.spec.tables import TableError, plain, read_table
from tapestry.node.trainer.models.pretrained import load_config, quiet, sequence_length_max
from tapestry.node.trainer.models.refusal import ModelError
from tapestry.node.trainer.models.stored import INDEX
from tapestry.node.trainer.models.weights import load_base, weights_digest
from tapestry.node.trainer.tokenizers.api import Tokenizer, TokenizerError
from tapestry.node.trainer.tokenizers.base import eos_id_of
from tapestry.node.trainer.tokenizers.registry import open_tokenizer

REPAIR_SHARE = 0.05  # of the version's own steps; guess: DESIGN's bound is 10 % of making it again
LENGTH_MAX = 1024  # of a sequence, where neither recipe nor base says less
GATES = "gates.toml"
SUITE = "suite.toml"

Told = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Built:
    """What a command says at its end."""

    derivative: Derivative
    version: Version
    folder: Path  # of the model


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a version was begun as; on disk before any work."""

    recipe: Recipe
    parent: Parent
    made_of: tuple[str, ...] = ()
    transplant: Transplant = PLAIN
    weights: tuple[float, ...] = ()
    steps: int = 0  # of a repair; 0 with made_of: none


@dataclass(frozen=True, slots=True)
class _Bench:
    """What models are measured on."""

    own: dict[str, list[Example]]  # held out of the member's data, by set
    others: dict[str, list[Example]]
    suite: Suite


def derive(
    home: Home, name: str, recipe: Recipe, epoch: int | None, *, restart: bool = False, told: Told
) -> Built:
    """A new derivative of the base at `epoch` (None: the newest on disk). Raises UserError."""
    require_extra()
    shelf = Shelf(home)
    with _one_line(), shelf.locked(name) as folder:
        if (found := shelf.read(name)) and found.versions:
            raise UserError(
                f"there is a derivative {name} already",
                hint=f"tapestry rebase {name} brings it to a newer base; another name makes another one",
            )
        plan = _begun(folder / "v1", recipe, restart)
        if plan is None:
            require(home, recipe_paths(recipe), f"derive:{name}", today_utc())
            plan = _Plan(recipe, _export_base(shelf, home, epoch, told))
            _write_plan(folder / "v1", plan)
        base = _require_base(shelf, home, plan.parent, told)
        return _finish(home, shelf, Derivative(name, 0, ()), plan, base, "derive", told)


def rebase(
    home: Home,
    name: str,
    epoch: int | None,
    how: Transplant,
    *,
    repair_share: float = REPAIR_SHARE,
    told: Told,
) -> Built:
    """The current version on a newer base, as a version of its own; current if its gate holds."""
    shelf = Shelf(home)
    with _one_line(), shelf.locked(name) as folder:
        derivative = shelf.require(name)
        version = derivative.version()
        if repair_share:
            require_extra()
        place = folder / f"v{derivative.next_number}"
        plan = _begun_plan(place)
        if plan is None or plan.transplant != how or (epoch not in (None, plan.parent.epoch)):
            shutil.rmtree(place, ignore_errors=True)
            parent = _export_base(shelf, home, epoch, told)
            if parent.head == version.parent.head:
                raise UserError(f"{name} stands on {parent} already")
            steps = round(repair_share * max(version.steps, 1))
            steps = max(1, steps) if repair_share else 0
            plan = _Plan(version.recipe, parent, (f"{name}:{version.number}",), how, steps=steps)
            _write_plan(place, plan)
        base = _require_base(shelf, home, plan.parent, told)
        old = _require_base(shelf, home, version.parent, told)
        _graft(place, shelf.model(name, version.number), base, old, plan, told)
        return _finish(home, shelf, derivative, plan, base, "rebase", told)


def merge(
    home: Home, into: str, names: Sequence[str], weights: Sequence[float], how: Transplant, *, told: Told
) -> Built:
    """The current versions of several derivatives of one base as one."""
    shelf = Shelf(home)
    if len(names) < 2 or len(set(names)) != len(names):
        raise UserError("a merge takes two derivatives or more, each once")
    shares = tuple(weights) or tuple(1 / len(names) for _ in names)
    if len(shares) != len(names):
        raise UserError(f"{len(names)} derivatives and {len(shares)} weights: give as many")
    with _one_line(), shelf.locked(into) as folder:
        if (found := shelf.read(into)) and found.versions:
            raise UserError(f"there is a derivative {into} already: choose another name")
        parts = [(name, shelf.require(name).version()) for name in names]
        parent = parts[0][1].parent
        for name, version in parts[1:]:
            if version.parent.head != parent.head:
                raise UserError(
                    f"{name} stands on {version.parent}, {parts[0][0]} on {parent}",
                    hint=f"tapestry rebase {name} --onto {parent.epoch} first",
                )
        place = folder / "v1"
        shutil.rmtree(place, ignore_errors=True)
        made_of = tuple(f"{name}:{version.number}" for name, version in parts)
        plan = _Plan(_joined_recipe([version for _, version in parts]), parent, made_of, how, shares)
        _write_plan(place, plan)
        base = _require_base(shelf, home, parent, told)
        models = [shelf.model(name, version.number) for name, version in parts]
        _make_folder_like(models[0], place / "grafted.new")
        graft.merge(base, models, shares, place / "grafted.new", how)
        (place / "grafted.new").rename(place / "grafted")
        _write_held_out(folder, _merged_held_out(shelf, names))
        return _finish(home, shelf, Derivative(into, 0, ()), plan, base, "merge", told)


def keep_island(home: Home, name: str, *, told: Told) -> Built:
    """What was learnt on an island as a derivative of the base where it began. Raises UserError."""
    shelf = Shelf(home)
    began, here = island.require(home)
    with _one_line(), shelf.locked(name) as folder:
        if (found := shelf.read(name)) and found.versions:
            version = found.version()
            if version.how == "island" and version.parent.head == began.head:
                return Built(found, version, shelf.model(name, version.number))  # a way back that goes on
            raise UserError(f"there is a derivative {name} already: choose another name")
        if here.epoch == began.epoch:
            raise UserError(
                f"nothing was made on the island: {home.path} is where it began, epoch {here.epoch}"
            )
        place = folder / "v1"
        shutil.rmtree(place, ignore_errors=True)
        parent = _export_base(shelf, Home(home.island), began.epoch, told)
        base = shelf.base(parent)
        recipe = island_recipe(home, parent)
        plan = _Plan(recipe, parent)
        _write_plan(place, plan)
        export_home(home, place / "whole", here.epoch, progress=told)
        for extra in ("README.md", "tapestry.json", MANIFEST, LINEAGE):
            _remove(place / "whole" / extra)
        uses = _island_uses(shelf, folder, base, recipe, parent, told)
        (place / "whole").rename(place / "model")
        trained = Trained(0, 0, 0.0)
        _write_trained(place, uses, trained)
        return _finish(home, shelf, Derivative(name, 0, ()), plan, base, "island", told)


def island_recipe(home: Home, parent: Parent) -> Recipe:
    """That of a later repair: the island's data, by the usual rates of continued pre-training."""
    return Recipe("cpt", "full", sources_since(home, parent.run_id, parent.epoch))


def _island_uses(
    shelf: Shelf, folder: Path, base: Path, recipe: Recipe, parent: Parent, told: Told
) -> tuple[DataUse, ...]:
    """What is held out of the island's data, as its training held it out. Nothing, for a script's data."""
    if not recipe.data:
        return ()
    prepared = _prepared(shelf, folder, base, recipe, parent, _length_of(recipe, base), told)
    _write_held_out(folder, prepared.held_out)
    return prepared.uses


def evaluate(
    home: Home, name: str, number: int | None, suite_file: Path | None, *, told: Told
) -> tuple[Built, Verdict]:
    """Measure a version and its base again, and judge again: what holds now is current. Raises UserError."""
    shelf = Shelf(home)
    with _one_line(), shelf.locked(name) as folder:
        derivative = shelf.require(name)
        version = derivative.version(number)
        base = _require_base(shelf, home, version.parent, told)
        bench = _bench(home, folder, base, version.recipe, suite_file, told)
        model = shelf.model(name, version.number)
        if (found := weights_digest(model)) != version.digest:
            raise UserError(
                f"{model} is not what was made: its digest is {found[:12]}, not {version.digest[:12]}",
                exit_code=ExitCode.FAILED,
            )
        before = _before(shelf, version)
        version = replace(
            version, report=_measured(model, bench, told), base_report=_measured(base, bench, told)
        )
        verdict = _judged(home, version, before)
        version = replace(version, promoted=verdict.holds, reasons=verdict.reasons)
        versions = tuple(version if one.number == version.number else one for one in derivative.versions)
        passed = [one.number for one in versions if one.promoted]
        derivative = replace(derivative, versions=versions, current=max(passed, default=0))
        _write_report(folder / f"v{version.number}", version)
        shelf.write(derivative)
        return Built(derivative, version, model), verdict


def evaluate_base(
    home: Home, epoch: int | None, suite_file: Path | None, *, told: Told
) -> tuple[Parent, tuple[Measure, ...]]:
    """The shared base itself, on a suite. Raises UserError."""
    path = suite_file or home.path / SUITE
    if not path.exists():
        raise UserError(
            f"the base is measured on a suite, and there is no {path}",
            hint="docs/sovereign.md says how to write one; --suite FILE",
        )
    shelf = Shelf(home)
    with _one_line():
        parent = _export_base(shelf, home, epoch, told)
        base = _require_base(shelf, home, parent, told)
        bench = _with_suite({}, Suite.load(path), base, shelf, told)
        return parent, _measured(base, bench, told)


# --- one version, from its plan to its place on the shelf ---------------------------------------------


def _finish(
    home: Home, shelf: Shelf, derivative: Derivative, plan: _Plan, base: Path, how: Any, told: Told
) -> Built:
    folder = shelf.of(derivative.name)
    number = derivative.next_number
    place = folder / f"v{number}"
    uses, trained = _trained(shelf, folder, place, plan, base, told)
    bench = _bench(home, folder, base, plan.recipe, None, told)
    model = place / "model"
    version = Version(
        number=number,
        how=how,
        parent=plan.parent,
        recipe=plan.recipe,
        made_of=plan.made_of,
        transplant=plan.transplant,
        weights=plan.weights,
        data=uses,
        steps=trained.steps,
        tokens=trained.tokens,
        seconds=round(trained.seconds, 3),
        made_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        digest=weights_digest(model),
        report=_measured(model, bench, told),
        base_report=_measured(base, bench, told),
        promoted=False,
        reasons=(),
    )
    verdict = _judged(home, version, _before(shelf, version))
    version = replace(version, promoted=verdict.holds, reasons=verdict.reasons)
    _write_report(place, version)
    derivative = derivative.with_version(version)
    shelf.write(derivative)
    for name in ("work", "grafted", "plan.json", "trained.json"):
        _remove(place / name)
    _prune_bases(shelf)
    return Built(derivative, version, model)


def _trained(
    shelf: Shelf, folder: Path, place: Path, plan: _Plan, base: Path, told: Told
) -> tuple[tuple[DataUse, ...], Trained]:
    """model/ in `place`, made or found; and what it took."""
    found = _read_trained(place / "trained.json")
    if found is not None and (place / "model").is_dir():
        return found
    start = place / "grafted" if plan.made_of else base
    uses: tuple[DataUse, ...] = ()
    if plan.made_of and not plan.steps:
        shutil.copytree(start, place / "model", dirs_exist_ok=True)
        trained = Trained(0, 0, 0.0)
    else:
        uses, trained = _train_on(shelf, folder, place, plan, start, told)
        _copy_beside(base, place / "model")
    _write_trained(place, uses, trained)
    return uses, trained


def _write_trained(place: Path, uses: tuple[DataUse, ...], trained: Trained) -> None:
    table = {"uses": plain(uses), "trained": plain(trained)}
    atomic_write(place / "trained.json", json.dumps(table).encode(), 0o600)


def _train_on(
    shelf: Shelf, folder: Path, place: Path, plan: _Plan, start: Path, told: Told
) -> tuple[tuple[DataUse, ...], Trained]:
    length = _length_of(plan.recipe, start)
    prepared = _prepared(shelf, folder, start, plan.recipe, plan.parent, length, told)
    if not (folder / "held-out.jsonl").exists():
        _write_held_out(folder, prepared.held_out)
    prepared = _without_held_out(prepared, _read_held_out(folder))
    out = place / "new"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    steps = plan.steps or steps_of(plan.recipe, prepared.examples)
    trained = train(start, prepared, plan.recipe, length, place / "work", out, told, steps)
    for path in sorted(out.iterdir()):
        _remove(place / path.name)
        path.rename(place / path.name)
    return prepared.uses, trained


def _prepared(
    shelf: Shelf, folder: Path, model: Path, recipe: Recipe, parent: Parent, length: int, told: Told
) -> Prepared:
    """The recipe's data, if they may be read for this derivative; and the use is written down."""
    purpose = f"derive:{folder.name}"
    paths = recipe_paths(recipe)
    protected = require(shelf.home, paths, purpose, today_utc())
    note_use(shelf.home, purpose, paths, parent.run_id, parent.epoch)
    text, rows = _tokenizers(model)
    return prepare(recipe, length, text, rows, _cache(shelf), told, protected)


def _without_held_out(prepared: Prepared, held_out: dict[str, list[Example]]) -> Prepared:
    """The examples that no version may be trained on are those of the first one, also if the files grew."""
    kept = {tuple(one["ids"]) for examples in held_out.values() for one in examples if "ids" in one}
    if not kept:
        return prepared
    take = prepared.train

    def train_rows() -> Any:
        return (row for row in take() if "input_ids" not in row or tuple(row["input_ids"]) not in kept)

    return replace(prepared, train=train_rows)


def _graft(place: Path, model: Path, base: Path, old: Path, plan: _Plan, told: Told) -> None:
    if (place / "grafted").is_dir():
        return
    told("transplanting", 0, 1)
    _make_folder_like(model, place / "grafted.new")
    graft.transplant(base, old, model, place / "grafted.new", plan.transplant)
    (place / "grafted.new").rename(place / "grafted")


# --- measuring ----------------------------------------------------------------------------------------


def _measured(model: Path, bench: _Bench, told: Told) -> tuple[Measure, ...]:
    measures: list[Measure] = []
    sets = {**bench.own, **bench.others}
    total, done = sum(map(len, sets.values())), 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        told("measuring", done, total)

    if sets:
        quiet()
        loaded = load_base(model, torch.float32).to(device_of()).eval()
        for name, examples in sets.items():
            measures += measure_set(loaded, name, examples, own=name in bench.own, tick=tick)
        del loaded
    for tasks in bench.suite.tasks:
        told("lm-eval", 0, 1)
        measures += suites.measured_tasks(tasks, model, device_of())
    for command in bench.suite.command:
        told(command.name, 0, 1)
        measures += suites.measured_command(command, model)
    return tuple(measures)


def _bench(
    home: Home, folder: Path, base: Path, recipe: Recipe, suite_file: Path | None, told: Told
) -> _Bench:
    path = suite_file or home.path / SUITE
    suite = Suite.load(path) if suite_file or path.exists() else Suite()
    own = _read_held_out(folder)
    return _with_suite(own, suite, base, Shelf(home), told, recipe)


def _with_suite(
    own: dict[str, list[Example]],
    suite: Suite,
    base: Path,
    shelf: Shelf,
    told: Told,
    recipe: Recipe | None = None,
) -> _Bench:
    others = {}
    for one in suite.set:
        if one.name in own:
            raise UserError(f"the suite's set {one.name} has the name of a set of one's own data: rename it")
        length = _length_of(recipe or Recipe("cpt", "full", ()), base)
        text, rows = _tokenizers(base)
        others[one.name] = suites.set_examples(one, length, text, rows, _cache(shelf), told)
    return _Bench(own, others, suite)


def _before(shelf: Shelf, version: Version) -> Version | None:
    """The version that a rebase came from."""
    if version.how != "rebase":
        return None
    name, _, number = version.made_of[0].partition(":")
    return shelf.require(name).version(int(number))


def _judged(home: Home, version: Version, before: Version | None) -> Verdict:
    gates = Gates.load(home.path / GATES)
    if before is None:
        return judge(gates, version.report, version.base_report)
    return judge(gates, version.report, version.base_report, before.report, before.base_report)


def _write_report(place: Path, version: Version) -> None:
    report = {
        "model": plain(version.report),
        "base": plain(version.base_report),
        "promoted": version.promoted,
        "reasons": list(version.reasons),
    }
    atomic_write(place / "report.json", json.dumps(report, indent=1).encode() + b"\n", 0o600)


# --- bases --------------------------------------------------------------------------------------------


def _export_base(shelf: Shelf, home: Home, epoch: int | None, told: Told) -> Parent:
    """The shared base at an epoch, in .bases; one that is there already is taken."""
    new = shelf.folder / ".bases" / "new"
    shutil.rmtree(new, ignore_errors=True)
    new.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    export_home(home, new, epoch, progress=told)
    lineage = json.loads((new / "tapestry.json").read_bytes())
    names = ("run_id", "run_name", "epoch", "head", "state_digest")
    parent = Parent(**{name: lineage[name] for name in names}, weights=weights_digest(new))
    target = shelf.base(parent)
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)
    return parent


def _require_base(shelf: Shelf, home: Home, parent: Parent, told: Told) -> Path:
    """Its folder; made again from the home if it is gone or another's. Raises UserError."""
    folder = shelf.base(parent)
    if not folder.is_dir():
        _export_base(shelf, home, parent.epoch, told)
    if not folder.is_dir() or weights_digest(folder) != parent.weights:
        raise UserError(
            f"{folder} is not the base at {parent}", exit_code=ExitCode.FAILED, hint="remove it and try again"
        )
    return folder


def _prune_bases(shelf: Shelf) -> None:
    """Bases that no version stands on, and that no half-made one was begun on."""
    needed = {"new"}
    for path in shelf.folder.glob("*/v*/plan.json"):
        plan = _begun_plan(path.parent)
        needed |= {plan.parent.folder} if plan else set()
    for name in shelf.names():
        needed |= {version.parent.folder for version in shelf.require(name).versions}
    for path in (shelf.folder / ".bases").iterdir():
        if path.name not in needed:
            shutil.rmtree(path, ignore_errors=True)


# --- plans, folders, held-out sets --------------------------------------------------------------------


def _begun(place: Path, recipe: Recipe, restart: bool) -> _Plan | None:
    """What a call before this one began. Raises UserError if it was something else."""
    if restart:
        shutil.rmtree(place, ignore_errors=True)
        (place.parent / "held-out.jsonl").unlink(missing_ok=True)
    plan = _begun_plan(place)
    if plan is not None and plan.recipe != recipe:
        raise UserError(
            f"{place.parent.name} was begun with another recipe and is not finished",
            details=differences(plan.recipe, recipe),
            hint="give the recipe of before to go on, or --restart to begin anew",
        )
    return plan


def _begun_plan(place: Path) -> _Plan | None:
    try:
        table = json.loads((place / "plan.json").read_bytes())
        return _Plan(
            read_table(Recipe, table["recipe"]),
            read_table(Parent, table["parent"]),
            tuple(map(str, table["made_of"])),
            read_table(Transplant, table["transplant"]),
            tuple(map(float, table["weights"])),
            int(table["steps"]),
        )
    except (OSError, ValueError, KeyError, TypeError, TableError):
        return None  # nothing was begun, or nothing that can be gone on with


def _write_plan(place: Path, plan: _Plan) -> None:
    place.mkdir(mode=0o700, exist_ok=True)
    atomic_write(place / "plan.json", json.dumps(plain(plan)).encode(), 0o600)


def _read_trained(path: Path) -> tuple[tuple[DataUse, ...], Trained] | None:
    try:
        table = json.loads(path.read_bytes())
        uses = tuple(read_table(DataUse, use) for use in table["uses"])
        return uses, Trained(**table["trained"])
    except (OSError, ValueError, KeyError, TypeError, TableError):
        return None


def _make_folder_like(model: Path, folder: Path) -> None:
    """Everything of a model's folder but its weights."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _copy_beside(model, folder)


def _copy_beside(source: Path, target: Path) -> None:
    """Config, tokenizer and templates, where the target has none of that name."""
    skipped = (INDEX, MANIFEST, "README.md", "tapestry.json")
    for path in sorted(source.iterdir()):
        plain_file = path.is_file() and path.suffix != ".safetensors" and path.name not in skipped
        if plain_file and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def _write_held_out(folder: Path, sets: dict[str, list[Example]]) -> None:
    lines = [json.dumps({"set": name, **one}) for name, examples in sets.items() for one in examples]
    atomic_write(folder / "held-out.jsonl", "".join(line + "\n" for line in lines).encode(), 0o600)


def _read_held_out(folder: Path) -> dict[str, list[Example]]:
    sets: dict[str, list[Example]] = {}
    try:
        with (folder / "held-out.jsonl").open("rb") as file:
            for line in file:
                example = json.loads(line)
                sets.setdefault(example.pop("set"), []).append(example)
    except FileNotFoundError:
        return {}
    return sets


def _merged_held_out(shelf: Shelf, names: Sequence[str]) -> dict[str, list[Example]]:
    return {
        f"{name}.{set_name}": examples
        for name in names
        for set_name, examples in _read_held_out(shelf.of(name)).items()
    }


def _joined_recipe(versions: Sequence[Version]) -> Recipe:
    """For a repair after a later rebase: the first's, on the data of all that are of its stage."""
    first = versions[0].recipe
    data = [one for version in versions if version.recipe.stage == first.stage for one in version.recipe.data]
    return replace(first, data=tuple(dict.fromkeys(data)))


def _tokenizers(model: Path) -> tuple[Tokenizer, Any]:
    """As the node reads text, and as transformers loads it, with its chat template."""
    from transformers import AutoTokenizer

    quiet()
    text = open_tokenizer("base", model / "tokenizer.json", eos_id_of(model))
    return text, AutoTokenizer.from_pretrained(model, local_files_only=True)


def _length_of(recipe: Recipe, model: Path) -> int:
    """Tokens of a sequence: no more than the base has positions for, less one that is only predicted."""
    longest = sequence_length_max(load_config(model)) or LENGTH_MAX + 1
    if recipe.sequence_length > longest:
        raise UserError(f"sequence_length {recipe.sequence_length}: the base has {longest} positions")
    return min(recipe.sequence_length or LENGTH_MAX, longest - 1)


def _cache(shelf: Shelf) -> Path:
    return shelf.folder / ".cache"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _one_line:
    """What the rooms below raise, in words for the person at the keyboard."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: object, _trace: object) -> None:
        if isinstance(error, ModelError):
            raise UserError(str(error), hint=error.hint or None) from error
        if isinstance(error, TokenizerError):
            raise UserError(str(error)) from error
        if isinstance(error, OSError):
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            raise UserError(what, exit_code=ExitCode.FAILED) from error
