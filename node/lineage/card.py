"""README.md of an export: a model card, as the Hugging Face hub reads it.

It says what the chain proves: run, epoch, head, state digest, and how much each member counted in the means.
How many tokens a member trained on only it knows, and the card says so. What a run does not know (a licence
nobody stated) is left out, not guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from tapestry.node.errors import printable
from tapestry.node.protocol.record import Record
from tapestry.node.spec.run import RunSpec
from tapestry.node.spec.training import TransformersSpec

CHANGES_SHOWN = 32  # of the newest, of how a run trains


@dataclass(frozen=True, slots=True)
class Contributor:
    """A member, over all records that made the state."""

    peer: str
    share: float  # in the means, by the weights of the records: all members' add up to 1
    tokens: int  # as it tells: nobody else can know


@dataclass(frozen=True, slots=True)
class Lineage:
    """What an export tells of where it comes from; tapestry.json holds the same."""

    run_id: str
    run_name: str
    epoch: int
    head: str
    state_digest: str
    members: tuple[Contributor, ...] = ()  # whoever counted most first
    licence: str = ""  # of the base
    data: tuple[str, ...] = ()  # descriptions that the exporting member publishes
    others: tuple[tuple[str, tuple[str, ...]], ...] = ()  # of `members`: peer id and what it signed
    vectors: tuple[tuple[str, str], ...] = ()  # digest of each vector of the state, in order
    settings: tuple[tuple[int, str], ...] = ()  # that records changed since the spec: epoch, "key number"

    def table(self) -> dict[str, Any]:
        """For tapestry.json."""
        return {
            "run_id": self.run_id,
            "run_name": self.run_name,
            "epoch": self.epoch,
            "head": self.head,
            "state_digest": self.state_digest,
            "members": [
                {"peer": one.peer, "share": round(one.share, 6), "tokens": one.tokens} for one in self.members
            ],
            "vectors": [list(pair) for pair in self.vectors],
        }


def members_of(records: Iterable[Record]) -> tuple[Contributor, ...]:
    """Who contributed; whoever counted most first, then by peer id."""
    shares: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for record in records:
        total = sum(member.weight for member in record.body.members)
        for member in record.body.members:
            if member.weight:
                shares[member.peer] = shares.get(member.peer, 0.0) + member.weight / total
                tokens[member.peer] = tokens.get(member.peer, 0) + member.tokens
    means = math.fsum(shares.values())  # as many as records that had any contribution
    found = [Contributor(peer, share / means, tokens[peer]) for peer, share in shares.items()]
    return tuple(sorted(found, key=lambda one: (-one.share, one.peer)))


def settings_of(records: Iterable[Record]) -> tuple[tuple[int, str], ...]:
    """What records changed of how the run trains: from which epoch on, and to what."""
    return tuple([(r.body.epoch, c.value) for r in records for c in r.body.changes if c.kind == "set"])


def model_card(lineage: Lineage, spec: RunSpec, *, adapters_apart: bool) -> str:
    """The whole README.md."""
    sections = [
        _front_matter(lineage, adapters_apart),
        _heading(lineage),
        _loading(adapters_apart),
        _training(spec, lineage.settings),
        _base(spec, lineage),
        _members(lineage.members),
        _data(lineage),
        _provenance(lineage),
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(lineage: Lineage, adapters_apart: bool) -> str:
    lines = ["pipeline_tag: text-generation", "tags:", "- tapestry"]
    lines.insert(0, f"library_name: {'peft' if adapters_apart else 'transformers'}")
    if lineage.licence:
        lines.insert(0, f"license: {_yaml(lineage.licence)}")
    return "\n".join(["---", *lines, "---", ""])


def _yaml(text: str) -> str:
    """A word as it is; anything else in quotes: what a base says of its licence is a stranger's text."""
    plain = text.replace("-", "").replace(".", "").isalnum() and text.isascii()
    return text if plain else '"' + printable(text).replace("\\", "").replace('"', "'") + '"'


def _heading(lineage: Lineage) -> str:
    name = printable(lineage.run_name)
    return f"# {name}, epoch {lineage.epoch}\n\nA language model that {_count(lineage)} trained together.\n"


def _count(lineage: Lineage) -> str:
    count = len(lineage.members)
    return {0: "nobody has yet", 1: "one member"}.get(count, f"{count} members")


def _loading(adapters_apart: bool) -> str:
    if adapters_apart:
        code = [
            "from peft import AutoPeftModelForCausalLM",
            "",
            'model = AutoPeftModelForCausalLM.from_pretrained("PATH")',
        ]
        note = (
            "These are adapters: where `adapter_config.json` names the base by a digest, put the place of "
            "your copy.\n\n"
        )
    else:
        code = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("PATH")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        ]
        note = ""
    return "\n".join(["## How to load it", "", note + "```python", *code, "```", ""])


def _training(spec: RunSpec, changed: Sequence[tuple[int, str]]) -> str:
    train, outer = spec.train, spec.outer
    inner = (
        f"{train.inner_steps} steps of {train.optimizer} (lr {train.lr:g}, batch {train.batch_size})"
        if train.inner_steps
        else f"the mean gradient of {train.accumulation} batches of {train.batch_size}"
    )
    return "\n".join(
        [
            "## How it was trained",
            "",
            f"Each member trained on text of its own: {inner} between two rounds, sequences of "
            f"{spec.data.sequence_length} tokens. In a round the members' updates were averaged "
            f"({spec.compression.codec}) and applied by {outer.optimizer} (lr {outer.lr:g}). "
            "No text left a member.",
            "",
            *_changes(changed),
        ]
    )


def _changes(changed: Sequence[tuple[int, str]]) -> list[str]:
    if not changed:
        return []
    lines = [f"- from epoch {epoch}: `{value}`" for epoch, value in changed[-CHANGES_SHOWN:]]
    left = len(changed) - CHANGES_SHOWN
    return [
        "The members changed since:",
        "",
        *([f"- {left} earlier changes"] if left > 0 else []),
        *lines,
        "",
    ]


def _base(spec: RunSpec, lineage: Lineage) -> str:
    model = spec.model
    if not isinstance(model, TransformersSpec):
        return ""
    how = f"adapters of rank {model.lora_rank} (LoRA)" if model.lora_rank else "all parameters"
    began = f"The base's weights have the digest `{model.weights}`" if model.weights else "It began at random"
    licence = f" The base says its licence is {lineage.licence}." if lineage.licence else ""
    return f"## Base\n\n{began}; {how} were trained, of {model.parameters:,} parameters.{licence}\n"


def _members(members: Sequence[Contributor]) -> str:
    if not members:
        return ""
    rows = [f"| `{one.peer}` | {100 * one.share:.1f} % | {one.tokens:,} |" for one in members]
    head = (
        "Share: how much a member's contributions counted in the means, over the records of the chain. "
        "Tokens: what it trained on, as it tells."
    )
    return "\n".join(
        ["## Members", "", head, "", "| peer id | share | tokens |", "|---|---:|---:|", *rows, ""]
    )


def _data(lineage: Lineage) -> str:
    """What members say of their own data: each for itself, and the others by their signatures."""
    silent = {one.peer for one in lineage.members} - {peer for peer, _ in lineage.others}
    if not lineage.data and not lineage.others:
        return ""
    lines = ["## Data", ""]
    if lineage.data:
        lines += ["What the member that wrote this card says of its own data:", "", *_items(lineage.data), ""]
    for peer, texts in lineage.others:
        lines += [f"What `{printable(peer)}` says of its own, signed by its key:", "", *_items(texts), ""]
    if len(silent) > bool(lineage.data):
        lines += ["The other members' data are not described here.", ""]
    return "\n".join(lines)


def _items(texts: Sequence[str]) -> list[str]:
    return [f"- {printable(text)}" for text in texts]


def _provenance(lineage: Lineage) -> str:
    facts: Mapping[str, object] = {
        "run": f"{printable(lineage.run_name)} (`{lineage.run_id}`)",
        "epoch": lineage.epoch,
        "head": f"`{lineage.head}`",
        "state digest": f"`{lineage.state_digest}`",
        "written by": f"transformers {version('transformers')}, peft {version('peft')}",
    }
    return "\n".join(["## Lineage", "", *(f"- {name}: {value}" for name, value in facts.items()), ""])
