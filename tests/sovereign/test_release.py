"""What a released derivative says of the member's data: what may be named, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.sovereign.derivative import (
    PLAIN,
    DataUse,
    Derivative,
    Measure,
    Parent,
    Shelf,
    SourcesFor,
    Version,
)
from tapestry.node.sovereign.recipe import Recipe
from tapestry.node.sovereign.release import card, own_sets, public, release
from tapestry.node.spec.declared import Declared, append, parse_declaration
from tapestry.node.spec.tables import plain

HEX = "ab" * 32
SECRET = "hue-psychiatric-ward"


def loss(name: str, *, own: bool = True) -> Measure:
    return Measure(f"{name}/loss", 1.0, False, 10, own)


def version(sources: tuple[str, ...], sets: tuple[str, ...]) -> Version:
    """By sft, measured on its sets and on one of a suite."""
    report = (*map(loss, sets), loss("general", own=False))
    found = [f"{one.name}: holds: 1.0000 to 1.0000 against the base" for one in report]
    return Version(
        number=1,
        how="derive",
        parent=Parent(HEX, "a run", 4, HEX, HEX, HEX),
        recipe=Recipe("sft", "full", sources),
        made_of=(),
        transplant=PLAIN,
        weights=(),
        data=tuple(DataUse(source, HEX, 9, 1) for source in sources),
        steps=1,
        tokens=1,
        seconds=1.0,
        made_at="2026-11-29T00:00:00Z",
        digest=HEX,
        report=report,
        base_report=report,
        promoted=True,
        reasons=(*found, f"{SECRET}-of-last-year/loss: was not measured"),
    )


def released(home: Home, one: Version) -> str:
    """All that others read of it, where its sources are links."""
    one = replace(one, data=tuple(replace(use, real=(f"/disk/{SECRET}",)) for use in one.data))
    one = replace(one, uses=(SourcesFor("derive:ours", (f"/disk/{SECRET}",)),))
    shown = public(one, Declared.load(home), own_sets(Shelf(home), one))
    return json.dumps(plain(shown)) + card(Derivative("ours", 1, (one,)), shown)


def declared(tmp_path: Path) -> tuple[Home, str, str]:
    home, private, open_ = Home(tmp_path / "home"), f"/data/{SECRET}.jsonl", "/data/laws.jsonl"
    append(home, [parse_declaration("own", private, "derive:*")])
    append(home, [parse_declaration("us, CC0-1.0, open", open_, "derive:*")])
    return home, private, open_


def test_what_failed_its_gate_is_released_only_if_it_is_named(tmp_path: Path) -> None:
    shelf = Shelf(Home(tmp_path / "home"))
    (shelf.folder / "ours").mkdir(parents=True)
    failed = replace(version(("/data/laws.jsonl",), ("laws",)), promoted=False)
    shelf.write(Derivative("ours", 0, (failed,)), 1)
    with pytest.raises(UserError, match="no version of ours passed its gate") as refused:
        release(shelf.home, "ours", None, tmp_path / "out", "f32", lambda *_: None)
    assert refused.value.hint is not None and refused.value.hint.startswith("--version 1 ")
    with pytest.raises(
        UserError, match=r"there is no .*/v1/model/config.json"
    ):  # of a home without its files
        release(shelf.home, "ours", 1, tmp_path / "out", "f32", lambda *_: None)


def test_a_private_source_is_named_in_no_report_and_no_reason_of_what_is_released(tmp_path: Path) -> None:
    home, private, open_ = declared(tmp_path)
    text = released(home, version((private, open_), (SECRET, "laws")))
    assert SECRET not in text and "private-1/loss: holds" in text
    assert "laws/loss: holds" in text and "general/loss: holds" in text and "laws.jsonl" in text


def test_nor_is_it_after_a_merge_and_a_rebase_of_what_was_trained_on_it(tmp_path: Path) -> None:
    home, private, open_ = declared(tmp_path)
    shelf = Shelf(home)
    for name, source, held_out in (("first", private, SECRET), ("second", open_, "laws")):
        (shelf.folder / name).mkdir(parents=True)
        shelf.write(Derivative(name, 1, (version((source,), (held_out,)),)), 1)
    sets = (f"first.{SECRET}", "second.laws")
    parts = ("first:1", "second:1")
    joined = replace(version((private, open_), sets), how="merge", made_of=parts, data=())
    (shelf.folder / "both").mkdir()
    shelf.write(Derivative("both", 1, (joined,)), 1)
    for one in (joined, replace(joined, how="rebase", number=2, made_of=("both:1",))):
        text = released(home, one)
        assert SECRET not in text and "second.laws/loss: holds" in text
    (shelf.folder / "second" / "derivative.json").unlink()
    assert "laws/loss" not in released(home, joined), "of a part that is gone nobody knows whose data it had"
