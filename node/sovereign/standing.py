"""Whether what a derivative is made from, and measured on, may still be used.

Asked before anything of it is read, and then at every step that a command tells of: a consent that ends, or
a `data revoke`, ends a training of three days within a step. What it has made lies in work/, and the report
names it (withdrawal.py). Must not import torch or transformers.
"""

from __future__ import annotations

from collections.abc import Mapping

from tapestry.node.home import Home
from tapestry.node.progress import Told
from tapestry.node.sovereign.derivative import Shelf, Version
from tapestry.node.sovereign.recipe import Recipe, recipe_paths
from tapestry.node.spec.declared import READ, Standing

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
    """What a version was trained on and is measured on: its own data, and those of what it was made of."""
    uses: Uses = {}
    if not version.made_of or version.steps:
        uses = of_recipe(name, version.recipe)
    for part, one in shelf.parts(version):
        uses = joined(uses, behind(shelf, part, one))
    reals = tuple(path for use in version.data for path in use.real)
    return joined(uses, {READ: reals}) if reals else uses


def joined(one: Uses, other: Uses) -> Uses:
    """Both."""
    return {
        purpose: tuple(dict.fromkeys((*one.get(purpose, ()), *other.get(purpose, ()))))
        for purpose in {**one, **other}
    }
