"""What a home says of its node that does not run: read from disk, nothing written, nothing verified.

`tapestry verify` proves; this only tells what lies there, and must answer at once: of the chain it reads
the end.
"""

from __future__ import annotations

import contextlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tapestry.dht.identity import Identity, IdentityError
from tapestry.node.disk.files import unseal
from tapestry.node.home import Home, way_back
from tapestry.node.lineage.crypto import ReaderCrypto
from tapestry.node.lineage.follow import Broken, read_genesis
from tapestry.node.protocol.canon import InvalidRecord
from tapestry.node.protocol.record import Record, record_from_dict

LINE_BYTES_MAX = 16 << 20  # of a record: as lineage/follow.py


def stopped_status(home: Home) -> dict[str, Any] | None:
    """The keys of /status that a stopped home can fill, `phase` being "stopped"; None if it holds no run."""
    crypto = ReaderCrypto()
    try:
        genesis, spec = read_genesis(home.genesis, crypto)
    except (Broken, OSError):
        return None  # `verify` says what is wrong with it
    last = _last_record(home.chain, crypto)
    return {
        "peer_id": _peer_id(home),
        "run_id": genesis.run_id,
        "run_name": spec.name,
        "phase": "stopped",
        "reason": "no node runs in this home; this is what its disk holds, not verified",
        "island": way_back(_island_since(home, crypto)),
        "epoch": last.body.epoch if last is not None else 0,
        "head": last.head if last is not None else genesis.run_id,
        "params": genesis.params,
        "members": [member.peer for member in last.body.members] if last is not None else [genesis.founder],
        "updated_at": _written_at(home.chain) or _written_at(home.genesis),
        "last_log_line": _last_line(home.log),
    }


def stopped_peers(home: Home) -> list[dict[str, Any]]:
    """Where the others were found last."""
    try:
        known = json.loads(home.peers.read_bytes())
    except (OSError, ValueError, RecursionError):
        known = {}
    return [
        {"peer_id": peer, "phase": "unknown", "addresses": [a for a in addresses if isinstance(a, str)]}
        for peer, addresses in (known.items() if isinstance(known, dict) else ())
        if isinstance(addresses, list)
    ]


def _peer_id(home: Home) -> str:
    try:
        return Identity.load(home.identity_key).peer_id
    except (IdentityError, OSError):
        return ""


def _island_since(home: Home, crypto: ReaderCrypto) -> int | None:
    """Epoch where its island began; None if it is on none."""
    if not home.island.exists():
        return None
    before = _last_record(Home(home.island).chain, crypto)
    return before.body.epoch if before is not None else 0


def _last_record(path: Path, crypto: ReaderCrypto) -> Record | None:
    """Of the last whole line of the chain."""
    for line in reversed(_end_of(path, LINE_BYTES_MAX).split(b"\n")):
        with contextlib.suppress(ValueError, InvalidRecord):  # torn, or the rest of a longer one
            return record_from_dict(unseal(line), crypto)
    return None


def _last_line(path: Path) -> str:
    lines = _end_of(path, 8192).decode(errors="replace").rstrip().splitlines()
    return lines[-1] if lines else ""


def _end_of(path: Path, bytes_max: int) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - bytes_max))
            return file.read(bytes_max)
    except OSError:
        return b""


def _written_at(path: Path) -> str:
    try:
        stamp = path.stat().st_mtime
    except OSError:
        return ""
    return datetime.fromtimestamp(stamp, UTC).isoformat(timespec="seconds")
