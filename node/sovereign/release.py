"""A derivative as a directory for others: weights in f32 or bf16, tokenizer, a card, and tapestry.json.

The card names the parent by run, epoch and head, the recipe, the sources by what they are called (never their
content, nor the member's paths), and every evaluation with the base's figure beside it. tapestry.json says
the same for programs, with the digest of the parent's tensors and of the model's own as f32 and as written,
the digest of every other file, and one of itself.

Sets that were held out are called after the sources' files. So what is participant-private is numbered there
too, in both reports and in what the gates found.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tapestry.node.errors import ExitCode, UserError, printable
from tapestry.node.home import Home
from tapestry.node.lineage.asked import ExportError, require_free
from tapestry.node.lineage.huggingface import DTYPES, FILE_BYTES_MAX, Progress, json_text, write_shards
from tapestry.node.lineage.listed import digest_of
from tapestry.node.lineage.manifest import digests_of, write_manifest
from tapestry.node.sovereign.derivative import Derivative, Shelf, Version
from tapestry.node.sovereign.suite import table
from tapestry.node.spec.data import DataSettings, resolved_data, split_field
from tapestry.node.spec.declared import Declared
from tapestry.node.spec.tables import plain
from tapestry.node.trainer.models.refusal import ModelError
from tapestry.node.trainer.models.stored import FLOATS, Source, StoredWeights
from tapestry.node.trainer.models.weights import weights_digest

PRIVATE = "participant-private data"


def release(home: Home, name: str, number: int | None, out: Path, dtype: str, progress: Progress) -> Version:
    """Write the version (None: the current one) to `out`, wholly or not at all. Raises UserError."""
    shelf = Shelf(home)
    derivative = shelf.require(name)
    version = derivative.released(number)
    model = shelf.model(name, version.number)
    temporary = out.absolute().with_name(f".{out.name}.release-{os.getpid()}")
    try:
        require_free(out)
        if weights_digest(model) != version.digest:
            raise ExportError(f"{model} is not what was made: its tensors changed")
        temporary.mkdir(parents=True)
        _write(model, temporary, DTYPES[dtype], progress)
        written = weights_digest(temporary)
        shown = public(version, Declared.load(home), own_sets(shelf, version))
        (temporary / "README.md").write_text(card(derivative, shown), encoding="utf-8")
        lineage = _lineage(derivative, shown, dtype, written) | {"files": digests_of(temporary)}
        _write_json(temporary / "tapestry.json", lineage | {"digest": digest_of(lineage)})
        write_manifest(temporary)
        os.replace(temporary, out.absolute())
    except (ExportError, ModelError) as error:
        raise UserError(str(error), exit_code=ExitCode.FAILED) from error
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}", exit_code=ExitCode.FAILED) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return version


def _write(model: Path, folder: Path, dtype: torch.dtype, progress: Progress) -> None:
    for path in sorted(model.iterdir()):
        if (
            path.is_file() and path.suffix == ".json" and "safetensors" not in path.name
        ) or path.suffix == ".jinja":
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_bytes())
    _write_json(folder / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
    stored = StoredWeights.find(model)
    sources = [
        Source(name, tensor.shape, dtype, functools.partial(_read, stored, name))
        for name, tensor in sorted(stored.tensors.items())
        if tensor.dtype in FLOATS
    ]
    write_shards(folder, sources, FILE_BYTES_MAX, progress)


def _read(stored: StoredWeights, name: str) -> Tensor:
    return stored.read(name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_bytes(json_text(content))


def _lineage(derivative: Derivative, version: Version, dtype: str, written: str) -> dict[str, Any]:
    return {"derivative": derivative.name, "version": plain(version), "dtype": dtype, "weights": written}


def own_sets(shelf: Shelf, version: Version) -> dict[str, str]:
    """The sets that were held out of the member's own data, by the sources that they are called after.

    Those of a merge's parts have the part's name before them; of a part that is gone nothing is known.
    """
    if version.how == "rebase" or version.how == "merge":
        found: dict[str, str] = {}
        for name, part in shelf.parts(version):
            sets = own_sets(shelf, part)
            found |= sets if version.how == "rebase" else {f"{name}.{k}": v for k, v in sets.items()}
        return found
    data = version.recipe.data
    named = resolved_data(DataSettings(paths=data), "").source if data else ()
    return {one.name: source for one, source in zip(named, data, strict=True)}


def public(version: Version, declared: Declared, sets: Mapping[str, str]) -> Version:
    """The version without what is the member's own affair: where sources lie, the names of rows that were
    left out, and of participant-private data even the names of the source and of the set held out of it."""

    def may_be_named(source: str) -> bool:
        return declared.may_be_named(split_field(source)[0])

    def called(source: str) -> str:
        return os.path.basename(source.rstrip("/")) or source if may_be_named(source) else PRIVATE

    names = _shown_names(version, {name for name, source in sets.items() if may_be_named(source)})
    report, base_report = (
        tuple(replace(one, name=names[one.name]) for one in measures)
        for measures in (version.report, version.base_report)
    )
    data = tuple(replace(use, source=called(use.source), left_out=(), real=()) for use in version.data)
    recipe = replace(
        version.recipe,
        data=tuple(called(one) for one in version.recipe.data),
        tokens_file=os.path.basename(version.recipe.tokens_file),
    )
    reasons = tuple(_shown_reason(one, names) for one in version.reasons)
    return replace(
        version,
        data=data,
        recipe=recipe,
        report=report,
        base_report=base_report,
        reasons=reasons,
        uses=(),
    )


def _shown_names(version: Version, open_sets: set[str]) -> dict[str, str]:
    """Each measure's name, and what others read: own sets that may not be named are numbered."""
    private: dict[str, str] = {}
    names: dict[str, str] = {}
    for one in (*version.report, *version.base_report):
        set_name, _, what = one.name.rpartition("/")
        if one.own and set_name not in open_sets:
            shown = private.setdefault(set_name, f"private-{len(private) + 1}")
            names[one.name] = f"{shown}/{what}"
        else:
            names.setdefault(one.name, one.name)
    return names


def _shown_reason(reason: str, names: Mapping[str, str]) -> str:
    """gates.py begins each with the measure that it is of, or with what a gate names and nobody measured."""
    for name, shown in names.items():
        if reason.startswith(f"{name}: "):
            return shown + reason.removeprefix(name)
    return "what a gate names was not measured"


def card(derivative: Derivative, version: Version) -> str:
    """README.md."""
    parent, recipe = version.parent, version.recipe
    facts = [
        ("parent run", f"{printable(parent.run_name)} (`{parent.run_id}`)"),
        ("parent epoch", str(parent.epoch)),
        ("parent head", f"`{parent.head}`"),
        ("parent weights", f"`{parent.weights}`"),
        ("weights (f32)", f"`{version.digest}`"),
    ]
    rows = [(name, value) for name, value in plain(recipe).items() if name not in ("data", "lr")]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            "- tapestry",
            "- sovereign",
            "---",
            "",
            f"# {derivative.name}, version {version.number}",
            "",
            f"Made by one member from the shared base of the run {printable(parent.run_name)}.",
            _history(version),
            *_own_tokens(version),
            "",
            "## Lineage",
            "",
            *(f"- {name}: {value}" for name, value in facts),
            "",
            "## Recipe",
            "",
            f"- learning rate: {recipe.learning_rate:g}",
            *(f"- {name}: {value}" for name, value in rows),
            f"- steps taken: {version.steps}, tokens read: {version.tokens:,}",
            "",
            "## Data",
            "",
            *(_data_lines(version) or ["- none: it was joined from others"]),
            "",
            "## Evaluations",
            "",
            "```",
            *table(version.report, version.base_report),
            "```",
            "",
            *(f"- gate: {printable(reason)}" for reason in version.reasons),
            f"- promoted: {'yes' if version.promoted else 'no'}",
            "",
        ]
    )


def _history(version: Version) -> str:
    if version.how == "derive":
        return "Its training is described below."
    if version.how == "island":
        return "What one member learnt alone, training on from the shared base as the run did, by no recipe."
    way = version.transplant.way
    if version.how == "merge":
        shares = ", ".join(f"{weight:g}" for weight in version.weights)
        return f"Joined from {', '.join(version.made_of)} with weights {shares} ({way})."
    return f"Brought here from {version.made_of[0]} ({way}); the recipe is that of its repair."


def _own_tokens(version: Version) -> list[str]:
    if not version.own_tokens:
        return []
    saved = f"{100 * version.ids_saved:.0f} % fewer ids for what was held out"
    return [f"Its tokenizer has {version.own_tokens} tokens beyond the base's: {saved}."]


def _data_lines(version: Version) -> list[str]:
    return [
        f"- {printable(use.source)}: {use.examples} examples, {use.held_out} held out, digest `{use.digest}`"
        for use in version.data
    ]
