"""A proof on disk that somebody signed two values in one ballot: protocol/equivocation.py, as a file.

It lies beside the accusations of reducers, travels as they do, and needs less to be checked: two bodies, and
two signatures. Its text begins with words that no accusation of a reducer begins with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgpack
from blake3 import blake3

from tapestry.node.protocol import strict
from tapestry.node.protocol.canon import PEER_CHARS_MAX, Crypto, canonical
from tapestry.node.protocol.equivocation import Equivocation, fault_of
from tapestry.node.protocol.record import BALLOT_MAX, body_from_dict, body_to_dict

KIND = "two votes"


@dataclass(frozen=True, slots=True)
class DoubleVote:
    """See the module. `name` names its file: one for one lie, whichever of the two values came first."""

    proof: Equivocation
    name: str

    @classmethod
    def of(cls, proof: Equivocation) -> DoubleVote:
        heads = sorted(blake3(canonical(body_to_dict(body))).hexdigest() for body in proof.bodies)
        return cls(proof, f"{proof.bodies[0].epoch - 1}-votes-{proof.peer[-8:]}-{heads[0][:8]}{heads[1][:8]}")

    @property
    def accused(self) -> str:
        return self.proof.peer

    @property
    def epoch(self) -> int:
        """Of the state that the round started from."""
        return self.proof.bodies[0].epoch - 1

    @property
    def shard(self) -> int:
        """None: it is about votes."""
        return -1

    @property
    def why(self) -> str:
        """For the liar's removal: the same for all ballots of a round, so that all sign the same change."""
        return f"signed two values: round {self.epoch + 1}"

    @property
    def what(self) -> str:
        return f"{self.why}, ballot {self.proof.ballot}"

    def fault(self, run_id: str, crypto: Crypto) -> str | None:
        """Why it proves nothing in this run; None if it is proven."""
        if self.proof.bodies[0].run_id != run_id:
            return "it is of another run"
        return fault_of(self.proof, crypto)

    def pack(self) -> bytes:
        """As it travels, and lies on disk."""
        p = self.proof
        bodies = [body_to_dict(body) for body in p.bodies]
        packed: bytes = msgpack.packb([KIND, p.peer, p.ballot, bodies, list(p.signatures)])
        return packed


def read_double_vote(raw: Any) -> DoubleVote:
    """Strict. Raises Malformed, InvalidRecord."""
    _, peer, ballot, bodies, signatures = strict.sequence(raw, 5, "it", 5)
    first, second = strict.sequence(bodies, 2, "bodies", 2)
    a, b = strict.sequence(signatures, 2, "signatures", 2)
    proof = Equivocation(
        strict.text(peer, PEER_CHARS_MAX, "peer", 1),
        strict.integer(ballot, 0, BALLOT_MAX, "ballot"),
        (body_from_dict(first), body_from_dict(second)),
        (strict.text(a, 256, "signature", 1), strict.text(b, 256, "signature", 1)),
    )
    return DoubleVote.of(proof)
