"""A node's chain, read from HOME/chain.jsonl by a script, and whether it is whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from blake3 import blake3

from tapestry.node.disk.files import unseal
from tapestry.node.protocol.canon import canonical
from tapestry.node.protocol.record import body_from_dict, body_to_dict


@dataclass(frozen=True)
class ChainRecord:
    """A line of HOME/chain.jsonl."""

    epoch: int
    prev: str
    head: str
    state_digest: str  # of the state before
    contributors: frozenset[str]
    forced: bool


def chain_record(line: bytes) -> ChainRecord:
    """Raises ValueError for a line that is not whole, or holds no record."""
    body = body_from_dict(unseal(line)["body"])
    return ChainRecord(
        epoch=body.epoch,
        prev=body.prev,
        head=blake3(canonical(body_to_dict(body))).hexdigest(),
        state_digest=body.state_digest,
        contributors=frozenset(member.peer for member in body.members if member.weight),
        forced=body.forced,
    )


def chain_faults(
    label: str, chain: list[ChainRecord], run_id: str, digests: Mapping[int, Collection[str]]
) -> list[str]:
    """A lost epoch is a gap, a break of the links, or an epoch that was shown and is not in the chain."""
    epochs = [record.epoch for record in chain]
    if epochs != list(range(1, len(chain) + 1)):
        return [f"{label}: the epochs of its chain are not 1, 2, 3 ...: {epochs}"]
    shown = max(digests, default=0)
    if len(chain) < shown:
        return [f"{label}: its chain ends at epoch {len(chain)}, epoch {shown} was shown"]
    heads = [run_id, *(record.head for record in chain)]
    faults = [
        f"{label}: record {record.epoch} does not follow the one before"
        for record, head in zip(chain, heads, strict=False)
        if record.prev != head
    ]
    return faults + [
        f"{label}: state {record.epoch - 1} was shown with another digest than the signed one"
        for record in chain
        if record.state_digest not in digests.get(record.epoch - 1, {record.state_digest})
    ]
