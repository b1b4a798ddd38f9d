"""What a model is measured on beside the member's own held-out rows: HOME/suite.toml, or `evaluate --suite
FILE`.

    [[set]]                       # held-out loss on data of one's own choice
    name = "general"
    stage = "cpt"                 # how it is read: as a recipe of that stage reads its data
    path = "general.txt"

    [[tasks]]                     # lm-eval's, from task files that lie on this disk
    include = "my-tasks"
    names = ["our_quiz"]

    [[command]]                   # anything else: it prints one JSON object of names and numbers
    name = "culture"
    run = ["python", "score.py", "{model}"]
    higher_is_better = true

Paths are relative to the suite's file, and commands run in its folder. Commands and task files are the
member's own and run as the member: a suite that somebody else wrote is a program that somebody else wrote.

Must not import torch or transformers at its top.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.progress import Told
from tapestry.node.sovereign.derivative import Measure
from tapestry.node.sovereign.recipe import Recipe, Stage
from tapestry.node.sovereign.rows import Example, prepare
from tapestry.node.spec.data import rebased_data
from tapestry.node.spec.tables import (
    FILLED_IN,
    Between,
    Pattern,
    TableError,
    read_table,
    read_toml,
    refuse_filled_in,
)
from tapestry.node.trainer.tokenizers.api import Tokenizer

EXTRA = "pip install 'tapestry-node[evaluate]'"
NAME = Pattern(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}", "1 to 64 letters, digits, blanks and . _ -")
OUTPUT_BYTES_MAX = 1 << 20  # of a command


@dataclass(frozen=True, slots=True)
class Set:
    """A set of examples, all of it measured on."""

    name: Annotated[str, NAME, "Its measures are NAME/loss, and of preferences NAME/prefers."]
    path: Annotated[str, "As --data of `derive` takes it."]
    stage: Annotated[Stage, "How it is read."] = "cpt"


@dataclass(frozen=True, slots=True)
class Tasks:
    """Tasks of lm-eval."""

    names: Annotated[tuple[str, ...], "As lm-eval calls them."]
    include: Annotated[str, "A folder of task files."] = ""
    limit: Annotated[int, Between(0, 1_000_000), "Samples of each task. 0: all."] = 0
    few_shot: Annotated[int, Between(0, 100), "Examples before each question."] = 0


@dataclass(frozen=True, slots=True)
class Command:
    """A program that prints figures."""

    name: Annotated[str, NAME, "Its measures are NAME/KEY."]
    run: Annotated[tuple[str, ...], "The program and its arguments; {model} is the model's folder."]
    higher_is_better: Annotated[bool, "Of all its figures."] = True
    timeout_s: Annotated[float, Between(0.1, 1e6), "After which it has failed."] = 3600.0
    folder: Annotated[str, FILLED_IN, "Where it runs: that of the suite's file."] = ""


@dataclass(frozen=True, slots=True)
class Suite:
    """All of it."""

    set: Annotated[tuple[Set, ...], "Held-out loss."] = ()
    tasks: Annotated[tuple[Tasks, ...], "lm-eval."] = ()
    command: Annotated[tuple[Command, ...], "Programs of the member's own."] = ()

    @classmethod
    def load(cls, path: Path) -> Suite:
        """Raises UserError."""
        try:
            raw = read_toml(path)
            suite = read_table(cls, raw)
            refuse_filled_in(cls, raw)
        except TableError as error:
            raise UserError(f"{path}: {error}") from error
        folder = path.absolute().parent
        return replace(
            suite,
            set=tuple(replace(one, path=_rebased(one.path, folder)) for one in suite.set),
            tasks=tuple(
                replace(one, include=str(folder / one.include) if one.include else "") for one in suite.tasks
            ),
            command=tuple(replace(one, folder=str(folder)) for one in suite.command),
        )


def _rebased(path: str, folder: Path) -> str:
    paths: list[str] = rebased_data({"paths": [path]}, folder)["paths"]
    return paths[0]


def set_examples(
    one: Set, length: int, text_tokenizer: Tokenizer, row_tokenizer: Any, cache: Path, told: Told
) -> list[Example]:
    """Every example of the set. Raises UserError."""
    recipe = Recipe(one.stage, "full", (one.path,), held_out_share=0.5)
    prepared = prepare(recipe, length, text_tokenizer, row_tokenizer, cache, told)
    held_out = [example for examples in prepared.held_out.values() for example in examples]
    if one.stage == "dpo":
        return held_out  # the other half is text, for trl
    rest = [{"ids": row["input_ids"], "labels": row["labels"]} for row in prepared.train()]
    return held_out + rest


def measured_tasks(tasks: Tasks, model: Path, device: str) -> list[Measure]:
    """Raises UserError where lm-eval is not installed or a task is not there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("[[tasks]] of a suite need lm-eval, which is not installed", hint=EXTRA)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lm_eval
        from lm_eval.tasks import TaskManager

        try:
            manager = TaskManager(include_path=tasks.include or None)
            found = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(model), "trust_remote_code": False, "dtype": "float32"},
                tasks=list(tasks.names),
                num_fewshot=tasks.few_shot or None,
                limit=tasks.limit or None,
                device=device,
                task_manager=manager,
                log_samples=False,
                verbosity="ERROR",
            )
        except (KeyError, ValueError, OSError) as error:
            raise UserError(
                f"lm-eval cannot run {', '.join(tasks.names)}: {str(error)[:200]}", exit_code=ExitCode.FAILED
            ) from error
    return list(_task_measures(found))


def _task_measures(found: Any) -> Iterator[Measure]:
    better = found.get("higher_is_better", {})
    for task, figures in sorted(found["results"].items()):
        for key, value in sorted(figures.items()):
            metric = key.partition(",")[0]
            if isinstance(value, int | float) and "stderr" not in key and metric in better.get(task, {}):
                count = int(found.get("n-samples", {}).get(task, {}).get("effective", 0))
                yield Measure(f"{task}/{metric}", float(value), bool(better[task][metric]), count)


def measured_command(command: Command, model: Path) -> list[Measure]:
    """What the program printed. Raises UserError if it failed or printed something else."""
    line = [part.replace("{model}", str(model.absolute())) for part in command.run]
    try:
        done = subprocess.run(
            line, capture_output=True, timeout=command.timeout_s, check=False, cwd=command.folder or None
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _command_failed(command, str(error)) from error
    if done.returncode:
        said = done.stderr[-400:].decode(errors="replace").strip().rpartition("\n")[2]
        raise _command_failed(command, f"exit {done.returncode}: {said or 'it said nothing'}")
    try:
        table = json.loads(done.stdout[:OUTPUT_BYTES_MAX])
        figures = {str(key): float(value) for key, value in table.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise _command_failed(command, "it must print one JSON object of names and numbers") from error
    if not figures or not all(math.isfinite(value) for value in figures.values()):
        raise _command_failed(command, "it printed no finite number")
    return [
        Measure(f"{command.name}/{key}", value, command.higher_is_better)
        for key, value in sorted(figures.items())
    ]


def _command_failed(command: Command, why: str) -> UserError:
    return UserError(f"the suite's command {command.name}: {why}", exit_code=ExitCode.FAILED)


def table(now: Sequence[Measure], base: Sequence[Measure]) -> list[str]:
    """The report for people: each figure beside the base's."""
    before = {one.name: one.value for one in base}
    rows = [("measure", "base", "this", "better by", "of")]
    for one in now:
        other = before.get(one.name)
        rows.append(
            (
                one.name + (" *" if one.own else ""),
                "-" if other is None else f"{other:.4f}",
                f"{one.value:.4f}",
                "-" if other is None else f"{one.gain_over(other):+.4f}",
                str(one.count) if one.count else "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [*lines, "* held out of the member's own data"] if any(one.own for one in now) else lines
