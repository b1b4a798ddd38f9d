"""Windows, what is held out of them, validation sets, segments; and data too small to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainer.data.kit import LENGTH, corpus_of, settings_of, write_jsonl

from tapestry.node.spec.data import DataSettings, ValidationSettings
from tapestry.node.trainer.data.corpus import Part, segments_of
from tapestry.node.trainer.data.errors import DataError
from tapestry.node.trainer.data.feed import Feed
from tapestry.node.trainer.tokenizers.byte import EOS_ID


def _text(path: Path, letter: str, windows: int) -> Path:
    """So many windows of eight letters and digits that say where they are."""
    path.write_text("".join(f"{letter}{number:06d} " for number in range(windows)))
    return path


def _said(windows: np.ndarray) -> list[str]:
    return [bytes(window[:-1].astype(np.uint8)).decode() for window in windows]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 400), st.data())
def test_training_windows_and_those_held_out_are_disjoint_and_together_all(
    windows: int, data: st.DataObject
) -> None:
    tokens = np.arange(windows * LENGTH + 1 + data.draw(st.integers(0, LENGTH - 1)), dtype=np.uint16)
    held_out = data.draw(st.sets(st.integers(0, windows - 1), max_size=windows - 1))
    part = Part("a", tokens, LENGTH, np.array(sorted(held_out), dtype=np.int64))
    trained = part.training(np.arange(part.train_windows))
    starts = [*trained[:, 0].tolist(), *part.validation(windows)[:, 0].tolist()]
    assert sorted(starts) == [LENGTH * number for number in range(windows)]
    assert (np.diff(trained, axis=1) == 1).all()


def test_two_percent_are_held_out_evenly_of_every_source_whatever_their_order(tmp_path: Path) -> None:
    french, german = _text(tmp_path / "fr.txt", "f", 1000), _text(tmp_path / "de.txt", "d", 500)
    said = {}
    for paths in ((french, german), (german, french)):
        corpus = corpus_of(settings_of(*paths), tmp_path / "cache")
        batches = corpus.validation(1000)
        assert {name: len(batch.ids) for name, batch in batches.items()} == {"fr": 20, "de": 10}
        said[paths] = {name: _said(batch.ids) for name, batch in batches.items()}
    assert said[french, german] == said[german, french]
    places = [int(text[1:7]) for text in said[french, german]["fr"]]
    assert places == list(range(1, 1000, 50))
    assert len(corpus.validation(6)["fr"].ids) == 3  # as many of each as there is time for


def test_given_sets_are_measured_whole_by_name_and_nothing_is_held_out_of_the_sources(tmp_path: Path) -> None:
    train, held = _text(tmp_path / "a.txt", "a", 100), _text(tmp_path / "b.txt", "b", 30)
    sets = (ValidationSettings(str(held), name="täglich"),)
    corpus = corpus_of(DataSettings(source=settings_of(train).source, validation=sets), tmp_path / "cache")
    assert list(corpus.validation(100)) == ["täglich"]
    assert len(corpus.validation(100)["täglich"].ids) == 30
    assert corpus.train_tokens == 100 * LENGTH


def test_a_pass_sees_every_training_window_once(tmp_path: Path) -> None:
    corpus = corpus_of(
        settings_of(_text(tmp_path / "a.txt", "a", 90), _text(tmp_path / "b.txt", "b", 210)),
        tmp_path / "cache",
    )
    said = _said(corpus.windows_at(0, 2 * corpus.train_tokens // LENGTH))
    half = len(said) // 2
    assert len(set(said[:half])) == half and sorted(said[:half]) == sorted(said[half:])
    assert said[:half] != said[half:]
    assert not set(said) & {text for b in corpus.validation(99).values() for text in _said(b.ids)}


def test_a_feed_gives_the_same_batch_for_an_epoch_and_step_whatever_was_drawn_between(tmp_path: Path) -> None:
    corpus = corpus_of(settings_of(_text(tmp_path / "a.txt", "a", 90)), tmp_path / "cache")
    feed = Feed(corpus, 4, tmp_path / "cursor.json")
    first = [_said(feed.draw(0, step).ids) for step in range(3)]
    assert _said(feed.draw(0, 1).ids) == first[1]
    feed.finish(0, 3)
    ahead = _said(feed.draw(1, 0).ids)
    assert _said(feed.draw(0, 2).ids) == first[2]
    again = Feed(corpus, 4, tmp_path / "cursor.json")
    assert _said(again.draw(1, 0).ids) == ahead
    assert [_said(again.draw(0, step).ids) for step in range(3)] == first
    assert again.passes == pytest.approx(12 / corpus.order.counts[0])


def test_segments_number_the_documents_of_a_window(tmp_path: Path) -> None:
    ids = np.array([[1, 2, EOS_ID, 3, EOS_ID, EOS_ID, 4, 5]])
    assert segments_of(ids, EOS_ID).tolist() == [[0, 0, 0, 1, 1, 2, 3, 3]]
    path = write_jsonl(tmp_path / "a.jsonl", ["abc", "defgh"] * 40)
    for attend in (True, False):
        corpus = corpus_of(settings_of(f"{path}:text"), tmp_path / "cache", attend=attend)
        batch, _ = corpus.batch(corpus.order.start(), 5)
        if attend:
            assert batch.segments is None
        else:
            assert batch.segments is not None and batch.segments.dtype == np.int32
            assert (batch.segments == segments_of(batch.ids[:, :-1], EOS_ID)).all()


def test_data_that_an_epoch_goes_over_too_often_are_refused_or_warned_of(tmp_path: Path) -> None:
    path = _text(tmp_path / "README.md", "a", 50)
    with pytest.raises(
        DataError, match=r"data README: an epoch of this run goes over it 4\.1 times"
    ) as caught:
        corpus_of(settings_of(path), tmp_path / "cache", windows_per_epoch=200)
    assert "--allow-doubtful-data" in str(caught.value)
    corpus = corpus_of(settings_of(path, allow_doubtful=True), tmp_path / "cache", windows_per_epoch=200)
    assert "goes over it 4.1 times" in corpus.summary[-1]
    assert corpus_of(settings_of(path, passes_per_epoch_max=5.0), tmp_path / "cache", windows_per_epoch=200)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x", "1 token, fewer than the 9 of one window"),  # an empty file: the end of its document
        ("short", "5 tokens, fewer than the 9 of one window"),
        ("one window.", "one training and one validation window of sequence_length 8 need 17"),
    ],
)
def test_too_little_text_for_two_windows_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.txt").write_text(text[:-1])
    with pytest.raises(DataError, match=words):
        corpus_of(settings_of(tmp_path / "a.txt"), tmp_path / "cache")


def test_the_summary_says_what_was_taken(tmp_path: Path) -> None:
    corpus = corpus_of(settings_of(_text(tmp_path / "a.txt", "a", 100)), tmp_path / "cache")
    assert corpus.summary == (
        "data a: 1 file, 800 B, 1 document, 801 tokens, 98 windows to train on and 2 to measure on",
    )
