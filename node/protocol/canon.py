"""What everything signed is made of: one text for one value, a way to sign it, and an error for what is none.

Text form is canonical JSON: sorted keys, no white space, integers and strings. Standard library only.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final, Protocol

from tapestry.node.protocol.strict import text

MEMBERS_MAX = 1024  # G7; a run spec's limits.max_peers is smaller
WEIGHT_MAX = 2**53  # tokens; exact in JSON, in float64 and in msgpack
EPOCH_MAX = 2**53
PEER_CHARS_MAX = 128


class Crypto(Protocol):
    """What the chain needs of cryptography; the simulator brings a cheap one."""

    def digest(self, data: bytes) -> str:
        """64 hex digits (blake3)."""
        ...

    def sign(self, message: bytes) -> str:
        """This node's signature, in hex (Ed25519)."""
        ...

    def verify(self, peer: str, signature: str, message: bytes) -> bool:
        """Whether `signature` over `message` is by `peer`. Never raises."""
        ...


class InvalidRecord(ValueError):
    """A record, genesis or body that does not hold; `reason` is a short word for counters."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def canonical(value: Any) -> bytes:
    return _ENCODER.encode(value).encode()


def quorum(electorate_count: int) -> int:
    """A strict majority."""
    return electorate_count // 2 + 1


def peer_field(value: Any, what: str) -> str:
    """A peer id: the same object in every record, for a chain of a year has millions of them."""
    return sys.intern(text(value, PEER_CHARS_MAX, what, 1))
