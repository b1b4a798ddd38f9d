"""A proof on disk that a leader told members two rosters of one ballot: protocol/receipts.py, as a file.

It lies beside the other accusations and travels as they do. Two digests and two signatures are all of it: the
rosters themselves are not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgpack

from tapestry.node.protocol import strict
from tapestry.node.protocol.canon import Crypto
from tapestry.node.protocol.receipts import TwoRosters, fault_of_rosters, receipt_from, receipt_to_list

KIND = "two rosters"


@dataclass(frozen=True, slots=True)
class DoubleRoster:
    """See the module. `name` names its file: one for one lie, whichever of the two was told first."""

    proof: TwoRosters
    name: str

    @classmethod
    def of(cls, proof: TwoRosters) -> DoubleRoster:
        first, second = sorted((proof.first, proof.second), key=lambda receipt: receipt.digest)
        name = f"{first.epoch}-rosters-{first.leader[-8:]}-{first.digest[:8]}{second.digest[:8]}"
        return cls(TwoRosters(first, second), name)

    @property
    def accused(self) -> str:
        return self.proof.peer

    @property
    def epoch(self) -> int:
        """Of the state that the round started from."""
        return self.proof.first.epoch

    @property
    def shard(self) -> int:
        """None: it is about rosters."""
        return -1

    @property
    def why(self) -> str:
        """For the liar's removal: the same for all ballots of a round, so that all sign the same change."""
        return f"signed two rosters: round {self.epoch + 1}"

    @property
    def what(self) -> str:
        return f"{self.why}, ballot {self.proof.first.ballot}"

    def fault(self, run_id: str, crypto: Crypto) -> str | None:
        """Why it proves nothing in this run; None if it is proven."""
        return fault_of_rosters(self.proof, run_id, crypto)

    def pack(self) -> bytes:
        """As it travels, and lies on disk."""
        receipts = [receipt_to_list(receipt) for receipt in (self.proof.first, self.proof.second)]
        packed: bytes = msgpack.packb([KIND, *receipts])
        return packed


def read_double_roster(raw: Any) -> DoubleRoster:
    """Strict. Raises Malformed."""
    _, first, second = strict.sequence(raw, 3, "it", 3)
    return DoubleRoster.of(TwoRosters(receipt_from(first, "first"), receipt_from(second, "second")))
