"""What the tests of proofs that a member signed twice share: who signs, and how such a proof is judged."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tapestry.dht.identity import Identity
from tapestry.node.disk.accusations import FalseAccusation, SignedTwice, prove, unpack
from tapestry.node.lineage.crypto import NodeCrypto

IDENTITY = Identity(Ed25519PrivateKey.from_private_bytes(b"tapestry audit tests ed25519 key"))
CRYPTO = NodeCrypto(IDENTITY)
RUN = "ab" * 32


def prove_it(one: SignedTwice, run_id: str = RUN) -> None:
    def mean_digest(*args: object) -> str:
        raise AssertionError("there is no mean in it")

    prove(one, run_id, 4, mean_digest, CRYPTO)  # type: ignore[arg-type]


def check_that_every_broken_text_is_refused(proof: SignedTwice) -> None:
    """When it is read, or else when it is to be proven."""
    data = proof.pack()
    for at in range(0, len(data), 7):
        broken = bytearray(data)
        broken[at] ^= 0x15
        try:
            one = unpack(broken)
        except FalseAccusation:
            continue
        assert isinstance(one, type(proof))
        with pytest.raises(FalseAccusation):
            prove_it(one)
