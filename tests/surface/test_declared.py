"""data.toml: what a declaration covers, what is refused, what --declare means."""

from __future__ import annotations

import datetime
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tapestry.node.cli.main import cli
from tapestry.node.daemon.permit import DataPermit, led_to
from tapestry.node.disk.files import atomic_write
from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage.uses import Span, Started, note_use, spans
from tapestry.node.sovereign.suite import Suite
from tapestry.node.spec import declared as declared_module
from tapestry.node.spec.data import DataSettings, Located, SourceSettings, ValidationSettings
from tapestry.node.spec.declared import (
    BASE,
    Declared,
    Revoked,
    append,
    parse_declaration,
    published,
    require,
    template,
    undeclared,
)
from tapestry.node.trainer.data import sources
from tapestry.node.trainer.data.errors import DataError
from tapestry.node.trainer.data.sources import located_in

TODAY = datetime.date(2026, 12, 1)
SOURCE = """[[source]]
path = "{path}"
owner = "INA"
licence = "CC-BY-4.0"
mode = "{mode}"
purposes = {purposes}
"""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    return home


def declare(home: Home, path: str, mode: str = "open", purposes: str = '["base"]', more: str = "") -> None:
    with home.data_toml.open("a") as file:
        file.write(SOURCE.format(path=path, mode=mode, purposes=purposes) + more)


def refusal(home: Home, path: object, purpose: str = BASE) -> str:
    return Declared.load(home).refusal(str(path), purpose, TODAY)


def test_what_nobody_declared_is_not_read(home: Home, tmp_path: Path) -> None:
    assert refusal(home, tmp_path / "a.txt") == "not declared"
    with pytest.raises(UserError, match=r"a\.txt is not read: not declared") as caught:
        require(home, [str(tmp_path / "a.txt")], BASE, TODAY)
    assert caught.value.hint is not None and "--declare" in caught.value.hint


def test_the_standard_library_needs_no_declaration_but_can_be_revoked(home: Home) -> None:
    assert require(home, ["stdlib:2/3", "stdlib"], BASE, TODAY) == ()
    home.data_toml.write_text('[[revoked]]\npath = "stdlib"\nat = "today"\n')
    assert refusal(home, "stdlib:2/3").startswith("stdlib was revoked")


def test_a_folder_covers_what_lies_in_it_and_the_longest_path_decides(home: Home, tmp_path: Path) -> None:
    declare(home, f"{tmp_path}/texts")
    declare(home, f"{tmp_path}/texts/clinic", "local-only", '["derive:*"]')
    assert refusal(home, tmp_path / "texts" / "fr") == ""
    assert refusal(home, tmp_path / "texts2") == "not declared"
    assert refusal(home, tmp_path / "texts/clinic/a.txt") == "declared for derive:*, not for base"
    assert refusal(home, tmp_path / "texts/clinic/a.txt", "derive:ours") == ""


def test_a_folder_is_not_read_if_something_in_it_may_not_be(home: Home, tmp_path: Path) -> None:
    declare(home, f"{tmp_path}/texts")
    declare(home, f"{tmp_path}/texts/clinic", "local-only", '["derive:*"]')
    assert "texts/clinic, which lies in it, is declared for derive:*" in refusal(home, tmp_path / "texts")


def test_a_link_is_what_it_leads_to(home: Home, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    declare(home, f"{tmp_path}/real")
    assert refusal(home, tmp_path / "link" / "x.txt") == ""


def test_what_links_of_a_followed_folder_lead_to_must_be_declared_and_kept_clear_too(
    home: Home, tmp_path: Path
) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    for one in (folder, outside):
        one.mkdir()
        (one / "a.txt").write_text("text")
    (folder / "link.txt").symlink_to(outside / "a.txt")
    source = SourceSettings(str(folder), name="folder", follow_links=True)
    alone = DataSettings(source=(replace(source, follow_links=False),))
    assert located_in(alone) == (Located(str(folder), (str(folder),)),)
    located = located_in(DataSettings(source=(source,)))
    assert located == (Located(str(folder), (str(folder), str(outside / "a.txt"))),)
    sets = (
        ValidationSettings(str(folder), name="set"),
    )  # the same folder, whose links are not followed here
    assert located_in(DataSettings(source=(source,), validation=sets)) == located
    append(home, [parse_declaration("us, CC0-1.0", str(folder), BASE)])
    with pytest.raises(UserError, match=r"a\.txt is not read: not declared \(a link in .*folder leads"):
        require(home, [str(folder)], BASE, TODAY, located)
    guarded = replace(parse_declaration("us, CC0-1.0", str(outside), BASE), protected=("names",))
    with home.data_toml.open("a") as file:
        file.write('[[domain]]\nname = "names"\npatterns = ["Anna"]\n')
    append(home, [guarded])
    (found,) = require(home, [str(folder)], BASE, TODAY, located)
    assert found.path == str(folder) and [one.name for one in found.domains] == ["names"]
    permit = DataPermit(home, (str(folder),), lambda: TODAY, located)
    assert permit.refusal() == ""
    append(home, [Revoked(str(outside / "a.txt"), "today")])
    assert "was revoked" in permit.refusal()
    note_use(home, BASE, [str(folder)], "run", 3, Started("peer", linked=located[0].real[1:]))
    assert spans(home, lambda path: path == str(outside / "a.txt")) == [Span("run", 3, None)]


def test_a_link_to_a_folder_is_one_place_and_too_many_places_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file below it stood in one line of the events, which became too long to be read again."""
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (tmp_path / "further").mkdir()
    folder.mkdir()
    for number in range(5):
        (outside / "deep" / f"{number}.txt").write_text("text")
        (tmp_path / "further" / f"{number}.txt").write_text("text")
    (folder / "link").symlink_to(outside)
    (outside / "deep" / "on").symlink_to(tmp_path / "further")
    settings = DataSettings(source=(SourceSettings(str(folder), name="folder", follow_links=True),))

    def places() -> list[str]:
        ((real, *further),) = [one.real for one in located_in(settings)]
        assert real == str(folder)
        return further

    assert places() == [str(outside), str(tmp_path / "further")]
    monkeypatch.setattr(sources, "LINKS_MAX", 2)
    (folder / "third").symlink_to(tmp_path / "further" / "0.txt")
    assert len(places()) == 2, "it lies in a place that is named already"
    for name in ("a",):
        (tmp_path / name).mkdir()
        (tmp_path / name / "alone.txt").write_text("text")
        (tmp_path / name / "other.txt").write_text("text")
    (folder / "fourth.txt").symlink_to(tmp_path / "a" / "alone.txt")
    with pytest.raises(DataError, match=r"lead to \d places outside, more than 2"):
        places()


def test_many_links_to_files_of_one_folder_lead_to_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir(), outside.mkdir()
    for number in range(4):
        (outside / f"{number}.txt").write_text("text")
        (folder / f"{number}.txt").symlink_to(outside / f"{number}.txt")
    settings = DataSettings(source=(SourceSettings(str(folder), name="folder", follow_links=True),))
    assert len(located_in(settings)[0].real) == 1 + 4
    monkeypatch.setattr(sources, "LINKS_MAX", 3)
    assert located_in(settings) == (Located(str(folder), (str(folder), str(outside))),)


def test_a_source_that_was_a_link_is_asked_about_where_it_was_read(home: Home, tmp_path: Path) -> None:
    """The trainer holds the text of the first place, wherever the link leads by now."""
    first, second, source = tmp_path / "v1", tmp_path / "v2", tmp_path / "current"
    for folder in (first, second):
        folder.mkdir()
        declare(home, str(folder))
    source.symlink_to(first)
    located = located_in(DataSettings(source=(SourceSettings(str(source), name="current"),)))
    assert located == (Located(str(source), (str(first),)),)
    permit = DataPermit(home, (str(source),), lambda: TODAY, located)
    assert permit.refusal() == ""
    source.unlink()
    source.symlink_to(second)
    append(home, [Revoked(str(first), "today")])
    assert "v1 was revoked" in permit.refusal()


def test_where_a_source_itself_leads_is_none_of_the_places_that_its_links_lead_to(tmp_path: Path) -> None:
    inside, outside, source = tmp_path / "v1", tmp_path / "elsewhere", tmp_path / "current"
    for folder in (inside, outside):
        folder.mkdir()
    source.symlink_to(inside)
    (outside / "a.txt").write_text("text")
    (inside / "link").symlink_to(outside)
    settings = DataSettings(source=(SourceSettings(str(source), name="current", follow_links=True),))
    located = located_in(settings)
    assert located[0].real == (str(inside), str(outside))
    assert led_to(located) == (str(outside),)


def test_where_a_command_runs_is_no_key_of_anybodys_to_write(home: Home, tmp_path: Path) -> None:
    """It was one that did nothing."""
    table = '[[{0}]]\nname = "secret"\n{1} = ["sort"]\n'
    for read, name, key in ((Declared.load, "domain", "command"), (_suite_of, "command", "run")):
        home.data_toml.write_text(table.format(name, key))
        (one,) = getattr(read(home), name)
        assert one.folder == str(home.path)
        home.data_toml.write_text(table.format(name, key) + 'folder = ""\n')  # of an older template
        assert getattr(read(home), name)
        home.data_toml.write_text(table.format(name, key) + 'folder = "/srv"\n')
        with pytest.raises(UserError, match=rf"{name}\[1\]\.folder: unknown key"):
            read(home)
    assert "#   command = " in template() and "#   folder = " not in template()


def _suite_of(home: Home) -> Suite:
    return Suite.load(home.data_toml)


def test_a_declaration_ends_with_its_last_day_and_any_that_goes_on_is_enough(home: Home) -> None:
    declare(home, "/d", more='until = "2026-12-01"\n')
    assert refusal(home, "/d") == ""
    home.data_toml.write_text(home.data_toml.read_text().replace("2026-12-01", "2026-11-30"))
    assert refusal(home, "/d") == "declared until 2026-11-30, which is over"
    declare(home, "/d")
    assert refusal(home, "/d") == ""


def test_a_purpose_that_is_not_named_is_refused(home: Home) -> None:
    declare(home, "/d", purposes='["derive:ours"]')
    assert refusal(home, "/d", "derive:ours") == ""
    assert refusal(home, "/d", "derive:theirs") == "declared for derive:ours, not for derive:theirs"


@pytest.mark.parametrize(
    ("mode", "more", "words"),
    [
        ("local-only", "", "local-only data are never used for the base"),
        ("restricted", "", "need a consent"),
        ("open", 'until = "2026-02-30"\n', "is no date"),
        ("open", 'protected = ["health"]\n', r'there is no \[\[domain\]\] "health"'),
        ("participant-private", 'description = "letters"\n', "not described outside"),
        ("open", "license = 'x'\n", r"did you mean source\[1\]\.licence"),
        ("public", "", r"source\[1\]\.mode"),
        ("open", '[[domain]]\nname = "x"\npatterns = ["("]\n', "no regular expression"),
        ("open", '[[domain]]\nname = "x"\n', "neither patterns nor a command"),
    ],
)
def test_a_mistake_in_the_file_is_named_and_nothing_is_read(
    home: Home, mode: str, more: str, words: str
) -> None:
    declare(home, "/d", mode, more=more)
    with pytest.raises(UserError, match=words):
        require(home, ["/d"], BASE, TODAY)


def run_declare(home: Home, *args: str) -> Result:
    return CliRunner().invoke(cli, ["data", "declare", *args, "--home", str(home.path)])


def test_sources_are_declared_before_a_node_starts_and_only_once(home: Home, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("x")
    home.node_toml.write_text(f'[data]\npaths = ["{text}", "stdlib"]\n')
    said = run_declare(home, "INA, CC-BY-4.0, open")  # those of node.toml
    assert said.exit_code == 0 and f"declared {text} for base: INA, CC-BY-4.0, open" in said.stderr
    assert refusal(home, text) == "" and len(Declared.load(home).source) == 1
    again = run_declare(home, "own", str(text))
    assert again.exit_code == 0 and "may be used for base already" in again.stderr
    assert len(Declared.load(home).source) == 1


def test_a_run_is_written_into_a_home_where_data_are_declared_already(home: Home, tmp_path: Path) -> None:
    assert run_declare(home, "own", str(tmp_path)).exit_code == 0
    said = CliRunner().invoke(cli, ["init", str(home.path), "--preset", "nano"])
    assert said.exit_code == 0 and home.run_toml.exists() and refusal(home, tmp_path) == ""


def test_a_declaration_that_could_not_be_read_again_is_not_written(home: Home, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("{}\n")
    home.data_toml.write_text(template())
    before = home.data_toml.read_text()
    home_option = ["--home", str(home.path)]
    declares = ["data", "declare", "own", str(text), "--purpose", "derive:two words", *home_option]
    derives = ["derive", "two words", "--data", str(text), "--declare", "own", *home_option]
    for args, why in ((declares, "purposes"), (derives, "is no name of a derivative")):
        result = CliRunner().invoke(cli, args)
        assert (result.exit_code, why in result.stderr) == (2, True), result.stderr
        assert home.data_toml.read_text() == before, "a file with a mistake lets nothing be read"


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["own"], "no data to train on"),
        (["own", "/no/such/folder"], "there is no /no/such/folder"),
        (["own, too, much, too", "/"], "is not understood"),
    ],
)
def test_a_declaration_that_cannot_be_meant_is_refused(home: Home, args: list[str], why: str) -> None:
    said = run_declare(home, *args)
    assert said.exit_code == 2 and why in said.stderr and not home.data_toml.exists()


def test_what_is_declared_on_the_command_line_is_appended_and_reads_back(home: Home) -> None:
    home.data_toml.write_text(template())
    assert Declared.load(home) == Declared()
    made = parse_declaration("INA, CC-BY-4.0, open, until 2027-01-31", "/d", BASE)
    append(home, [made, parse_declaration("own", "/e", BASE)])
    declared = Declared.load(home)
    assert declared.source[0] == made and made.until == "2027-01-31"
    assert (declared.source[1].licence, declared.source[1].mode) == ("own", "participant-private")
    assert home.data_toml.read_text().startswith("# What each source of data is")


@pytest.mark.parametrize(
    "text", ["", "INA", "INA, ", "INA, CC0, fast", "INA, CC0, until tomorrow", "A, B, restricted"]
)
def test_a_declaration_that_says_too_little_or_something_else_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--declare") as caught:
        parse_declaration(text, "/d", BASE)
    assert caught.value.hint is not None and "OWNER, LICENCE" in caught.value.hint


def test_of_two_commands_at_once_none_undoes_what_the_other_wrote(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is held up between reading and writing, while the second revokes."""
    append(home, [parse_declaration("us, CC0-1.0", "/first", BASE)])
    second = threading.Thread(target=append, args=(home, [Revoked("/first", "today")]))

    def slow(path: Path, data: bytes, mode: int) -> None:
        monkeypatch.setattr(declared_module, "atomic_write", atomic_write)
        second.start()
        second.join(0.3)
        atomic_write(path, data, mode)

    monkeypatch.setattr(declared_module, "atomic_write", slow)
    append(home, [parse_declaration("us, CC0-1.0", "/third", BASE)])
    second.join()
    read = Declared.load(home)
    assert [one.path for one in read.source] == ["/first", "/third"]
    assert [one.path for one in read.revoked] == ["/first"]


def test_only_what_a_declaration_can_still_allow_is_asked_for(home: Home) -> None:
    declare(home, "/local", "local-only", '["derive:ours"]')
    declare(home, "/over", more='until = "2020-01-01"\n')
    declare(home, "/derived", purposes='["derive:ours"]')
    assert undeclared(home, ["/local", "/over", "/derived", "/new", "stdlib"], BASE) == ["/derived", "/new"]


def test_descriptions_are_published_and_nothing_else_is(home: Home) -> None:
    declare(home, "/a", more='description = "News of 2019"\n')
    declare(home, "/b")
    declare(home, "/c", purposes='["derive:ours"]', more='description = "Letters"\n')
    declared = Declared.load(home)
    assert published(declared) == ("News of 2019 (of INA, CC-BY-4.0)",)
    assert declared.may_be_named("/b/x") and not declared.may_be_named("/unknown")


def test_domains_of_the_home_of_a_source_and_of_what_lies_in_it_hold(home: Home) -> None:
    home.data_toml.write_text('protected = ["all"]\n')
    declare(home, "/d", more='protected = ["one"]\n')
    declare(home, "/d/inner", more='protected = ["two"]\n')
    with home.data_toml.open("a") as file:
        for name in ("all", "one", "two", "unused"):
            file.write(f'[[domain]]\nname = "{name}"\npatterns = ["{name}"]\n')
    declared = Declared.load(home)
    assert [one.name for one in declared.domains_of("/d")] == ["all", "one", "two"]
    assert [one.name for one in declared.domains_of("stdlib")] == ["all"]
    assert [one.path for one in declared.protections(["/d", "/d"])] == ["/d"]
