"""What models are measured on, and how a version is judged."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tapestry.node.disk.files import atomic_write
from tapestry.node.errors import ExitCode, UserError, as_user_error
from tapestry.node.home import Home
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.follow import Broken, read_genesis
from tapestry.node.progress import Told
from tapestry.node.sovereign import suite as suites
from tapestry.node.sovereign.asked import SUITE, too_long
from tapestry.node.sovereign.derivative import Measure, Shelf, Version
from tapestry.node.sovereign.gates import Gates, Verdict, judge
from tapestry.node.sovereign.losses import measure_set
from tapestry.node.sovereign.plans import read_held_out
from tapestry.node.sovereign.recipe import Recipe
from tapestry.node.sovereign.rows import Example
from tapestry.node.sovereign.suite import Suite
from tapestry.node.sovereign.tokens import Pieces, counted, in_base_ids, kept_tokens, pieces_of
from tapestry.node.sovereign.training import device_of
from tapestry.node.spec.tables import plain
from tapestry.node.spec.training import DataSpec
from tapestry.node.trainer.models.pretrained import load_config, quiet, sequence_length_max
from tapestry.node.trainer.models.weights import load_base
from tapestry.node.trainer.tokenizers.api import Tokenizer
from tapestry.node.trainer.tokenizers.registry import run_tokenizer

LENGTH_MAX = 1024  # of a sequence, where neither recipe nor base says less
LONGEST = 1 << 20  # ids that a model takes which does not say how many
GATES = "gates.toml"
NO_PIECES: Pieces = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Bench:
    """What models are measured on."""

    own: dict[str, list[Example]]  # held out of the member's data, by set
    others: dict[str, list[Example]]
    suite: Suite
    pieces: Pieces  # of own tokens; the base does not know them

    def in_base_ids(self, examples: Sequence[Example], model: Path) -> list[Example]:
        """As the base reads them."""
        if not self.pieces:
            return list(examples)
        longest = sequence_length_max(load_config(model)) or LONGEST
        return [part for one in examples for part in in_base_ids(one, self.pieces, longest)]

    @property
    def ids_saved(self) -> float:
        """The share that own tokens save, of the ids of what was held out."""
        held_out = [one for examples in self.own.values() for one in examples]
        theirs = counted(part for one in held_out for part in in_base_ids(one, self.pieces, LONGEST))
        return 1 - counted(held_out) / theirs if self.pieces and theirs else 0.0


def measured(model: Path, bench: Bench, told: Told, *, is_base: bool = False) -> tuple[Measure, ...]:
    """All figures of a model. Losses are per id of the base, whoever is measured. Raises UserError."""
    measures: list[Measure] = []
    sets = {**bench.own, **bench.others}
    total, done = sum(map(len, sets.values())), 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        told("measuring", done, total)

    if sets:
        quiet()
        loaded = load_base(model, torch.float32).to(device_of()).eval()
        for name, examples in sets.items():
            own = name in bench.own
            theirs = bench.in_base_ids(examples, model)
            count = counted(theirs) if bench.pieces else 0
            read = theirs if is_base else examples
            measures += measure_set(loaded, name, read, own=own, tick=tick, count=count)
        del loaded
    for tasks in bench.suite.tasks:
        told("lm-eval", 0, 1)
        measures += suites.measured_tasks(tasks, model, device_of())
    for command in bench.suite.command:
        told(command.name, 0, 1)
        measures += suites.measured_command(command, model)
    if odd := [one.name for one in measures if not math.isfinite(one.value)]:
        raise UserError(
            f"{', '.join(odd)} of {model} is no number, and nobody can judge by it",
            exit_code=ExitCode.FAILED,
            hint="a model that diverged is made anew with a smaller --lr and --restart; "
            "a task that counts nothing is taken out of the suite",
        )
    return tuple(measures)


def bench_of(
    home: Home,
    folder: Path,
    base: Path,
    model: Path,  # whose tokenizer has the own tokens
    recipe: Recipe,
    suite_file: Path | None,
    told: Told,
) -> Bench:
    path = suite_file or home.path / SUITE
    suite = Suite.load(path) if suite_file or path.exists() else Suite()
    own = read_held_out(folder)
    pieces = pieces_of(base, kept_tokens(folder))
    return with_suite(own, suite, model, Shelf(home), told, recipe, pieces)


def with_suite(
    own: dict[str, list[Example]],
    suite: Suite,
    model: Path,
    shelf: Shelf,
    told: Told,
    recipe: Recipe | None = None,
    pieces: Pieces = NO_PIECES,
) -> Bench:
    others = {}
    for one in suite.set:
        if one.name in own:
            raise UserError(f"the suite's set {one.name} has the name of a set of one's own data: rename it")
        length = length_of(recipe or Recipe("cpt", "full", ()), model)
        text, rows = tokenizers(shelf.home, model)
        others[one.name] = suites.set_examples(one, length, text, rows, shelf.cache, told)
    return Bench(own, others, suite, pieces)


def version_before(shelf: Shelf, version: Version) -> Version | None:
    """The version that a rebase came from."""
    if version.how != "rebase":
        return None
    name, _, number = version.made_of[0].partition(":")
    return shelf.require(name).version(int(number))


def judged(home: Home, version: Version, before: Version | None) -> Verdict:
    gates = Gates.load(home.path / GATES)
    if before is None:
        return judge(gates, version.report, version.base_report)
    return judge(gates, version.report, version.base_report, before.report, before.base_report)


def write_report(place: Path, version: Version) -> None:
    report = {
        "model": plain(version.report),
        "base": plain(version.base_report),
        "promoted": version.promoted,
        "reasons": list(version.reasons),
    }
    atomic_write(place / "report.json", json.dumps(report, indent=1).encode() + b"\n", 0o600)


def tokenizers(home: Home, model: Path) -> tuple[Tokenizer, Any]:
    """As the home's run reads text, with its BOS, and as transformers loads it, with its chat template.

    Raises UserError, TokenizerError.
    """
    from transformers import AutoTokenizer

    quiet()
    text = run_tokenizer(replace(_data_of(home), tokenizer="base"), model)  # an export of bytes has one too
    return text, AutoTokenizer.from_pretrained(model, local_files_only=True)


def _data_of(home: Home) -> DataSpec:
    """How the home's run reads text. Raises UserError, OSError."""
    with as_user_error(Broken):
        return read_genesis(home.genesis, ReaderCrypto())[1].data


def length_of(recipe: Recipe, model: Path) -> int:
    """Tokens of a sequence: no more than the base has positions for, less one that is only predicted."""
    longest = sequence_length_max(load_config(model)) or LENGTH_MAX + 1
    if recipe.sequence_length > longest:
        raise too_long(recipe.sequence_length, longest)
    return min(recipe.sequence_length or LENGTH_MAX, longest - 1)
