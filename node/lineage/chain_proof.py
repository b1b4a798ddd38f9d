"""The records of a chain, for `tapestry verify`: from the genesis on; of a branch, from where it left.

One record is held at a time. What the updates and checkpoints on the disk need of a record is remembered,
and so is where the chain was at the epochs at which branches leave it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tapestry.node.lineage.anchor import Anchor
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.follow import Broken, Follower, read_records
from tapestry.node.lineage.proof import Proof, Signed
from tapestry.node.lineage.signatures import Ahead, Trusting
from tapestry.node.progress import Told
from tapestry.node.protocol.canon import InvalidRecord
from tapestry.node.protocol.record import Genesis
from tapestry.node.spec.run import RunSpec


@dataclass(frozen=True, slots=True)
class ToFollow:
    """What is read of a chain."""

    path: Path
    genesis: Genesis
    spec: RunSpec
    needed: set[int]  # epochs
    anchor: Anchor | None
    told: Told
    begins: int | None = None  # an island, by the record of this epoch
    ties: frozenset[int] = frozenset()  # epochs at which a branch may leave it
    start: Follower | None = None  # where a branch left; None: the genesis
    before: Mapping[int, Signed] = field(default_factory=dict)  # of a branch: what is said up to there
    called: str = "chain.jsonl"  # in faults
    finds_island: bool = False  # of an export: where an island begins follows from its records


@dataclass(frozen=True, slots=True)
class Followed:
    """What a chain says."""

    signed: dict[int, Signed]  # of the epochs that were needed
    ties: dict[int, Follower]  # where it was, at those that were asked for
    end: Follower


def followed(chain: ToFollow, jobs: int, proof: Proof) -> Followed:
    """As `follow`, and says the same; with several jobs a chain that holds is read faster."""
    held = 0
    if jobs > 1:
        with Ahead(jobs) as ahead:
            trial = replace(proof, faults=[], notes=[])
            found = follow(chain, ahead, trial)
            held = ahead.held()
        if trial.holds and held == ahead.asked:
            for name in ("records", "signatures", "epoch", "head", "rolled"):
                setattr(proof, name, getattr(trial, name))
            return found
    return follow(chain, Trusting(held), proof)


def _lines_of(path: Path) -> int:
    """Raises OSError."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))


def follow(chain: ToFollow, crypto: ReaderCrypto, proof: Proof) -> Followed:
    """Every record from the start on; what it says of the epochs in `needed`. A fault ends it."""
    genesis, needed, anchor = chain.genesis, chain.needed, chain.anchor
    follower = chain.start or Follower.start(genesis, chain.spec, crypto, chain.begins)
    follower.finds_island = chain.finds_island
    began = follower.epoch
    signed = dict(chain.before)
    if 0 in needed and not began:
        signed[0] = Signed(genesis.run_id, "", genesis.state_digest)
    ties = {began: copied(follower)} if began in chain.ties else {}
    anchored = anchor is None or (anchor.epoch == 0 and anchor.head == genesis.run_id)
    try:
        total = began + _lines_of(chain.path)
        for record in read_records(chain.path, crypto):
            settings = follower.at.roll.settings
            follower.take(record)
            body = record.body
            before = body.epoch - 1
            if before in signed and before:
                signed[before] = replace(signed[before], state=body.state_digest)
            if body.epoch in needed:
                back = follower.at.roll.rolled.get(body.epoch)
                # A state that is an earlier one again was signed under that one's epoch.
                state = None if back is None else follower.signed.get(back)
                signed[body.epoch] = Signed(record.head, body.result, state, record, settings)
            if body.epoch in chain.ties:
                ties[body.epoch] = copied(follower)
            if anchor is not None and anchor.epoch == body.epoch:
                anchored = anchor.head == record.head
            proof.records += 1
            proof.signatures += len(record.signatures)
            if body.epoch % 256 == 0:
                chain.told("records", body.epoch, total)
    except Broken as error:
        proof.fault(chain.called, str(error), None if error.epoch is None else began + error.epoch)
    except InvalidRecord as error:
        proof.fault(chain.called, str(error), follower.epoch + 1)
    except OSError as error:
        proof.fault(chain.called, f"cannot be read: {error.strerror}")
    proof.epoch, proof.head = follower.epoch, follower.head
    proof.rolled = follower.at.roll.rolled
    if anchor is not None:
        _check_anchor(anchor, genesis, anchored, follower.epoch, ReaderCrypto(), proof)
    return Followed(signed, ties, follower)


def copied(follower: Follower) -> Follower:
    """To go on from, with every signature checked; on no island, for whoever is on one leaves no fork."""
    return replace(follower, crypto=ReaderCrypto(), island_from=None, signed=dict(follower.signed))


def _check_anchor(
    anchor: Anchor, genesis: Genesis, anchored: bool, epoch: int, crypto: ReaderCrypto, proof: Proof
) -> None:
    if anchor.run_id != genesis.run_id:
        proof.fault("anchor", f"it is of the run {anchor.run_id[:12]}, not {genesis.run_id[:12]}")
    elif epoch < anchor.epoch:
        proof.fault("anchor", f"the chain ends at epoch {epoch}, before it", anchor.epoch)
    elif not anchored:
        proof.fault("anchor", f"the chain has another head there than {anchor.head[:12]}", anchor.epoch)
    for peer in anchor.bad_signatures(crypto):
        proof.fault("anchor", f"its signature by {peer} does not hold", anchor.epoch)
