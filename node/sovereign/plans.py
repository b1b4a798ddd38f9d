"""What a version was begun as, and the files in its folder, while it is made.

Must not import torch or transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from tapestry.node.disk.files import atomic_write
from tapestry.node.errors import UserError
from tapestry.node.lineage.manifest import NAME as MANIFEST
from tapestry.node.protocol import strict
from tapestry.node.sovereign.derivative import (
    PLAIN,
    DataUse,
    How,
    Parent,
    Shelf,
    SourcesFor,
    Transplant,
    Version,
)
from tapestry.node.sovereign.recipe import Recipe, differences
from tapestry.node.sovereign.rows import Example, Prepared
from tapestry.node.spec.tables import plain, read_table
from tapestry.node.trainer.models.folder import INDEX

# What reading a damaged file raises: it is no JSON, or other JSON than was written.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a version was begun as; on disk before any work."""

    recipe: Recipe
    parent: Parent
    made_of: tuple[str, ...] = ()
    transplant: Transplant = PLAIN
    weights: tuple[float, ...] = ()
    steps: int = 0  # of a repair; 0 with made_of: none
    data: str = ""  # the digest of what was read; empty until it was
    how: How = "derive"
    uses: tuple[SourcesFor, ...] = ()  # as in Version


@dataclass(frozen=True, slots=True)
class Trained:
    """What a stage took."""

    steps: int
    tokens: int
    seconds: float

    def __add__(self, other: Trained) -> Trained:
        return Trained(self.steps + other.steps, self.tokens + other.tokens, self.seconds + other.seconds)


def write_trained(path: Path, uses: tuple[DataUse, ...], trained: Trained) -> None:
    table = {"uses": plain(uses), "trained": plain(trained)}
    atomic_write(path, json.dumps(table).encode(), 0o600)


def begun(
    place: Path,
    how: How,
    restart: bool,
    epoch: int | None = None,
    flag: str = "--from",
    steps_behind: int = 0,  # of what is repaired
    **asked: Any,
) -> Plan | None:
    """What a call before this one began; where there is none, or to `restart`, the place is empty. `asked`:
    what keys of the plan must be. Raises UserError if something else was begun."""
    plan = None if restart else begun_plan(place)
    if plan is None:  # what lies there is of no plan that is known
        clear(place)
        return None
    name = place.parent.name
    if plan.how != how:
        raise UserError(
            f"{name} was begun by `{_COMMANDS[plan.how]}` and is not finished",
            hint="give that command again to go on, or --restart to begin anew; or choose another name",
        )
    if key := next((key for key, value in asked.items() if getattr(plan, key) != value), ""):
        was, now = getattr(plan, key), asked[key]
        is_recipe = isinstance(was, Recipe)
        before = f"the {_WORDS[key]} of before"
        if key == "steps":  # the default may have been another
            before = f"--repair {repair_share(was, steps_behind)}"
        raise UserError(
            f"{name} was begun with another {_WORDS[key]} and is not finished",
            details=differences(was, now) if is_recipe else [f"{plain(was)} before, {plain(now)} now"],
            hint=f"give {before} to go on, or --restart to begin anew",
        )
    if epoch not in (None, plan.parent.epoch):
        raise UserError(
            f"{name} was begun from {plan.parent} and is not finished",
            hint=f"leave out {flag} to go on, or give --restart to begin anew",
        )
    return plan


_COMMANDS = {"derive": "derive", "rebase": "rebase", "merge": "merge", "island": "rejoin --keep"}
_WORDS = {"recipe": "recipe", "made_of": "current version", "transplant": "way", "steps": "--repair"}


def repair_steps(share: float, behind: int) -> int:
    """Of a repair that is so much of the `behind` steps of training behind it."""
    return max(1, int(share * behind)) if share else 0


def repair_share(steps: int, behind: int) -> str:
    """The shortest --repair that gives so many steps."""
    if not steps or not behind:
        return "0" if not steps else "1"
    for digits in range(1, 10):
        share = -(-steps * 10**digits // behind) / 10**digits  # rounded up
        if repair_steps(share, behind) == steps:
            return f"{share:.{digits}f}"
    return str((steps + 0.5) / behind)


def clear(place: Path) -> None:
    """Nothing of a version is left; of the first one not what it would share with later ones either."""
    shutil.rmtree(place, ignore_errors=True)
    if place.name == "v1":
        for name in ("held-out.jsonl", "tokens.json"):
            (place.parent / name).unlink(missing_ok=True)


def require_same_data(place: Path, plan: Plan, prepared: Prepared) -> None:
    """Writes down what is trained on, the first time. Raises UserError where it was something else."""
    if not plan.data:
        write_plan(place, replace(plan, data=prepared.digest))
    elif plan.data != prepared.digest:
        raise UserError(
            f"{place.parent.name} was begun with other data and is not finished: a file or what is protected "
            "in it has changed",
            hint="put it back to go on, or give --restart to begin anew",
        )


def begun_plan(place: Path) -> Plan | None:
    try:
        table = json.loads((place / "plan.json").read_bytes())
        return Plan(
            read_table(Recipe, table["recipe"]),
            read_table(Parent, table["parent"]),
            tuple(map(str, table["made_of"])),
            read_table(Transplant, table["transplant"]),
            tuple(map(float, table["weights"])),
            int(table["steps"]),
            str(table.get("data", "")),  # of an older node: none
            _how(table),
            tuple(read_table(SourcesFor, one) for one in table.get("uses", ())),
        )
    except (OSError, *DAMAGE):
        return None  # nothing was begun, or nothing that can be gone on with


def _how(table: dict[str, Any]) -> How:
    """Raises ValueError."""
    parts = len(table["made_of"])  # of a version that an older node began, this tells
    was = "derive" if not parts else "rebase" if parts == 1 else "merge"
    found: How | None = next((how for how in get_args(How) if how == table.get("how", was)), None)
    if found is None:
        raise ValueError("no command makes such a version")
    return found


def write_plan(place: Path, plan: Plan) -> None:
    place.mkdir(mode=0o700, exist_ok=True)
    atomic_write(place / "plan.json", json.dumps(plain(plan)).encode(), 0o600)


def read_trained(path: Path) -> tuple[tuple[DataUse, ...], Trained] | None:
    try:
        table = json.loads(path.read_bytes())
        uses = tuple(read_table(DataUse, use) for use in table["uses"])
        took = strict.table(table["trained"], ("steps", "tokens", "seconds"), "what a stage took")
        steps, tokens = (strict.integer(took[name], 0, 2**53, name) for name in ("steps", "tokens"))
        return uses, Trained(steps, tokens, float(took["seconds"]))
    except (OSError, *DAMAGE):
        return None


def make_folder_like(model: Path, folder: Path) -> None:
    """Everything of a model's folder but its weights."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy_beside(model, folder)


def copy_beside(source: Path, target: Path) -> None:
    """Config, tokenizer and templates, where the target has none of that name."""
    skipped = (INDEX, MANIFEST, "README.md", "tapestry.json")
    for path in sorted(source.iterdir()):
        plain_file = path.is_file() and path.suffix != ".safetensors" and path.name not in skipped
        if plain_file and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


def write_held_out(folder: Path, sets: dict[str, list[Example]]) -> None:
    lines = [json.dumps({"set": name, **one}) for name, examples in sets.items() for one in examples]
    atomic_write(folder / "held-out.jsonl", "".join(line + "\n" for line in lines).encode(), 0o600)


def read_held_out(folder: Path) -> dict[str, list[Example]]:
    """Examples by their set; none of a version that held none out. Raises UserError if it is damaged."""
    sets: dict[str, list[Example]] = {}
    path = folder / "held-out.jsonl"
    try:
        with path.open("rb") as file:
            for line in file:
                example = json.loads(line)
                sets.setdefault(str(example.pop("set")), []).append(example)
    except FileNotFoundError:
        return {}
    except DAMAGE as error:
        raise UserError(
            f"{path} is damaged: {error}", hint="tapestry verify looks at the whole home"
        ) from error
    return sets


def merged_held_out(shelf: Shelf, names: Sequence[str]) -> dict[str, list[Example]]:
    return {
        f"{name}.{set_name}": examples
        for name in names
        for set_name, examples in read_held_out(shelf.of(name)).items()
    }


def joined_recipe(versions: Sequence[Version]) -> Recipe:
    """For a repair after a later rebase: the first's, on the data of all that are of its stage."""
    first = versions[0].recipe
    data = [one for version in versions if version.recipe.stage == first.stage for one in version.recipe.data]
    return replace(first, data=tuple(dict.fromkeys(data)))


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
