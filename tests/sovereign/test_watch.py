"""rebase --watch: when it says that the base has moved."""

from __future__ import annotations

from pathlib import Path

import pytest
from homes import make_home

from tapestry.node.errors import UserError
from tapestry.node.sovereign.derivative import PLAIN, Derivative, Parent, Shelf, Version
from tapestry.node.sovereign.recipe import Recipe
from tapestry.node.sovereign.watch import newest_epoch, watch
from tapestry.node.spec.training import PRESETS

HEX = "ab" * 32


def test_it_waits_until_the_base_has_moved_so_far_and_tries_an_epoch_once(tmp_path: Path) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    made.advance(2)
    parent = Parent(HEX, "a run", 2, HEX, HEX, HEX)
    recipe = Recipe("cpt", "full", ("/a",))
    version = Version(1, "derive", parent, recipe, (), PLAIN, (), (), 1, 1, 1.0, "", HEX, (), (), True, ())
    (made.home.path / "derivatives" / "ours").mkdir(parents=True)
    Shelf(made.home).write(Derivative("ours", 1, (version,)), 1)
    slept: list[int] = []

    def sleep(_seconds: float) -> None:
        slept.append(made.chain.epoch)
        made.advance()

    told = watch(made.home, "ours", 3, sleep)
    assert next(told) == 5 and slept == [2, 3, 4]
    assert next(told) == 8, "what was tried is not tried again before the base has moved"


def test_a_half_written_record_is_not_there_yet_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    made = make_home(tmp_path / "home", PRESETS["nano"].model)
    assert newest_epoch(made.home.chain) == 0
    made.advance(2)
    with made.home.chain.open("ab") as file:
        file.write(b'{"digest":')
    assert newest_epoch(made.home.chain) == 2
    with made.home.chain.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(UserError, match="its last record does not hold"):
        newest_epoch(made.home.chain)
