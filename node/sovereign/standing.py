"""Whether what a derivative is made from, and measured on, may still be used.

Asked before anything of it is read, and then at every step that a command tells of: a consent that ends, or
a `data revoke`, ends a training of three days within a step. What it has made lies in work/, and the report
names it (withdrawal.py). Must not import torch or transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tapestry.node.home import Home
from tapestry.node.lineage.uses import training_uses
from tapestry.node.progress import Told
from tapestry.node.sovereign.derivative import Shelf, SourcesFor, Version
from tapestry.node.sovereign.recipe import Recipe, recipe_paths
from tapestry.node.spec.declared import READ, Standing

if TYPE_CHECKING:
    from tapestry.node.sovereign.plans import Plan

Uses = dict[str, tuple[str, ...]]  # paths by their purpose


def asking(home: Home, uses: Mapping[str, tuple[str, ...]], told: Told) -> Told:
    """The same `told`, which raises UserError once a source may not be used any more; and so does this."""
    standing = Standing(home, uses)
    standing.require()

    def asked(what: str, done: int, total: int) -> None:
        standing.require()
        told(what, done, total)

    return asked


def of_recipe(name: str, recipe: Recipe) -> Uses:
    """What the training of this derivative reads."""
    return {f"derive:{name}": recipe_paths(recipe)}


def behind(shelf: Shelf, name: str, version: Version) -> Uses:
    """What a version was trained on and is measured on: its own data, and those of what it was made of.
    Raises UserError."""
    uses = begun_with(shelf, name, version)
    reals = tuple(path for use in version.data for path in use.real)
    return joined(uses, {READ: reals}) if reals else uses


def begun_with(shelf: Shelf, name: str, plan: Version | Plan) -> Uses:
    """The same, as it was written down when the version was begun; by an older node it was not: then by its
    parts, and of a part that is gone by the trainings of that name. Raises UserError."""
    if plan.uses:
        return {one.purpose: one.sources for one in plan.uses}
    uses: Uses = {}
    if not plan.made_of or plan.steps:
        uses = of_recipe(name, plan.recipe)
    for made_of in plan.made_of:
        part, _, number = made_of.partition(":")
        found = shelf.read(part)
        one = next((one for one in (found.versions if found else ()) if one.number == int(number)), None)
        uses = joined(uses, _of_trainings(shelf, part) if one is None else behind(shelf, part, one))
    return uses


def _of_trainings(shelf: Shelf, name: str) -> Uses:
    paths = [path for one, sources in training_uses(shelf.home) for path in sources if one == name]
    return {f"derive:{name}": tuple(dict.fromkeys(paths))} if paths else {}


def kept(uses: Uses) -> tuple[SourcesFor, ...]:
    """As a plan and a version keep them."""
    return tuple(SourcesFor(purpose, paths) for purpose, paths in uses.items())


def joined(one: Uses, other: Uses) -> Uses:
    """Both."""
    return {
        purpose: tuple(dict.fromkeys((*one.get(purpose, ()), *other.get(purpose, ()))))
        for purpose in {**one, **other}
    }
