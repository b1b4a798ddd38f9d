"""Where peers were found last: HOME/peers.json, so that a node finds its run again.

After a restart, and after a partition: those on the other side of one are given up in time, and their
presence expires; without this the two sides would stay two for good. Only addresses to try: who answers is
checked.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Collection
from pathlib import Path

from tapestry.dht.addresses import parse_peer
from tapestry.node.disk.files import atomic_write

KNOWN_MAX = 256  # Guess: peers whose addresses are kept, a few times a run's max_peers
RECENT = 8  # Guess

Addresses = dict[str, tuple[str, ...]]  # peer id -> where it was

_log = logging.getLogger("tapestry.network")


class KnownPeers:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.addresses: Addresses = _read(path)  # the last linked first

    def remember(self, linked: Addresses) -> None:
        """These come first; of those not linked any more, as many stay as there is room for."""
        merged = linked | {p: a for p, a in self.addresses.items() if p not in linked}
        merged = dict(list(merged.items())[:KNOWN_MAX])
        if list(merged.items()) != list(self.addresses.items()):  # the order counts
            self.addresses = merged
            try:
                atomic_write(self._path, json.dumps(merged, indent=1).encode() + b"\n")
            except OSError as error:  # a full disk: it is known in memory
                _log.warning(
                    "known_peers=not_written path=%s reason=%r; make room or mend the disk",
                    self._path,
                    str(error),
                )

    def lost(self, linked: Collection[str]) -> Addresses:
        """Two of those that are not linked: one that was of late, and any. Who answers knows the others."""
        lost = [peer for peer in self.addresses if peer not in linked]
        drawn = {random.choice(some) for some in (lost[:RECENT], lost) if some}
        return {peer: self.addresses[peer] for peer in lost if peer in drawn}


def _read(path: Path) -> Addresses:
    """What is damaged is forgotten: it can be found again."""
    known: Addresses = {}
    try:
        for addresses in json.loads(path.read_bytes()).values():
            for address in addresses:
                peer = parse_peer(address)
                known[peer.peer_id] = (*known.get(peer.peer_id, ()), peer.maddr)
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError, RecursionError, OSError) as error:
        _log.warning(
            "known_peers=forgotten path=%s reason=%r; give --peer if the others are not found",
            path,
            str(error),
        )
    return known
