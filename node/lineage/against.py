"""`tapestry verify EXPORT --against HOME|OUT`: tensors that no signature reaches by itself, compared with a
state that the members signed.

Rounded weights are the signed state's, rounded once more here. The state of a head is the one that a home's
replay makes of the state before it, which was signed, and of the update that the head's record names.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tapestry.node.errors import UserError
from tapestry.node.home import Home
from tapestry.node.lineage.claims import NAME as CLAIMS
from tapestry.node.lineage.claims import read_claims
from tapestry.node.lineage.export import Restored, base_folder, restore
from tapestry.node.lineage.exported import weights_at
from tapestry.node.lineage.huggingface import ADAPTERS, Exported, Form, sources_of
from tapestry.node.lineage.proof import Proof
from tapestry.node.lineage.provable import vouching
from tapestry.node.progress import Told
from tapestry.node.trainer.models.refusal import ModelError
from tapestry.node.trainer.models.stored import StoredWeights, weights_of

Tensors = Mapping[str, Callable[[], Tensor]]  # f32, by the names under which they are stored


class NotCompared(Exception):
    """What is to be compared with proves nothing here; one line that says why."""


def compare(
    folder: Path, table: Mapping[str, Any], reference: Path, found: Proof, proof: Proof, told: Told
) -> None:
    """`found` is what `verify` says of the reference. Afterwards the tensors are proven, or there is a fault,
    or `proof.unproven` says why neither."""
    try:
        with _signed(reference, found, table, proof, told) as tensors:
            if proof.holds:
                _check_tensors(folder, table, tensors, reference, proof, told)
    except NotCompared as why:
        proof.unproven = f"{reference} cannot prove them: {why}"
        return
    if proof.holds:
        proof.proven, proof.unproven = True, ""
        proof.notes.append(f"its tensors were compared with those of {reference}, which are proven")


@contextmanager
def _signed(
    reference: Path, found: Proof, table: Mapping[str, Any], proof: Proof, told: Told
) -> Iterator[Tensors]:
    if found.faults:
        raise NotCompared(f"it does not hold itself: {found.faults[0]}")
    if found.run_id != proof.run_id:
        raise NotCompared(f"it is of the run {found.run_id[:16]}")
    if found.kind == "home":
        with tempfile.TemporaryDirectory(prefix="tapestry-verify-") as scratch:
            yield _of_home(Home(reference), Path(scratch), found, table, proof, told)
        return
    if not found.proven:
        raise NotCompared(f"they are not proven in it either: {found.unproven}")
    said = read_claims(reference)
    if (found.head, said["form"]) != (proof.head, table["form"]):
        what = f"an export of another state or form ({said['form']}, epoch {found.epoch})"
        raise NotCompared(f"it is {what}; make both with the same --epoch")
    stored = _stored(reference, table)
    yield {name: lambda name=name: stored.read(name) for name in stored.tensors}  # type: ignore[misc]


def _of_home(
    home: Home, scratch: Path, found: Proof, table: Mapping[str, Any], proof: Proof, told: Told
) -> Tensors:
    """Raises NotCompared."""
    try:
        restored = restore(home, scratch, proof.epoch, told)
    except UserError as error:
        raise NotCompared(error.line) from error
    if restored.lineage.head != proof.head:
        raise NotCompared("its chain has another record there")
    if found.alone_from is not None and vouching(restored.chain.place, proof.epoch) >= found.alone_from:
        raise NotCompared(f"its records from epoch {found.alone_from} on were made by fewer than a majority")
    if not _is_proven(restored, found):
        raise NotCompared(f"nothing in it leads to the state of epoch {proof.epoch} from one that was signed")
    if restored.lineage.state_digest != table["state_digest"]:
        proof.fault(CLAIMS, f"another state digest than that of {home.path}", proof.epoch)
    spec = restored.spec
    form = Form(adapters_apart=table["form"] == "adapters")
    what = (spec.model, spec.data.sequence_length, restored.layout, restored.flat, base_folder(home, spec))
    return {source.name: source.load for source in sources_of(Exported(*what, form))}


def _is_proven(restored: Restored, found: Proof) -> bool:
    """A verified record signed it, or the replay made it. A live home may have gone on since it was verified:
    what came later counts for nothing."""
    chain, epoch = restored.chain, restored.lineage.epoch
    if epoch > found.epoch or chain.head_at(found.epoch) != found.head:
        return False
    if epoch < found.epoch or epoch in found.rolled:
        return chain.state_digest_at(epoch) == restored.lineage.state_digest
    return found.replayed_to == epoch and found.replayed_from != epoch


def _stored(folder: Path, table: Mapping[str, Any]) -> StoredWeights:
    """Raises ModelError."""
    if table["form"] == "adapters":
        return StoredWeights(weights_of(folder / ADAPTERS))
    return StoredWeights.find(folder)


def _check_tensors(
    folder: Path, table: Mapping[str, Any], tensors: Tensors, reference: Path, proof: Proof, told: Told
) -> None:
    """Each is the reference's in this export's dtype, to the bit."""
    try:
        stored = _stored(folder, table)
        for done, name in enumerate(sorted({*stored.tensors, *tensors})):
            told("tensors", done, len(tensors))
            if name not in stored.tensors or name not in tensors:
                proof.fault(
                    weights_at(folder), f"{name[:120]} is not in both it and {reference}", proof.epoch
                )
            elif not _same(stored.read(name), tensors[name]()):
                file = stored.tensors[name].path.name
                proof.fault(file, f"{name[:120]} is not that of {reference}, rounded", proof.epoch)
    except (ModelError, OSError) as error:
        proof.fault(weights_at(folder), str(error), proof.epoch)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """To the bit: a NaN equals itself, and 0 is not -0."""
    rounded = theirs.detach().to(ours.dtype)
    return ours.shape == rounded.shape and torch.equal(_bytes_of(ours), _bytes_of(rounded))


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)
