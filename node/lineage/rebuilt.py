"""What of an export follows from the run, made again from its spec and compared to the byte.

config.json or adapter_config.json is a function of the spec and of the base's own config, which the spec pins
and the export carries; a preset's tokenizer and generation config are one of the spec alone; tapestry.json is
one of the records and of the digests that a record signed; the header of a file of weights is one of its
tensors. So whoever changes one of them is found, though the manifest was made again.

A later transformers or peft may fill in other defaults: the export is then to be verified with the version
that the card names.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tapestry.compression.shards import Layout
from tapestry.node.lineage.card import members_of
from tapestry.node.lineage.claims import NAME as CLAIMS
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.exported import FORMS, described, weights_at
from tapestry.node.lineage.follow import read_records
from tapestry.node.lineage.huggingface import (
    ADAPTER_CONFIG,
    ADAPTERS,
    DTYPES,
    Form,
    json_files,
    json_text,
    names_of_base,
)
from tapestry.node.lineage.listed import digest_of
from tapestry.node.lineage.manifest import LINEAGE, digests_of
from tapestry.node.lineage.proof import Proof
from tapestry.node.protocol.path import stretches
from tapestry.node.spec.run import RunSpec
from tapestry.node.spec.training import TransformersSpec
from tapestry.node.trainer.models.folder import INDEX
from tapestry.node.trainer.models.refusal import ModelError
from tapestry.node.trainer.models.stored import FLOATS, StoredWeights, index_of, is_as_written, weights_of

SHOWN_MAX = 60  # characters of a value, in a fault


def check_table(folder: Path, table: Mapping[str, Any], spec: RunSpec, proof: Proof) -> None:
    """What it says of the run, the members and the tensors is what the records say. Its head, and digests
    of vectors, are compared by the caller, with what was signed."""
    epoch = int(table["epoch"])
    chain = folder / LINEAGE / "chain.jsonl"
    path = stretches(proof.rolled, epoch)
    made = (r for r in read_records(chain, ReaderCrypto()) if any(r.body.epoch in s[1:] for s in path))
    try:
        layout = Layout.from_named((str(name), shape) for name, shape in table["layout"])
        expected = {
            **table,
            "run_id": proof.run_id,
            "run_name": proof.run_name,
            "members": [
                {"peer": one.peer, "share": round(one.share, 6), "tokens": one.tokens}
                for one in members_of(made)
            ],
            **described(layout, str(table["form"]), DTYPES[_dtype(table)]),
        }
        if table["form"] not in FORMS:
            raise ValueError(f"{str(table['form'])[:20]!r} is no form of an export")
    except (ValueError, TypeError, KeyError) as error:
        proof.fault(CLAIMS, str(error), epoch)
        return
    if differing := _difference(table, expected):
        proof.fault(CLAIMS, differing, epoch)


def check_files(folder: Path, table: Mapping[str, Any], spec: RunSpec, proof: Proof) -> None:
    """The files of JSON that follow from the spec, and the headers of the weights. Of an export whose table
    holds."""
    form = Form(DTYPES[_dtype(table)], table["form"] == "adapters")
    base = folder / LINEAGE if isinstance(spec.model, TransformersSpec) else None
    try:
        made = json_files(spec.model, spec.data.sequence_length, base, form)
        if ADAPTER_CONFIG in made and base is not None:
            _take_name(folder, made[ADAPTER_CONFIG], names_of_base(spec.model, base))
    except (ModelError, OSError, ValueError) as error:
        proof.fault(f"{LINEAGE}/config.json", str(error))
        return
    for name, content in made.items():
        _check_json(folder, name, content, proof)
    _check_weights(folder, form, proof)


def _take_name(folder: Path, made: dict[str, Any], names: tuple[str, ...]) -> None:
    """Adapters may name their base by its digest also where it is published: its name was then that of a
    folder where they were written."""
    key = "base_model_name_or_path"
    with contextlib.suppress(ValueError, RecursionError):  # it is compared below, and found
        said = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        made[key] = next((one for one in names if isinstance(said, dict) and said.get(key) == one), made[key])


def _check_json(folder: Path, name: str, content: Mapping[str, Any], proof: Proof) -> None:
    try:
        data = (folder / name).read_bytes()
        if data == json_text(content):
            return
        said = json.loads(data)
        what = _difference(said, content) if isinstance(said, dict) else "is no table"
    except OSError as error:
        proof.fault(name, f"cannot be read: {error.strerror}")
        return
    except (ValueError, RecursionError):
        what = "is no JSON"
    makers = f"transformers {version('transformers')}, peft {version('peft')}"
    proof.fault(name, f"it is not what the run's spec makes, by {makers}: {what or 'it has another form'}")


def _difference(said: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The first key that differs; "" if there is none."""
    for key in sorted({*map(str, said), *expected}):
        if key not in said:
            return f"it lacks {key}"
        if key not in expected:
            return f"{key[:SHOWN_MAX]} should not be there"
        if json.dumps(said[key]) != json.dumps(expected[key]):
            return f"{key} is {_shown(said[key])}, and should be {_shown(expected[key])}"
    return ""


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_MAX else text[:SHOWN_MAX] + "..."


def _dtype(table: Mapping[str, Any]) -> str:
    """As --dtype says it. Raises KeyError."""
    return {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}[str(table["dtype"])]


def _check_weights(folder: Path, form: Form, proof: Proof) -> None:
    """Headers in the form in which they are written, and one dtype; of several files, the index too."""
    try:
        if form.adapters_apart:
            tensors = weights_of(folder / ADAPTERS)
        else:
            tensors = StoredWeights.find(folder).tensors
            if (folder / INDEX).exists():
                _check_json(folder, INDEX, index_of(tensors), proof)
        for path in sorted({one.path for one in tensors.values()}):
            if not is_as_written(path):
                proof.fault(path.name, "its header is not in the form in which an export writes it")
        for name, one in sorted(tensors.items()):
            if FLOATS.get(one.dtype, torch.bool) != form.dtype:
                proof.fault(one.path.name, f"{name[:120]} is {one.dtype}, and the export says {form.dtype}")
    except (ModelError, OSError) as error:
        proof.fault(ADAPTERS if form.adapters_apart else weights_at(folder), str(error))


def check_derivative(folder: Path, table: Mapping[str, Any], proof: Proof) -> None:
    """tapestry.json has its own digest, and that of every other file but the manifest."""
    if table["digest"] != digest_of(table):
        proof.fault(CLAIMS, "it is not what was written")
        return
    found = digests_of(folder, but=(CLAIMS,))
    for name in sorted({*found, *table["files"]}):
        if name not in found:
            proof.fault(name, "is missing")
        elif found[name] != table["files"].get(name):
            proof.fault(name, f"has the digest {found[name][:12]}, which {CLAIMS} does not name")
