"""Which files a source means, and what is said of the others."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from trainer.data.kit import settings_of, write_jsonl

from tapestry.node.spec.data import DataSettings, Located, SourceSettings, ValidationSettings
from tapestry.node.trainer.data import hub
from tapestry.node.trainer.data.errors import DataError
from tapestry.node.trainer.data.sources import Listing, list_data, located_in


def _listing(*paths: object, **more: object) -> Listing:
    return list_data(settings_of(*paths, **more)).sources[0]


def _names(listing: Listing) -> list[str]:
    return [Path(file.path).name for file in listing.files]


def test_a_folder_is_read_whatever_its_files_are_called_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "page.1.gz").write_bytes(gzip.compress(b"a page of a manual\n" * 100))
    (tmp_path / "deep" / "README").write_text("read me " * 900)
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2")
    (tmp_path / "latin.txt").write_bytes("élégant, déjà, où, garçon ".encode("latin-1") * 9)
    (tmp_path / ".hidden.txt").write_text("secret")
    (tmp_path / "empty.txt").touch()
    write_jsonl(tmp_path / "rows.jsonl", ["a", "b"])
    listing = _listing(tmp_path)
    assert _names(listing) == ["good.py", "README", "page.1.gz"]
    lines = "\n".join(listing.tally.lines())
    assert lines.startswith("3 files, ")
    for reason in (
        "binary: 1 (",
        "not UTF-8, perhaps",
        "jsonl without a field, give the folder as FOLDER:FIELD: 1 (",
        "links to folders, not followed: 1 (",
    ):
        assert f"left out, {reason}" in lines


def test_a_folder_with_a_field_takes_its_tables_and_its_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ["a", "b"])
    (tmp_path / "notes.txt").write_text("notes")
    listing = _listing(f"{tmp_path}:text")
    assert [(Path(file.path).name, file.format, file.field) for file in listing.files] == [
        ("notes.txt", "text", ""),
        ("rows.jsonl", "jsonl", "text"),
    ]


def test_a_field_is_never_dropped_without_a_word(tmp_path: Path) -> None:
    """The base learnt braces, keys and escapes of corpus.json:text; the only sign was "1 documents"."""
    (tmp_path / "notes.txt").write_text("notes " * 99)
    (tmp_path / "list.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    (tmp_path / "one.json").write_text(json.dumps({"text": "a"}, indent=1))
    write_jsonl(tmp_path / "rows.json", ["a", "b"])
    write_jsonl(tmp_path / "row.json", ["a"])
    with pytest.raises(DataError, match=r"notes.txt is read as text, which has no fields: leave :body out"):
        _listing(f"{tmp_path}/notes.txt:body")
    for name in ("list.json", "one.json"):
        with pytest.raises(DataError, match=f"{name} is no JSON lines"):
            _listing(f"{tmp_path / name}:text")
    for name in ("rows.json", "row.json"):
        (file,) = _listing(f"{tmp_path / name}:text").files
        assert (file.format, file.field) == ("jsonl", "text")
    listing = _listing(f"{tmp_path}:text")
    assert [Path(file.path).name for file in listing.files] == ["notes.txt", "row.json", "rows.json"]
    assert "left out, json that is no JSON lines: 2 (" in "\n".join(listing.tally.lines())


def test_a_table_without_a_field_is_not_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n" + "1,a\n" * 9)
    (tmp_path / "a.tsv").write_text("id\ttext\n" + "1\ta\n" * 9)
    write_jsonl(tmp_path / "a.json", ["a", "b"])
    (tmp_path / "config.json").write_text('{"text": "of one line, as in code"}')
    for name in ("a.csv", "a.tsv", "a.json"):
        with pytest.raises(DataError, match=r"say which field holds the text \(there are: .*text"):
            _listing(tmp_path / name)
    listing = _listing(tmp_path, allow_doubtful=True)
    assert _names(listing) == ["config.json"]
    lines = "\n".join(listing.tally.lines())
    assert all(f"left out, {form} without a field" in lines for form in ("csv", "tsv", "jsonl"))


def test_where_most_bytes_would_be_left_out_it_refuses_and_says_which_flag_allows_it(tmp_path: Path) -> None:
    for number in range(437):
        (tmp_path / f"{number}.bin").write_bytes(b"\0" * 100)
    (tmp_path / "README.md").write_text("read me")
    with pytest.raises(
        DataError, match=r"100% of its bytes would be left out \(left out, binary: 437 "
    ) as caught:
        _listing(tmp_path)
    assert "--allow-doubtful-data" in str(caught.value) and "\n" not in str(caught.value)
    assert _names(_listing(tmp_path, allow_doubtful=True)) == ["README.md"]
    assert _names(_listing(tmp_path, left_out_max=1.0)) == ["README.md"]


def test_a_file_counts_once_by_its_real_path_however_many_names_and_sources_lead_to_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    (tmp_path / "again.txt").symlink_to(path)
    (tmp_path / "b.txt").write_text("more")
    first, second = list_data(settings_of(path, tmp_path)).sources
    assert _names(first) == ["a.txt"] and _names(second) == ["b.txt"]
    assert "read once already: 2 (" in "\n".join(second.tally.lines())


def test_links_that_lead_out_of_the_folder_are_followed_only_if_told(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "private.txt").write_text("private")
    (outside / "deep").mkdir()
    (outside / "deep" / "more.txt").write_text("more")
    (inside / "a.txt").write_text("text")
    (inside / "link.txt").symlink_to(outside / "private.txt")
    (inside / "folder").symlink_to(outside / "deep")
    listing = _listing(inside)
    assert _names(listing) == ["a.txt"]
    assert "links that lead out of the folder, not followed: 1 (" in "\n".join(listing.tally.lines())
    told = SourceSettings(str(inside), name="in", follow_links=True)
    assert _names(list_data(DataSettings(source=(told,))).sources[0]) == ["a.txt", "link.txt", "more.txt"]


def test_what_a_new_link_leads_to_was_not_asked_about_and_is_left_out_unopened(tmp_path: Path) -> None:
    """A trainer that is started again lists the files anew."""
    folder, asked, later = (tmp_path / name for name in ("folder", "asked", "later"))
    for one in (folder, asked, later):
        one.mkdir()
    (folder / "a.txt").write_text("text")
    (asked / "b.txt").write_text("more")
    (folder / "first").symlink_to(asked)
    settings = DataSettings(source=(SourceSettings(str(folder), name="folder", follow_links=True),))
    located = located_in(settings)
    (later / "s.txt").write_bytes(b"\0")  # who opens it says that it is binary
    (later / "t.txt").write_text("text")
    (folder / "l").symlink_to(later)
    (asked / "c.txt").write_text("new in a place that was asked about")
    (listing,) = list_data(settings, located).sources
    assert _names(listing) == ["a.txt", "b.txt", "c.txt"]
    ((reason, left),) = listing.tally.left_out.items()
    assert "elsewhere than when the node was started" in reason and left.count == 2
    assert _names(list_data(settings, located_in(settings)).sources[0])[-1] == "t.txt"


@pytest.mark.parametrize("what", ["", "a.txt"], ids=["folder", "file"])
def test_a_source_whose_link_was_moved_is_not_read(tmp_path: Path, what: str) -> None:
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    source, second = tmp_path / "current", tmp_path / "v2" / what
    source.symlink_to(tmp_path / "v1" / what)
    settings = settings_of(source)
    located = located_in(settings)
    assert len(list_data(settings, located).sources[0].files) == 1
    source.unlink()
    source.symlink_to(second)
    other = Located("another source, with domains of its own", (str(second),))
    for asked in (located, (*located, other), ()):
        with pytest.raises(DataError, match=r"current: it leads to .*v2.*start it again"):
            list_data(settings, asked)
    assert len(list_data(settings, located_in(settings)).sources[0].files) == 1


def test_a_saved_data_set_names_no_file_outside_of_its_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
        (folder / "a.arrow").write_bytes(b"rows")
    (inside / "a.arrow").unlink()
    (inside / "a.arrow").symlink_to(outside / "a.arrow")
    with pytest.raises(DataError, match="no text to read there: left out, links that lead out"):
        _listing(inside)
    (inside / "dataset_dict.json").write_text('{"splits": ["../out"]}')
    with pytest.raises(DataError, match="no text to read there: left out, links that lead out"):
        _listing(inside)


def test_a_home_and_a_cache_inside_a_folder_of_data_are_not_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for folder, mark in (("home", "identity.key"), ("cache", "CACHEDIR.TAG")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / mark).touch()
        (tmp_path / folder / "node.log").write_text("no data")
    assert _names(_listing(tmp_path)) == ["a.txt"]


def test_what_is_measured_on_is_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "held.txt").write_text("held")
    settings = settings_of(tmp_path)
    sets = (ValidationSettings(str(tmp_path / "held.txt"), name="held"),)
    listings = list_data(DataSettings(source=settings.source, validation=sets))
    assert _names(listings.sources[0]) == ["a.txt"] and _names(listings.validation[0]) == ["held.txt"]


def test_stdlib_parts_are_disjoint_complete_and_balanced() -> None:
    whole = {file.path for file in _listing("stdlib").files}
    parts = [_listing(f"stdlib:{k}/3").files for k in (1, 2, 3)]
    paths = [file.path for part in parts for file in part]
    assert len(paths) == len(set(paths)) and set(paths) == whole
    sizes = [sum(file.size_bytes for file in part) for part in parts]
    assert max(sizes) - min(sizes) < 0.01 * sum(sizes)
    assert not any("site-packages" in path for path in paths)


def _cached_on_this_disk(root: Path, revision: str) -> None:
    """A snapshot as huggingface_hub keeps it: links into a folder of blobs."""
    repository = root / "datasets--org--texts"
    snapshot = repository / "snapshots" / revision
    (snapshot / "data").mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        blob = write_jsonl(repository / "blobs" / f"blob-{name}", [name])
        (snapshot / "data" / f"{name}.jsonl").symlink_to(f"../../../blobs/{blob.name}")
    for name, text in (("README.md", "# Texts\n"), ("dataset_infos.json", '{"a": 1}\n{"b": 2}\n')):
        (repository / "blobs" / f"blob-{name}").write_text(text * 99)
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)


def test_a_hub_data_set_is_read_from_the_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _cached_on_this_disk(tmp_path, "a" * 40)
    real = hub.snapshot_download
    monkeypatch.setattr(
        hub, "snapshot_download", lambda *a, **k: real(*a, **k, cache_dir=tmp_path, local_files_only=True)
    )
    listing = _listing("hub:org/texts:text")
    assert _names(listing) == ["train-00000-of-00001.jsonl"]
    assert "of another split than train: 1 (" in "\n".join(listing.tally.lines())
    assert "it describes the data set: 2 (" in "\n".join(listing.tally.lines())
    with pytest.raises(DataError, match="hub:org/none: neither the hub nor its cache on this disk gives it"):
        _listing("hub:org/none:text")


def test_every_kind_of_table_and_text_is_fetched_from_a_hub() -> None:
    from huggingface_hub.utils import filter_repo_objects

    kinds = ("parquet", "jsonl", "json", "json.gz", "csv", "tsv", "txt", "txt.zst", "arrow")
    files = [f"data/a.{kind}" for kind in kinds]
    assert [*filter_repo_objects([*files, "a.py", "a.bin"], allow_patterns=list(hub.WANTED))] == files


def _unknown(root: Path) -> str:
    (root / "model.bin").write_bytes(b"a\0b")
    return str(root / "model.bin")


def _jsonl_without_field(root: Path) -> str:
    (root / "a.jsonl").write_text(json.dumps({"body": "x", "n": 1}) + "\n")
    return str(root / "a.jsonl")


def _link_loop(root: Path) -> str:
    (root / "a.txt").symlink_to(root / "b.txt")
    (root / "b.txt").symlink_to(root / "a.txt")
    return str(root / "a.txt")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: root / "nowhere.txt", "there is no such file or folder"),
        (lambda root: root, "no text to read there"),
        (_unknown, "binary"),
        (_jsonl_without_field, r"say which field holds the text \(there are: body, n\), as in .*:body"),
        (lambda _: "/dev/null", "neither a file nor a folder"),
        (_link_loop, "cannot be read: Too many levels of symbolic links"),
        (lambda _: "stdlib:4/3", "the part must be between 1 and 3"),
        (lambda _: "stdlib:1/99999", "fewer than 99999 parts"),
        (lambda _: "stdlib:x", "write stdlib:K/N"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(
    tmp_path: Path, make: Callable[[Path], object], words: str
) -> None:
    root = tmp_path / "source"
    root.mkdir()
    with pytest.raises(DataError, match=words) as caught:
        _listing(make(root))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    path.chmod(0)
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Permission denied"):
        _listing(path)
