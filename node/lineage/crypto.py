"""The cryptography of a real node: blake3, and Ed25519 by its identity (node/protocol/canon.py, `Crypto`).

Must not import torch or hivemind: `tapestry verify` and the command line read chains.
"""

from __future__ import annotations

from blake3 import blake3

from tapestry.dht.identity import Identity, verify


class ReaderCrypto:
    """What it takes to read a chain: no identity, and so no signature of one's own."""

    def digest(self, data: bytes) -> str:
        """64 hex digits."""
        return blake3(data).hexdigest()

    def sign(self, message: bytes) -> str:
        """A reader signs nothing: to ask for it is our bug."""
        raise AssertionError("a reader of chains has no identity to sign with")

    def verify(self, peer: str, signature: str, message: bytes) -> bool:
        """Whether `signature` over `message` is by `peer`; only lower case hex is a signature."""
        try:
            raw = bytes.fromhex(signature)
        except ValueError:
            return False
        return raw.hex() == signature and verify(peer, raw, message)


class NodeCrypto(ReaderCrypto):
    """What the protocol needs of cryptography. Signatures are hex, so that they fit into canonical JSON."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    def sign(self, message: bytes) -> str:
        """128 hex digits, by this node."""
        return self._identity.sign(message).hex()
