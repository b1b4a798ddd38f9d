"""Sources, cache and windows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapestry.node.trainer.data import corpus as data
from tapestry.node.trainer.data.corpus import EOS_ID, Corpus, DataError, list_files, load_corpus

T = 16


def test_tokens_are_the_bytes_with_eos_after_each_document(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_bytes(b"second \xff\xfe" * 20)
    (tmp_path / "a.txt").write_bytes("first é".encode() * 20)
    corpus = load_corpus([str(tmp_path)], tmp_path / "cache", T)
    expected = [*("first é".encode() * 20), EOS_ID, *(b"second \xff\xfe" * 20), EOS_ID]
    assert corpus.tokens.tolist() == expected
    assert corpus.train_count + corpus.validation_count == len(expected)


def test_tokenizing_in_small_pieces_gives_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 256)) * 40)
    whole = load_corpus([str(tmp_path)], tmp_path / "one", T).tokens.tolist()
    monkeypatch.setattr(data, "READ_BYTES", 7)
    assert load_corpus([str(tmp_path)], tmp_path / "two", T).tokens.tolist() == whole


def test_the_last_two_percent_are_held_out(text_file: Path, tmp_path: Path) -> None:
    corpus = load_corpus([str(text_file)], tmp_path, T)
    assert corpus.validation_count == len(corpus.tokens) // 50


@given(
    st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(0, 2**20), st.integers(2 * (T + 1), 2000)
)
def test_windows_are_a_function_of_seed_epoch_and_step_within_the_training_part(
    seed: int, epoch: int, step: int, count: int
) -> None:
    corpus = _counting_corpus(count)
    windows = corpus.training_windows(seed, epoch, step, 5)
    assert windows.shape == (5, T + 1) and windows.dtype == np.int64
    assert (np.diff(windows, axis=1) == 1).all()
    assert windows.min() >= 0 and windows.max() < corpus.train_count
    assert (windows == corpus.training_windows(seed, epoch, step, 5)).all()


def test_windows_do_not_change_between_versions() -> None:
    """Members restart with newer NumPy; an epoch begun again must draw the same windows."""
    starts = _counting_corpus(1000).training_windows(1, 2, 3, 4)[:, 0]
    assert starts.tolist() == PINNED_STARTS


def test_another_seed_epoch_or_step_draws_other_windows() -> None:
    corpus = _counting_corpus(60_000)
    drawn = [
        corpus.training_windows(*place, 8)[:, 0].tolist()
        for place in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]
    ]
    assert len({tuple(starts) for starts in drawn}) == 4


@given(st.integers(2 * (T + 1), 5000), st.integers(1, 100))
def test_validation_windows_lie_in_the_held_out_part(count: int, count_max: int) -> None:
    corpus = _counting_corpus(count)
    windows = corpus.validation_windows(count_max)
    assert 1 <= len(windows) <= count_max
    assert windows.min() >= corpus.train_count and windows.max() < count


def test_stdlib_parts_are_disjoint_complete_and_balanced() -> None:
    whole = {file.path for file in list_files(["stdlib"])}
    parts = [list_files([f"stdlib:{k}/3"]) for k in (1, 2, 3)]
    paths = [file.path for part in parts for file in part]
    assert len(paths) == len(set(paths)) and set(paths) == whole
    sizes = [sum(file.size_bytes for file in part) for part in parts]
    assert max(sizes) - min(sizes) < 0.01 * sum(sizes)
    assert parts[0] == list_files(["stdlib:1/3"])
    assert not any("site-packages" in path for path in paths)


def test_the_cache_is_reused_until_a_file_changes(tmp_path: Path) -> None:
    source, cache = tmp_path / "a.txt", tmp_path / "cache"
    source.write_text("some text " * 20)
    load_corpus([str(source)], cache, T)
    before = {path.name: path.stat().st_ino for path in cache.iterdir()}
    load_corpus([str(source)], cache, T)
    assert {path.name: path.stat().st_ino for path in cache.iterdir()} == before
    source.write_text("other text " * 20)
    assert bytes(load_corpus([str(source)], cache, T).tokens[:5].astype(np.uint8)) == b"other"


def test_caches_of_the_same_sources_as_they_were_before_are_removed_and_no_others(tmp_path: Path) -> None:
    data, other, cache = tmp_path / "data", tmp_path / "other.txt", tmp_path / "cache"
    data.mkdir()
    other.write_text("other text " * 20)
    load_corpus([str(other)], cache, T)
    dead, building = cache / ".tokens-ab.bin.1", cache / ".tokens-ab.bin.2"
    dead.write_text("left by a killed builder")
    os.utime(dead, (1000, 1000))
    building.write_text("at work")
    mapped = None
    for number in range(4):
        (data / f"{number}.txt").write_text("some text " * 20)
        mapped = mapped or load_corpus([str(data)], cache, T)
        load_corpus([str(data)], cache, T)
    assert len(list(cache.glob("*.bin"))) == len(list(cache.glob("*.manifest"))) == 2
    assert not dead.exists() and building.exists()
    assert bytes(mapped.tokens[:4].astype(np.uint8)) == b"some"  # it was removed, and who has it reads on


def test_a_file_touched_is_a_file_changed(tmp_path: Path) -> None:
    """Same path, same size, other text."""
    source = tmp_path / "a.txt"
    for number, word in enumerate(("some ", "else ")):
        source.write_text(word * 40)
        os.utime(source, (1000 + number, 1000 + number))
        tokens = load_corpus([str(source)], tmp_path / "cache", T).tokens
        assert bytes(tokens[:5].astype(np.uint8)).decode() == word


def test_a_cache_inside_the_data_folder_is_not_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 20)
    before = load_corpus([str(tmp_path)], tmp_path / "cache", T).tokens.tolist()
    assert load_corpus([str(tmp_path)], tmp_path / "cache", T).tokens.tolist() == before
    assert len(list_files([str(tmp_path)])) == 1


@pytest.mark.parametrize("damage", ["truncate", "manifest", "no manifest"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, damage: str) -> None:
    source, cache = tmp_path / "a.txt", tmp_path / "cache"
    source.write_text("some text " * 20)
    tokens = load_corpus([str(source)], cache, T).tokens.tolist()
    (bin_path,), (manifest,) = cache.glob("*.bin"), cache.glob("*.manifest")
    if damage == "truncate":
        bin_path.write_bytes(bin_path.read_bytes()[:-2])
    elif damage == "manifest":
        manifest.write_text("[1")
    else:
        manifest.unlink()
    assert load_corpus([str(source)], cache, T).tokens.tolist() == tokens


def test_jsonl_takes_the_named_field_of_every_line(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}", "n": i}) + "\n\n" for i in range(9)))
    corpus = load_corpus([f"{path}:text"], tmp_path / "cache", T)
    documents = bytes(np.where(corpus.tokens == EOS_ID, 10, corpus.tokens).astype(np.uint8)).decode()
    assert documents.splitlines() == [f"document {i}" for i in range(9)]


def test_a_folder_leaves_out_binaries_hidden_files_and_loops_of_links(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "good.py").write_text("x = 1\n")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2")
    (tmp_path / ".hidden.txt").write_text("secret")
    (tmp_path / "picture.png").write_bytes(b"x")
    (tmp_path / "empty.txt").touch()
    assert [Path(file.path).name for file in list_files([str(tmp_path)])] == ["good.py"]


def test_a_file_given_twice_counts_once(text_file: Path) -> None:
    assert len(list_files([str(text_file), str(text_file.parent)])) == 1


def _missing(root: Path) -> str:
    return str(root / "nowhere.txt")


def _empty_folder(root: Path) -> str:
    return str(root)


def _unknown_suffix(root: Path) -> str:
    return _file(root, "model.bin", b"text")


def _no_suffix(root: Path) -> str:
    return _file(root, "notes", b"text")


def _binary(root: Path) -> str:
    return _file(root, "a.txt", b"a\0b")


def _too_small(root: Path) -> str:
    return _file(root, "a.txt", b"short")


def _jsonl_without_field(root: Path) -> str:
    return _file(root, "a.jsonl", b'{"text": "x"}\n')


def _jsonl_field_missing(root: Path) -> str:
    return _file(root, "a.jsonl", b'{"text": "x"}\n{"body": "y"}\n') + ":text"


def _jsonl_broken(root: Path) -> str:
    return _file(root, "a.jsonl", b'{"text": "x"}\n{"text"\n') + ":text"


def _link_loop(root: Path) -> str:
    (root / "a.txt").symlink_to(root / "b.txt")
    (root / "b.txt").symlink_to(root / "a.txt")
    return str(root / "a.txt")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_missing, "nowhere.txt: there is no such file or folder"),
        (_empty_folder, "no text files in this folder"),
        (_unknown_suffix, ".bin is not known as text; rename it to .txt"),
        (_no_suffix, "a name without a suffix is not known as text"),
        (_binary, "this is a binary file"),
        (_too_small, f"holds 6 tokens; .* sequence_length {T} need {2 * (T + 1)}: add more text"),
        (_jsonl_without_field, "say which field holds the text, as in --data .*a.jsonl:text"),
        (_jsonl_field_missing, r"a.jsonl, line 2: no text in field 'text' \(there are: body\)"),
        (_jsonl_broken, "a.jsonl, line 2: not valid JSON"),
        (_link_loop, "cannot be read: Too many levels of symbolic links"),
        (lambda _: "stdlib:4/3", "the part must be between 1 and 3"),
        (lambda _: "stdlib:1/99999", "fewer than 99999 parts"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(tmp_path: Path, make, words: str) -> None:  # type: ignore[no-untyped-def]
    root = tmp_path / "source"
    root.mkdir()
    with pytest.raises(DataError, match=words) as caught:
        load_corpus([make(root)], tmp_path / "cache", T)
    assert "\n" not in str(caught.value)


def test_no_data_names_the_flag() -> None:
    with pytest.raises(DataError, match="--data stdlib"):
        list_files([])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    path.chmod(0)
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Permission denied"):
        list_files([str(path)])


def test_a_cache_that_cannot_be_written_is_named(text_file: Path) -> None:
    with pytest.raises(DataError, match="cannot write the token cache in /dev/null/cache: Not a directory"):
        load_corpus([str(text_file)], Path("/dev/null/cache"), T)


PINNED_STARTS = [278, 693, 288, 12]


def _counting_corpus(count: int) -> Corpus:
    """Token i is i, so a window shows where it lies."""
    tokens = np.arange(count, dtype=np.uint16)
    validation = max(count // data.HELD_OUT_DIVISOR, T + 1)
    return Corpus(tokens, count - validation, validation, T)


def _file(root: Path, name: str, content: bytes) -> str:
    (root / name).write_bytes(content)
    return str(root / name)
