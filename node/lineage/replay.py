"""The states of a home, against the chain that signed them: each checkpoint's numbers, and a replay.

The replay begins at the oldest checkpoint and goes on by the updates as far as they are there; each state is
compared with the digest in the record after it. Where the run was rolled back it goes by the records as well:
the state is the earlier one again. States lie in mapped files: memory does not grow with the model.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tapestry.node.disk.checkpoints import Checkpoint, chunk_count, read_chunk
from tapestry.node.disk.held import bare_state
from tapestry.node.disk.scratch import scratch_vectors
from tapestry.node.disk.store import read_update_file
from tapestry.node.lineage.numbers_proof import is_gone
from tapestry.node.lineage.proof import Proof, Signed
from tapestry.node.progress import Told
from tapestry.node.protocol.path import leads, step_from
from tapestry.node.protocol.record import Genesis
from tapestry.node.spec.run import RunSpec
from tapestry.node.state.model import DigestMismatch, ModelState


def check_states(
    genesis: Genesis,
    spec: RunSpec,
    signed: dict[int, Signed],
    updates: dict[int, Path],
    checkpoints: dict[int, Checkpoint],
    proof: Proof,
    told: Told,
) -> None:
    """Every checkpoint's numbers; then replay from the oldest usable one as far as the updates go."""
    with tempfile.TemporaryDirectory(prefix="tapestry-verify-") as folder:
        state = _empty_state(genesis, spec, Path(folder))
        starts: list[Checkpoint] = []
        undone: int | None = None  # a checkpoint of what was rolled back
        for epoch in sorted(checkpoints):
            if _check_checkpoint(checkpoints[epoch], state, genesis, signed.get(epoch), proof):
                if leads(proof.rolled, epoch, proof.epoch):
                    starts.append(checkpoints[epoch])
                else:
                    undone = epoch
            proof.checkpoints += 1
            told("checkpoints", proof.checkpoints, len(checkpoints))
        start = next((one for one in starts if _adopt(one, state)), None)
        if start is None:
            if undone is not None:
                why = "and what replaced it is still with the others: nothing is replayed"
                proof.notes.append(f"the state of epoch {undone} was undone, {why}")
            elif any(is_gone(one.path) for one in checkpoints.values()):
                proof.notes.append("the checkpoints were pruned meanwhile: nothing is replayed")
            elif proof.holds:
                proof.fault("checkpoints", "there is none to replay from")
            return
        _replay(state, signed, updates, checkpoints, proof, told)


def _empty_state(genesis: Genesis, spec: RunSpec, folder: Path) -> ModelState:
    params = scratch_vectors(folder, ("params",), genesis.params)["params"]
    return bare_state(spec, params, genesis.schema, genesis.run_id, folder)


def _check_checkpoint(
    checkpoint: Checkpoint, state: ModelState, genesis: Genesis, signed: Signed | None, proof: Proof
) -> bool:
    name = f"checkpoints/{checkpoint.path.name}"
    shape = (checkpoint.schema, checkpoint.n, checkpoint.names)
    if signed is None or checkpoint.head != signed.head:
        proof.fault(name, "it is of another record than the chain's", checkpoint.epoch)
    elif signed.state not in (None, checkpoint.state_digest):
        proof.fault(name, "its digest is not the one that the record signed", checkpoint.epoch)
    elif shape != (genesis.schema, genesis.params, state.names):
        proof.fault(name, "it is of another model", checkpoint.epoch)
    else:
        try:
            with checkpoint.path.open("rb") as file:
                for index in range(chunk_count(checkpoint.data_bytes)):
                    read_chunk(checkpoint, file, index)
            _load(checkpoint, state)
            state.adopt(checkpoint.epoch, checkpoint.head, checkpoint.state_digest)
        except (ValueError, DigestMismatch, OSError) as error:
            if not is_gone(checkpoint.path):
                proof.fault(name, str(error), checkpoint.epoch)
        else:
            return True
    return False


def _adopt(checkpoint: Checkpoint, state: ModelState) -> bool:
    """One whose numbers were checked; whether it is still there."""
    try:
        _load(checkpoint, state)
    except FileNotFoundError:
        return False
    state.adopt(checkpoint.epoch, checkpoint.head, checkpoint.state_digest)
    return True


def _load(checkpoint: Checkpoint, state: ModelState) -> None:
    """Raises ValueError, OSError. The state is torn after it."""
    with checkpoint.path.open("rb") as file:
        file.seek(checkpoint.data_start)
        for vector in state.overwrite():
            if len(vector) and file.readinto(vector) != len(vector):
                raise ValueError("it is cut short")


def _replay(
    state: ModelState,
    signed: dict[int, Signed],
    updates: dict[int, Path],
    checkpoints: dict[int, Checkpoint],
    proof: Proof,
    told: Told,
) -> None:
    proof.replayed_from = proof.replayed_to = state.epoch
    first = state.epoch
    while state.epoch < proof.epoch:
        epoch = step_from(proof.rolled, state.epoch, proof.epoch)
        if epoch in proof.rolled:
            proof.notes.append(f"epoch {epoch}: the state is that of epoch {state.epoch} again")
            state.rename(epoch, _head_of(epoch, signed, state))
            held = checkpoints.get(epoch)
            if held is not None and held.state_digest != state.digest():
                proof.fault(f"checkpoints/{held.path.name}", "it is another state than the one before", epoch)
            proof.replayed_to = epoch
            continue
        path, said = updates.get(epoch), signed.get(epoch)
        if path is None or is_gone(path) or said is None or said.record is None:
            later = any(one > epoch for one in checkpoints)
            behind = "" if later else "; the node was behind its records when it ended, and fetches the rest"
            proof.notes.append(
                f"the updates have no epoch {epoch}: replayed no further than {state.epoch}{behind}"
            )
            return
        try:
            _, payloads = read_update_file(path)
            state.apply(payloads, said.record, said.settings)
        except (ValueError, OSError) as error:
            if is_gone(path):
                continue  # a note says so
            proof.fault(f"updates/{path.name}", f"cannot be applied: {error}", epoch)
            return
        digest = state.digest()
        if said.state is not None and digest != said.state:
            proof.fault(
                "chain.jsonl", f"replay makes the state {digest[:12]}, it says {said.state[:12]}", epoch
            )
            return
        held = checkpoints.get(epoch)
        if held is not None and held.state_digest != digest:
            proof.fault(f"checkpoints/{held.path.name}", "replay makes another state", epoch)
        proof.replayed_to = epoch
        told("replaying", epoch - first, proof.epoch - first)


def _head_of(epoch: int, signed: dict[int, Signed], state: ModelState) -> str:
    """Nothing of this epoch need lie on the disk; then nothing is compared with its head."""
    said = signed.get(epoch)
    return said.head if said is not None else state.head
