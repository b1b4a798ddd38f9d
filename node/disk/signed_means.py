"""Who made each shard of a result, with their signatures: beside its update, for as long as it is no record.

    updates/<epoch>-<head>.means = msgpack [peers, [[index in peers, digest 32 bytes, signature], ...]]

A member that had accepted a result gives this with it to whoever asks (net/transfer.py), and so can say of no
other numbers that it had. Once there is a record, its signatures stand for the update, and this goes.

Must not import: asyncio; hivemind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack

from tapestry.node.protocol import strict
from tapestry.node.protocol.audit import SignedMean
from tapestry.node.protocol.canon import MEMBERS_MAX, PEER_CHARS_MAX

SUFFIX = ".means"
SIGNATURE_CHARS_MAX = 256
DIGEST_BYTES = 32
_ONE_BYTES_MAX = SIGNATURE_CHARS_MAX + DIGEST_BYTES + 16


def bytes_max(shard_count: int) -> int:
    """No honest file is longer."""
    return MEMBERS_MAX * (PEER_CHARS_MAX + 8) + shard_count * _ONE_BYTES_MAX + 64


def pack(means: Sequence[SignedMean]) -> bytes:
    peers = sorted({one.reducer for one in means})
    index = {peer: i for i, peer in enumerate(peers)}
    rows = [[index[one.reducer], bytes.fromhex(one.digest), one.signature] for one in means]
    packed: bytes = msgpack.packb([peers, rows])
    return packed


def unpack(data: bytes | bytearray, shard_count: int) -> tuple[SignedMean, ...]:
    """Strict. Raises ValueError."""
    try:
        raw = msgpack.unpackb(data, use_list=False, max_array_len=max(shard_count, MEMBERS_MAX, 3))
        peers, rows = strict.sequence(raw, 2, "signed means", 2)
        names = [strict.text(peer, PEER_CHARS_MAX, "a reducer", 1) for peer in _list(peers, MEMBERS_MAX)]
        return tuple([_read(row, names) for row in _list(rows, shard_count)])
    except (TypeError, msgpack.exceptions.UnpackException) as error:
        raise strict.Malformed(f"no signed means: {error}") from None


def _list(raw: Any, count_max: int) -> Sequence[Any]:
    return strict.sequence(raw, count_max, "a list of signed means", 1)


def _read(raw: Any, names: Sequence[str]) -> SignedMean:
    index, digest, signature = strict.sequence(raw, 3, "a signed mean", 3)
    if not isinstance(digest, bytes) or len(digest) != DIGEST_BYTES:
        raise strict.Malformed("a digest must be 32 bytes")
    reducer = names[strict.integer(index, 0, len(names) - 1, "a reducer")]
    return SignedMean(reducer, digest.hex(), strict.text(signature, SIGNATURE_CHARS_MAX, "a signature", 1))
