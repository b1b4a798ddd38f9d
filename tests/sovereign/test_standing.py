"""What a version stands on, by purpose: asked before it is read, and at every step."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import pytest
from sovereign.test_release import version

from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.sovereign.derivative import DataUse, Derivative, Shelf
from tapestry.node.sovereign.standing import behind
from tapestry.node.spec import declared
from tapestry.node.spec.declared import READ, Revoked, Standing, append, parse_declaration


def test_behind_a_version_are_its_own_data_and_those_of_its_parts_each_for_their_own_purpose(
    tmp_path: Path,
) -> None:
    shelf = Shelf(Home(tmp_path))
    merged = replace(version(("/a",), ()), how="merge", made_of=("one:1", "two:1", "gone:1"), steps=0)
    repaired = replace(merged, how="rebase", number=2, made_of=("both:1",), steps=3)
    for name, versions in (
        ("one", (version(("/a:text",), ()),)),
        ("two", (version(("/b",), ()),)),
        ("both", (merged, repaired)),
    ):
        (shelf.folder / name).mkdir(parents=True)
        shelf.write(Derivative(name, 1, versions), 1)
    parts = {"derive:one": ("/a",), "derive:two": ("/b",)}
    assert behind(shelf, "both", merged) == parts
    assert behind(shelf, "both", repaired) == {**parts, "derive:both": ("/a",)}


def test_a_file_that_is_just_being_saved_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    append(home, [parse_declaration("us, CC0-1.0", "/a", "derive:ours")])
    standing = Standing(home, {"derive:ours": ("/a",)}, lambda: datetime.date(2026, 12, 1))
    standing.require()
    whole, halves = home.data_toml.read_text(), iter(["", "[[source]]\npath = "])

    def a_second_passes(_: float) -> None:
        home.data_toml.write_text(next(halves, whole + "# saved\n"))

    monkeypatch.setattr(declared.time, "sleep", a_second_passes)
    home.data_toml.write_text(whole[: len(whole) // 2])
    standing.require()
    home.data_toml.write_text('[[source]]\npath = "/a"\nowner = ')
    monkeypatch.setattr(declared.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match="not valid TOML"):
        standing.require()


def test_what_a_link_led_to_when_it_was_read_is_asked_for_and_not_what_it_leads_to_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, link = Home(tmp_path / "home"), tmp_path / "current"
    monkeypatch.setattr(declared.time, "sleep", lambda _: None)
    link.symlink_to("v1")
    append(home, [parse_declaration("us, CC0-1.0", str(link), "derive:ours")])
    standing = Standing(home, {"derive:ours": (str(link),)})
    standing.require()
    link.unlink()
    link.symlink_to("v2")
    append(home, [Revoked(str(tmp_path / "other"), "today")])
    standing.require()
    append(home, [Revoked(str(tmp_path / "v1"), "today")])
    with pytest.raises(UserError, match="/v1 was revoked"):
        standing.require()


def test_behind_a_version_is_also_where_its_links_led(tmp_path: Path) -> None:
    shelf = Shelf(Home(tmp_path))
    trained = version(("/a",), ())
    trained = replace(trained, data=(DataUse("/a", "ab" * 32, 1, 1, real=("/v1",)),))
    assert behind(shelf, "one", trained) == {"derive:one": ("/a",), READ: ("/v1",)}


def test_a_consent_that_ends_is_noticed_without_the_file_being_changed(tmp_path: Path) -> None:
    home, day = Home(tmp_path), datetime.date(2026, 12, 1)
    append(home, [parse_declaration("us, CC0-1.0, until 2026-12-01", "/a", "derive:ours")])
    standing = Standing(home, {"derive:ours": ("/a",)}, lambda: day)
    standing.require()
    day = datetime.date(2026, 12, 2)
    for _ in range(2):
        with pytest.raises(UserError, match="which is over"):
            standing.require()
