"""Tokens of one's own: which are learnt, what becomes of the base's rows, and that losses stay comparable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from homes import MadeHome, base_spec, make_home
from transformers import AutoModelForCausalLM, AutoTokenizer

from tapestry.node.errors import UserError
from tapestry.node.sovereign import build
from tapestry.node.sovereign.build import Built
from tapestry.node.sovereign.derivative import Shelf, Transplant
from tapestry.node.sovereign.recipe import Recipe
from tapestry.node.sovereign.release import card, public
from tapestry.node.sovereign.rows import IGNORED
from tapestry.node.sovereign.tokens import counted, extend, in_base_ids, kept_tokens, learned, read_tokens
from tapestry.node.spec.declared import Declared, append, parse_declaration
from tapestry.node.trainer.models.stored import StoredWeights

WORDS = ("kaffekoppen", "sommerfugl", "blåbærsyltetøy")


def _quiet(_what: str, _done: int, _total: int) -> None:
    return None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeHome:
    folder = tmp_path_factory.mktemp("tokens")
    text = "".join(f"{WORDS[i % 3]} og {WORDS[i % 2]} er {i % 9}\n" for i in range(900))
    (folder / "text.txt").write_text(text)
    made = make_home(folder / "home", base_spec(folder / "home", "llama"))
    append(made.home, [parse_declaration("us, CC0-1.0, open", str(folder / "text.txt"), "derive:*")])
    made.advance(1, scale=0.005)
    return made


def _recipe(made: MadeHome, **keys: object) -> Recipe:
    data = (str(made.home.path.parent / "text.txt"),)
    keys = {"lr": 1e-2, "steps": 10, "rows_share": 0.5, "batch_size": 4, "sequence_length": 16, **keys}
    return Recipe("cpt", "full", data, **keys)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def norwegian(made: MadeHome) -> Built:
    return build.derive(made.home, "norwegian", _recipe(made, own_tokens=6), None, told=_quiet)


@pytest.fixture(scope="module")
def base(made: MadeHome, norwegian: Built) -> Path:
    return Shelf(made.home).base(norwegian.version.parent)


def test_what_is_learnt_are_whole_frequent_tokens_that_cut_up_none_of_the_bases(base: Path) -> None:
    text = " ".join(WORDS) * 50
    tokens = learned(base, lambda: [text], 20)
    assert any(word in token for word in WORDS for token in tokens)
    vocabulary = AutoTokenizer.from_pretrained(base)
    known = [vocabulary.decode([number]) for number in range(len(vocabulary))]
    assert tokens and not [token for token in tokens if any(token in one for one in known)]
    assert learned(base, lambda: [text], 20) == tokens and len(learned(base, lambda: [text], 3)) == 3


def test_a_derivative_reads_and_writes_its_own_tokens(norwegian: Built) -> None:
    tokens = kept_tokens(norwegian.folder.parent.parent)
    tokenizer = AutoTokenizer.from_pretrained(norwegian.folder)
    assert norwegian.version.own_tokens == len(tokens) == 6
    for token in tokens:
        (number,) = tokenizer.encode(token, add_special_tokens=False)
        assert tokenizer.decode([number]) == token
    model = AutoModelForCausalLM.from_pretrained(norwegian.folder)
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    assert norwegian.version.promoted and norwegian.version.steps == 15


def test_its_loss_is_per_id_of_the_base_so_that_it_can_be_compared(norwegian: Built) -> None:
    (own,), (before,) = norwegian.version.report, norwegian.version.base_report
    assert own.count == before.count
    lines = (norwegian.folder.parent.parent / "held-out.jsonl").read_text().splitlines()
    held_out = [json.loads(line) for line in lines]
    assert own.count > 1.2 * counted(held_out)  # the same text in fewer ids
    assert norwegian.version.ids_saved == pytest.approx(1 - counted(held_out) / own.count, abs=1e-4)


def test_a_new_row_begins_as_the_mean_of_its_pieces_and_no_other_row_changes(
    base: Path, tmp_path: Path
) -> None:
    extend(base, WORDS, tmp_path / "extended")
    before, after = StoredWeights.find(base), StoredWeights.find(tmp_path / "extended")
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name not in before.tensors:
            continue  # tied
        old, new = before.read(name).float(), after.read(name)
        first = len(tokenizer)
        for index, word in enumerate(WORDS):
            ids = tokenizer.encode(word, add_special_tokens=False)
            assert torch.equal(new[first + index], old[ids].mean(0))
        assert torch.equal(new[:first], old[:first])


def test_the_steps_for_rows_alone_change_nothing_else(made: MadeHome, base: Path) -> None:
    class Ended(Exception):
        pass

    def ending(what: str, done: int, total: int) -> None:
        if (what, total) == ("training", 10):  # the first of the steps for all
            raise Ended

    recipe = _recipe(made, own_tokens=6)
    with pytest.raises(Ended):
        build.derive(made.home, "rows", recipe, None, told=ending)
    place = Shelf(made.home).of("rows") / "v1"
    seen = {
        name: StoredWeights.find(place / path)
        for name, path in {"before": "extended", "after": "rows/model"}.items()
    }
    moved = {
        name: (seen["before"].read(name) != seen["after"].read(name))
        .flatten(1)
        .any(1)
        .nonzero()
        .flatten()
        .tolist()
        for name in seen["before"].tensors
        if seen["before"].read(name).dim() == 2
    }
    rows = {name: found for name, found in moved.items() if found}
    first = len(AutoTokenizer.from_pretrained(base))
    assert rows and all(min(found) >= first for found in rows.values())
    built = build.derive(made.home, "rows", recipe, None, told=_quiet)  # and goes on from there
    assert built.version.steps == 15 and not (place / "rows").exists()


def test_it_is_rebased_with_its_tokens_and_merged_only_with_those_that_have_the_same(
    made: MadeHome, norwegian: Built
) -> None:
    plain = build.derive(
        made.home, "plain", _recipe(made, steps=2), norwegian.version.parent.epoch, told=_quiet
    )
    with pytest.raises(UserError, match="different tokens of their own"):
        build.merge(made.home, "both", ["plain", "norwegian"], (), Transplant(), told=_quiet)
    assert plain.version.own_tokens == 0
    made.advance(1, scale=0.002)
    rebased = build.rebase(made.home, "norwegian", None, Transplant(), told=_quiet)
    assert (
        rebased.version.own_tokens == 6 and rebased.version.parent.epoch == norwegian.version.parent.epoch + 1
    )
    (now,), (old,) = rebased.version.report, norwegian.version.report
    assert now.value < 1.2 * old.value and now.count == old.count


def test_adapters_leave_the_rows_as_the_first_steps_left_them(made: MadeHome, norwegian: Built) -> None:
    recipe = replace(_recipe(made, own_tokens=6), method="lora")
    built = build.derive(made.home, "adapted", recipe, norwegian.version.parent.epoch, told=_quiet)
    own, other = StoredWeights.find(built.folder), StoredWeights.find(norwegian.folder)
    name = next(name for name in own.tensors if "embed" in name)
    assert built.version.own_tokens == 6 and (built.folder.parent / "adapters").is_dir()
    assert own.read(name).shape == other.read(name).shape


def test_its_card_says_so_and_names_no_path(made: MadeHome, norwegian: Built) -> None:
    version = replace(
        norwegian.version, recipe=replace(norwegian.version.recipe, tokens_file="/secret/t.txt")
    )
    shown = public(version, Declared.load(made.home), {})
    text = card(norwegian.derivative, shown)
    assert "has 6 tokens beyond the base's" in text and "/secret" not in text and "t.txt" in text


def test_a_list_of_tokens_is_read_strictly(base: Path, tmp_path: Path) -> None:
    listed = tmp_path / "tokens.txt"
    listed.write_text(f" {WORDS[0]}\n\n{WORDS[1]}\n{WORDS[1]}\n", encoding="utf-8")
    assert read_tokens(listed, base) == (f" {WORDS[0]}", WORDS[1])
    listed.write_text("e\n")
    with pytest.raises(UserError, match="'e' is no new token"):
        read_tokens(listed, base)
    listed.write_text("\n")
    with pytest.raises(UserError, match="has 0 tokens"):
        read_tokens(listed, base)


def test_an_example_in_the_bases_ids_counts_every_id_once_however_it_is_cut() -> None:
    pieces = {100: [1, 2, 3], 101: [4, 5]}
    example = {"ids": [7, 100, 101, 8], "labels": [IGNORED, 100, 101, 8]}
    (whole,) = in_base_ids(example, pieces, 64)
    assert whole == {"ids": [7, 1, 2, 3, 4, 5, 8], "labels": [IGNORED, 1, 2, 3, 4, 5, 8]}
    parts = in_base_ids(example, pieces, 3)
    assert [part["ids"] for part in parts] == [[7, 1, 2], [2, 3, 4], [4, 5, 8]]
    assert [one for part in parts for one in part["labels"] if one != IGNORED] == [1, 2, 3, 4, 5, 8]
    assert counted(parts) == counted([whole]) == 6


def test_a_preference_of_a_suite_is_read_by_the_base_too():
    pair = {"prompt": [7, 100], "chosen": [101], "rejected": [8]}
    (read,) = in_base_ids(pair, {100: [1, 2, 3], 101: [4, 5]}, 3)
    assert read == {"prompt": [7, 1, 2, 3], "chosen": [4, 5], "rejected": [8]} and counted([read]) == 0
