"""Rows -> examples: what is held out, what counts in the loss, and what is left out with its reason."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from bases import BOS, begin_with, make_tokenizer
from homes import base_spec, make_run
from transformers import AutoTokenizer

from tapestry.node.errors import UserError
from tapestry.node.sovereign.bench import tokenizers
from tapestry.node.sovereign.recipe import Recipe, load_recipe
from tapestry.node.sovereign.rows import IGNORED, Prepared, prepare
from tapestry.node.sovereign.training import _dataset
from tapestry.node.spec.data import Domain, Protection
from tapestry.node.spec.run import new_spec
from tapestry.node.spec.training import PRESETS, DataSpec, TrainingSpec
from tapestry.node.trainer.data.readers import csv as readers_csv
from tapestry.node.trainer.tokenizers.byte import ByteTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def _file(path: Path, rows: Sequence[Mapping[str, Any] | str]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def _prepared(tokenizer: Any, stage: str, *paths: str, length: int = 64, **keys: Any) -> Prepared:
    recipe = Recipe(stage, "full", paths, **keys)  # type: ignore[arg-type]
    return prepare(recipe, length, ByteTokenizer(), tokenizer, Path("unused"), lambda *_: None)


def _pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"the cube of {i} is ", "completion": str(i**3)} for i in range(count)]


def test_only_the_completion_and_its_end_count_in_the_loss(tmp_path: Path, tokenizer: Any) -> None:
    prepared = _prepared(tokenizer, "sft", _file(tmp_path / "a.jsonl", _pairs(40)))
    row = next(prepared.train())
    counted = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(counted) == "0" + tokenizer.eos_token
    assert tokenizer.decode(row["input_ids"]) == "the cube of 0 is 0" + tokenizer.eos_token


def test_a_folder_of_rows_is_read_without_what_is_hidden_and_links_that_lead_out(
    tmp_path: Path, tokenizer: Any
) -> None:
    """What lies elsewhere was not declared, and perhaps revoked."""
    (tmp_path / "rows").mkdir()
    _file(tmp_path / "rows" / "a.jsonl", _pairs(40))
    (tmp_path / "rows" / "b.jsonl").symlink_to(_file(tmp_path / "elsewhere.jsonl", _pairs(400)))
    _file(tmp_path / "rows" / ".hidden.jsonl", _pairs(400))
    (use,) = _prepared(tokenizer, "sft", str(tmp_path / "rows")).uses
    assert use.examples + use.held_out == 40
    assert any(line.startswith("left out, links that lead out of the folder") for line in use.left_out)


@pytest.mark.parametrize("stage", ["sft", "cpt"])
def test_a_source_that_is_a_link_is_kept_by_both_names(tmp_path: Path, tokenizer: Any, stage: str) -> None:
    (tmp_path / "link.jsonl").symlink_to(_file(tmp_path / "v1.jsonl", _pairs(400)))
    source = f"{tmp_path}/link.jsonl" + (":completion" if stage == "cpt" else "")
    recipe = Recipe(stage, "full", (source,))  # type: ignore[arg-type]
    (use,) = prepare(recipe, 8, ByteTokenizer(), tokenizer, tmp_path / "cache", lambda *_: None).uses
    assert (use.source, use.real) == (f"{tmp_path}/link.jsonl", (f"{tmp_path}/v1.jsonl",))


@pytest.mark.parametrize("add_bos", [False, True])
def test_text_has_the_bos_of_the_home_s_run_and_rows_that_of_the_base(tmp_path: Path, add_bos: bool) -> None:
    data = DataSpec("base", 16, add_bos=add_bos)
    spec = new_spec("a run", TrainingSpec(base_spec(tmp_path / "home", "llama"), data, PRESETS["nano"].train))
    home = make_run(tmp_path / "home", spec, members=1).home
    text, rows = tokenizers(home, home.base)
    path = tmp_path / "a.txt"
    path.write_text("line 1: the square of 1 is 1\n" * 99)
    prepared = prepare(
        Recipe("cpt", "full", (str(path),)), 8, text, rows, tmp_path / "cache", lambda *_: None
    )
    first = next(prepared.train())["input_ids"]
    assert (first[0] == rows.bos_token_id) is add_bos
    begin_with(home.base)
    _, rows = tokenizers(home, home.base)
    pair = next(_prepared(rows, "sft", _file(tmp_path / "a.jsonl", _pairs(40))).train())
    assert pair["input_ids"].count(rows.bos_token_id) == 1 and pair["input_ids"][0] == rows.bos_token_id


def test_of_messages_the_last_answer_counts(tmp_path: Path, tokenizer: Any) -> None:
    chat = [
        [
            {"role": "user", "content": f"the square of {i}?"},
            {"role": "assistant", "content": f"it is {i * i}"},
        ]
        for i in range(40)
    ]
    prepared = _prepared(tokenizer, "sft", _file(tmp_path / "a.jsonl", [{"messages": one} for one in chat]))
    row = next(prepared.train())
    assert "it is 0" in tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    assert "square" not in tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def test_a_share_is_held_out_and_nothing_equal_to_it_is_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    path = _file(tmp_path / "a.jsonl", _pairs(50) * 2)
    prepared = _prepared(tokenizer, "sft", path, held_out_share=0.1)
    held_out = {tuple(one["ids"]) for one in prepared.held_out["a"]}
    trained = [tuple(row["input_ids"]) for row in prepared.train()]
    assert len(held_out) == 5 and not held_out & set(trained)
    (use,) = prepared.uses
    assert (use.examples, use.held_out) == (len(trained), 5) == (90, 5)
    assert any("equal a held-out row" in line for line in use.left_out)


def test_a_row_that_spells_a_special_token_is_left_out_and_named(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*_pairs(40), {"prompt": f"a {BOS} b", "completion": "c"}]
    prepared = _prepared(tokenizer, "sft", _file(tmp_path / "a.jsonl", rows))
    assert prepared.uses[0].left_out == (f"1 ({tmp_path}/a.jsonl:41) rows that spell a special token",)
    assert all(tokenizer.bos_token_id not in row["input_ids"] for row in prepared.train())


def test_a_prompt_that_fills_the_sequence_is_left_out_and_a_long_answer_cut(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [*_pairs(40), {"prompt": "x " * 200, "completion": "y"}, {"prompt": "p", "completion": "z " * 200}]
    prepared = _prepared(tokenizer, "sft", _file(tmp_path / "a.jsonl", rows), length=32)
    said = " ".join(prepared.uses[0].left_out)
    assert "a.jsonl:41) rows whose prompt fills" in said and "a.jsonl:42) rows used, but cut" in said
    assert max(len(row["input_ids"]) for row in prepared.train()) == 32


def test_preferences_are_a_prompt_and_two_ends(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"{i}? ", "chosen": "yes", "rejected": "no"} for i in range(40)]
    prepared = _prepared(tokenizer, "dpo", _file(tmp_path / "a.jsonl", rows))
    example = prepared.held_out["a"][0]
    assert tokenizer.decode(example["chosen"]) == "yes" + tokenizer.eos_token
    assert next(prepared.train())["rejected"] == "no"


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_what_was_held_out_is_not_trained_on_when_the_file_has_grown_before_it(
    tmp_path: Path, tokenizer: Any, stage: str
) -> None:
    rows = [{"prompt": f"{i}? ", "completion": "yes", "chosen": "yes", "rejected": "no"} for i in range(60)]
    held_out = _prepared(tokenizer, stage, _file(tmp_path / "a.jsonl", rows[5:])).held_out
    grown = _prepared(tokenizer, stage, _file(tmp_path / "a.jsonl", rows))
    shifted = [one for one in held_out["a"] if one not in grown.held_out["a"]]
    trained = [example for _, example in grown.rows()]
    assert shifted and all(one in trained for one in shifted)
    kept = [example for _, example in grown.without(held_out).rows()]
    assert not any(one in kept for one in held_out["a"]) and len(kept) == len(trained) - len(shifted)


@pytest.mark.parametrize("row", [5, 40])
def test_a_row_that_nobody_judged_is_never_trained_on(tmp_path: Path, tokenizer: Any, row: int) -> None:
    path, secret = tmp_path / "a.jsonl", {"prompt": "the patient Smith ", "completion": "is ill"}
    health = (Protection(str(path), (Domain("health", ("patient",)),)),)
    recipe = Recipe("sft", "full", (_file(path, [*_pairs(40), secret]),))
    prepared = prepare(recipe, 64, ByteTokenizer(), tokenizer, Path("unused"), lambda *_: None, health)
    assert len([*prepared.train()]) == prepared.examples == 38
    rows: list[Mapping[str, Any]] = [*_pairs(40), secret]
    rows.insert(row, {"prompt": "the patient Jones ", "completion": "is ill too"})
    _file(path, rows)
    trained = []
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was read"):
        trained += [tokenizer.decode(one["input_ids"]) for one in prepared.train()]
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was read"):
        _dataset(prepared, recipe, tmp_path)
    assert not trained


@pytest.mark.parametrize("count", [63, 64, 65, 128, 200])
def test_the_same_rows_are_read_again_and_what_stands_before_a_change_is_still_used(
    tmp_path: Path, tokenizer: Any, count: int
) -> None:
    path = tmp_path / "a.jsonl"
    prepared = _prepared(tokenizer, "sft", _file(path, _pairs(count)))
    whole = [*prepared.train()]
    assert len(whole) == prepared.examples
    for changed in (_pairs(count)[:-1], [*_pairs(count), {"prompt": "one ", "completion": "more"}]):
        _file(path, changed)
        read: list[Any] = []
        with pytest.raises(UserError, match="changed while it was read"):
            for one in prepared.train():
                read.append(one)
        assert read == whole[: len(read)] and len(read) >= len(whole) - 64


def test_a_bad_row_is_counted_and_ends_nothing(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = '{"prompt": "a smile \\ud83d", "completion": "half of it"}'
    prepared = _prepared(tokenizer, "sft", _file(tmp_path / "a.jsonl", [*_pairs(40), cut]))
    (row,) = [row for row in prepared.train() if "half" in tokenizer.decode(row["input_ids"])]
    assert "smile \ufffd" in tokenizer.decode(row["input_ids"])
    (tmp_path / "a.csv").write_text(
        "prompt,completion\n" + "".join(f"{i},{'x' * 150_000 if i == 7 else i}\n" for i in range(120))
    )
    (use,) = _prepared(tokenizer, "sft", str(tmp_path / "a.csv")).uses
    assert use.left_out == (f"1 ({tmp_path}/a.csv:9) rows used, but cut at the sequence's end",)
    with (tmp_path / "a.csv").open("a") as file:
        file.write(f"1,{'x' * 200_001}\n")
    monkeypatch.setattr(readers_csv, "CELL_CHARS_MAX", 200_000)
    (use,) = _prepared(tokenizer, "sft", str(tmp_path / "a.csv")).uses
    assert use.left_out[0].startswith(f"1 ({tmp_path}/a.csv:122) rows without what")


def test_a_row_of_a_csv_that_a_comma_has_cut_in_two_is_left_out(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*(f"{i},{i}" for i in range(120)), "a, b,c"]
    (tmp_path / "a.csv").write_text("\n".join(["prompt,completion", *rows]) + "\n")
    (use,) = _prepared(tokenizer, "sft", str(tmp_path / "a.csv")).uses
    assert use.left_out[0].startswith(f"1 ({tmp_path}/a.csv:122) rows without what")


def test_messages_that_the_template_refuses_are_malformed_and_without_one_it_is_said(
    tmp_path: Path, tokenizer: Any
) -> None:
    answer = {"role": "assistant", "content": "b"}
    chats = [[{"role": "user", "content": f"{i}?"}, answer] for i in range(120)]
    odd = [{"role": "nobody", "content": "?"}, answer]
    strict = copy.copy(tokenizer)
    strict.chat_template = (
        "{% for one in messages %}{% if one.role == 'nobody' %}{{ raise_exception('no such role') }}"
        "{% endif %}{{ one.content }}{% endfor %}"
    )
    path = _file(tmp_path / "a.jsonl", [{"messages": one} for one in [*chats, odd]])
    assert "a.jsonl:121) rows without what" in _prepared(strict, "sft", path).uses[0].left_out[0]
    strict.chat_template = None
    with pytest.raises(UserError, match="the base has no chat template"):
        _prepared(strict, "sft", path)


def test_many_malformed_rows_are_refused_with_what_a_row_is(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*_pairs(40), "{not json", '{"prompt": "a"}']
    with pytest.raises(UserError, match=r"2 .*a\.jsonl:41.* of 42 rows without what sft needs") as raised:
        _prepared(tokenizer, "sft", _file(tmp_path / "a.jsonl", rows))
    assert '"completion": TEXT' in (raised.value.hint or "")


def test_tables_of_other_kinds_are_read_the_same(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = _pairs(40)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    found = [
        [row["input_ids"] for row in _prepared(tokenizer, "sft", path).train()]
        for path in (_file(tmp_path / "a.jsonl", rows), str(tmp_path / "a.parquet"), str(tmp_path / "a.csv"))
    ]
    assert found[0] == found[1] == found[2] and len(found[0]) == 38


def test_flags_go_before_the_recipe_file_and_every_key_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('stage = "sft"\nmethod = "lora"\ndata = ["a.jsonl"]\nsteps = 5\n')
    recipe = load_recipe(path, {"steps": 7, "lr": None, "data": ()})
    assert (recipe.steps, recipe.learning_rate) == (7, 2e-4)
    assert recipe.data == (str(Path.cwd() / "a.jsonl"),)
    path.write_text(path.read_text() + "lora_rang = 8\n")
    with pytest.raises(UserError, match="lora_rang: unknown key; did you mean lora_rank"):
        load_recipe(path, {})
    with pytest.raises(UserError, match="the recipe says no stage"):
        load_recipe(None, {"method": "full", "data": ("x",)})
