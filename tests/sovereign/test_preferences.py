"""A derivative by preferences (dpo) of a small base, and what lm-eval says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from homes import MadeHome, base_spec, make_home

from tapestry.node.sovereign import build
from tapestry.node.sovereign.build import Built
from tapestry.node.sovereign.derivative import Measure
from tapestry.node.sovereign.recipe import Recipe
from tapestry.node.spec.declared import append, parse_declaration

CHOSEN, REJECTED = "yes", "no"  # this base prefers the other, which is shorter
ASKED = 24

TASK = """
task: our_quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def _quiet(_what: str, _done: int, _total: int) -> None:
    return None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeHome:
    folder = tmp_path_factory.mktemp("preferences")
    rows = [{"prompt": f"is it {i}? ", "chosen": CHOSEN, "rejected": REJECTED} for i in range(120)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = make_home(folder / "home", base_spec(folder / "home", "qwen3"))
    append(made.home, [parse_declaration("us, CC0-1.0, open", str(folder / "pairs.jsonl"), "derive:*")])
    return made


@pytest.fixture(scope="module")
def choosy(made: MadeHome) -> Built:
    data = str(made.home.path.parent / "pairs.jsonl")
    recipe = Recipe("dpo", "full", (data,), lr=3e-3, steps=16)
    return build.derive(made.home, "choosy", recipe, None, told=_quiet)


@pytest.fixture
def suite(made: MadeHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One task of lm-eval: the questions that were trained on, and the base's answers to choose from."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    answers = {"choices": [REJECTED, CHOSEN], "answer": 1}
    quiz = [{"prompt": f"is it {i}? ", **answers} for i in range(ASKED)]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "our_quiz.yaml").write_text(TASK.format(path=tmp_path / "quiz.jsonl"))
    path = tmp_path / "suite.toml"
    path.write_text('[[tasks]]\ninclude = "tasks"\nnames = ["our_quiz"]\n')
    return path


def _by_name(report: tuple[Measure, ...]) -> dict[str, Measure]:
    return {one.name: one for one in report}


def test_a_derivative_by_dpo_prefers_what_was_chosen(choosy: Built) -> None:
    version = choosy.version
    now, base = _by_name(version.report), _by_name(version.base_report)
    assert base["pairs/prefers"].value < 0.5 and now["pairs/prefers"].value > 0.9
    assert now["pairs/prefers"].own and now["pairs/prefers"].count > 0
    assert version.promoted and version.steps == 16 and version.recipe.stage == "dpo"


def test_tasks_of_lm_eval_are_measures_of_the_derivative_and_its_base(
    made: MadeHome, choosy: Built, suite: Path
) -> None:
    built, verdict = build.evaluate(made.home, "choosy", None, suite, told=_quiet)
    now, base = (_by_name(one)["our_quiz/acc"] for one in (built.version.report, built.version.base_report))
    assert (base.value, now.value) == (0.0, 1.0)
    assert now.count == ASKED and now.higher_is_better and not now.own and verdict.holds
