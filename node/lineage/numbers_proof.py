"""Updates and checkpoints on a disk, for `tapestry verify`: names, headers and numbers, against records.

Of a home, and of a branch. A live node may prune a file after it was listed: that counts as not there.
"""

from __future__ import annotations

import os
from pathlib import Path

from tapestry.node.disk.checkpoints import SUFFIX, Checkpoint, read_checkpoint
from tapestry.node.disk.store import read_update_file, result_digest
from tapestry.node.disk.update_header import UPDATE_SUFFIX, read_update_header, update_name
from tapestry.node.home import Home
from tapestry.node.lineage.proof import Proof, Signed
from tapestry.node.protocol.record import Genesis


def updates_of(home: Home, proof: Proof) -> dict[int, Path]:
    """The update log by epoch, as the files' names say."""
    found: dict[int, Path] = {}
    for path in sorted(home.updates.glob(f"*{UPDATE_SUFFIX}")) if home.updates.exists() else ():
        epoch = _epoch_of(path)
        if epoch is None or epoch in found:
            proof.fault(f"updates/{path.name}", "two updates of one epoch" if epoch else "not a name of ours")
        else:
            found[epoch] = path
    return found


def is_gone(path: Path) -> bool:
    """Whether it was pruned since it was listed. A link that leads nowhere is still there."""
    return not os.path.lexists(path)


def _epoch_of(path: Path) -> int | None:
    head, _, _ = path.stem.partition("-")
    return int(head) if head.isdigit() else None


def check_update(path: Path, epoch: int, signed: Signed | None, proof: Proof) -> None:
    name = f"updates/{path.name}"
    if signed is None:
        if epoch == proof.epoch + 1:
            proof.notes.append(f"{name}: of a round that is not decided")
        else:
            proof.fault(name, f"of an epoch that the chain does not have (it ends at {proof.epoch})", epoch)
        return
    try:
        with path.open("rb") as file:
            header = read_update_header(file)
            file.seek(0)
            exact = file.read(len(header.pack())) == header.pack()
        _, payloads = read_update_file(path)
    except (ValueError, OSError) as error:
        if not is_gone(path):
            proof.fault(name, str(error), epoch)
        return
    if not exact:
        proof.fault(name, "its header is not in the form in which a node writes it", epoch)
    elif (header.epoch, header.head) != (epoch, signed.head) or path.name != update_name(epoch, signed.head):
        proof.fault(name, "it is of another record than the chain's", epoch)
    elif header.result != signed.result:
        proof.fault(name, "it names another result than the record", epoch)
    elif result_digest(payloads) != signed.result:
        proof.fault(name, "its numbers are not those that the record names", epoch)


def checkpoints_of(home: Home, genesis: Genesis, proof: Proof) -> dict[int, Checkpoint]:
    """By epoch. Their headers are read here; their numbers when their turn comes."""
    found: dict[int, Checkpoint] = {}
    for path in sorted(home.checkpoints.glob(f"*{SUFFIX}")) if home.checkpoints.exists() else ():
        try:
            checkpoint = read_checkpoint(path, genesis.run_id)
        except (ValueError, OSError) as error:
            if not is_gone(path):
                proof.fault(f"checkpoints/{path.name}", str(error), _epoch_of(path))
            continue
        if path.name != f"{checkpoint.epoch:08d}-{checkpoint.head[:16]}{SUFFIX}":
            proof.fault(f"checkpoints/{path.name}", "its name is of another state", checkpoint.epoch)
        found[checkpoint.epoch] = checkpoint
    return found
