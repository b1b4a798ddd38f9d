"""`tapestry verify`: whether a home, or an export, is what it says it is. Offline, and it changes nothing.

A home: the genesis and its signature; every record's link, electorate, weights and signatures from there to
the head; every update against the record that names it; every checkpoint against the record that signed it;
the base's files against the spec; what lost at forks, likewise (branch_proof.py); and then the states
themselves, replayed from the oldest checkpoint, each compared with the digest in the record after it. Where
the run was rolled back, the replay goes by the records too: the state is the earlier one again, and what
was undone is not made once more.

An export: every file against its manifest; the records that it carries, from the genesis on; and its tensors,
which must have the digest that the record after them signed. Where signatures do not reach its tensors
(rounded weights, merged adapters, a state at the head, which nobody had signed yet, a derivative) that is no
fault, but they are not `proven`; of the first and the third `against` can prove them (against.py).

It streams: one record, one piece of an update and one state in mapped files are held at a time; of the chain
only what the updates and checkpoints on the disk need is remembered.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tapestry.compression.codecs import get_codec
from tapestry.compression.shards import shard_bounds
from tapestry.node.disk.accusations import SUFFIX as ACCUSATION_SUFFIX
from tapestry.node.disk.accusations import FalseAccusation, kept, prove, unpack
from tapestry.node.disk.base import BaseFile, pinned
from tapestry.node.disk.files import seal, unseal
from tapestry.node.disk.linked import BrokenLink, Linked, Tail, read_linked
from tapestry.node.errors import UserError, printable
from tapestry.node.home import Home
from tapestry.node.lineage.anchor import Anchor
from tapestry.node.lineage.asked import is_export, require_provable
from tapestry.node.lineage.branch_proof import branches_of, check_branches
from tapestry.node.lineage.chain_proof import Followed, ToFollow, followed
from tapestry.node.lineage.claims import NAME as CLAIMS
from tapestry.node.lineage.claims import read_claims
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.egress import Totals, counted
from tapestry.node.lineage.follow import Broken, Follower, island_from, read_genesis, read_records
from tapestry.node.lineage.listed import faults
from tapestry.node.lineage.manifest import LINEAGE, check_manifest
from tapestry.node.lineage.numbers_proof import check_update, checkpoints_of, updates_of
from tapestry.node.lineage.proof import Proof, Signed
from tapestry.node.lineage.provable import alone_at, made_alone, unprovable, vouched_to
from tapestry.node.lineage.replay import check_states
from tapestry.node.net.descriptions import pack as pack_descriptions
from tapestry.node.net.descriptions import unpack as unpack_descriptions
from tapestry.node.progress import Told
from tapestry.node.protocol import strict
from tapestry.node.protocol.canon import canonical
from tapestry.node.protocol.record import Genesis
from tapestry.node.spec.run import RunSpec
from tapestry.node.spec.training import FILE_NAMES, WEIGHTS, TransformersSpec
from tapestry.node.state.means import mean_digest_of, mean_of
from tapestry.node.state.model import state_digest_of
from tapestry.node.trainer.data.tally import numbered

CONFIG = "config.json"
WRITTEN_ANEW = (CONFIG, "README.md", WEIGHTS)  # of a base's files, by an export


def verify(
    path: Path,
    *,
    anchor: Anchor | None = None,
    against: Path | None = None,
    replay: bool = True,
    jobs: int = 1,
    told: Told,
) -> Proof:
    """Of a home or an export. `jobs`: processes that check a long chain's signatures. `against`: a home or an
    export with which an export's tensors are compared, if signatures do not reach them. Raises UserError if
    `path` or `against` is neither."""
    require_provable(path, against)
    if is_export(path):
        return verify_export(path, anchor=anchor, against=against, jobs=jobs, told=told)
    return verify_home(Home(path), anchor=anchor, replay=replay, jobs=jobs, told=told)


# --- a home -------------------------------------------------------------------------------------------


def verify_home(
    home: Home, *, anchor: Anchor | None = None, replay: bool = True, jobs: int = 1, told: Told
) -> Proof:
    """Everything of the run that lies there."""
    proof = Proof("home")
    crypto = ReaderCrypto()
    try:
        genesis, spec = read_genesis(home.genesis, crypto)
    except (Broken, UserError, OSError) as error:
        proof.fault("genesis.json", str(error))
        return proof
    proof.run_id, proof.run_name = genesis.run_id, spec.name
    updates = updates_of(home, proof)
    checkpoints = checkpoints_of(home, genesis, proof)
    derivatives = _derivatives(home, proof)
    on_disk = branches_of(home, proof)
    parents = {one.parent_epoch for one in derivatives}
    needed = {*updates, *checkpoints, *parents, *on_disk.needed}
    begins = island_from(home)
    chain = ToFollow(home.chain, genesis, spec, needed, anchor, told, begins, on_disk.ties)
    run = followed(chain, jobs, proof)
    signed = run.signed
    if begins is not None and begins <= proof.epoch:
        proof.notes.append(
            f"chain.jsonl: from epoch {begins} on made alone, on an island; no other member has it"
        )
    elif alone := made_alone(run.end.at):
        proof.notes.append(f"chain.jsonl: {alone}")
    proof.alone_from = _alone_from(run.end)
    _check_updates(updates, signed, proof, told)
    _check_small_files(home, spec, proof)
    _check_linked(home.data_events, read_linked(home.data_events), proof)
    totals = Totals()
    _check_linked(home.egress, counted(home, totals), proof)
    proof.egress_lines, proof.egress_bytes = totals.lines, totals.bytes
    _check_bases(home, proof)
    _check_accusations(home, genesis, spec, crypto, proof)
    _check_descriptions(home, genesis, crypto, proof)
    chains = check_branches(on_disk, genesis, spec, run, replay, parents, proof, told)
    for one in derivatives:
        _check_version(home, one, genesis, chains, proof)
        told("derivatives", proof.derivatives, len(derivatives))
    if replay:
        check_states(genesis, spec, signed, updates, checkpoints, proof, told)
    return proof


def _check_updates(
    updates: Mapping[int, Path], signed: Mapping[int, Signed], proof: Proof, told: Told
) -> None:
    """Each against its record. Where the chain is short, one fault names all that are beyond its end."""
    beyond = sorted(epoch for epoch in updates.keys() - signed.keys() if epoch > proof.epoch + 1)
    if len(beyond) > 1:
        proof.fault(
            "updates",
            f"{len(beyond)} of epochs {beyond[0]} to {beyond[-1]}, which the chain does not have (it ends at "
            f"{proof.epoch})",
            beyond[0],
        )
    for epoch, path in sorted(updates.items()):
        if len(beyond) == 1 or epoch not in beyond:
            check_update(path, epoch, signed.get(epoch), proof)
        proof.updates += 1
        told("updates", proof.updates, len(updates))


def _alone_from(end: Follower) -> int | None:
    """As in Proof."""
    epoch = vouched_to(end.at, end.island_from)
    return epoch + 1 if epoch < end.epoch else None


def _check_linked(path: Path, lines: Iterator[Linked | Tail], proof: Proof) -> None:
    """A file whose lines are linked: each line against the one before."""
    try:
        for line in lines:
            if isinstance(line, Tail):
                proof.notes.append(
                    f"{line.file}: its last line is not finished: a node writes it, or was killed"
                )
    except BrokenLink as error:
        proof.fault(error.file, f"line {error.number}: {error.what}")
    except OSError as error:
        proof.fault(path.name, f"cannot be read: {error.strerror}")


def _check_accusations(
    home: Home, genesis: Genesis, spec: RunSpec, crypto: ReaderCrypto, proof: Proof
) -> None:
    """Lies that this member saw proven: each must prove it again, from the file alone."""
    shards = shard_bounds(genesis.params, spec.compression.shard_elements)
    mean_digest = mean_digest_of(get_codec(spec.compression.codec), shards, mean_of(spec.mean))
    for path in kept(home.accusations):
        name = f"accusations/{path.name}"
        try:
            data = path.read_bytes()
            one = unpack(data)
            if one.pack() != data or path.name != f"{one.name}{ACCUSATION_SUFFIX}":
                raise FalseAccusation("not in the form, or not of the name, in which a node writes it")
            prove(one, genesis.run_id, len(shards), mean_digest, crypto)
        except (FalseAccusation, OSError) as error:
            proof.fault(name, str(error))
        else:
            proof.notes.append(f"{name}: {one.accused} {one.what}")


def _check_descriptions(home: Home, genesis: Genesis, crypto: ReaderCrypto, proof: Proof) -> None:
    """What members say of their data: each must have signed its own."""
    name = home.descriptions.name
    try:
        data = home.descriptions.read_bytes()
        value = unseal(data.removesuffix(b"\n"))
        found = unpack_descriptions(canonical(value))
        if seal(json.loads(pack_descriptions(found))) + b"\n" != data:
            raise ValueError("not in the form in which a node writes it")
    except FileNotFoundError:
        return
    except (ValueError, OSError) as error:
        proof.fault(name, str(error))
        return
    for one in found:
        if not crypto.verify(one.peer, one.signature, one.message(genesis.run_id)):
            proof.fault(name, f"{one.peer} did not sign what it is said to say of its data")
        proof.descriptions += 1


def _check_small_files(home: Home, spec: RunSpec, proof: Proof) -> None:
    if home.vote.exists():
        try:
            data = home.vote.read_bytes()
            unseal(data[:-1] if data.endswith(b"\n") else b"")
        except (ValueError, OSError) as error:
            proof.fault("vote.json", str(error))
    if isinstance(spec.model, TransformersSpec):
        for file in pinned(spec.model):
            _check_base_file(home.base / file.name, file, proof)


def _check_base_file(path: Path, file: BaseFile, proof: Proof) -> None:
    try:
        found = BaseFile.of(path)
    except OSError as error:
        proof.fault(f"base/{file.name}", f"cannot be read: {error.strerror}")
        return
    proof.files += 1
    if (found.size_bytes, found.digest) != (file.size_bytes, file.digest):
        proof.fault(f"base/{file.name}", f"has the digest {found.digest[:12]}, not {file.digest[:12]}")


# --- derivatives in a home ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Version:
    """What a derivative.json says of one version."""

    name: str
    number: int
    digest: str  # of the model's tensors
    run_id: str
    parent_epoch: int
    parent_head: str

    @property
    def folder(self) -> str:
        return f"derivatives/{self.name}/v{self.number}/model"


def _derivatives(home: Home, proof: Proof) -> list[_Version]:
    found: list[_Version] = []
    for path in sorted((home.path / "derivatives").glob("*/derivative.json")):
        name = path.parent.name
        try:
            table = json.loads(path.read_bytes())
            for one in table["versions"]:
                parent = one["parent"]
                version = _Version(
                    name, one["number"], one["digest"], parent["run_id"], parent["epoch"], parent["head"]
                )
                for text in (version.digest, version.run_id, version.parent_head):
                    strict.text(text, 64, "a digest")
                strict.integer(version.number, 1, 1_000_000, "number")
                strict.integer(version.parent_epoch, 0, 2**53, "epoch")
                found.append(version)
            for file, what in faults(path.parent):
                proof.fault(f"derivatives/{name}/{file}", what)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            proof.fault(f"derivatives/{name}/derivative.json", f"cannot be read: {str(error)[:80]}")
    return found


def _check_bases(home: Home, proof: Proof) -> None:
    """The exports of the base that versions stand on."""
    for folder in sorted((home.path / "derivatives" / ".bases").glob("*-*")):
        for name, what in check_manifest(folder):
            proof.fault(f"derivatives/.bases/{folder.name}/{name}", what)


def _check_version(
    home: Home, version: _Version, genesis: Genesis, chains: Mapping[str, Followed], proof: Proof
) -> None:
    """Its model is what was written down. A parent that the chain has not is no fault: a better chain may
    have come."""
    from tapestry.node.trainer.models.refusal import ModelError
    from tapestry.node.trainer.models.weights import weights_digest

    proof.derivatives += 1
    if place := _parent_of(home, version, genesis, chains):
        proof.notes.append(f"{version.name} {version.number}: stands on {place}")
    try:
        found = weights_digest(home.path / version.folder)
    except (ModelError, OSError, ValueError) as error:
        proof.fault(version.folder, str(error))
        return
    if found != version.digest:
        proof.fault(version.folder, f"its tensors have the digest {found[:12]}, not {version.digest[:12]}")


def _parent_of(home: Home, version: _Version, genesis: Genesis, chains: Mapping[str, Followed]) -> str:
    """Where the records have its parent, in words; "" for the home's own chain."""
    if version.run_id != genesis.run_id:
        return f"another run, {version.run_id[:12]}"
    epoch, head = version.parent_epoch, version.parent_head
    for folder, chain in chains.items():
        if epoch in chain.signed and chain.signed[epoch].head == head:
            return folder and f"epoch {epoch} of {folder}, which lost at a fork"
    for path in sorted((home.path / "islands").glob("*-*")):
        with contextlib.suppress(Broken, OSError):
            records = read_records(Home(path).chain, ReaderCrypto())
            if any(one.body.epoch == epoch and one.head == head for one in records):
                return f"epoch {epoch} of islands/{path.name}, which was made alone"
    return f"epoch {epoch} (head {head[:12]}), of which this home has no record"


# --- an export ----------------------------------------------------------------------------------------


def verify_export(
    folder: Path, *, anchor: Anchor | None = None, against: Path | None = None, jobs: int = 1, told: Told
) -> Proof:
    """Every file, the records that it carries, and its tensors; these by `against` too, where that helps."""
    proof = Proof("export", proven=False)
    _check_export(folder, anchor, jobs, proof, told)
    if against is not None:
        _compare(folder, against, jobs, proof, told)
    return proof


def _check_export(folder: Path, anchor: Anchor | None, jobs: int, proof: Proof, told: Told) -> None:
    told("files", 0, 1)
    for name, what in check_manifest(folder):
        proof.fault(name, what)
    if proof.faults:
        return
    from tapestry.node.lineage.rebuilt import check_files, check_table

    proof.files = sum(1 for path in folder.rglob("*") if path.is_file())
    try:
        table = read_claims(folder)
    except (ValueError, OSError) as error:
        proof.fault(CLAIMS, str(error))
        return
    _check_names(folder, "derivative" if "derivative" in table else table["form"], proof)
    if "derivative" in table:
        _check_derivative(folder, table, proof)
        if anchor is not None:
            of = f", which is of the run {anchor.run_id[:12]}" if anchor.run_id != proof.run_id else ""
            proof.fault("anchor", f"a derivative carries no records to compare with it{of}", anchor.epoch)
        return
    crypto = ReaderCrypto()
    epoch = table["epoch"]
    try:
        genesis, spec = read_genesis(folder / LINEAGE / "genesis.json", crypto)
    except (Broken, UserError, OSError) as error:
        proof.fault(f"{LINEAGE}/genesis.json", str(error))
        return
    proof.run_id, proof.run_name = genesis.run_id, spec.name
    if isinstance(spec.model, TransformersSpec):
        _check_copied(folder, spec.model, proof)
    name = f"{LINEAGE}/chain.jsonl"
    chain = ToFollow(folder / name, genesis, spec, {epoch}, anchor, told, finds_island=True, called=name)
    run = followed(chain, jobs, proof)
    if proof.faults:
        return
    said = run.signed.get(epoch)
    if said is None or said.head != table["head"] or genesis.run_id != table["run_id"]:
        proof.fault(CLAIMS, "it names another head than the records that it carries", epoch)
        return
    proof.epoch, proof.head = epoch, said.head
    proof.alone_from = _alone_from(run.end)
    check_table(folder, table, spec, proof)
    if proof.faults:
        return
    check_files(folder, table, spec, proof)
    alone = alone_at(run.end.at, epoch, run.end.island_from)
    _check_tensors(folder, table, genesis, spec, said, alone, proof, told)


def _compare(folder: Path, against: Path, jobs: int, proof: Proof, told: Told) -> None:
    """With a home or another export, where that can tell more; else a note says why not."""
    from tapestry.node.lineage.against import compare

    why = ""
    if proof.faults:
        why = "the export does not hold"
    elif proof.proven:
        why = "what members signed proves its tensors already"
    elif proof.kind == "derivative":
        why = "nothing in a home or an export proves a derivative"
    else:
        table = read_claims(folder)
        if table["form"] != "merged":
            compare(folder, table, against, verify(against, jobs=jobs, told=told), proof, told)
            return
        why = "merged adapters are rounded as the machine does, and equal nothing"
    proof.notes.append(f"nothing was compared with {against}: {why}")


def _check_names(folder: Path, form: str, proof: Proof) -> None:
    """No file lies there that a loader might take for what is checked."""
    from tapestry.node.lineage.exported import foreign_files, weights_at
    from tapestry.node.trainer.models.refusal import ModelError

    try:
        for name in foreign_files(folder, form):
            proof.fault(name, "no export has such a file; a loader might take it for what was signed")
    except ModelError as error:
        proof.fault(weights_at(folder), str(error))


def _check_copied(folder: Path, model: TransformersSpec, proof: Proof) -> None:
    """Tokenizer, generation config and chat template are the base's as they were, and no others; and so is
    the config of which that of the export was made."""
    known = {file.name: file for file in pinned(model)}
    here = {name: name for name in FILE_NAMES if name not in WRITTEN_ANEW}
    for name, place in {**here, CONFIG: f"{LINEAGE}/{CONFIG}"}.items():
        if not (name in known or (folder / place).exists()):
            continue
        try:
            found = BaseFile.of(folder / place)
        except OSError as error:
            proof.fault(place, f"cannot be read: {error.strerror}")
            continue
        if replace(found, name=name) != known.get(name):
            proof.fault(place, "it is not the base's, which the run pins")


def _check_tensors(
    folder: Path,
    table: dict[str, Any],
    genesis: Genesis,
    spec: RunSpec,
    said: Signed,
    alone: str,
    proof: Proof,
    told: Told,
) -> None:
    """The digest of the exported tensors, joined with those of the outer buffers, is what was signed."""
    from tapestry.node.lineage.exported import params_digest
    from tapestry.node.lineage.huggingface import ADAPTERS
    from tapestry.node.trainer.models.refusal import ModelError

    epoch = table["epoch"]
    vectors = dict(table["vectors"])
    if state_digest_of(genesis.schema, genesis.params, vectors) != table["state_digest"]:
        proof.fault(CLAIMS, "its digests do not make its state digest", epoch)
    if said.state not in (None, table["state_digest"]):
        proof.fault(CLAIMS, "another state digest than the record after it signed", epoch)
    told("tensors", 0, 1)
    weights = ADAPTERS if table["form"] == "adapters" else WEIGHTS
    try:
        found = params_digest(folder, table, genesis, spec.model)
    except ModelError as error:
        proof.fault(weights, str(error), epoch)
        return
    except (ValueError, KeyError) as error:
        proof.fault(CLAIMS, str(error), epoch)
        return
    if found not in (None, vectors.get("params")):
        proof.fault(weights, "its tensors are not those of the signed state", epoch)
    if proof.holds:
        proof.unproven = unprovable(table["form"], table["dtype"], epoch, said.state is not None, alone)
        proof.proven = not proof.unproven


def _check_derivative(folder: Path, table: dict[str, Any], proof: Proof) -> None:
    from tapestry.node.lineage.exported import foreign_tensors
    from tapestry.node.lineage.rebuilt import check_derivative
    from tapestry.node.trainer.models.refusal import ModelError
    from tapestry.node.trainer.models.weights import weights_digest

    proof.kind = "derivative"
    check_derivative(folder, table, proof)
    if proof.faults:
        return
    version = table["version"]
    proof.run_id, proof.run_name = version["parent"]["run_id"], version["parent"]["run_name"]
    proof.epoch, proof.head = version["parent"]["epoch"], version["parent"]["head"]
    try:
        found, foreign = weights_digest(folder), foreign_tensors(folder)
    except ModelError as error:
        proof.fault("model.safetensors", str(error))
        return
    for name in foreign:
        proof.fault("model.safetensors", f"holds {name[:120]}, which its model has not")
    if found != table["weights"]:
        proof.fault("model.safetensors", f"has the digest {found[:12]}, not {table['weights'][:12]}")
    if table["dtype"] == "f32" and found != version["digest"]:
        proof.fault(CLAIMS, "names another model than it carries")
    proof.unproven = "what a derivative says of its parent and its making is its maker's word, not signed"


def lines(proof: Proof) -> Iterator[str]:
    """For people."""
    if proof.run_id:
        run = f"{printable(proof.run_name)} ({proof.run_id[:16]})"
        yield f"{proof.kind} of {run}, epoch {proof.epoch}, head {proof.head[:16]}"
    else:
        yield f"{proof.kind} of a run that cannot be read"
    if proof.records:
        yield f"records {proof.records}, signatures {proof.signatures}: every one checked from the genesis on"
    if proof.updates or proof.checkpoints:
        yield f"updates {proof.updates}, checkpoints {proof.checkpoints}, files of the base {proof.files}"
    if proof.derivatives:
        yield f"derivatives {proof.derivatives} versions: their models are what was written down"
    if proof.branches:
        yield f"branches {proof.branches}: what lost at forks, from where it left"
    if proof.descriptions:
        yield f"descriptions of data {proof.descriptions}: by whoever is said to say it"
    if proof.egress_lines:
        yield f"egress {proof.egress_lines} lines: {proof.egress_bytes} bytes left this node"
    if proof.replayed_to is not None:
        yield f"replayed from epoch {proof.replayed_from} to {proof.replayed_to}: the states that were signed"
    for note in proof.notes:
        yield f"note  {printable(note)}"
    for fault in proof.faults:
        yield f"FAULT {printable(str(fault))}"
    yield _verdict(proof)


def _verdict(proof: Proof) -> str:
    """The last line: nobody should take what is not proven for what is."""
    if proof.faults:
        return f"it does not hold: {numbered(len(proof.faults), 'fault')}"
    if proof.proven is None:
        return "it holds"
    if proof.proven:
        return "it holds, tensors proven: they are what the members signed"
    return f"no file is damaged, but tensors NOT proven: {proof.unproven}"
