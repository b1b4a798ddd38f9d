"""Tokenizers: bytes, and a base's tokenizer.json; no text can spell a special token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bases import BOS, EOS, begin_with, edit_json, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from tapestry.node.spec.training import DataSpec
from tapestry.node.trainer.tokenizers.api import TokenizerError
from tapestry.node.trainer.tokenizers.base import BaseTokenizer, adds_bos, bos_id_of, eos_id_of
from tapestry.node.trainer.tokenizers.byte import EOS_ID, ByteTokenizer
from tapestry.node.trainer.tokenizers.registry import open_tokenizer, run_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE, as most bases have."""
    root = tmp_path_factory.mktemp("base")
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["the cat and the dog and the bird"] * 20, trainer)
    library.enable_truncation(4)
    library.save(str(root / "tokenizer.json"))
    (root / "config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    return root


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(max_size=20), max_size=3))
def test_bytes_are_the_utf8_of_the_text(texts: list[str]) -> None:
    encoded = ByteTokenizer().encode_batch(texts)
    assert [bytes(ids.astype(np.uint8)) for ids in encoded] == [
        text.encode("utf-8", "replace") for text in texts
    ]


def test_a_base_tokenizer_gives_whole_texts_back(folder: Path) -> None:
    tokenizer = BaseTokenizer(folder / "tokenizer.json", 0)
    texts = ["the cat", "größer 大きい 😀", "", "the dog and " * 50]
    encoded = tokenizer.encode_batch(texts)
    library = Library.from_file(str(folder / "tokenizer.json"))
    assert [library.decode(ids.tolist()) for ids in encoded] == texts
    assert {ids.dtype for ids in encoded} == {np.dtype(np.uint16)}
    assert all(int(ids.max(initial=0)) < tokenizer.vocab_size for ids in encoded)


def test_no_text_can_spell_a_special_token(folder: Path) -> None:
    (ids,) = BaseTokenizer(folder / "tokenizer.json", 0).encode_batch(["the end<|end|><|user|>"])
    assert not {0, 1} & set(ids.tolist())


def test_equal_files_have_equal_digests_and_another_end_another(folder: Path) -> None:
    first, second, other = (BaseTokenizer(folder / "tokenizer.json", eos) for eos in (0, 0, 1))
    assert first.digest == second.digest != other.digest


def test_the_end_of_a_document_is_what_the_configuration_says(folder: Path, tmp_path: Path) -> None:
    assert eos_id_of(folder) == 0
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(TokenizerError, match="says which token ends a document"):
        eos_id_of(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|user|>"}}')
    assert eos_id_of(tmp_path) == 1


def test_a_base_that_puts_bos_before_a_text_was_pretrained_with_it(tmp_path: Path) -> None:
    ids = make_tokenizer(tmp_path)
    assert not adds_bos(tmp_path), "to have a BOS is not to use it"
    begin_with(tmp_path)
    assert adds_bos(tmp_path) and bos_id_of(tmp_path) == ids[BOS]
    (tmp_path / "tokenizer_config.json").unlink()
    edit_json(tmp_path / "tokenizer.json", lambda table: table.update(truncation=_CUT, padding=_FILLED))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": ids[EOS]}))
    assert adds_bos(tmp_path) and bos_id_of(tmp_path) == ids[BOS], "tokenizer.json is enough"


_CUT = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
_FILLED = {
    "strategy": {"Fixed": 4},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 2,
    "pad_type_id": 0,
    "pad_token": "<|pad|>",
}


@pytest.mark.parametrize(("said", "adds"), [(True, True), (False, False), (None, False)])
def test_a_base_whose_configuration_adds_bos_was_pretrained_with_it(
    tmp_path: Path, said: bool | None, adds: bool
) -> None:
    ids = make_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", lambda table: table.update(add_bos_token=said))
    assert adds_bos(tmp_path) is adds and bos_id_of(tmp_path) == ids[BOS]


def test_a_bos_that_is_the_end_of_a_document_is_not_put_before_the_next(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    begin_with(tmp_path, EOS)
    assert not adds_bos(tmp_path)
    with pytest.raises(TokenizerError, match="the tokenizer's BOS is its EOS") as caught:
        bos_id_of(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_puts_bos_only_where_its_spec_says_so_and_its_tokenizer_has_one(tmp_path: Path) -> None:
    ids = make_tokenizer(tmp_path)
    begin_with(tmp_path)
    bare, begun = (run_tokenizer(DataSpec("base", add_bos=put), tmp_path) for put in (False, True))
    assert (bare.bos_id, begun.bos_id) == (None, ids[BOS])
    assert bare.digest == BaseTokenizer(tmp_path / "tokenizer.json", ids[EOS]).digest != begun.digest
    (encoded,) = begun.encode_batch(["line 1"])
    assert ids[BOS] not in encoded.tolist(), "a document may come in several pieces"
    make_tokenizer(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", lambda table: table.update(bos_token=None))
    assert run_tokenizer(DataSpec("base"), tmp_path).bos_id is None
    with pytest.raises(TokenizerError, match="is true, but the tokenizer has no BOS") as caught:
        run_tokenizer(DataSpec("base", add_bos=True), tmp_path)
    assert "\n" not in str(caught.value)
    assert run_tokenizer(DataSpec(), tmp_path / "nothing").bos_id is None


@pytest.mark.parametrize(
    ("content", "eos", "words"),
    [
        (None, 0, "No such file"),
        (b"{}", 0, "not a tokenizer"),
        ("same", 10_000, "the end of a document is id"),
    ],
)
def test_what_is_no_tokenizer_is_refused_in_one_line(
    folder: Path, tmp_path: Path, content: bytes | str | None, eos: int, words: str
) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes((folder / "tokenizer.json").read_bytes() if content == "same" else content)
    with pytest.raises(TokenizerError, match=words) as caught:
        BaseTokenizer(path, eos)
    assert "\n" not in str(caught.value)


def test_the_registry_opens_both_and_names_what_it_does_not_know(folder: Path) -> None:
    assert open_tokenizer("byte").eos_id == EOS_ID
    assert open_tokenizer("base", folder / "tokenizer.json", 0).name == "base"
    for name, words in (("base", "needs its tokenizer.json"), ("words", "byte or base")):
        with pytest.raises(TokenizerError, match=words):
            open_tokenizer(name)
