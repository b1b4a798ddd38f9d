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
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.lineage import island
from tapestry.node.lineage.export import export_home
from tapestry.node.lineage.manifest import LINEAGE
from tapestry.node.lineage.manifest import NAME as MANIFEST
from tapestry.node.lineage.uses import note_use, read_since, sources_since
from tapestry.node.progress import Told
from tapestry.node.sovereign import transplant as graft
from tapestry.node.sovereign.asked import require_extra, require_new, require_suite, shares_of, to_merge
from tapestry.node.sovereign.bases import bases_in_use, export_base, prune_bases, require_base
from tapestry.node.sovereign.bench import (
    bench_of,
    judged,
    length_of,
    measured,
    tokenizers,
    version_before,
    with_suite,
    write_report,
)
from tapestry.node.sovereign.derivative import (
    DataUse,
    Derivative,
    Measure,
    Parent,
    Shelf,
    Transplant,
    Version,
)
from tapestry.node.sovereign.gates import Verdict
from tapestry.node.sovereign.plans import (
    Plan,
    Trained,
    begun,
    clear,
    copy_beside,
    joined_recipe,
    make_folder_like,
    merged_held_out,
    read_held_out,
    read_trained,
    remove,
    repair_steps,
    require_same_data,
    write_held_out,
    write_plan,
    write_trained,
)
from tapestry.node.sovereign.recipe import REPAIR_SHARE, Recipe, recipe_paths
from tapestry.node.sovereign.rows import Prepared, prepare
from tapestry.node.sovereign.standing import Uses, asking, begun_with, behind, joined, kept, of_recipe
from tapestry.node.sovereign.suite import Suite
from tapestry.node.sovereign.tokens import extend, keep_tokens, kept_tokens, learned, pieces_of, read_tokens
from tapestry.node.sovereign.training import steps_of, train
from tapestry.node.spec.declared import READ, require, today_utc
from tapestry.node.spec.node import sources_for
from tapestry.node.trainer.models.refusal import ModelError
from tapestry.node.trainer.models.weights import weights_digest
from tapestry.node.trainer.tokenizers.api import TokenizerError


@dataclass(frozen=True, slots=True)
class Built:
    """What a command says at its end."""

    derivative: Derivative
    version: Version
    folder: Path  # of the model
    notes: tuple[str, ...] = ()


def derive(
    home: Home, name: str, recipe: Recipe, epoch: int | None, *, restart: bool = False, told: Told
) -> Built:
    """A new derivative of the base at `epoch` (None: the newest on disk). Raises UserError."""
    require_extra()
    shelf = Shelf(home)
    with _one_line(), shelf.locked(name) as folder:
        require_new(shelf, name)
        plan = begun(folder / "v1", "derive", restart, epoch, recipe=recipe)
        told = asking(home, of_recipe(name, recipe), told)
        if plan is None:
            uses = kept(of_recipe(name, recipe))
            plan = Plan(recipe, export_base(shelf, home, epoch, told), uses=uses)
            write_plan(folder / "v1", plan)
        base = require_base(shelf, home, plan.parent, told)
        return _finish(home, shelf, Derivative(name, 0, ()), plan, base, told)


def rebase(
    home: Home,
    name: str,
    epoch: int | None,
    how: Transplant,
    *,
    repair_share: float = REPAIR_SHARE,
    restart: bool = False,
    told: Told,
) -> Built:
    """The current version on a newer base, as a version of its own; current if its gate holds.

    One that was begun goes on, or begins anew to `restart`. Raises UserError.
    """
    shelf = Shelf(home)
    with _one_line(), shelf.locked(name) as folder:
        derivative = shelf.require(name)
        version = derivative.version()
        if not version.recipe.data:
            repair_share = 0.0  # a script brought what an island learnt from
        if repair_share:
            require_extra()
        repair = of_recipe(name, version.recipe) if repair_share else {}
        uses = joined(repair, behind(shelf, name, version))
        told = asking(home, uses, told)
        place = folder / f"v{derivative.next_number}"
        steps_behind = _steps_behind(shelf, version)
        steps = repair_steps(repair_share, steps_behind)
        made_of = (f"{name}:{version.number}",)
        asked = {"made_of": made_of, "transplant": how, "steps": steps}
        plan = begun(place, "rebase", restart, epoch, "--onto", steps_behind, **asked)
        if plan is None:
            parent = export_base(shelf, home, epoch, told)
            if parent.head == version.parent.head:
                raise UserError(f"{name} stands on {parent} already")
            plan = Plan(version.recipe, parent, made_of, how, steps=steps, uses=kept(uses), how="rebase")
            write_plan(place, plan)
        ground = base = require_base(shelf, home, plan.parent, told)
        old = require_base(shelf, home, version.parent, told)
        tokens = kept_tokens(folder)
        base, old = (_extended(place / name, one, tokens) for name, one in (("extended", base), ("old", old)))
        _graft(place, shelf.model(name, version.number), base, old, plan, told)
        return _finish(home, shelf, derivative, plan, ground, told)


def _steps_behind(shelf: Shelf, version: Version) -> int:
    """Of the trainings that it goes back to, without repairs; those of a deleted part are not known. An
    island's: one pass over its data."""
    if version.how == "derive":
        return version.steps
    if version.how == "island":
        return steps_of(version.recipe, sum(use.examples for use in version.data))
    return sum(_steps_behind(shelf, part) for _, part in shelf.parts(version))


def merge(
    home: Home,
    into: str,
    names: Sequence[str],
    weights: Sequence[float],
    how: Transplant,
    *,
    restart: bool = False,
    told: Told,
) -> Built:
    """The current versions of several derivatives of one base as one. Made from its beginning, also where one
    was begun. Raises UserError."""
    shelf = Shelf(home)
    shares = shares_of(names, weights)
    with _one_line(), shelf.locked(into) as folder:
        require_new(shelf, into)
        parts = to_merge(shelf, names)
        parent = parts[0][1].parent
        uses: Uses = {}
        for name, version in parts:
            uses = joined(uses, behind(shelf, name, version))
        told = asking(home, uses, told)
        tokens = {name: kept_tokens(shelf.of(name)) for name in names}
        if len(set(tokens.values())) > 1:
            raise UserError(
                "these derivatives have different tokens of their own: their rows cannot be joined",
                hint="derive them anew with one --tokens-file",
            )
        place = folder / "v1"
        begun(place, "merge", restart)
        clear(place)
        made_of = tuple(f"{name}:{version.number}" for name, version in parts)
        recipe = joined_recipe([version for _, version in parts])
        plan = Plan(recipe, parent, made_of, how, shares, uses=kept(uses), how="merge")
        write_plan(place, plan)
        ground = require_base(shelf, home, parent, told)
        if tokens[names[0]]:
            keep_tokens(folder, tokens[names[0]])
        base = _extended(place / "extended", ground, tokens[names[0]])
        models = [shelf.model(name, version.number) for name, version in parts]
        make_folder_like(models[0], place / "grafted.new")
        graft.merge(base, models, shares, place / "grafted.new", how)
        (place / "grafted.new").rename(place / "grafted")
        write_held_out(folder, merged_held_out(shelf, names))
        return _finish(home, shelf, Derivative(into, 0, ()), plan, ground, told)


def keep_island(home: Home, name: str, *, restart: bool = False, told: Told) -> Built:
    """What was learnt on an island as a derivative of the base where it began; made from its beginning, also
    where that was begun. Raises UserError."""
    shelf = Shelf(home)
    began, here = island.require(home)
    with _one_line(), shelf.locked(name) as folder:
        if (found := shelf.read(name)) and found.versions:
            version = found.version()
            if version.how == "island" and version.parent.head == began.head:
                return Built(found, version, shelf.model(name, version.number))  # a way back that goes on
        require_new(shelf, name)
        place = folder / "v1"
        begun(place, "island", restart)
        clear(place)
        parent = export_base(shelf, Home(home.island), began.epoch, told)
        base = shelf.base(parent)
        recipe = island_recipe(home, parent)
        reads = _island_reads(home, name, parent)
        told = asking(home, reads, told)
        plan = Plan(recipe, parent, uses=kept(reads), how="island")
        write_plan(place, plan)
        export_home(home, place / "whole", here.epoch, progress=told)
        for extra in ("README.md", "tapestry.json", MANIFEST, LINEAGE):
            remove(place / "whole" / extra)
        uses, notes = _island_uses(shelf, folder, base, recipe, parent, told)
        (place / "whole").rename(place / "model")
        trained = Trained(0, 0, 0.0)
        write_trained(place / "trained.json", uses, trained)
        return replace(_finish(home, shelf, Derivative(name, 0, ()), plan, base, told), notes=notes)


def island_recipe(home: Home, parent: Parent) -> Recipe:
    """That of a later repair: the island's data, by the usual rates of continued pre-training."""
    return Recipe("cpt", "full", sources_since(home, parent.run_id, parent.epoch))


def _island_reads(home: Home, name: str, parent: Parent) -> Uses:
    """Its sources and what their links led to, which a repair does not read."""
    paths, reals = read_since(home, parent.run_id, parent.epoch)
    return {f"derive:{name}": paths} | ({READ: reals} if reals else {})


def _island_uses(
    shelf: Shelf, folder: Path, base: Path, recipe: Recipe, parent: Parent, told: Told
) -> tuple[tuple[DataUse, ...], tuple[str, ...]]:
    """What is held out of the island's data, as its training held it out, and what to say of it. Nothing, for
    a script's data, or where they cannot be read any more: what was learnt is kept all the same."""
    if not recipe.data:
        return (), ("nothing is held out: a script brought the data",)
    try:
        prepared = _prepared(shelf, folder, base, recipe, parent, length_of(recipe, base), told)
    except UserError as error:
        told("reading", 0, 1)  # asks once more whether they may be
        return (), (f"nothing is held out, for the data cannot be read: {error.line}",)
    write_held_out(folder, prepared.held_out)
    return prepared.uses, ()


def evaluate(
    home: Home, name: str, number: int | None, suite_file: Path | None, *, told: Told
) -> tuple[Built, Verdict]:
    """Measure a version and its base again, and judge again: what holds now is current. Raises UserError."""
    shelf = Shelf(home)
    with _one_line(), shelf.locked(name) as folder:
        derivative = shelf.require(name)
        version = derivative.version(number)
        told = asking(home, behind(shelf, name, version), told)
        base = require_base(shelf, home, version.parent, told)
        model = shelf.model(name, version.number)
        if (found := weights_digest(model)) != version.digest:
            raise UserError(
                f"{model} is not what was made: its digest is {found[:12]}, not {version.digest[:12]}",
                exit_code=ExitCode.FAILED,
            )
        bench = bench_of(home, folder, base, model, version.recipe, suite_file, told)
        before = version_before(shelf, version)
        version = replace(
            version,
            report=measured(model, bench, told),
            base_report=measured(base, bench, told, is_base=True),
        )
        verdict = judged(home, version, before)
        version = replace(version, promoted=verdict.holds, reasons=verdict.reasons)
        versions = tuple(version if one.number == version.number else one for one in derivative.versions)
        passed = [one.number for one in versions if one.promoted]
        derivative = replace(derivative, versions=versions, current=max(passed, default=0))
        write_report(folder / f"v{version.number}", version)
        derivative = shelf.write(derivative, version.number)
        return Built(derivative, version, model), verdict


def evaluate_base(
    home: Home, epoch: int | None, suite_file: Path | None, *, told: Told
) -> tuple[Parent, tuple[Measure, ...]]:
    """The shared base itself, on a suite. Raises UserError."""
    path = require_suite(home, suite_file)
    shelf = Shelf(home)
    with _one_line(), bases_in_use(shelf):
        parent = export_base(shelf, home, epoch, told)
        base = require_base(shelf, home, parent, told)
        bench = with_suite({}, Suite.load(path), base, shelf, told)
        return parent, measured(base, bench, told)


# --- one version, from its plan to its place on the shelf ---------------------------------------------


def _finish(home: Home, shelf: Shelf, derivative: Derivative, plan: Plan, base: Path, told: Told) -> Built:
    folder = shelf.of(derivative.name)
    number = derivative.next_number
    place = folder / f"v{number}"
    uses, trained = _trained(shelf, folder, place, plan, base, told)
    model = place / "model"
    bench = bench_of(home, folder, base, model, plan.recipe, None, told)
    version = Version(
        number=number,
        how=plan.how,
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
        report=measured(model, bench, told),
        base_report=measured(base, bench, told, is_base=True),
        promoted=False,
        reasons=(),
        own_tokens=len(bench.pieces),
        ids_saved=round(bench.ids_saved, 4),
        uses=kept(begun_with(shelf, derivative.name, plan)),
    )
    verdict = judged(home, version, version_before(shelf, version))
    version = replace(version, promoted=verdict.holds, reasons=verdict.reasons)
    write_report(place, version)
    derivative = shelf.write(derivative.with_version(version), number)
    for name in ("work", "work-rows", "rows", "extended", "old", "grafted", "plan.json", "trained.json"):
        remove(place / name)
    prune_bases(shelf)
    return Built(derivative, version, model)


def _trained(
    shelf: Shelf, folder: Path, place: Path, plan: Plan, base: Path, told: Told
) -> tuple[tuple[DataUse, ...], Trained]:
    """model/ in `place`, made or found; and what it took."""
    found = read_trained(place / "trained.json")
    if found is not None and (place / "model").is_dir():
        return found
    tokens = _own_tokens(shelf, folder, plan, base, told)
    start = place / "grafted" if plan.made_of else _extended(place / "extended", base, tokens)
    uses: tuple[DataUse, ...] = ()
    if plan.made_of and not plan.steps:
        shutil.copytree(start, place / "model", dirs_exist_ok=True)
        trained = Trained(0, 0, 0.0)
    else:
        rows = list(pieces_of(base, tokens))
        uses, trained = _train_on(shelf, folder, place, plan, start, rows, told)
        copy_beside(start, place / "model")
    write_trained(place / "trained.json", uses, trained)
    return uses, trained


def _own_tokens(shelf: Shelf, folder: Path, plan: Plan, base: Path, told: Told) -> tuple[str, ...]:
    """Those of the derivative; chosen once, before anything is trained."""
    recipe = plan.recipe
    kept = kept_tokens(folder)
    is_begun = bool(kept and plan.data)  # else they may be of data that changed since
    if is_begun or plan.made_of or not (recipe.own_tokens or recipe.tokens_file):
        return kept
    if recipe.tokens_file:
        tokens = read_tokens(Path(recipe.tokens_file), base)
    else:
        prepared = _prepared(shelf, folder, base, recipe, plan.parent, length_of(recipe, base), told)
        told("learning tokens", 0, 1)
        _, reader = tokenizers(shelf.home, base)

        def texts() -> Iterator[str]:
            return (reader.decode(row["input_ids"]) for row in prepared.train())

        tokens = learned(base, texts, recipe.own_tokens)
    if not tokens:
        raise UserError(
            "there are no tokens to learn: the base's tokenizer knows all that is frequent in these data",
            hint="leave own_tokens out, or give more text",
        )
    keep_tokens(folder, tokens)
    return tokens


def _extended(folder: Path, base: Path, tokens: Sequence[str]) -> Path:
    """The base with own tokens; made anew, since a folder may be torn. The base itself if there are none."""
    if not tokens:
        return base
    shutil.rmtree(folder, ignore_errors=True)
    extend(base, tokens, folder)
    return folder


def _rows_first(
    place: Path, start: Path, prepared: Prepared, plan: Plan, length: int, rows: Sequence[int], told: Told
) -> tuple[Path, Trained]:
    """The model after the steps that train own tokens' rows alone, made or found; and what they took."""
    recipe = plan.recipe
    steps = round(recipe.rows_share * steps_of(recipe, prepared.examples))
    if not rows or not steps or plan.made_of:
        return start, Trained(0, 0, 0.0)
    done = place / "rows"
    if not done.is_dir():
        new = place / "rows.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        trained = train(start, prepared, recipe, length, place / "work-rows", new, told, steps, rows)
        copy_beside(start, new / "model")
        write_trained(new / "trained.json", (), trained)
        new.rename(done)
    found = read_trained(done / "trained.json")
    assert found is not None, "it is written before the folder has its name"
    return done / "model", found[1]


def _train_on(
    shelf: Shelf, folder: Path, place: Path, plan: Plan, start: Path, rows: Sequence[int], told: Told
) -> tuple[tuple[DataUse, ...], Trained]:
    length = length_of(plan.recipe, start)
    prepared = _prepared(shelf, folder, start, plan.recipe, plan.parent, length, told)
    require_same_data(place, plan, prepared)
    if not (folder / "held-out.jsonl").exists():
        write_held_out(folder, prepared.held_out)
    prepared = prepared.without(read_held_out(folder))
    out = place / "new"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    steps = plan.steps or steps_of(plan.recipe, prepared.examples)
    start, spent = _rows_first(place, start, prepared, plan, length, rows, told)
    work, is_repair = place / "work", bool(plan.steps)
    trained = spent + train(start, prepared, plan.recipe, length, work, out, told, steps, is_repair=is_repair)
    for path in sorted(out.iterdir()):
        remove(place / path.name)
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
    text, rows = tokenizers(shelf.home, model)
    settings = sources_for(shelf.home, recipe.data)
    return prepare(recipe, length, text, rows, shelf.cache, told, protected, settings)


def _graft(place: Path, model: Path, base: Path, old: Path, plan: Plan, told: Told) -> None:
    if (place / "grafted").is_dir():
        return
    told("transplanting", 0, 1)
    make_folder_like(model, place / "grafted.new")
    graft.transplant(base, old, model, place / "grafted.new", plan.transplant)
    (place / "grafted.new").rename(place / "grafted")


# --- measuring ----------------------------------------------------------------------------------------


# --- bases --------------------------------------------------------------------------------------------


# --- plans, folders, held-out sets --------------------------------------------------------------------


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
