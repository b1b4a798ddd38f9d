"""An invitation: one line of text to hand over, and `tapestry start --peer LINE` joins with it.

    /ip4/203.0.113.5/tcp/4001/p2p/12D3...,RUN_ID,SECRET

The secret is a private key. The chain holds the public half, by an `invite` that the charter's authorities
signed; the guest signs its own admission with the private half. So no secret crosses the network, no member
keeps one, and what a member knows lets it admit nobody.

Must not import hivemind or torch: the command line reads and prints such lines.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tapestry.dht.identity import Identity
from tapestry.node.errors import UserError
from tapestry.node.protocol.members import Change, change_message

ADMIT_WITHIN_EPOCHS = 100_000  # Guess: after so many records a guest's admission that nobody took is void
_SECRET_CHARS = 43  # base64url of 32 bytes, without padding


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a line says."""

    address: str
    run_id: str
    secret: bytes  # 32, of an Ed25519 key

    @classmethod
    def drawn(cls, address: str, run_id: str) -> Invitation:
        return cls(address, run_id, Ed25519PrivateKey.generate().private_bytes_raw())

    @property
    def key(self) -> str:
        """The public half, as the chain names it."""
        return self._identity().peer_id

    @property
    def line(self) -> str:
        secret = base64.urlsafe_b64encode(self.secret).decode().rstrip("=")
        return f"{self.address},{self.run_id},{secret}"

    def admission(self, guest: str, name: str, epoch: int) -> Change:
        """That of `guest`, signed. `epoch`: of the newest record that is known."""
        change = Change("admit", guest, name, epoch + ADMIT_WITHIN_EPOCHS, secrets.token_hex(16))
        signature = self._identity().sign(change_message(self.run_id, change))
        return change.signed(self.key, signature.hex())

    def _identity(self) -> Identity:
        return Identity(Ed25519PrivateKey.from_private_bytes(self.secret))


def read_invitation(line: str) -> Invitation | None:
    """None if it is a mere address. Raises UserError for a line that was cut or mistyped."""
    if "," not in line:
        return None
    parts = line.strip().split(",")
    try:
        address, run_id, text = parts
        secret = base64.urlsafe_b64decode(text + "=")
        if not re.fullmatch("[0-9a-f]{64}", run_id) or len(text) != _SECRET_CHARS or len(secret) != 32:
            raise ValueError
    except (ValueError, binascii.Error):
        raise UserError(
            "this invitation is not whole", hint="copy the whole line that `tapestry invite` printed"
        ) from None
    return Invitation(address, run_id, secret)
