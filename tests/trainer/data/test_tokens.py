"""The cache of ids: made once, gone on with after a kill, private, and never of other data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from trainer.data.kit import LENGTH, corpus_of, documents_of, settings_of, write_jsonl

from tapestry.node.spec.data import Domain, Protection, ValidationSettings
from tapestry.node.trainer.data import files, tokens
from tapestry.node.trainer.data.corpus import Use, open_corpus
from tapestry.node.trainer.data.errors import DataError
from tapestry.node.trainer.data.readers import registry
from tapestry.node.trainer.data.sources import list_data
from tapestry.node.trainer.data.tokens import tokenize
from tapestry.node.trainer.tokenizers.byte import BOS_ID, EOS_ID, ByteTokenizer


class Killed(Exception):
    """Where a trainer died."""


class Counting(ByteTokenizer):
    """Counts the characters that it was given; dies after so many."""

    def __init__(self, dies_after: int = 1 << 60) -> None:
        self.chars = 0
        self.dies_after = dies_after

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.chars >= self.dies_after:
            raise Killed
        self.chars += sum(map(len, texts))
        return super().encode_batch(texts)


class Begun(Counting):
    """Each document begins with BOS."""

    digest = "begun"
    bos_id = BOS_ID


class Wide(ByteTokenizer):
    vocab_size = 100_000
    digest = "wide"
    eos_id = 99_999


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PART_TOKENS", 64)
    monkeypatch.setattr(tokens, "BATCH_CHARS", 16)
    monkeypatch.setattr(files, "PIECE_CHARS", 16)


def test_ids_are_those_of_the_text_with_eos_after_each_document(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("second " * 20)
    (tmp_path / "a.txt").write_text("first é" * 20)
    ids = corpus_of(settings_of(tmp_path), tmp_path / "cache").parts[0].tokens
    assert ids.tolist() == [*("first é" * 20).encode(), EOS_ID, *("second " * 20).encode(), EOS_ID]
    assert ids.dtype == np.uint16


def test_where_the_run_has_it_so_every_document_begins_with_bos_and_validation_sets_too(
    tmp_path: Path,
) -> None:
    (tmp_path / "b.md").write_text("second " * 20)
    (tmp_path / "a.txt").write_text("first é" * 20)
    held_out = write_jsonl(tmp_path / "held-out.jsonl", ["one text", "another text"])
    sets = (ValidationSettings(str(held_out), "measured", "text"),)
    settings = settings_of(tmp_path / "a.txt", tmp_path / "b.md", validation=sets)
    corpus = corpus_of(settings, tmp_path / "cache", Begun(), attend=False)
    first, second = (part.tokens.tolist() for part in corpus.parts)
    assert first == [BOS_ID, *("first é" * 20).encode(), EOS_ID]
    assert second == [BOS_ID, *("second " * 20).encode(), EOS_ID]
    (measured,) = corpus.sets
    whole = [BOS_ID, *b"one text", EOS_ID, BOS_ID, *b"another text", EOS_ID]
    assert measured.tokens.tolist() == whole
    (batch,) = corpus.validation(2).values()
    assert batch.segments is not None
    assert [batch.ids[1].tolist(), batch.segments[1].tolist()] == [whole[8:17], [0, 0, *[1] * 6]]
    bare = corpus_of(settings, tmp_path / "cache").sets[0].tokens.tolist()
    assert bare == [one for one in whole if one != BOS_ID], "the ids that were there are not taken"


def test_bos_stands_once_before_what_is_kept_of_a_document(tmp_path: Path, small_parts: None) -> None:
    """What is dropped is no document, and a document that comes in pieces begins once."""
    secret = Domain("health", ("secret",))
    plain = tmp_path / "a.txt"
    plain.write_text("a secret\n\n" * 5 + "kept text\n\n" * 9 + "a secret\n\n")
    rows = write_jsonl(tmp_path / "b.jsonl", ["secret"] * 3 + ["kept row"] * 3 + ["secret"] * 3)
    settings, use = settings_of(plain, f"{rows}:text"), Use(LENGTH, 1, seed=7)
    protected = [Protection(one.path, (secret,)) for one in settings.source]
    corpus = open_corpus(settings, Begun(), tmp_path / "cache", use, protected=protected)
    whole, table = (part.tokens.tolist() for part in corpus.parts)
    assert whole == [BOS_ID, *(b"kept text\n\n" * 9), EOS_ID]
    assert table == [BOS_ID, *b"kept row", EOS_ID] * 3


def test_a_large_vocabulary_takes_four_bytes_an_id(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first " * 20)
    ids = corpus_of(settings_of(tmp_path), tmp_path / "cache", Wide()).parts[0].tokens
    assert (ids.dtype, ids[-1]) == (np.uint32, 99_999)


def test_small_pieces_give_the_same_ids(tmp_path: Path, small_parts: None) -> None:
    text = "".join(f"line {i} é\n" for i in range(300)) + "x" * 500
    (tmp_path / "a.txt").write_text(text)
    corpus = corpus_of(settings_of(tmp_path), tmp_path / "cache")
    assert documents_of(corpus) == [text]


def test_what_an_earlier_reader_of_the_format_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,n\n" + "".join(f"some text {number},1\n" for number in range(60)))
    key = corpus_of(settings_of(f"{path}:text"), tmp_path / "cache").seen[0].key
    assert corpus_of(settings_of(f"{path}:text"), tmp_path / "cache").seen[0].key == key
    later = dataclasses.replace(registry.format_named("csv"), version=99)
    monkeypatch.setitem(registry._BY_NAME, "csv", later)
    assert corpus_of(settings_of(f"{path}:text"), tmp_path / "cache").seen[0].key != key


@pytest.mark.parametrize("kind", [Counting, Begun])
@pytest.mark.parametrize("dies_after", range(1, 1600, 150))
def test_a_killed_tokenization_goes_on_where_its_last_part_ended(
    tmp_path: Path, small_parts: None, dies_after: int, kind: type[Counting]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    texts = [f"document {number} {'x' * number}" for number in range(40)]
    path = write_jsonl(data / "a.jsonl", texts)
    path.write_text(path.read_text() + '{"n": 1}\n')
    (data / "b.txt").write_text("".join(f"line {number}\n" for number in range(50)))
    settings = settings_of(f"{data}:text", malformed_max=0.1)
    whole = corpus_of(settings, tmp_path / "whole", kind())
    total = whole.parts[0].tokens.size
    with pytest.raises(Killed):
        corpus_of(settings, tmp_path / "cache", kind(dies_after))
    second = kind()
    resumed = corpus_of(settings, tmp_path / "cache", second)
    assert resumed.parts[0].tokens.tolist() == whole.parts[0].tokens.tolist()
    assert resumed.summary == whole.summary  # rows are not counted twice
    assert second.chars <= max(total - dies_after, 0) + 64 + 3 * 48  # a part, and what a batch holds
    assert sorted(path.suffix for path in (tmp_path / "cache").glob("tokens-*")) == [".bin", ".manifest"]


def test_a_start_that_finds_its_place_shows_life_at_every_text_that_is_judged(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that needs 20 ms a text judges again what is in the ids already: that may take longer than a
    silent trainer is waited for."""
    path = write_jsonl(tmp_path / "a.jsonl", [f"some text {number}" for number in range(60)])
    settings, cache, use = settings_of(f"{path}:text"), tmp_path / "cache", Use(LENGTH, 1, seed=7)
    protected = [Protection(settings.source[0].path, (Domain("health", ("some",)),))]  # all of it is dropped
    with pytest.raises(Killed):
        corpus_of(settings, cache, Counting(600))
    life: list[str] = []

    class Watching(ByteTokenizer):
        def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
            life.append("tokenized")
            return super().encode_batch(texts)

    def shown(done: int, total: int) -> None:
        life.append("shown")

    open_corpus(settings, Watching(), cache, use, shown)
    assert life.index("tokenized") >= 40
    life.clear()
    with pytest.raises(DataError, match="fewer than"):
        open_corpus(settings, Watching(), cache, use, shown, protected)
    assert life.count("shown") >= 2 * 60


def test_a_folder_shows_life_at_each_of_its_files_before_any_is_read(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.bin").write_bytes(b"\0")
    (tmp_path / "a.txt").write_text("text")
    shown: list[int] = []
    list_data(settings_of(tmp_path, left_out_max=1.0), on_file=lambda: shown.append(1))
    assert len(shown) == 11


def test_progress_rises_to_all_the_bytes(tmp_path: Path, small_parts: None) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["some text"] * 40)
    (tmp_path / "b.txt").write_text("more text\n" * 40)
    told: list[tuple[int, int]] = []
    use = Use(LENGTH, 1, seed=7)
    open_corpus(
        settings_of(f"{tmp_path}:text"),
        ByteTokenizer(),
        tmp_path / "cache",
        use,
        lambda done, total: told.append((done, total)),
    )
    assert told == sorted(told) and len(told) > 10
    assert told[-1][0] == told[-1][1] == sum(path.stat().st_size for path in tmp_path.glob("*.*"))


def test_a_link_that_is_moved_between_looking_and_reading_is_not_read(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).write_text("text " * 20)
    source = tmp_path / "a.txt"
    source.symlink_to(tmp_path / "one")
    (listing,) = list_data(settings_of(source)).sources
    source.unlink()
    source.symlink_to(tmp_path / "other")
    with pytest.raises(DataError, match=r"a\.txt: it leads elsewhere since it was looked for"):
        tokenize(listing, ByteTokenizer(), tmp_path / "cache", lambda done: None, lambda tally: None)


def test_the_cache_is_reused_until_a_file_or_the_tokenizer_changes(tmp_path: Path) -> None:
    source, cache = tmp_path / "a.txt", tmp_path / "cache"
    source.write_text("some text " * 20)
    corpus_of(settings_of(source), cache)
    again = Counting()
    corpus_of(settings_of(source), cache, again)
    assert again.chars == 0
    corpus_of(settings_of(source), cache, Wide())
    assert len(list(cache.glob("*.bin"))) == 2
    for number, word in enumerate(("more ", "else ")):  # same path, same size, other text
        source.write_text(word * 40)
        os.utime(source, (1000 + number, 1000 + number))
        assert documents_of(corpus_of(settings_of(source), cache))[0] == word * 40


def test_what_a_source_was_before_is_removed_and_nothing_else(tmp_path: Path) -> None:
    data, other, cache = tmp_path / "data", tmp_path / "other.txt", tmp_path / "cache"
    data.mkdir()
    other.write_text("other text " * 20)
    corpus_of(settings_of(other), cache)
    mapped = None
    for number in range(4):
        (data / f"{number}.txt").write_text("some text " * 20)
        mapped = mapped or corpus_of(settings_of(data), cache)
        corpus_of(settings_of(data), cache)
    assert len(list(cache.glob("*.bin"))) == len(list(cache.glob("*.manifest"))) == 2
    assert documents_of(mapped) == ["some text " * 20]  # it was removed, and who has it reads on


@pytest.mark.parametrize("damage", ["truncate", "manifest", "no manifest", "wrong manifest"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, damage: str) -> None:
    source, cache = tmp_path / "a.txt", tmp_path / "cache"
    source.write_text("some text " * 20)
    corpus_of(settings_of(source), cache)
    (bin_path,), (manifest,) = cache.glob("*.bin"), cache.glob("*.manifest")
    if damage == "truncate":
        bin_path.write_bytes(bin_path.read_bytes()[:-2])
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("[1" if damage == "manifest" else '{"tokens": 201, "tally": {"x": 1}}')
    assert documents_of(corpus_of(settings_of(source), cache)) == ["some text " * 20]


def test_only_their_owner_may_read_the_ids(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 20)
    cache = tmp_path / "cache"
    corpus_of(settings_of(tmp_path / "a.txt"), cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in cache.iterdir()} == {0o600}


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 20)
    with pytest.raises(DataError, match="cannot write the token cache in /dev/null/cache: Not a directory"):
        corpus_of(settings_of(tmp_path / "a.txt"), Path("/dev/null/cache"))


def test_rows_without_the_field_end_the_work_before_all_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BATCH_PIECES", 50)
    path = write_jsonl(tmp_path / "a.jsonl", ["x"] * 11_000)
    text = path.read_text().splitlines()
    path.write_text("\n".join(line if i % 2 else "{}" for i, line in enumerate(text * 2)))
    counted = Counting()
    with pytest.raises(DataError, match="is malformed or has no text"):
        corpus_of(settings_of(f"{path}:text"), tmp_path / "cache", counted)
    assert counted.chars < 6000


def test_what_is_forgotten_is_the_named_source_and_whatever_could_hold_it(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in ("gone", "kept", "linked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"{name} " * 50)
        folder = settings_of(tmp_path / name)
        (source,) = folder.source
        linked = dataclasses.replace(source, follow_links=name == "linked")
        corpus_of(dataclasses.replace(folder, source=(linked,)), cache)
    with pytest.raises(Killed):
        (tmp_path / "begun").mkdir()
        (tmp_path / "begun" / "a.txt").write_text("begun " * 50)
        corpus_of(settings_of(tmp_path / "begun"), cache, Counting(dies_after=0))
    assert len(list(cache.glob("tokens-*.part"))) == 1
    named = {str(tmp_path / "gone"), str(tmp_path / "begun")}
    ids = 2 * (len("gone " * 50) + len("linked " * 50) + 2)
    assert tokens.forget(cache, named.__contains__) == ids
    (left,) = cache.glob("tokens-*.bin")
    assert b"kept" in np.fromfile(left, np.uint16).astype(np.uint8).tobytes()
    assert len(list(cache.glob("tokens-*"))) == 2, "ids and manifest"
    assert tokens.forget(tmp_path / "none", named.__contains__) == 0


def test_what_was_read_by_a_link_is_forgotten_by_the_name_of_what_it_led_to(tmp_path: Path) -> None:
    (tmp_path / "v1.txt").write_text("gone " * 50)
    (tmp_path / "link.txt").symlink_to(tmp_path / "v1.txt")
    corpus_of(settings_of(tmp_path / "link.txt"), tmp_path / "cache")
    assert tokens.forget(tmp_path / "cache", lambda path: path == f"{tmp_path}/other") == 0
    assert tokens.forget(tmp_path / "cache", lambda path: path == f"{tmp_path}/v1.txt") > 0
    assert not list((tmp_path / "cache").glob("tokens-*"))


def test_a_digest_that_is_made_while_its_source_is_revoked_brings_no_note_of_it_back(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("gone " * 50)
    listing = list_data(settings_of(tmp_path / "a.txt")).sources[0]
    file = tokenize(listing, ByteTokenizer(), tmp_path / "cache", lambda done: None, lambda tally: None)
    revoke = lambda: tokens.forget(tmp_path / "cache", lambda path: True)  # noqa: E731
    assert len(file.digest_of(100, revoke)) == 32
    assert not list((tmp_path / "cache").glob("tokens-*"))
